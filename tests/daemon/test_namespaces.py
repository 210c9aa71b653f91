"""The file of namespaces: what is saved comes back, what can't be understood says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.core.events import NamespaceRecord
from cachesvc.daemon import namespaces
from cachesvc.errors import FormatError

records = st.builds(
    NamespaceRecord,
    tenant=st.text("abc-", min_size=1, max_size=8),
    namespace=st.binary(min_size=16, max_size=16),
    label=st.text(max_size=20),
    components=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
    chunk_bytes=st.lists(st.integers(1, 1 << 31), min_size=1, max_size=4).map(tuple),
)


def name_of(record: NamespaceRecord) -> tuple[str, bytes]:
    return record.tenant, record.namespace


def named(number: int, **fields: Any) -> NamespaceRecord:
    usual: dict[str, Any] = {"label": "l", "components": {"c": "x" * 100}, "chunk_bytes": (4096,)}
    return NamespaceRecord("t", b"%16d" % number, **(usual | fields))


@given(st.lists(records, max_size=4, unique_by=name_of))
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, saved: list[NamespaceRecord]) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    namespaces.save(state_dir, [])
    namespaces.save(state_dir, saved)
    assert namespaces.load(state_dir) == tuple(saved)
    assert [path.name for path in state_dir.iterdir()] == [namespaces.FILE_NAME]


def test_no_file_is_no_namespaces(tmp_path: Path) -> None:
    assert namespaces.load(tmp_path) == ()


def one(namespace: str, chunk_bytes: list[int]) -> bytes:
    """A file of one namespace."""
    record = {"tenant": "a", "namespace": namespace, "label": "", "components": {}, "chunk_bytes": chunk_bytes}
    return json.dumps({"format": 1, "namespaces": [record]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"format": 2, "namespaces": []}',
        b'{"format": 1, "namespaces": [{"tenant": "a"}]}',
        one("xx", [1]),
        # no daemon writes such values, and none must stumble over them
        one("00", [1]),
        one("00" * 17, [1]),
        one("00" * 16, []),
        one("00" * 16, [1] * 65),
        one("00" * 16, [0]),
        one("00" * 16, [4096, -1]),
        one("00" * 16, [1 << 40]),
        one("00" * 16, [True]),
    ],
)
def test_anything_else_is_a_format_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / namespaces.FILE_NAME).write_bytes(content)
    with pytest.raises(FormatError, match=r"namespaces\.json"):
        namespaces.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    namespaces.save(tmp_path, [])
    before = (tmp_path / namespaces.FILE_NAME).read_bytes()
    (tmp_path / "namespaces.new").mkdir()
    with pytest.raises(OSError, match=r"namespaces\.new"):
        namespaces.save(tmp_path, [])
    assert (tmp_path / namespaces.FILE_NAME).read_bytes() == before


# --- while the daemon runs ------------------------------------------------------------------------------------------


@given(st.lists(st.lists(records, min_size=1, max_size=3, unique_by=name_of), min_size=1, max_size=4))
def test_what_is_kept_comes_back(tmp_path_factory: pytest.TempPathFactory, steps: list[list[NamespaceRecord]]) -> None:
    """At every moment: a kill may come after any of these calls."""
    state_dir = tmp_path_factory.mktemp("state")
    register = namespaces.Register(state_dir)
    known: dict[tuple[str, bytes], NamespaceRecord] = {}
    for step in steps:
        known |= {name_of(record): record for record in step}
        register.keep(known.values())
        assert {name_of(record): record for record in namespaces.load(state_dir)} == known


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    register = namespaces.Register(tmp_path)
    known = [named(n) for n in range(100)]
    register.keep(known)
    before = (tmp_path / namespaces.FILE_NAME).read_bytes()
    fresh = named(100)
    register.keep([*known, fresh])
    after = (tmp_path / namespaces.FILE_NAME).read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1
    assert namespaces.load(tmp_path) == (*known, fresh)


def test_one_that_was_forgotten_and_came_again_has_its_new_sizes(tmp_path: Path) -> None:
    register = namespaces.Register(tmp_path)
    register.keep([named(1), named(2)])
    register.keep([named(2)])
    register.keep([named(2), named(1, chunk_bytes=(8192,))])
    assert named(1, chunk_bytes=(8192,)) in namespaces.load(tmp_path)


def test_a_file_that_was_appended_to_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Namespaces that come and go don't make it grow for ever."""
    monkeypatch.setattr(namespaces, "APPENDED_BYTES_MIN", 1000)
    register = namespaces.Register(tmp_path)
    sizes = []
    for n in range(200):
        register.keep([named(n)])
        sizes.append((tmp_path / namespaces.FILE_NAME).stat().st_size)
    assert max(sizes) < 1500
    assert named(199) in namespaces.load(tmp_path)


def test_a_line_that_a_kill_cut_off_is_not_there(tmp_path: Path) -> None:
    register = namespaces.Register(tmp_path)
    register.keep([named(1)])
    register.keep([one := named(1), two := named(2)])
    file = tmp_path / namespaces.FILE_NAME
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        assert namespaces.load(tmp_path) == (one,)
    file.write_bytes(whole)
    assert namespaces.load(tmp_path) == (one, two)


def test_after_a_write_that_failed_everything_is_written(tmp_path: Path) -> None:
    register = namespaces.Register(tmp_path)
    one, two = named(1), named(2)
    register.keep([one])
    state_dir = tmp_path.rename(tmp_path.with_suffix(".away"))
    with pytest.raises(OSError, match=r"namespaces\.json"):
        register.keep([one, two])
    state_dir.rename(tmp_path)
    file = tmp_path / namespaces.FILE_NAME
    file.write_bytes(file.read_bytes() + b"half a line")
    register.keep([one, two])
    assert namespaces.load(tmp_path) == (one, two)
