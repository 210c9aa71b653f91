"""What the connector uses of vLLM, and rules that hold it against the sources of a release; those aren't imported.

Compared by `ast`, from our modules to vLLM's and back:

- what we import from vLLM, and how we call it;
- what we override: the kind of method, and that ours takes whatever vLLM's own may be given; nothing abstract is left;
- what vLLM calls on our classes, with those arguments;
- that nothing of ours hides something of vLLM's by accident, or has stopped being called because vLLM renamed it;
- what we read of objects that vLLM hands us: `READ_OF_VLLM` below, which must be complete.

A rule yields its objections, one line each. Not here: getting the sources (`tests.support.vllm_sources`), the tests
(`tests.connector.test_releases`), what these things mean; that takes an engine (`tests.engines`), or reading.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.vllm_sources import Found, Signature, Sources, decorators, own_members

ROOT = Path(__file__).resolve().parents[2]
OURS = "cachesvc.connector"
FACADE, MANAGER, WORKER, SPEC = "CachesvcConnector", "CachesvcManager", "CachesvcWorker", "CachesvcSpec"

SINCE = {(MANAGER, "get_load_source"): "0.32.0"}
"""Methods of ours that vLLM calls only from this release on."""

OWN = {
    FACADE: "",
    SPEC: "",
    MANAGER: "settle",
    WORKER: "join linger take_outcomes take_failed_loads",
    "Metadata": "around",
    "WorkerMetadata": "around",
    "SlotsSpec": "",
    "Handshake": "",
}
"""Methods that only we call."""

MADE_BY_US = {MANAGER, WORKER, "Metadata", "WorkerMetadata", "SlotsSpec", "Handshake"}
"""Classes whose constructors vLLM never calls."""

OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading"

CALLERS = {
    f"{OFFLOADING}.scheduler": {"self.manager": MANAGER, "spec": SPEC},
    f"{OFFLOADING}.worker": {"self.worker": WORKER, "spec": SPEC, "self.spec": SPEC},
    f"{OFFLOADING}.metrics": {"spec_cls": SPEC, "self._spec_cls": SPEC},
    "vllm.v1.core.sched.scheduler": {"self.connector": FACADE},
    "vllm.v1.worker.kv_connector_model_runner_mixin": {"kv_connector": FACADE},
    "vllm.v1.worker.gpu.kv_connector": {"self.kv_connector": FACADE},
    "vllm.v1.engine.core": {"kv_connector": FACADE},
}
"""Where vLLM holds objects of our classes, and by what expression."""

READ_OF_VLLM = {
    # requests and steps
    "vllm.v1.request:Request": "block_hashes lora_request request_id skip_reading_prefix_cache",
    "vllm.lora.request:LoRARequest": "lora_path",
    "vllm.v1.core.sched.output:SchedulerOutput": "total_num_scheduled_tokens",
    "vllm.v1.outputs:KVConnectorOutput": "kv_connector_worker_meta",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorTransferResults": "failed_recving finished_recving",
    # the offloading connector's parts
    f"{OFFLOADING}_connector:OffloadingConnector": "_connector_metadata connector_worker scheduler",
    f"{OFFLOADING}.scheduler:OffloadingConnectorScheduler": "config manager",
    f"{OFFLOADING}.scheduler:SchedulerOffloadConfig": "kv_group_configs",
    f"{OFFLOADING}.scheduler:GroupOffloadConfig": "group_idx hashes_per_chunk",
    f"{OFFLOADING}.worker:OffloadingConnectorWorker": "worker",
    f"{OFFLOADING}.common:OffloadingConnectorMetadata": "load_jobs",
    f"{OFFLOADING}.common:TransferJob": "req_id",
    f"{OFFLOADING}.metrics:OffloadingConnectorStats": "increase_counter is_empty",
    f"{OFFLOADING}.canonical_mapping:canonical_format_id": "",
    "vllm.v1.kv_offload.base:OffloadingSpec": "blocks_per_chunk config",
    "vllm.v1.kv_offload.base:ReqContext": "kv_transfer_params load_tier_filter req_id",
    "vllm.v1.kv_offload.base:TierFilter": "allows",
    "vllm.v1.kv_offload.base:ScheduleEndContext": "preempted_req_ids",
    "vllm.v1.kv_offload.base:GPULoadStoreSpec": "block_ids block_indices group_sizes",
    "vllm.v1.kv_offload.config:OffloadingConfig": "groups parallel",
    "vllm.v1.kv_offload.config:OffloadingGroupConfig": "group_id layer_names tokens_per_block",
    "vllm.v1.kv_offload.config:OffloadingParallelConfig": "rank world_size",
    # what a KV cache looks like
    "vllm.v1.kv_offload.base:CanonicalKVCaches": "group_data_refs tensors",
    "vllm.v1.kv_offload.base:CanonicalKVCacheTensor": "tensor",
    "vllm.v1.kv_offload.base:CanonicalKVCacheRef": "mapping page_size_bytes tensor_idx",
    "vllm.v1.kv_offload.base:CanonicalPageMapping": "canonical_page_size_bytes local_page_size_bytes num_writers "
    "parallelism_agnostic runs writer_index",
    "vllm.v1.kv_offload.base:CopyRun": "canonical_offset canonical_stride fragment_size local_offset local_stride "
    "num_fragments",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups prefix_cacheable_group_ids",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm.v1.kv_cache_interface:KVCacheSpec": "block_size dcp_sharded page_size_bytes",
    "vllm.model_executor.layers.attention.attention:Attention": "get_attn_backend kv_cache",
    "vllm.v1.attention.backend:AttentionBackend": "get_name",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": "isa",
    # the resolved config
    "vllm.config:VllmConfig": "cache_config compilation_config kv_transfer_config load_config model_config "
    "parallel_config speculative_config",
    "vllm.config:CacheConfig": "cache_dtype kv_cache_dtype_skip_layers kv_cache_layout prefix_caching_hash_algo "
    "replayssm_buffer_len use_replayssm",
    "vllm.config:CompilationConfig": "static_forward_context",
    "vllm.config:KVTransferConfig": "kv_connector_extra_config kv_load_failure_policy",
    "vllm.config:LoadConfig": "download_dir load_format model_loader_extra_config",
    "vllm.config:ModelConfig": "architecture dtype hf_config hf_text_config max_model_len model "
    "model_class_overrides model_weights multimodal_config override_generation_config quantization "
    "quantization_config revision served_model_name trust_remote_code",
    "vllm.config:MultiModalConfig": "mm_encoder_attn_dtype mm_encoder_fp8_scale_path",
    "vllm.config:ParallelConfig": "cp_kv_cache_interleave_size decode_context_parallel_size nnodes "
    "pipeline_parallel_size prefill_context_parallel_size tensor_parallel_size world_size",
    "vllm.config:SpeculativeConfig": "draft_load_config draft_model_config kv_cache_dtype method model "
    "num_speculative_tokens parallel_drafting",
}
"""Module:class -> what we read of its objects, or ask for by name; module:function -> nothing."""

OTHERS = (
    "HF_HUB_CACHE auto_map model_type resolved rope_parameters rope_scaling to_dict "  # of the hub, of its models
    "as_strided copy_ current_stream get_cpu_capability numel numpy record_event storage_offset stream stride_tricks "
    "synchronize wait_event "  # of torch and numpy
    "blake3 f_back f_globals f_locals fileno hexdigest kwargs readinto"  # of small things
)
"""Names that we read of objects which aren't vLLM's, nor Python's."""

