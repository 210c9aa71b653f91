"""Content identity of the weights that an engine loaded.

Covers: which files they are, digests of their content (remembered on disk), whether they are still what the engine
loaded. Not here: adapters (`connector.adapters`), what else makes KV bytes differ (`connector.identity`).

What is trusted, best first:

- a snapshot of the hub's cache: its files are links to blobs that are named by their content, nothing is read;
- a directory with `.cachesvc-manifest.json`, a JSON object whose "digest" names the content: if no weight file's ctime
  is later than the manifest's (mtime can be set back, ctime can't);
- any other local file or directory: BLAKE3 of every byte of every weight file. A digest is remembered under the file's
  device, inode, size, mtime and ctime.

The engine loads first and we look later, so files are taken only if they, their directory and the links that lead to it
last changed before the process started; else nobody knows which content was loaded. A renamed directory further up
isn't seen. Files are read, not mapped: a mapping of a file that somebody truncates ends the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import importlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cachesvc import config
from cachesvc.connector.namespace import fingerprint
from cachesvc.errors import CachesvcError

MANIFEST: Final = ".cachesvc-manifest.json"
MANIFEST_BYTES_MAX: Final = 64 << 20
"""A manifest names every file of a revision; a larger one is no manifest."""

HASH_THREADS: Final = 4
"""The engine has just started and computes on the other cores."""

READ_BYTES: Final = 16 << 20

SETTLED_NS: Final = 2 * 10**9
"""Filesystems tell times apart by 4 ms to 2 s: a file that changed this lately may change again and keep its times."""

MEMOS_MAX: Final = 4096
"""Remembered files; the oldest go first. One has 64 bytes and a long name."""

FILES_MAX: Final = 10_000
"""Weight files of one model; more is a wrong directory."""

LOAD_FORMATS: Final = (
    *("auto", "fastsafetensors", "gguf", "hf", "instanttensor", "mistral", "npcache", "pt", "runai_streamer"),
    *("safetensors", "sharded_state"),
)
"""Those that load files which lie in the model's directory, and nothing else."""

_BESIDE: Final = ("*.index.json", "*quant*.json")
"""Small files that decide which weights are used and how they are read."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_DIGEST = re.compile(r"[!-~]{16,200}")
_LINKS_MAX: Final = 40

Signature = tuple[int, int, int, int, int]
"""Device, inode, size in bytes, mtime and ctime in ns: what a file's content is remembered under."""


class WeightsError(CachesvcError):
    """Nobody can say which bytes the engine loaded; it shares nothing then."""


@dataclass(frozen=True, slots=True)
class Files:
    """Weights of one model: what to read, or, where that isn't needed, the identity in `known`."""

    role: str
    """`model` or `draft`."""
    known: str
    paths: tuple[tuple[str, str], ...]
    """(name inside the model, absolute path), sorted by name."""


# --- which files ------------------------------------------------------------------------------------------------------


def find(vllm_config: Any, loaded_ns: int | None = None) -> tuple[Files, ...]:
    """The weights of an engine: its model's, and its draft model's where that has its own.

    `loaded_ns` is a time (ns since the epoch) before anything was loaded; default: when this process started.
    WeightsError if they can't be found, can't be known, or changed since.
    """
    since = process_start_ns() if loaded_ns is None else loaded_ns
    model = vllm_config.model_config
    found = [_files_of("model", model, vllm_config.load_config, since)]
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and (draft.model, draft.revision) != (model.model, model.revision):
        load = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
        found.append(_files_of("draft", draft, load, since))
    return tuple(found)


