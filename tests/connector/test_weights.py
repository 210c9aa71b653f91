"""Which files an engine's weights are, what they hold, and when nobody can say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3

from cachesvc.connector import weights
from cachesvc.connector.weights import Files, Identified, Memos, WeightsError, content_digest, find, process_start_ns

LATER = 10**18 * 4
"""A time that no file reaches: whatever changed, changed before it."""


def engine(model: object, *, load_format: str = "auto", draft: object = None, **changes: Any) -> SimpleNamespace:
    """As much of vLLM's resolved config as `find` looks at; test_identity.py gives it the real one."""

    def one(path: object) -> SimpleNamespace:
        values = {"revision": None, "model_weights": "", "trust_remote_code": False, "hf_config": SimpleNamespace()}
        return SimpleNamespace(**{"model": str(path), **values, **changes})

    return SimpleNamespace(
        model_config=one(model),
        load_config=SimpleNamespace(load_format=load_format, download_dir=changes.get("download_dir")),
        speculative_config=SimpleNamespace(draft_model_config=one(draft), draft_load_config=None) if draft else None,
    )


def grown(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(found: tuple[Files, ...]) -> list[str]:
    return [name for files in found for name, _ in files.paths]


def identity(model: Path, **changes: Any) -> str:
    return content_digest(find(engine(model, **changes), LATER), Memos(model.parent / "memos"))


# --- which files ------------------------------------------------------------------------------------------------------

MODEL = {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "t", "pytorch_model.bin": "old"}


@pytest.mark.parametrize(
    ("files", "load_format", "chosen"),
    [
        (MODEL, "auto", ["model.safetensors"]),
        (MODEL, "npcache", ["pytorch_model.bin"]),
        ({"a.bin": "", "b.pt": "", "c.txt": ""}, "auto", ["a.bin", "b.pt"]),
        ({"m.safetensors": "", "model.safetensors.index.json": "", "hf_quant_config.json": ""}, "auto", None),
        ({"m.safetensors": "", "part/n.safetensors": ""}, "auto", ["m.safetensors", "part/n.safetensors"]),
        ({"m.safetensors": "", "original/n.safetensors": "", ".x/n.safetensors": ""}, "auto", ["m.safetensors"]),
    ],
)
def test_weights_are_chosen(files: dict[str, str], load_format: str, chosen: list[str] | None, tmp_path: Path) -> None:
    found = find(engine(grown(tmp_path / "m", files), load_format=load_format), LATER)
    assert [one.role for one in found] == ["model"]
    assert names(found) == (sorted(files) if chosen is None else chosen)


def test_a_file_is_a_model(tmp_path: Path) -> None:
    grown(tmp_path, {"tiny.gguf": "w", "other.gguf": "x"})
    assert names(find(engine(tmp_path / "tiny.gguf"), LATER)) == ["tiny.gguf"]


def test_code_that_runs_counts(tmp_path: Path) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "", "modeling.py": ""})
    trusted: dict[str, Any] = {
        "trust_remote_code": True,
        "hf_config": SimpleNamespace(auto_map={"AutoModel": "modeling.M"}),
    }
    assert names(find(engine(model), LATER)) == ["m.safetensors"]
    assert names(find(engine(model, **trusted), LATER)) == ["m.safetensors", "modeling.py"]


def test_a_draft_model_counts(tmp_path: Path) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "w"})
    draft = grown(tmp_path / "d", {"d.safetensors": "v"})
    assert identity(model, draft=draft).startswith("model blake3 ")
    assert ", draft blake3 " in identity(model, draft=draft)
    assert identity(model, draft=model) == identity(model), "as with n-grams: no weights of its own"


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "ipc_cache", "modelexpress", "of-a-plugin"])
def test_other_formats_are_unknown(load_format: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=load_format):
        find(engine(grown(tmp_path / "m", MODEL), load_format=load_format), LATER)


