"""The file of namespaces: what is saved comes back, what can't be understood says so."""

from __future__ import annotations

import json
from pathlib import Path

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


@given(st.lists(records, max_size=4))
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, saved: list[NamespaceRecord]) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    namespaces.save(state_dir, [])
    namespaces.save(state_dir, saved)
    assert namespaces.load(state_dir) == tuple(saved)
    assert [path.name for path in state_dir.iterdir()] == [namespaces.FILE_NAME]


def test_no_file_is_no_namespaces(tmp_path: Path) -> None:
    assert namespaces.load(tmp_path) == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"format": 2, "namespaces": []}',
        b'{"format": 1, "namespaces": [{"tenant": "a"}]}',
        json.dumps(
            {
                "format": 1,
                "namespaces": [
                    {"tenant": "a", "namespace": "xx", "label": "", "components": {}, "chunk_bytes": [1]},
                ],
            }
        ).encode(),
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