def _files_of(role: str, model: Any, load: Any, since_ns: int) -> Files:
    load_format = str(load.load_format)
    if load_format not in LOAD_FORMATS:
        raise WeightsError(f"load_format={load_format}: the content of such weights can't be known")
    if getattr(model, "model_weights", ""):
        raise WeightsError(f"{model.model_weights}: weights that come from an object store can't be known")
    path = os.path.abspath(model.model)
    try:
        if os.path.isfile(path):
            _check_age([path], since_ns)
            return Files(role, "", ((os.path.basename(path), path),))
        folder = path if os.path.isdir(path) else _snapshot(model, load.download_dir, since_ns)
        names = _weight_names(folder, load_format, code=_runs_code(model))
        return files_in(role, folder, names, since_ns)
    except OSError as error:
        raise WeightsError(f"weights of {model.model}: {error.strerror}: {error.filename}") from error


def _runs_code(model: Any) -> bool:
    """Whether Python files of the model's directory are run by its forward pass."""
    return bool(model.trust_remote_code and getattr(model.hf_config, "auto_map", None))


def _weight_names(folder: str, load_format: str, *, code: bool) -> list[str]:
    """Names of the weight files, as vLLM chooses them or more: below subdirectories too, for some models have parts
    there. `original` holds the same weights in another format, hidden directories belong to tools."""
    names = []
    for where, children, files in os.walk(folder):
        children[:] = sorted(child for child in children if not child.startswith(".") and child != "original")
        names += [os.path.relpath(os.path.join(where, name), folder) for name in files]
        if len(names) > FILES_MAX:
            raise WeightsError(f"{folder} holds more than {FILES_MAX} files; is it a model's directory?")
    kinds: list[tuple[str, ...]] = [("*.safetensors",), ("*.bin", "*.pt", "*.pth", "*.gguf")]
    if load_format in ("pt", "npcache"):
        kinds.reverse()
    weights = matching(names, kinds[0]) or matching(names, kinds[1])
    if not weights:
        raise WeightsError(f"no weights in {folder}")
    return sorted({*weights, *matching(names, _BESIDE), *(matching(names, ("*.py",)) if code else ())})


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those whose last part fits one of the patterns."""
    return [name for name in names if any(fnmatch.fnmatchcase(os.path.basename(name), one) for one in patterns)]


def files_in(role: str, folder: str, names: Sequence[str], since_ns: int) -> Files:
    """These files of a directory, or what is known of them. WeightsError if one changed after `since_ns`."""
    blobs = _blobs(folder, names)
    if blobs:
        _check_age([folder], since_ns, links_only=True)
        return Files(role, f"hub {fingerprint(blobs)}", ())
    paths = tuple((name, os.path.join(folder, name)) for name in names)
    folders = sorted({folder, *(os.path.dirname(path) for _, path in paths)})
    _check_age([*folders, *(path for _, path in paths)], since_ns)
    digest = _manifest_digest(folder, [path for _, path in paths])
    return Files(role, f"manifest {digest}" if digest else "", paths)


def _snapshot(model: Any, download_dir: str | None, since_ns: int) -> str:
    """The directory of the hub's cache that a model's name stands for; WeightsError if that can't be told."""
    if not _HUB_NAME.fullmatch(model.model):
        raise WeightsError(f"{model.model} is no directory and no name of the hub")
    cache = download_dir or importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE
    repository = Path(cache, "models--" + model.model.replace("/", "--"))
    revision = model.revision or "main"
    commit = getattr(revision, "resolved", None) or revision  # vLLM asks the hub once, and keeps the commit
    if not _BLOB.fullmatch(commit):
        ref = repository / "refs" / revision
        commit = ref.read_text(encoding="ascii").strip()
        # a first download writes it while the engine starts; that it was another one needs another snapshot
        if ref.stat().st_ctime_ns > since_ns and len(os.listdir(repository / "snapshots")) > 1:
            raise WeightsError(f"{ref} changed after this process started: restart the engine to share its cache")
    folder = repository / "snapshots" / commit
    if not folder.is_dir():
        raise WeightsError(f"{model.model} at {commit} is not in the hub's cache {cache}")
    return str(folder)