PYTHONS = (
    *(builtins, Counter, ContextVar, ExitStack, OrderedDict, Path, deque, os.path, queue.SimpleQueue),
    *(threading.Event, threading.Lock, type(Path().stat())),
)
"""Objects whose attributes are no news, with all modules that we import and all types that are built in."""


# --- both sides -------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """The connector's modules, by their names."""

    sources: Sources = field(default_factory=lambda: Sources(ROOT))

    def modules(self) -> Iterator[tuple[str, ast.Module]]:
        for path in sorted(ROOT.joinpath(*OURS.split(".")).glob("*.py")):
            name = f"{OURS}.{path.stem}"
            tree = self.sources.module(name)
            if tree is not None and path.stem != "__init__":
                yield name, tree

    def classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        """Those that inherit from vLLM's."""
        for module, tree in self.modules():
            names = imported(tree)
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in names for base in node.bases):
                    yield module, node


@dataclass
class Pair:
    """Our sources and those of one release of vLLM."""

    ours: Ours
    vllm: Sources
    version: str

    def imported(self, tree: ast.Module) -> dict[str, Found | None]:
        """What a module of ours has from vLLM, by its name there; None: there is no such thing."""
        return {name: self.vllm.find(*origin) for name, origin in imported(tree).items()}

    def bases(self, module: str, node: ast.ClassDef) -> list[Found]:
        tree = self.ours.sources.module(module)
        assert tree is not None
        found = self.imported(tree)
        return [base for name in node.bases if (base := found.get(ast.unparse(name))) is not None]

    def inherited(self, module: str, node: ast.ClassDef) -> dict[str, ast.AST]:
        """Everything that a class of ours has from vLLM."""
        members: dict[str, ast.AST] = {}
        for base in self.bases(module, node):
            members = self.vllm.members(base) | members
        return members


def imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Names that a module has from vLLM -> (module, name)."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    }


# --- what doesn't fit -------------------------------------------------------------------------------------------------


def imports(pair: Pair) -> Iterator[str]:
    """What we import is there, has what we ask of it, and takes what we call it with."""
    for module, tree in pair.ours.modules():
        names = pair.imported(tree)
        yield from (f"{module}: vLLM has no {name}" for name, found in names.items() if found is None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = names.get(node.value.id)
                if found and isinstance(found.node, ast.ClassDef) and node.attr not in pair.vllm.members(found):
                    yield f"{module}:{node.lineno}: {node.value.id} has no {node.attr}"
                if node.value.id == "vllm" and pair.vllm.find("vllm", node.attr) is None:
                    yield f"{module}:{node.lineno}: vllm has no {node.attr}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and names.get(node.func.id):
                found = names[node.func.id]
                assert found is not None
                if refused := pair.vllm.called(found).refusal(node):
                    yield f"{module}:{node.lineno}: {node.func.id} {refused}"


def supers(pair: Pair) -> Iterator[str]:
    """What we call of vLLM's own methods, in those that override them."""
    for module, cls in pair.ours.classes():
        theirs = pair.inherited(module, cls)
        for node in ast.walk(cls):
            func = node.func if isinstance(node, ast.Call) else None
            if not isinstance(func, ast.Attribute) or ast.unparse(func.value) != "super()":
                continue
            assert isinstance(node, ast.Call)
            where = f"{module}:{node.lineno}: super().{func.attr}"
            if func.attr not in theirs:
                yield f"{where} is not there"
            elif refused := Signature.of(theirs[func.attr], method=True).refusal(node):
                yield f"{where} {refused}"


def overrides(pair: Pair) -> Iterator[str]:
    """Ours take what vLLM's take; nothing else of ours has a name that vLLM uses, nothing abstract is left."""
    for module, cls in pair.ours.classes():
        theirs, mine = pair.inherited(module, cls), own_members(cls)
        for name, node in theirs.items():
            if isinstance(node, ast.FunctionDef) and "abstractmethod" in decorators(node) and name not in mine:
                yield f"{cls.name} lacks {name}"
        for name, node in mine.items():
            if name.startswith("__") and (name != "__init__" or cls.name in MADE_BY_US):
                continue
            own = (name.startswith("_") and name != "__init__") or name in OWN[cls.name].split()
            if name not in theirs:
                newer = SINCE.get((cls.name, name), "") > pair.version
                if isinstance(node, ast.FunctionDef) and not own and not newer:
                    yield f"{cls.name}.{name}: vLLM doesn't know it"
            elif own or not isinstance(node, ast.FunctionDef):
                yield f"{cls.name}.{name} hides something of vLLM's"
            elif SINCE.get((cls.name, name), "") > pair.version:
                yield f"{cls.name}.{name}: vLLM knows it already"
            else:
                yield from _unlike(f"{cls.name}.{name}", node, theirs[name])


def _unlike(name: str, mine: ast.FunctionDef, theirs: ast.AST) -> Iterator[str]:
    if not isinstance(theirs, ast.FunctionDef):
        yield f"{name}: vLLM's is not a method"
        return
    kinds = {"classmethod", "staticmethod", "property", "cached_property"}
    if decorators(mine) & kinds != decorators(theirs) & kinds:
        yield f"{name}: vLLM's is {sorted(decorators(theirs) & kinds) or 'a plain method'}"
    if less := Signature.of(mine, method=True).takes_less_than(Signature.of(theirs, method=True)):
        yield f"{name} {less}"


def callers(pair: Pair) -> Iterator[str]:
    """What vLLM reads and calls of objects of our classes."""
    ours = {cls.name: (module, cls) for module, cls in pair.ours.classes()}
    for module, receivers in CALLERS.items():
        tree = pair.vllm.module(module)
        unseen = set(receivers.values())
        for node in ast.walk(tree) if tree else ():
            if not isinstance(node, ast.Attribute) and not isinstance(node, ast.Call):
                continue
            target = node.func if isinstance(node, ast.Call) else node
            name = receivers.get(ast.unparse(target.value)) if isinstance(target, ast.Attribute) else None
            if name is None:
                continue
            assert isinstance(target, ast.Attribute)
            if target.attr.startswith("__"):
                continue
            where, cls = ours[name]
            members = pair.inherited(where, cls) | own_members(cls)
            unseen.discard(name)
            if target.attr not in members:
                yield f"{module}:{node.lineno}: {name} has no {target.attr}"
            elif isinstance(node, ast.Call) and (refused := _refusal(members[target.attr], node)):
                yield f"{module}:{node.lineno}: {name}.{target.attr} {refused}"
        yield from (f"{module}: no {name} is seen there any more" for name in unseen)


def _refusal(member: ast.AST, call: ast.Call) -> str:
    return Signature.of(member, method=True).refusal(call) if isinstance(member, ast.FunctionDef) else ""


def reads(pair: Pair) -> Iterator[str]:
    """What we read is there."""
    for place, attributes in READ_OF_VLLM.items():
        module, _, name = place.partition(":")
        found = pair.vllm.find(module, name)
        if found is None:
            yield f"there is no {place}"
            continue
        members = pair.vllm.members(found) if isinstance(found.node, ast.ClassDef) else {}
        for attribute in attributes.split():
            if attribute not in members:
                yield f"{name} has no {attribute}"
                continue
            for where, call in _calls(pair.ours, attribute):
                if refused := _refusal(members[attribute], call):
                    yield f"{where}: {name}.{attribute} {refused}"


def _calls(ours: Ours, attribute: str) -> Iterator[tuple[str, ast.Call]]:
    """Where we call a method of this name."""
    for module, tree in ours.modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute:
                yield f"{module}:{node.lineno}", node


def unlisted(pair: Pair) -> Iterator[str]:
    """What we read is in the list above, and the list has nothing else."""
    listed = {name for names in READ_OF_VLLM.values() for name in names.split()}
    called = {place.partition(":")[2] for place, names in READ_OF_VLLM.items() if not names}
    known = listed | called | set(OTHERS.split()) | _names_of_python(pair.ours) | _names_of_ours()
    asked: set[str] = set()
    for module, tree in pair.ours.modules():
        vllms = imported(tree).keys() | {"vllm", "self", "super()"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                asked.add(node.attr)
                if not node.attr.startswith("__") and node.attr not in known and ast.unparse(node.value) not in vllms:
                    yield f"{module}:{node.lineno}: {ast.unparse(node)} is in no list"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                asked.add(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and name.value not in known:
                    yield f"{module}:{node.lineno}: {ast.unparse(node)} is in no list"
    yield from (f"{name}: nobody reads it any more" for name in sorted(listed - asked))


def _names_of_python(ours: Ours) -> set[str]:
    names: set[str] = set()
    for one in (*PYTHONS, *(kind for kind in vars(builtins).values() if isinstance(kind, type))):
        names |= set(dir(one))
    for _, tree in ours.modules():
        for node in ast.walk(tree):
            for alias in node.names if isinstance(node, ast.Import) else ():
                if alias.name != "vllm":
                    names |= set(dir(importlib.import_module(alias.name)))
    return names


def _names_of_ours() -> set[str]:
    names = set()
    for path in ROOT.joinpath("cachesvc").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= own_members(node).keys()
        names |= {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(target := node.target, ast.Name)
        }
    return names


RULES: tuple[Callable[[Pair], Iterator[str]], ...] = (imports, supers, overrides, callers, reads)
