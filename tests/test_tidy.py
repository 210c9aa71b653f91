"""Rules about the tree itself, and for each a small tree that breaks it.

A rule is a function from the root of a tree to its objections, one line each. Not here: what ruff, mypy and
import-linter see already (pyproject.toml).
"""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = {"cachesvc": "cachesvc", "node-agent/node_agent": "node_agent"}
"""Folder of each package, and the name that it is imported by."""

PURE = (
    "cachesvc.arena.layout",
    "cachesvc.connector.layout",
    "cachesvc.connector.namespace",
    "cachesvc.core",
    "cachesvc.models.manifest",
    "cachesvc.tiers.nvme_format",
    "cachesvc.wire",
    "node_agent.plan",
)
"""Modules that decide and don't act: the contract of that name must hold them as soon as they exist."""

SHARED_TESTS = {
    "cachesvc/core/events.py": "tests/core/test_node.py",
}
"""Files of plain data whose tests are another file's."""

LOADED_BY_OTHERS = frozenset({"cachesvc.connector"})
"""vLLM loads it, by the name in its settings."""

LINES_PER_FUNCTION_MAX = 70
LINES_PER_FILE_MAX = 600
LONG: Mapping[str, str] = {
    "tests/client/test_channel.py": "every arrow of one drawing, and the threads that race for one lock",
    "tests/sim/oracle.py": "one judge, who has to see everything",
}
"""`path` or `path:function` that may be longer, each with the reason; remove the line when it is short again."""

UNFINISHED = re.compile(r"\b(FIX" + r"ME|TO" + r"DO|XX" + r"X)\b")
SOMEBODYS_DISK = re.compile(r"(?<![\w.$}>-])/(root|home|work|Users)/")
HIDDEN_INPUT = re.compile(r"\b(os\.environ|environb?\[|getenvb?\()")
TEXT_SUFFIXES = {"", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
GENERATED = {"__pycache__", "build", "dist"}

# --- the tree ---------------------------------------------------------------------------------------------------------


def files(root: Path) -> Iterator[Path]:
    """The project's text files, without hidden and generated folders (`.ci` is ours)."""
    for folder, children, names in os.walk(root):
        children[:] = sorted(c for c in children if c == ".ci" or not (c.startswith(".") or c in GENERATED))
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix in TEXT_SUFFIXES)


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in files(root / folder) if path.suffix == ".py"]


def source_files(root: Path) -> list[Path]:
    return python_files(root, *PACKAGES)


def name_of(path: Path, root: Path) -> str:
    """The name that a file is imported by, seen from the root of the tree."""
    parts = path.relative_to(root).with_suffix("").as_posix().removeprefix("node-agent/").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every name that a file imports anywhere in it, and the packages above these."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)}


def settings_of(root: Path) -> dict[str, dict[str, object]]:
    path = root / "pyproject.toml"
    settings: dict[str, dict[str, object]] = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings


# --- the rules --------------------------------------------------------------------------------------------------------


def unreached(root: Path) -> list[str]:
    """Modules that nothing leads to: from the console scripts, each package and its `__main__` for the packages; from
    tests and scripts for what lies beside them."""
    modules = {name_of(path, root): path for path in source_files(root)}
    helpers = {name_of(path, root): path for path in python_files(root, "tests", "bench")}
    scripts = settings_of(root).get("project", {}).get("scripts", {})
    assert isinstance(scripts, dict)
    starts = {str(target).partition(":")[0] for target in scripts.values()} | set(PACKAGES.values()) | LOADED_BY_OTHERS
    starts |= {name for name in modules if name.endswith("__main__")}
    helper_starts = {
        name
        for name, path in helpers.items()
        if path.stem in ("__init__", "conftest") or path.stem.startswith("test_") or "__main__" in path.read_text()
    }
    lost = modules.keys() - reached(modules, starts) | helpers.keys() - reached(helpers, helper_starts)
    return sorted(f"{(modules | helpers)[name].relative_to(root)}: nothing imports it" for name in lost)


def reached(modules: Mapping[str, Path], starts: set[str]) -> set[str]:
    found: set[str] = set()
    frontier = starts & modules.keys()
    while frontier:
        found |= frontier
        frontier = {name for start in frontier for name in imports_of(modules[start])} & modules.keys() - found
    return found


def untested(root: Path) -> list[str]:
    """Source files without the test file that mirrors them; a docstring needs no test."""
    lost = []
    for path in source_files(root):
        relative = path.relative_to(root).as_posix()
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if path.name == "__init__.py" and all(isinstance(node, ast.Expr) for node in body):
            continue
        folder = Path("tests", *Path(relative).parts[1:-1])
        test = SHARED_TESTS.get(relative, (folder / f"test_{path.stem.strip('_')}.py").as_posix())
        if not (root / test).exists():
            lost.append(f"{relative}: has no {test}")
        elif relative in SHARED_TESTS and name_of(path, root) not in imports_of(root / test):
            lost.append(f"{relative}: {test} doesn't import it")
    return lost