def test_object_stores_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="s3://bucket"):
        find(engine(grown(tmp_path / "m", MODEL), model_weights="s3://bucket/m"), LATER)


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}])
def test_no_weights(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(WeightsError, match="no weights in"):
        find(engine(grown(tmp_path / "m", files)), LATER)


def test_a_model_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no directory and no name of the hub"):
        find(engine(tmp_path / "m"), LATER)
    grown(tmp_path / "m", {"x.txt": ""}).joinpath("m.safetensors").symlink_to("gone")
    with pytest.raises(WeightsError, match="No such file"):
        find(engine(tmp_path / "m"), LATER)


# --- the hub's cache --------------------------------------------------------------------------------------------------

COMMIT, OTHER = "c" * 40, "d" * 40


def hub(cache: Path, commit: str = COMMIT, blob: str = "a" * 64) -> Path:
    """A repository in a hub's cache, as its client lays it out."""
    repository = cache / "models--org--tiny"
    grown(repository, {f"blobs/{blob}": "w", "refs/main": commit, f"snapshots/{commit}/README": ""})
    (repository / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    return repository


def test_blobs_are_named_by_their_content(tmp_path: Path) -> None:
    repository = hub(tmp_path)
    (repository / "blobs" / ("a" * 64)).chmod(0)
    named = content_digest(find(engine("org/tiny", download_dir=str(tmp_path)), 0))
    assert named.startswith("model hub ")
    assert named == content_digest(find(engine(repository / "snapshots" / COMMIT), 0)), "by its path it is the same"
    hub(tmp_path / "else", blob="b" * 64)
    assert named != content_digest(find(engine("org/tiny", download_dir=str(tmp_path / "else")), 0))


def test_a_snapshot_without_links_is_read(tmp_path: Path) -> None:
    repository = hub(tmp_path)
    link = repository / "snapshots" / COMMIT / "model.safetensors"
    link.unlink()
    link.write_text("w")
    assert identity(link.parent).startswith("model blake3 ")


def test_a_link_to_something_else_named_so_is_read(tmp_path: Path) -> None:
    model = grown(tmp_path / "m", {"x.txt": ""})
    grown(tmp_path / "blobs", {"a" * 64: "w"})
    (model / "model.safetensors").symlink_to(f"../blobs/{'a' * 64}")
    assert identity(model).startswith("model blake3 ")


def test_the_commit_that_vllm_resolved_counts(tmp_path: Path) -> None:
    class Resolved(str):
        resolved = COMMIT

    hub(tmp_path)
    first = find(engine("org/tiny", download_dir=str(tmp_path)), LATER)
    hub(tmp_path, OTHER, "b" * 64)
    assert first != find(engine("org/tiny", download_dir=str(tmp_path)), LATER)
    assert first == find(engine("org/tiny", download_dir=str(tmp_path), revision=Resolved("main")), 0)
    with pytest.raises(WeightsError, match="refs/main changed after"):
        find(engine("org/tiny", download_dir=str(tmp_path)), 0)


def test_what_the_hubs_cache_lacks(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        find(engine("org/tiny", download_dir=str(tmp_path)), LATER)
    with pytest.raises(WeightsError, match="is not in the hub's cache"):
        find(engine("org/tiny", download_dir=str(tmp_path), revision=OTHER), LATER)


# --- manifests --------------------------------------------------------------------------------------------------------


def published(folder: Path, manifest: str = '{"digest": "sha256:0123456789abcdef"}') -> Path:
    grown(folder, {"m.safetensors": "w"})
    time.sleep(0.02)  # more than a tick of the clock that ctimes are taken from
    return grown(folder, {weights.MANIFEST: manifest})


def test_a_manifest_is_trusted(tmp_path: Path) -> None:
    model = published(tmp_path / "m")
    (model / "m.safetensors").chmod(0o400)
    (model / weights.MANIFEST).touch()
    assert identity(model) == "model manifest sha256:0123456789abcdef"


def test_not_when_a_file_is_newer(tmp_path: Path) -> None:
    model = published(tmp_path / "m")
    time.sleep(0.02)
    (model / "m.safetensors").write_text("x")
    os.utime(model / "m.safetensors", (1, 1))
    assert identity(model).startswith("model blake3 ")


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"digest": 1}', '{"digest": "short"}', '{"digest": "a\\nb0123456789abcdef"}', "\xff{"]
)
def test_not_when_it_is_none(manifest: str, tmp_path: Path) -> None:
    assert identity(published(tmp_path / "m", manifest)).startswith("model blake3 ")


# --- content ----------------------------------------------------------------------------------------------------------


def test_content_is_what_counts(tmp_path: Path) -> None:
    first = identity(grown(tmp_path / "a/m", {"m.safetensors": "w", "n.safetensors": "v", "README": "1"}))
    assert first == identity(grown(tmp_path / "b/m", {"n.safetensors": "v", "m.safetensors": "w", "README": "2"}))
    others = [
        {"m.safetensors": "w", "n.safetensors": "w"},
        {"m.safetensors": "v", "n.safetensors": "w"},
        {"m.safetensors": "w", "o.safetensors": "v"},
        {"m.safetensors": "wv", "n.safetensors": ""},
        {"m.safetensors": "w"},
    ]
    found = {identity(grown(tmp_path / str(n) / "m", files)) for n, files in enumerate(others)}
    assert len(found) == len(others)
    assert first not in found


def test_large_files_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "w" * 10_000})
    whole = identity(model)
    monkeypatch.setattr(weights, "READ_BYTES", 999)
    assert content_digest(find(engine(model), LATER), Memos(tmp_path / "other")) == whole


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "w"})
    found = find(engine(model), LATER)
    (model / "m.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"m.safetensors can't be read: No such file"):
        content_digest(found, Memos(tmp_path / "memos"))


# --- remembered -------------------------------------------------------------------------------------------------------


class Reads:
    """Counts the files that are read, and may do something meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self.meanwhile: Callable[[str], object] = lambda _: None
        self._read = weights._read_digest
        monkeypatch.setattr(weights, "_read_digest", self)

    def __call__(self, path: str) -> bytes:
        self.paths.append(Path(path).name)
        digest = self._read(path)
        self.meanwhile(path)
        return digest


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_a_file_is_read_once(tmp_path: Path, reads: Reads) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "w", "n.safetensors": "v"})
    found, memos = find(engine(model), LATER), Memos(tmp_path / "memos", settled_ns=0)
    first = content_digest(found, memos)
    assert content_digest(found, Memos(tmp_path / "memos", settled_ns=0)) == first
    assert reads.paths == ["m.safetensors", "n.safetensors"]
    status = (model / "n.safetensors").stat()
    (model / "n.safetensors").write_text("u")
    os.utime(model / "n.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_digest(found, memos) != first
    assert reads.paths == ["m.safetensors", "n.safetensors", "n.safetensors"]
    assert not list((tmp_path / "memos").glob("*.lock"))


def test_what_changes_while_it_is_read_is_not_remembered(tmp_path: Path, reads: Reads) -> None:
    model = grown(tmp_path / "m", {"m.safetensors": "w"})
    found, memos = find(engine(model), LATER), Memos(tmp_path / "memos", settled_ns=0)
    reads.meanwhile = lambda path: Path(path).write_text("x")
    with pytest.raises(WeightsError, match="changed while it was read"):
        content_digest(found, memos)
    assert not list(memos._folder.glob("*-*[!k]"))


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path: Path, reads: Reads) -> None:
    found = find(engine(grown(tmp_path / "m", {"m.safetensors": "w"})), LATER)
    assert content_digest(found, Memos(tmp_path / "memos")) == content_digest(found, Memos(tmp_path / "memos"))
    assert len(reads.paths) == 2


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("xyz"), lambda path: path.write_bytes(b"\xff")])
def test_a_spoilt_memo_is_none(spoil: object, tmp_path: Path, reads: Reads) -> None:
    found = find(engine(grown(tmp_path / "m", {"m.safetensors": "w"})), LATER)
    first = content_digest(found, Memos(tmp_path / "memos", settled_ns=0))
    for path in (tmp_path / "memos").iterdir():
        spoil(path)  # type: ignore[operator]
    assert content_digest(found, Memos(tmp_path / "memos", settled_ns=0)) == first
    assert len(reads.paths) == 2


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, reads: Reads) -> None:
    found = find(engine(grown(tmp_path / "m", {"m.safetensors": "w"})), LATER)
    (tmp_path / "memos").mkdir()
    (tmp_path / "memos").chmod(0o777)
    for _ in range(2):
        content_digest(found, Memos(tmp_path / "memos", settled_ns=0))
    assert len(reads.paths) == 2
    assert not list((tmp_path / "memos").iterdir())


def test_no_folder_is_no_error(tmp_path: Path) -> None:
    found = find(engine(grown(tmp_path / "m", {"m.safetensors": "w"})), LATER)
    (tmp_path / "file").write_text("")
    assert content_digest(found, Memos(tmp_path / "file" / "memos", settled_ns=0)).startswith("model blake3 ")


def test_memos_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MEMOS_MAX", 3)
    memos = Memos(tmp_path, settled_ns=0)
    for inode in range(6):
        memos.put((1, inode, 1, 1, 1), blake3().digest())
    assert len(list(tmp_path.iterdir())) == 3
    assert memos.get((1, 5, 1, 1, 1)) == blake3().digest()


def test_the_users_cache_is_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.config.cache_dir", lambda: tmp_path / "cache")
    Memos(settled_ns=0).put((1, 1, 1, 1, 1), blake3().digest())
    with Memos().lock((2, 2, 2, 2, 2)):
        assert (tmp_path / "cache/weights/2-2-2-2-2.lock").exists()


WAITER = """
import sys
from pathlib import Path
from cachesvc.connector import weights
weights._read_digest = lambda path: sys.exit("read it although somebody else did")
print("waiting", flush=True)
print(weights.content_digest([weights.Files("model", "", (("m", sys.argv[1]),))], weights.Memos(Path(sys.argv[2]), 0)))
"""


def test_others_wait_for_the_one_who_reads(tmp_path: Path, reads: Reads) -> None:
    path = grown(tmp_path, {"m": "w"}) / "m"
    started = []

    def start_another(_: str) -> None:
        command = [sys.executable, "-c", WAITER, str(path), str(tmp_path / "memos")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        started.append(process)

    reads.meanwhile = start_another
    ours = content_digest([Files("model", "", (("m", str(path)),))], Memos(tmp_path / "memos", settled_ns=0))
    out, _ = started[0].communicate(timeout=60)
    assert out.strip() == ours
    assert started[0].returncode == 0


# --- have they changed ------------------------------------------------------------------------------------------------


def test_a_process_starts_before_it_looks() -> None:
    code = "from cachesvc.connector.weights import process_start_ns as start; print(start())"
    before = time.time_ns()
    out = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert before - 20_000_000 < int(out) < time.time_ns()
    assert abs(process_start_ns() - process_start_ns()) < 1_000_000_000


@pytest.mark.parametrize("change", ["file", "folder", "link"])
def test_what_changed_after_the_start_is_unknown(change: str, tmp_path: Path) -> None:
    grown(tmp_path / "v1", {"m.safetensors": "w"})
    grown(tmp_path / "v2", {"m.safetensors": "x"})
    link = tmp_path / "latest"
    link.symlink_to("v1")
    time.sleep(0.02)
    started = time.time_ns()
    time.sleep(0.02)
    find(engine(link), started)
    if change == "file":
        (tmp_path / "v1/m.safetensors").write_text("x")
        os.utime(tmp_path / "v1/m.safetensors", (1, 1))
    elif change == "folder":  # both are old, and have changed places
        (tmp_path / "v1").rename(tmp_path / "v0")
        (tmp_path / "v2").rename(tmp_path / "v1")
    else:
        link.unlink()
        link.symlink_to("v2")
    with pytest.raises(WeightsError, match="changed after the engine started"):
        find(engine(link), started)
    find(engine(link), LATER)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert len(list(weights._links(str(tmp_path / "a")))) > 1


# --- in the background ------------------------------------------------------------------------------------------------


def test_identified_in_the_background(tmp_path: Path, reads: Reads) -> None:
    model, go = grown(tmp_path / "m", {"m.safetensors": "w"}), threading.Event()
    reads.meanwhile = lambda _: go.wait(60)
    identified = Identified(engine(model), loaded_ns=LATER, memos=Memos(tmp_path / "memos"))
    assert (identified.result(), identified.error) == (None, "")
    go.set()
    assert identified.wait(60)
    assert identified.result() == identity(model)
    assert identified.error == ""


def test_an_error_in_the_background(tmp_path: Path) -> None:
    identified = Identified(engine(tmp_path), loaded_ns=LATER)
    assert identified.wait(60)
    assert identified.result() is None
    assert identified.error.startswith("no weights in ")


def test_a_fault_in_the_background_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: ended.set())
    identified = Identified(SimpleNamespace(), loaded_ns=LATER)
    assert identified.wait(60)
    assert identified.error == "the thread that identifies the weights failed"
    assert ended.wait(60), "and Python shows where"
