"""Real engines for the tests of this folder, which need vLLM in their environment and take minutes.

An engine takes seven seconds and more to start, so tests share what they leave healthy: `daemon`, `one` and `two`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from cachesvc.demo.engine import EngineProcess
from tests.engines.faults import Switches
from tests.engines.harness import Engines, Right, nothing_held, wait_long
from tests.support.daemon import Daemon, shared_directory

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

ROOMY = {"ram_bytes": "256MiB", "extent_bytes": "16MiB"}
"""512 chunks of the tiny model."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def right(models: Path) -> Iterator[Right]:
    """What the tiny model says without us."""
    with Engines(models) as engines:
        yield Right(engines.plain())


@pytest.fixture(scope="module")
def engines(models: Path) -> Iterator[Engines]:
    """Starts engines of a module's tests."""
    with Engines(models) as engines:
        yield engines


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_directory() as arena, Daemon(tmp_path_factory.mktemp("daemon"), arena, **ROOMY) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def pair(daemon: Daemon, engines: Engines) -> tuple[EngineProcess, EngineProcess]:
    return engines.pair(daemon)


@pytest.fixture
def one(pair: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return pair[0]


@pytest.fixture
def two(pair: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return pair[1]


@pytest.fixture(scope="module")
def switches(pair: tuple[EngineProcess, EngineProcess], tmp_path_factory: pytest.TempPathFactory) -> list[Switches]:
    """Faults of `one` and of `two`."""
    return [Switches(engine, tmp_path_factory.mktemp("switches")) for engine in pair]


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: nothing is held of the module's daemon, and what ended there left no lease and no slot."""
    yield
    if "daemon" in request.fixturenames:
        daemon: Daemon = request.getfixturevalue("daemon")
        if daemon.process is not None and daemon.process.poll() is None:
            wait_long(lambda: nothing_held(daemon))
