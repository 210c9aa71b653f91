"""Shares of tenants in whole extents: who may grow, give and receive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachesvc.core.quota import Quotas, TenantQuota

MIB = 1 << 20


def quotas(extents_max: int, *tenants: tuple[str, int, int | None]) -> Quotas:
    return Quotas(tuple(TenantQuota(*tenant) for tenant in tenants), MIB, extents_max)


def test_who_is_known() -> None:
    q = quotas(4, ("t", 0, None))
    assert q.knows("t")
    assert not q.knows("u")


def test_minima_are_rounded_up_and_maxima_down() -> None:
    q = quotas(10, ("t", MIB + 1, 3 * MIB - 1))
    assert [q.entitled("t", {"t": n}) for n in (0, 1, 2)] == [True, True, False]
    assert [q.left("t", {"t": n}) for n in (0, 1, 2)] == [2, 1, 0]
    assert [q.may_receive("t", {"t": n}) for n in (0, 1, 2)] == [True, True, False]
    assert [q.may_give("t", {"t": n}) for n in (2, 3)] == [False, True]


def test_a_maximum_below_one_extent_is_one_extent() -> None:
    q = quotas(4, ("t", 0, 10))
    assert q.left("t", {}) > 0
    assert q.left("t", {"t": 1}) <= 0


def test_what_others_are_guaranteed_and_lack_is_not_taken() -> None:
    q = quotas(5, ("t", 0, None), ("u", 2 * MIB, None), ("v", MIB, None))
    assert q.left("t", {"t": 1}) > 0
    assert q.left("t", {"t": 2}) <= 0
    assert q.left("t", {"t": 2, "u": 2}) <= 0
    assert q.left("t", {"t": 1, "u": 2}) > 0
    assert q.left("u", {"t": 2}) > 0, "its own guarantee is no hindrance"
    assert q.left("u", {"t": 2, "u": 2}) <= 0
    assert q.left("u", {"t": 5}) <= 0


def test_who_damages_its_memory_has_its_even_share_or_what_it_is_guaranteed() -> None:
    q = quotas(9, ("t", 0, None), ("u", 4 * MIB, 5 * MIB), ("v", 0, 2 * MIB))
    assert [q.left(name, {}) for name in "tuv"] == [5, 5, 2]
    assert [q.left(name, {}, damaged=True) for name in "tuv"] == [3, 4, 2]


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12) | st.none()), min_size=1, max_size=4),
    st.data(),
)
def test_growing_never_takes_what_is_guaranteed(
    extents_max: int, shares: list[tuple[int, int | None]], data: st.DataObject
) -> None:
    total = sum(least for least, _ in shares)
    names = "tuvw"[: len(shares)]
    tenants = [
        (name, least * MIB, None if most is None else max(least, most) * MIB)
        for name, (least, most) in zip(names, shares, strict=True)
    ]
    q = quotas(max(extents_max, total), *tenants)
    used: dict[str, int] = {}
    for name in data.draw(st.lists(st.sampled_from(names), max_size=40)):
        if q.left(name, used) > 0:
            used[name] = used.get(name, 0) + 1
    assert sum(used.values()) <= q.extents_max
    for name, (least, _) in zip(names, shares, strict=True):
        while used.get(name, 0) < least:
            assert q.left(name, used) > 0, "a guarantee can always be met"
            used[name] = used.get(name, 0) + 1