def unfinished(root: Path) -> list[str]:
    """Marks of work left for later: they belong into an issue."""
    return matching_lines(files(root), UNFINISHED, root)


def on_somebodys_disk(root: Path) -> list[str]:
    """Absolute paths of one machine."""
    return matching_lines(files(root), SOMEBODYS_DISK, root)


def hidden_inputs(root: Path) -> list[str]:
    """The environment is read in config.py alone."""
    paths = (path for path in source_files(root) if path.relative_to(root).as_posix() != "cachesvc/config.py")
    return matching_lines(paths, HIDDEN_INPUT, root)


def matching_lines(paths: Iterator[Path], pattern: re.Pattern[str], root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: {match[0]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := pattern.search(line))
    ]


def false_names(root: Path) -> list[str]:
    """Files and folders that documents name and that don't exist, seen from the root, the package or the document.

    A name is a word in backticks or a link's target that ends with a slash, .py, .md or .toml, or any word with a slash
    that ends so; `*` stands for anything. Words that start with a slash or hold `<` or `$` are about other machines.
    """
    lost = []
    for document in (path for path in files(root) if path.suffix == ".md"):
        text = document.read_text(encoding="utf-8")
        names = set(re.findall(r"`([\w.*-]+(?:/[\w.*-]+)*(?:/|\.py|\.md|\.toml))`", text))
        names |= set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
        names |= set(re.findall(r"(?<![\w./<>$-])((?:[\w.*-]+/)+[\w.*-]+\.(?:py|md|toml))\b", text))
        for name in sorted(names):
            if not any(any(base.glob(name.rstrip("/"))) for base in (root, root / "cachesvc", document.parent)):
                lost.append(f"{document.relative_to(root)}: names {name}, which doesn't exist")
    return lost


def long_ones(root: Path) -> dict[str, int]:
    """Functions longer than a screen and files longer than a room should be, with their lines."""
    long = {}
    for path in python_files(root, *PACKAGES, "tests", "bench"):
        relative = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LINES_PER_FILE_MAX:
            long[relative] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LINES_PER_FUNCTION_MAX:
                    long[f"{relative}:{node.name}"] = lines
    return long


def uncontracted(root: Path) -> list[str]:
    """Pure modules that exist and that the contract about them doesn't name."""
    linter = settings_of(root).get("tool", {}).get("importlinter", {})
    assert isinstance(linter, dict)
    named = {
        source
        for contract in linter.get("contracts", [])
        if contract["name"].startswith("Pure modules")
        for source in contract["source_modules"]
    }
    modules = {name_of(path, root) for path in source_files(root)}
    return [f"{pure}: not among the pure modules of pyproject.toml" for pure in PURE if pure in modules - named]


RULES: list[Callable[[Path], list[str]]] = [
    unreached,
    untested,
    unfinished,
    on_somebodys_disk,
    hidden_inputs,
    false_names,
    uncontracted,
]

# --- the tree keeps them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_tree(rule: Callable[[Path], list[str]]) -> None:
    if objections := rule(ROOT):
        pytest.fail("\n".join(objections), pytrace=False)


def test_no_screen_is_outgrown() -> None:
    long = long_ones(ROOT)
    objections = [f"{name}: {lines} lines" for name, lines in sorted(long.items()) if name not in LONG]
    if objections:
        pytest.fail("\n".join(objections), pytrace=False)
    assert LONG.keys() - long.keys() == set(), "these are short again: take them out of LONG"


def test_shared_tests_are_of_files_that_exist() -> None:
    assert [path for path in SHARED_TESTS if not (ROOT / path).exists()] == []


# --- and each can fail ------------------------------------------------------------------------------------------------