def _blobs(folder: str, names: Iterable[str]) -> list[list[str]]:
    """[name, name of its blob] of every file, if `folder` is a snapshot of the hub's cache; else nothing."""
    real = os.path.realpath(folder)
    if os.path.basename(os.path.dirname(real)) != "snapshots":
        return []
    blobs = os.path.join(os.path.dirname(os.path.dirname(real)), "blobs")
    found = []
    for name in names:
        where, blob = os.path.split(os.path.realpath(os.path.join(real, name)))
        if where != blobs or not _BLOB.fullmatch(blob):
            return []
        found.append([name, blob])
    return found


def _manifest_digest(folder: str, paths: Iterable[str]) -> str:
    """What the manifest of a directory says, if there is one that may be trusted; else nothing."""
    path = os.path.join(folder, MANIFEST)
    try:
        written = os.stat(path)
        if written.st_size > MANIFEST_BYTES_MAX or any(os.stat(p).st_ctime_ns > written.st_ctime_ns for p in paths):
            return ""
        digest = json.loads(Path(path).read_bytes())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else ""


# --- have they changed ------------------------------------------------------------------------------------------------


def process_start_ns() -> int:
    """When this process started, in ns since the epoch, 10 ms too early at most."""
    # the second field, the name, may hold spaces and brackets
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    since_boot_ns = ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + since_boot_ns


def _check_age(paths: Iterable[str], since_ns: int, *, links_only: bool = False) -> None:
    """WeightsError if one of `paths`, or a link that leads to it, changed after `since_ns`. OSError if one is gone."""
    for path in paths:
        changed = _changed_ns(path, links_only=links_only)
        if changed > since_ns:
            raise WeightsError(
                f"{path} changed after the engine started, so which content it loaded is not known: "
                "restart the engine to share its cache"
            )


def _changed_ns(path: str, *, links_only: bool = False) -> int:
    """When a file or directory, or a link on the way to it, last changed (ctime)."""
    times = [] if links_only else [os.stat(path).st_ctime_ns]
    return max([*times, *(link.st_ctime_ns for link in _links(path))], default=0)


def _links(path: str) -> Iterator[os.stat_result]:
    """Every symbolic link that is followed to get to `path`, less those of procfs, whose times mean nothing."""
    procfs = os.stat("/proc").st_dev
    left = Path(os.path.abspath(path)).parts[1:]
    at, followed = "/", 0
    while left and followed <= _LINKS_MAX:
        step = os.path.normpath(os.path.join(at, left[0]))
        status = os.lstat(step)
        left = left[1:]
        if not stat.S_ISLNK(status.st_mode):
            at = step
            continue
        followed += 1
        if status.st_dev != procfs:
            yield status
        target = Path(os.readlink(step))
        at, left = ("/", target.parts[1:] + left) if target.is_absolute() else (at, target.parts + left)


# --- content ----------------------------------------------------------------------------------------------------------


