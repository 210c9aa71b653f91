"""An adapter is what its files hold, as long as they are what the engine loaded."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cachesvc.connector import adapters as module
from cachesvc.connector import weights
from cachesvc.connector.adapters import Adapters
from cachesvc.connector.namespace import ADAPTER_BYTES
from cachesvc.connector.weights import Memos

LATER = 10**18 * 4
"""An engine that starts then: whatever changed, changed before."""


def adapter(folder: Path, content: str = "w", config: str = "{}") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "adapter_config.json").write_text(config)
    return str(folder)


def adapters(tmp_path: Path, *, started_ns: int = LATER, now_bytes_max: int = 1 << 20) -> Adapters:
    return Adapters(started_ns=started_ns, memos=Memos(tmp_path / "memos", settled_ns=0), now_bytes_max=now_bytes_max)


def test_content_is_what_counts(tmp_path: Path) -> None:
    ours = adapters(tmp_path)
    first = ours.digest(adapter(tmp_path / "a"))
    assert first is not None
    assert len(first) == ADAPTER_BYTES
    assert ours.digest(adapter(tmp_path / "b")) == first
    assert ours.digest(adapter(tmp_path / "c", content="v")) not in (None, first)
    assert ours.digest(adapter(tmp_path / "d", config='{"r": 8}')) not in (None, first)
    assert ours.reason(str(tmp_path / "a")) == ours.reason("never asked for") == ""


def test_other_files_do_not_count(tmp_path: Path) -> None:
    first = adapters(tmp_path).digest(adapter(tmp_path / "a"))
    (tmp_path / "a/README.md").write_text("")
    (tmp_path / "a/optimizer.pt").write_text("")
    assert adapters(tmp_path).digest(str(tmp_path / "a")) == first


def test_overwritten_between_two_engines(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    first = adapters(tmp_path).digest(path)
    adapter(tmp_path / "a", content="v")
    assert adapters(tmp_path).digest(path) not in (None, first)
    adapter(tmp_path / "a", content="w")
    assert adapters(tmp_path).digest(path) == first


def test_overwritten_under_an_engine_that_uses_it(tmp_path: Path) -> None:
    path, ours = adapter(tmp_path / "a"), adapters(tmp_path)
    status = os.stat(tmp_path / "a/adapter_model.safetensors")
    assert ours.digest(path) is not None
    adapter(tmp_path / "a", content="v")
    os.utime(tmp_path / "a/adapter_model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ours.digest(path) is None, "the engine may still have the one it loaded"
    assert "changed after it was first used" in ours.reason(path)
    adapter(tmp_path / "a", content="w")
    assert ours.digest(path) is None, "nor does anybody know which one it loaded since"


@pytest.mark.parametrize("overwrite", ["in place", "by rename", "by its folder", "by a link"])
def test_overwritten_after_the_start_and_before_it_is_used(overwrite: str, tmp_path: Path) -> None:
    adapter(tmp_path / "v1")
    adapter(tmp_path / "v2", content="v")
    link = tmp_path / "latest"
    link.symlink_to("v1")
    time.sleep(0.02)
    ours = adapters(tmp_path, started_ns=time.time_ns() + weights.SETTLED_NS)
    time.sleep(0.02)
    if overwrite == "in place":
        adapter(tmp_path / "v1", content="v")
    elif overwrite == "by rename":
        os.replace(tmp_path / "v2/adapter_model.safetensors", tmp_path / "v1/adapter_model.safetensors")
    elif overwrite == "by its folder":
        (tmp_path / "v1").rename(tmp_path / "v0")
        (tmp_path / "v2").rename(tmp_path / "v1")
    else:
        link.unlink()
        link.symlink_to("v2")
    assert ours.digest(str(link)) is None
    assert "changed after the engine started" in ours.reason(str(link))
    assert ours.digest(str(link)) is None


def test_an_adapter_that_nobody_can_read(tmp_path: Path) -> None:
    ours = adapters(tmp_path)
    assert ours.digest("org/some-adapter") is None
    assert "No such file" in ours.reason("org/some-adapter")
    (tmp_path / "a").mkdir()
    assert ours.digest(str(tmp_path / "a")) is None
    assert ours.reason(str(tmp_path / "a")) == f"no adapter in {tmp_path / 'a'}"
    path = adapter(tmp_path / "a")
    assert ours.digest(path) is not None, "and then it can"
    assert ours.reason(path) == ""
    os.unlink(tmp_path / "a/adapter_model.safetensors")
    assert ours.digest(path) is None


def test_a_snapshot_of_the_hubs_cache_is_never_overwritten(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--lora/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--lora/blobs").mkdir()
    (tmp_path / "models--org--lora/blobs" / ("a" * 64)).write_text("w")
    (snapshot / "adapter_model.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
    assert adapters(tmp_path, started_ns=weights.SETTLED_NS).digest(str(snapshot)) is not None


def test_a_large_adapter_is_read_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, go, done = adapter(tmp_path / "a"), threading.Event(), threading.Event()
    tree_digest = weights.tree_digest

    def slowly(*args: object, **kwargs: object) -> bytes:
        assert go.wait(60)
        return tree_digest(*args, **kwargs)  # type: ignore[arg-type]

    class Watched(Adapters):
        def _identify_later(self, *args: object) -> None:
            super()._identify_later(*args)  # type: ignore[arg-type]
            done.set()

    expected = adapters(tmp_path).digest(path)
    monkeypatch.setattr(module, "tree_digest", slowly)
    ours = Watched(started_ns=LATER, memos=Memos(tmp_path / "memos"), now_bytes_max=2)
    assert [ours.digest(path) for _ in range(3)] == [None] * 3
    assert ours.reason(path) == ""
    assert ours._threads == 1, "asked three times, read once"
    go.set()
    assert done.wait(60)
    assert ours.digest(path) == expected
    assert ours._threads == 0


def test_only_a_few_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, go = [adapter(tmp_path / name, content=name) for name in "abc"], threading.Event()

    def slowly(*_: object, **__: object) -> bytes:
        assert go.wait(60)
        return b""

    monkeypatch.setattr(module, "tree_digest", slowly)
    ours = adapters(tmp_path, now_bytes_max=0)
    assert [ours.digest(path) for path in paths] == [None] * 3
    assert ours._threads == module.THREADS_MAX
    go.set()
    until = time.monotonic() + 60
    while None in [ours.digest(path) for path in paths] and time.monotonic() < until:
        time.sleep(0.01)
    assert None not in [ours.digest(path) for path in paths]


def test_changed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tree_digest = adapter(tmp_path / "a"), weights.tree_digest

    def meanwhile(*args: object, **kwargs: object) -> bytes:
        digest = tree_digest(*args, **kwargs)  # type: ignore[arg-type]
        adapter(tmp_path / "a", content="v")
        return digest

    monkeypatch.setattr(module, "tree_digest", meanwhile)
    ours = adapters(tmp_path)
    assert ours.digest(path) is None
    assert "changed while it was read" in ours.reason(path)


def test_it_remembers_a_limited_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADAPTERS_MAX", 2)
    ours = adapters(tmp_path)
    digests = [ours.digest(adapter(tmp_path / name, content=name)) for name in "abc"]
    assert list(ours._adapters) == [str(tmp_path / "b"), str(tmp_path / "c")]
    assert [ours.digest(str(tmp_path / name)) for name in "abc"] == digests
