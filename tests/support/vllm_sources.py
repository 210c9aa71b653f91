"""vLLM's Python sources, release by release: fetched once, read by `ast`, never run.

Covers: getting them with pip, finding a class or a function behind re-exports, members of a class with those of its
bases, what a signature takes. Not here: what of it the connector uses (`tests.connector.test_releases`).

pip downloads a source distribution only together with its metadata, which the distribution's own build makes: a build
of vLLM wants torch and a compiler. So pip is given a stand-in for `setuptools` that says just name and version.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

from cachesvc.config import cache_dir, child_environment

KEPT = (
    "vllm/config/",
    "vllm/distributed/kv_transfer/",
    "vllm/lora/",
    "vllm/model_executor/layers/attention/",
    "vllm/v1/",
)
"""Of the 40 MB that a release has; and the files that lie directly in `vllm/`."""

PIP = ("download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary=vllm", "--no-build-isolation")
FETCH_S = 300.0

BACKEND = """
import os

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name = "vllm-{version}.dist-info"
    os.mkdir(os.path.join(directory, name))
    with open(os.path.join(directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
    return name
"""

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


class SourcesError(Exception):
    """The sources can't be had; one line says why."""


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(version: str) -> Path:
    """The folder that holds `vllm/` of this release; from the user's cache if it was fetched before."""
    kept = cache_dir() / f"vllm-sources-{version}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix="vllm-sources-") as draft:
        _unpack(_download(version, Path(draft)), Path(draft, "made"))
        try:
            Path(draft, "made").rename(kept)
        except OSError:
            if not kept.is_dir():  # else somebody else was faster
                raise
    return kept


def _download(version: str, folder: Path) -> Path:
    backend = folder / "setuptools"
    backend.mkdir()
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND.replace("{version}", version))
    command = [sys.executable, "-m", "pip", *PIP, "--dest", str(folder), f"vllm=={version}"]
    try:
        done = subprocess.run(
            command,
            env=child_environment({"PYTHONPATH": str(folder)}),
            capture_output=True,
            text=True,
            timeout=FETCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SourcesError(f"vLLM {version}'s sources can't be had: pip took more than {FETCH_S:.0f} s") from None
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or len(found) != 1:
        said = ["pip says nothing", *done.stderr.splitlines()]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise SourcesError(f"vLLM {version}'s sources can't be had: {errors[-1]}")
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if not member.isfile() or not name.endswith(".py") or not is_kept(name):
                continue
            content = tar.extractfile(member)
            assert content is not None
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)


def is_kept(name: str) -> bool:
    """Is this path of an archive, without its first folder, one that anybody here reads?"""
    safe = os.path.normpath(name) == name and not name.startswith(("/", ".."))
    return safe and (name.startswith(KEPT) or (name.startswith("vllm/") and name.count("/") == 1))


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A definition, and the module it stands in."""

    module: str
    node: Definition


@dataclass
class Sources:
    """Modules below `root`; `changed` are other texts for some of them, by name of the module."""

    root: Path
    changed: dict[str, str] = field(default_factory=dict)
    _modules: dict[str, ast.Module | None] = field(default_factory=dict)

    def path(self, module: str) -> Path | None:
        """The file of a module; None if there is none."""
        base = self.root.joinpath(*module.split("."))
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)

    def module(self, name: str) -> ast.Module | None:
        """What a module consists of; None if there is none."""
        if name not in self._modules:
            path = self.path(name)
            if name in self.changed:
                self._modules[name] = ast.parse(self.changed[name])
            else:
                self._modules[name] = _parsed(path) if path else None
        return self._modules[name]

    def find(self, module: str, name: str) -> Found | None:
        """What `from module import name` gives, unless that is a module."""
        tree = self.module(module)
        for node in _statements(tree.body) if tree else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(self._origin(module, node), alias.name)
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that is imported from, by its full name."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + bool(path and path.name == "__init__.py")]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def lineage(self, found: Found) -> list[Found]:
        """A class and all that it inherits from here, nearest first."""
        line = [found]
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            above = self.find(found.module, name.id) if isinstance(name, ast.Name) else None
            if above is not None and isinstance(above.node, ast.ClassDef):
                line += [one for one in self.lineage(above) if one not in line]
        return line

    def members(self, found: Found) -> dict[str, ast.AST]:
        """Everything that an object of this class has, by name; of several definitions the nearest."""
        members: dict[str, ast.AST] = {}
        for one in self.lineage(found):
            assert isinstance(one.node, ast.ClassDef)
            for name, node in own_members(one.node).items():
                members.setdefault(name, node)
        return members

    def called(self, found: Found) -> Signature:
        """What a function, or the constructor of a class, takes."""
        if not isinstance(found.node, ast.ClassDef):
            return Signature.of(found.node)
        members = self.members(found)
        if "__init__" in members:
            return Signature.of(members["__init__"], method=True)
        if any(isinstance(base, ast.Name) and base.id == "Enum" for base in found.node.bases):
            return Signature(["value"], 1)
        fields: dict[str, bool] = {}
        for one in reversed(self.lineage(found)):
            assert isinstance(one.node, ast.ClassDef)
            fields |= _fields(one.node)
        # vLLM has no field without a default behind one with
        return Signature(list(fields), sum(fields.values()))


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, also what stands under `if TYPE_CHECKING` and in `try`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def own_members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class's body defines, and what its methods set on `self`."""
    members: dict[str, ast.AST] = {}
    for one in node.body:
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            members[one.name] = one
        elif isinstance(one, ast.Assign | ast.AnnAssign):
            members |= dict.fromkeys(_targets(one), one)
    for inner in ast.walk(node):
        targets = inner.targets if isinstance(inner, ast.Assign) else []
        targets = [inner.target] if isinstance(inner, ast.AnnAssign) else targets
        for target in (part for whole in targets for part in ast.walk(whole)):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                members.setdefault(target.attr, inner)
    return members


def _fields(node: ast.ClassDef) -> dict[str, bool]:
    """Fields of a dataclass or NamedTuple that its constructor takes, and whether it must be given them."""
    fields = {}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            value = "" if one.value is None else ast.unparse(one.value)
            if "ClassVar" not in ast.unparse(one.annotation) and "init=False" not in value:
                fields[one.target.id] = not value
    return fields


# --- signatures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """What can be given to a function, without `self`."""

    names: list[str]
    """By position or by name."""
    required: int
    """The first so many must be given."""
    only_by_name: dict[str, bool] = field(default_factory=dict)
    """And whether it must be given."""
    rest: bool = False
    any_name: bool = False

    @classmethod
    def of(cls, node: ast.AST, *, method: bool = False) -> Signature:
        """Of a function; of a method what is given behind `self` or `cls`."""
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), ast.dump(node)
        taken = node.args
        names = [one.arg for one in (*taken.posonlyargs, *taken.args)]
        skipped = int(method and "staticmethod" not in decorators(node))
        by_name = {one.arg: default is None for one, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)}
        required = len(names) - len(taken.defaults) - skipped
        return cls(names[skipped:], required, by_name, taken.vararg is not None, taken.kwarg is not None)

    def refusal(self, call: ast.Call) -> str:
        """Why this call doesn't fit; "" if it does, or if `*` and `**` in it leave that open."""
        given = [one.arg for one in call.keywords if one.arg is not None]
        starred = any(isinstance(one, ast.Starred) for one in call.args)
        if len(call.args) > len(self.names) and not self.rest and not starred:
            return f"takes {len(self.names)} arguments, not {len(call.args)}"
        for name in given:
            if name not in self.names[len(call.args) :] and name not in self.only_by_name and not self.any_name:
                return f"takes no {name!r}"
        if starred or len(given) < len(call.keywords):
            return ""
        needed = self.names[len(call.args) : self.required] + [n for n, must in self.only_by_name.items() if must]
        lacking = [name for name in needed if name not in given]
        return f"needs {', '.join(lacking)}" if lacking else ""

    def takes_less_than(self, other: Signature) -> str:
        """What may be given to `other` and not to this one; "" if nothing."""
        for at, name in enumerate(other.names):
            if at < len(self.names) and self.names[at] != name:
                return f"calls {self.names[at]!r} what is called {name!r}"
            if at >= len(self.names) and not (self.rest and self.any_name):
                return f"doesn't take {name!r}"
        if self.required > other.required:
            return f"needs {self.names[other.required]!r}"
        for name in other.only_by_name:
            if name not in self.only_by_name and name not in self.names and not self.any_name:
                return f"doesn't take {name!r}"
        if (other.rest and not self.rest) or (other.any_name and not self.any_name):
            return "doesn't take any number of arguments"
        return next(
            (f"needs {n!r}" for n, must in self.only_by_name.items() if must and n not in other.only_by_name), ""
        )


def decorators(node: ast.AST) -> set[str]:
    """Names of a function's decorators."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return {ast.unparse(one).split("(")[0].split(".")[-1] for one in node.decorator_list}