class Memos:
    """Digests of files, remembered in a directory of this user's; several processes use it at once.

    Whoever gets a file's lock first hashes it, the others wait and then find the digest. Where nothing can be written,
    everybody hashes. A directory that others could write to is not used.
    """

    def __init__(self, folder: Path | None = None, settled_ns: int = SETTLED_NS) -> None:
        self._folder = folder or config.cache_dir() / "weights"
        self._settled_ns = settled_ns

    def get(self, signature: Signature) -> bytes | None:
        """The digest of a file that looks so, if it is known."""
        try:
            if not self._ours():
                return None
            digest = bytes.fromhex(self._path(signature).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return digest if len(digest) == 32 else None

    def put(self, signature: Signature, digest: bytes) -> None:
        """Remember it, unless the file changed so lately that another change might not show."""
        path = self._path(signature)
        if time.time_ns() - signature[4] < self._settled_ns:
            return
        with contextlib.suppress(OSError):
            if self._ours():
                draft = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
                draft.write_text(digest.hex(), encoding="ascii")
                draft.replace(path)
                self._forget_oldest()

    @contextlib.contextmanager
    def lock(self, signature: Signature) -> Iterator[None]:
        """Held by one process a file; without effect where nothing can be written."""
        path = self._path(signature).with_suffix(".lock")
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._ours():
                    file = held.enter_context(path.open("w"))
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield
            with contextlib.suppress(OSError):
                if self.get(signature) is not None:  # who waits for the lock that is removed here finds it next
                    path.unlink(missing_ok=True)

    def _path(self, signature: Signature) -> Path:
        return self._folder / "-".join(map(str, signature))

    def _ours(self) -> bool:
        status = self._folder.stat()
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022

    def _forget_oldest(self) -> None:
        with os.scandir(self._folder) as entries:
            memos = [(entry.stat().st_mtime_ns, entry.path) for entry in entries]
        for _, path in sorted(memos)[: max(len(memos) - MEMOS_MAX, 0)]:
            Path(path).unlink(missing_ok=True)


def content_digest(files: Sequence[Files], memos: Memos | None = None) -> str:
    """The identity of all weights of an engine, as one readable component: `model blake3 1f3c..., draft hub 90ab...`.

    Reads whatever isn't known yet: seconds to minutes. WeightsError if a file can't be read or changes meanwhile.
    """
    memos = memos or Memos()
    return ", ".join(f"{one.role} {one.known or 'blake3 ' + tree_digest(one.paths, memos).hex()}" for one in files)


def tree_digest(paths: Sequence[tuple[str, str]], memos: Memos, *, wait: bool = True) -> bytes:
    """32 bytes: digest of names, sizes and contents, in the order of names.

    `wait`: for another process that reads the same file. WeightsError if one can't be read or changes meanwhile.
    """
    blake3 = importlib.import_module("blake3").blake3
    out = blake3()
    for name, path in sorted(paths):
        signature, digest = _file_digest(path, memos, wait=wait)
        out.update(b"%d %d " % (len(name.encode(errors="surrogateescape")), signature[2]))
        out.update(name.encode(errors="surrogateescape") + digest)
    return bytes(out.digest())


def _file_digest(path: str, memos: Memos, *, wait: bool) -> tuple[Signature, bytes]:
    try:
        signature = sign(os.stat(path))
        known = memos.get(signature)
        if known is not None:
            return signature, known
        with memos.lock(signature) if wait else contextlib.nullcontext():
            known = memos.get(signature)
            if known is None:
                known = _read_digest(path)
                if sign(os.stat(path)) != signature:
                    raise WeightsError(f"{path} changed while it was read: restart the engine when it is whole")
                memos.put(signature, known)
            return signature, known
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from error


def _read_digest(path: str) -> bytes:
    out = importlib.import_module("blake3").blake3(max_threads=HASH_THREADS)
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(READ_BYTES, os.fstat(file.fileno()).st_size) or 1))
        while length := file.readinto(buffer):
            out.update(buffer[:length])
    return bytes(out.digest())


def sign(status: os.stat_result) -> Signature:
    """What a file looks like from outside."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Identified:
    """The identity of an engine's weights, found out in a background thread; ask again until there is an answer."""

    def __init__(self, vllm_config: Any, *, loaded_ns: int | None = None, memos: Memos | None = None) -> None:
        self._result: str | None = None
        self._error = ""
        self._done = threading.Event()
        arguments = (vllm_config, loaded_ns, memos)
        threading.Thread(target=self._identify, args=arguments, name="cachesvc-weights", daemon=True).start()

    def result(self) -> str | None:
        """As `content_digest` says; None = not known yet, or never (`error` says why)."""
        return self._result

    @property
    def error(self) -> str:
        """Why there will be no result; empty as long as there may be one."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the thread ended within this time."""
        return self._done.wait(timeout_s)

    def _identify(self, vllm_config: Any, loaded_ns: int | None, memos: Memos | None) -> None:
        error = "the thread that identifies the weights failed"
        try:
            self._result = content_digest(find(vllm_config, loaded_ns), memos)
            error = ""
        except WeightsError as told:
            error = str(told)
        finally:
            self._error = error
            self._done.set()
