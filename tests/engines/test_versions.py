"""An engine whose client speaks another version of the protocol: it serves, and shares nothing."""

from __future__ import annotations

from pathlib import Path

from cachesvc.demo import engine as demo
from tests.engines.harness import CHUNK, Engines, Right, answer, assert_alike, connected, faults_of, misses, words
from tests.support.daemon import Daemon

NEWER = """
import cachesvc.wire.messages
cachesvc.wire.messages.WIRE_VERSION = 2
"""


def test_a_client_of_another_version(daemon: Daemon, engines: Engines, right: Right, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NEWER)
    above = Path(demo.__file__).resolve().parent.parent.parent
    stranger = engines.begin(daemon.socket(), env={"PYTHONPATH": f"{tmp_path}:{above}"}).wait_ready()
    prompts = [words(f"version {n}", 3 * CHUNK) for n in range(3)]
    for prompt in prompts + prompts:
        assert_alike(answer(stranger, prompt), right(prompt))
    assert not connected(stranger)
    assert stranger.apply("tests.engines.faults:refusal").rstrip("')").endswith("upgrade the daemon")
    assert not faults_of(stranger)
    assert misses(stranger)["daemon_down"] >= 9
    assert daemon.tenant()["sessions"] == 0