def grown(root: Path, tree: Mapping[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


GOOD = {
    "pyproject.toml": (
        '[project.scripts]\nfake = "cachesvc.cli:app"\n'
        '[[tool.importlinter.contracts]]\nname = "Pure modules"\nsource_modules = ["cachesvc.core"]\n'
    ),
    "README.md": "Start with `core/node.py`, `cachesvc/cli.py`, `tests/*/test_node.py`, [a](README.md#x) and `core/`.",
    "cachesvc/__init__.py": '"""Docstring."""',
    "cachesvc/cli.py": "def app():\n    from cachesvc.core import node",
    "cachesvc/core/__init__.py": "",
    "cachesvc/core/node.py": "import os",
    "tests/test_cli.py": "from tests.support.fakes import x",
    "tests/core/test_node.py": "",
    "tests/support/fakes.py": "x = 1",
    "bench/speed.py": "from bench import table\nif __name__ == '__main__':\n    pass",
    "bench/table.py": "",
    ".venv/lib/bad.py": "# FIX" + "ME",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_good_tree(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(grown(tmp_path, GOOD)) == []
    assert long_ones(tmp_path) == {}


@pytest.mark.parametrize(
    ("rule", "tree", "objection"),
    [
        (unreached, {"cachesvc/core/lost.py": ""}, "cachesvc/core/lost.py: nothing imports it"),
        (unreached, {"cachesvc/lost/__init__.py": ""}, "cachesvc/lost/__init__.py: nothing imports it"),
        (unreached, {"cachesvc/a.py": "import cachesvc.a"}, "cachesvc/a.py: nothing imports it"),
        (unreached, {"cachesvc/x.py": "", "tests/test_x.py": "import cachesvc.x"}, "cachesvc/x.py: nothing imports it"),
        (unreached, {"tests/support/lost.py": ""}, "tests/support/lost.py: nothing imports it"),
        (unreached, {"bench/lost.py": ""}, "bench/lost.py: nothing imports it"),
        (untested, {"cachesvc/core/index.py": ""}, "cachesvc/core/index.py: has no tests/core/test_index.py"),
        (untested, {"cachesvc/lazy/__init__.py": "x = 1"}, "cachesvc/lazy/__init__.py: has no tests/lazy/test_init.py"),
        (
            untested,
            {"cachesvc/core/events.py": ""},
            "cachesvc/core/events.py: tests/core/test_node.py doesn't import it",
        ),
        (untested, {"node-agent/node_agent/x.py": ""}, "node-agent/node_agent/x.py: has no tests/node_agent/test_x.py"),
        (unfinished, {"Makefile": "a:\n\ttrue  # TO" + "DO"}, "Makefile:2: TO" + "DO"),
        (unfinished, {"cachesvc/cli.py": "# XX" + "X later"}, "cachesvc/cli.py:1: XX" + "X"),
        (on_somebodys_disk, {"bench/README.md": "see /ro" + "ot/x"}, "bench/README.md:1: /ro" + "ot/"),
        (on_somebodys_disk, {".ci/run": "cd /wo" + "rk/x"}, ".ci/run:1: /wo" + "rk/"),
        (hidden_inputs, {"cachesvc/cli.py": "import os\nos.environ['A']"}, "cachesvc/cli.py:2: os.environ"),
        (hidden_inputs, {"cachesvc/cli.py": "from os import getenv\ngetenv('A')"}, "cachesvc/cli.py:2: getenv("),
        (false_names, {"README.md": "`core/gone.py`"}, "README.md: names core/gone.py, which doesn't exist"),
        (false_names, {"README.md": "`gone/`"}, "README.md: names gone/, which doesn't exist"),
        (false_names, {"README.md": "[x](docs/gone.txt)"}, "README.md: names docs/gone.txt, which doesn't exist"),
        (false_names, {"a.md": "```\npython bench/gone.py\n```"}, "a.md: names bench/gone.py, which doesn't exist"),
        (
            uncontracted,
            {"cachesvc/wire/__init__.py": ""},
            "cachesvc.wire: not among the pure modules of pyproject.toml",
        ),
    ],
)
def test_rule_objects(
    rule: Callable[[Path], list[str]], tree: Mapping[str, str], objection: str, tmp_path: Path
) -> None:
    assert rule(grown(tmp_path, {**GOOD, **tree})) == [objection]


def test_two_dead_modules_do_not_keep_each_other_alive(tmp_path: Path) -> None:
    tree = {"cachesvc/a.py": "import cachesvc.b", "cachesvc/b.py": "from cachesvc import a"}
    assert len(unreached(grown(tmp_path, {**GOOD, **tree}))) == 2


@pytest.mark.parametrize(
    "text", ["`/v1/status`", "`/run/x/y.sock`", "`<root>/models/`", "`$XDG_DATA_HOME/x.md`", "[x](https://a.b/c.md)"]
)
def test_documents_may_name_what_is_on_other_machines(text: str, tmp_path: Path) -> None:
    assert false_names(grown(tmp_path, {"README.md": text})) == []


def test_length_is_counted(tmp_path: Path) -> None:
    tree = {
        "cachesvc/a.py": "def f():\n" + "    pass\n" * LINES_PER_FUNCTION_MAX,
        "tests/b.py": "class C:\n    async def g():\n" + "        pass\n" * LINES_PER_FUNCTION_MAX,
        "tests/short.py": "def f():\n" + "    pass\n" * (LINES_PER_FUNCTION_MAX - 1),
        "bench/c.py": "\n" * (LINES_PER_FILE_MAX + 1),
    }
    assert long_ones(grown(tmp_path, tree)) == {"cachesvc/a.py:f": 71, "tests/b.py:g": 71, "bench/c.py": 601}
