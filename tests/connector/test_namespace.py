"""Digests that never meet: two sets of components, two adapters, two groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.connector.namespace import (
    ADAPTER_BYTES,
    adapter_key,
    digest,
    fingerprint,
    group_component,
    ranks_component,
)
from cachesvc.types import KEY_BYTES_MAX, NAMESPACE_BYTES, user_namespace

COMPONENTS = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=6)
HASHES = st.binary(min_size=32, max_size=36)
ADAPTERS = st.binary(min_size=ADAPTER_BYTES, max_size=ADAPTER_BYTES)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
PAGES = st.lists(st.tuples(st.text(max_size=4), st.integers(1, 1 << 20)), min_size=1, max_size=5)

# --- components -------------------------------------------------------------------------------------------------------


@given(COMPONENTS, COMPONENTS)
def test_only_equal_components_share(a: dict[str, str], b: dict[str, str]) -> None:
    assert len(digest(a)) == NAMESPACE_BYTES
    assert (digest(a) == digest(b)) == (a == b)


@given(COMPONENTS, st.randoms(use_true_random=False))
def test_their_order_does_not_matter(components: dict[str, str], random: object) -> None:
    items = list(components.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert digest(dict(items)) == digest(components)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"ab": "c"}, {"a": "bc"}),
        ({"a": "", "b": ""}, {"a": "b", "": ""}),
        ({"a": "b"}, {"b": "a"}),
        ({"a": "1", "b": "2"}, {"a": "1\x00b2"}),
        ({}, {"": ""}),
    ],
)
def test_what_runs_together_is_told_apart(a: dict[str, str], b: dict[str, str]) -> None:
    assert digest(a) != digest(b)


def test_stays_what_it_was() -> None:
    # an engine of the next release must find the chunks of this one
    assert digest({"weights": "model blake3 00", "epoch": ""}).hex() == "d733260d903af39eaffc426c6030779d"


def test_a_users_namespace_is_never_an_engines() -> None:
    assert digest({}) != user_namespace("") != user_namespace("connector\0")


def test_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        digest({"weights": "\ud800"})


# --- adapters ---------------------------------------------------------------------------------------------------------


@given(HASHES, ADAPTERS, HASHES, ADAPTERS)
def test_keys_of_adapters_never_meet(hash_a: bytes, a: bytes, hash_b: bytes, b: bytes) -> None:
    key_a, key_b = adapter_key(hash_a, a), adapter_key(hash_b, b)
    assert len(key_a) <= KEY_BYTES_MAX
    assert (key_a == key_b) == ((hash_a, a) == (hash_b, b))
    assert key_a != hash_a
    assert key_a.endswith(hash_a[-4:]), "vLLM's group number stays readable"


@pytest.mark.parametrize("adapter", [b"", b"x" * (ADAPTER_BYTES - 1), b"x" * (ADAPTER_BYTES + 1)])
def test_an_adapters_digest_has_one_length(adapter: bytes) -> None:
    with pytest.raises(ValueError, match="has 16 bytes"):
        adapter_key(b"h" * 32, adapter)


@pytest.mark.parametrize("length", [0, KEY_BYTES_MAX - ADAPTER_BYTES + 1])
def test_a_key_has_room_for_both(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 48 bytes"):
        adapter_key(b"h" * length, b"a" * ADAPTER_BYTES)


# --- words ------------------------------------------------------------------------------------------------------------


@given(PLAIN, PLAIN)
def test_fingerprints_are_of_values(a: object, b: object) -> None:
    assert len(fingerprint(a)) == 32
    assert (fingerprint(a) == fingerprint(b)) == (repr_sorted(a) == repr_sorted(b))


def repr_sorted(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{repr_sorted(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(repr_sorted, value)) + "]" if isinstance(value, list) else repr(value)


def test_a_fingerprint_takes_no_objects() -> None:
    with pytest.raises(TypeError):
        fingerprint({"config": object()})


@given(PAGES, PAGES)
def test_groups_of_other_layers_differ(a: list[tuple[str, int]], b: list[tuple[str, int]]) -> None:
    assert (group_component("Full", {}, 16, 2, a) == group_component("Full", {}, 16, 2, b)) == (a == b)


def test_a_group_in_words() -> None:
    words = group_component("Full", {"head_size": "64", "dtype": "float32"}, 128, 2, [("l.0", 4096), ("l.1", 4096)])
    assert words.startswith(
        "Full(dtype=float32, head_size=64), 128 tokens a block, 256 a chunk, 2 layers of 4096 bytes ("
    )


def test_many_page_sizes_stay_short() -> None:
    assert len(group_component("Full", {}, 16, 1, [(f"layer {n}", n) for n in range(1, 200)])) < 200


@given(PAGES, PAGES)
def test_ranks_that_hold_other_parts_differ(a: list[tuple[str, int]], b: list[tuple[str, int]]) -> None:
    assert ranks_component([[a], [b]]).startswith("2 ranks ")
    assert (ranks_component([[a], [b]]) == ranks_component([[b], [a]])) == (a == b)
    assert ranks_component([[a, b]]) != ranks_component([[a], [b]])
