"""Whether a Hello may come in. (What it opens is used all over tests/core.)"""

from __future__ import annotations

import pytest

from cachesvc.core import events as ev
from cachesvc.core.admission import Admission, Rejected
from tests.support.nodes import CHUNK, Driven


def hello(**changes: object) -> ev.Hello:
    d = Driven(2)
    seen: list[ev.Hello] = []
    d.node._doors[ev.Hello] = lambda event, _now, _out: seen.append(event)
    d.hello(1)
    fields = {name: getattr(seen[0], name) for name in ev.Hello.__dataclass_fields__}
    return ev.Hello(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"tenant": "nobody"}, "protocol", "not configured"),
        ({"session": b"s"}, "protocol", "session id"),
        ({"namespace": b"n"}, "protocol", "digest"),
        ({"chunk_bytes": ()}, "protocol", "KV groups"),
        ({"chunk_bytes": (0,)}, "namespace", "at least 1"),
        ({"chunk_bytes": (CHUNK * 1000,)}, "namespace", "extent_bytes"),
    ],
)
def test_what_can_never_be_opened(changes: dict[str, object], kind: str, word: str) -> None:
    admission: Admission = Driven(2).node.admission
    admission.check(hello())
    with pytest.raises(Rejected, match=word) as refused:
        admission.check(hello(**changes))
    assert refused.value.kind == kind


def test_a_namespace_is_known_by_one_size() -> None:
    d = Driven(2)
    d.hello(1)
    record = d.node.namespaces()[0]
    out: list[ev.Effect] = []
    known = d.node.admission.open(record, 0.0, out)
    assert known is d.node.index.find(record.tenant, record.namespace)
    assert out == [], "it is declared, and saved, already"
    other = ev.NamespaceRecord(record.tenant, record.namespace, record.label, {}, (CHUNK * 2,))
    with pytest.raises(Rejected, match="another namespace for another chunk_bytes"):
        d.node.admission.open(other, 0.0, out)
