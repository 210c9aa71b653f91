"""Settings: sizes, defaults for root and others, flags over file, every error line, where a client finds its daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.config import (
    GIB,
    KIB,
    MIB,
    Config,
    Http,
    Tenant,
    cache_dir,
    check_extents,
    child_environment,
    client_address,
    default_extent_bytes,
    effective,
    format_size,
    hash_seed,
    load,
    parse_size,
)
from cachesvc.errors import ConfigError

USER = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_DATA_HOME": "/data/u", "HOME": "/users/u"}


def configured(tmp_path: Path, text: str, flags: Mapping[str, object] | None = None) -> Config:
    """The config of a file with this text, read as root."""
    path = tmp_path / "cachesvc.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, flags or {}, environ={}, uid=0)


def flagged(uid: int = 0, environ: Mapping[str, str] | None = None, **flags: object) -> Config:
    return load(None, flags, environ=environ or {}, uid=uid)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("512MiB", 512 * MIB),
        ("512 MiB", 512 * MIB),
        (" 4kib ", 4 * KIB),
        ("1GB", 10**9),
        ("1kB", 1000),
        ("2tb", 2 * 10**12),
        ("4096", 4096),
        ("17B", 17),
        (4096, 4096),
        (0, 0),
    ],
)
def test_size(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1.5GiB", "-1", "1e9", "0x10", "8 G iB", "٣", "1_000", -1, 1.0, True, None, [], b"8GiB"]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="not a size; write whole bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8Gi", "8G", "8bytes", "8PiB"])
def test_unit_that_does_not_exist_lists_those_that_do(text: str) -> None:
    with pytest.raises(ValueError, match="is no unit of size; use one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_size_round_trip(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "\n" not in str(error).replace(text, "")


@given(st.integers(min_value=1, max_value=1 << 50))
def test_default_extent_is_the_nearest_power_of_two(ram_bytes: int) -> None:
    extent_bytes = default_extent_bytes(ram_bytes)
    assert extent_bytes.bit_count() == 1
    assert 16 * MIB <= extent_bytes <= GIB
    # nearest in log2 = within a factor of sqrt(2), unless an end of the range is nearer
    square = Fraction(64 * extent_bytes, ram_bytes) ** 2
    assert square <= 2 or extent_bytes == 16 * MIB
    assert square >= Fraction(1, 2) or extent_bytes == GIB


def test_default_extent_at_known_sizes() -> None:
    pairs = [(MIB, 16 * MIB), (GIB, 16 * MIB), (4 * GIB, 64 * MIB), (5 * GIB, 64 * MIB), (6 * GIB, 128 * MIB)]
    assert [default_extent_bytes(ram) for ram, _ in pairs] == [extent for _, extent in pairs]
    assert default_extent_bytes(1 << 45) == GIB


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_of_root() -> None:
    config = flagged()
    assert config == Config(
        run_dir=Path("/run/cachesvc"),
        root=Path("/var/lib/cachesvc"),
        state_dir=Path("/var/lib/cachesvc/state"),
        ram_bytes=4 * GIB,
        arena_dir=Path("/dev/shm/cachesvc"),
        extent_bytes=None,
        quarantine_s=600,
        restart_grace_s=5,
        tenants=(Tenant("default", group=None, min_bytes=0, max_bytes=None),),
        eviction="arc",
        http=Http("127.0.0.1", 8765),
        socket=None,
    )
    assert config.admin_socket == Path("/run/cachesvc/admin.sock")
    assert config.socket_path("default") == Path("/run/cachesvc/default/cachesvc.sock")


def test_defaults_of_another_user() -> None:
    config = flagged(uid=7, environ=USER)
    assert config.run_dir == Path("/run/user/7/cachesvc")
    assert config.root == Path("/data/u/cachesvc")
    assert config.state_dir == Path("/data/u/cachesvc/state")
    assert config.arena_dir == Path("/dev/shm/cachesvc-7")


def test_data_home_has_the_default_of_the_xdg_specification() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_DATA_HOME": "relative is to be ignored", "HOME": "/users/u"}
    assert flagged(uid=7, environ=environ).root == Path("/users/u/.local/share/cachesvc")


def test_no_default_directory() -> None:
    with pytest.raises(ConfigError, match=r"^root: neither XDG_DATA_HOME nor HOME is set, so .* set root$"):
        flagged(uid=7, environ={"XDG_RUNTIME_DIR": "/run/user/7"})
    with pytest.raises(ConfigError, match=r"^run_dir: XDG_RUNTIME_DIR is not set, so .* set run_dir$"):
        flagged(uid=7, environ={"HOME": "/users/u"})
    config = flagged(uid=7, root="/r", run_dir="/s")
    assert (config.root, config.run_dir) == (Path("/r"), Path("/s"))


# --- file and flags ---------------------------------------------------------------------------------------------------


def test_every_key_of_the_file(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        """
        run_dir: /r
        root: /c
        state_dir: /s
        ram_bytes: 1GiB
        arena_dir: /mnt/arena
        extent_bytes: 32MiB
        quarantine_s: 60
        restart_grace_s: 0.5
        tenants:
        - {name: blue, group: gpu-users, min_bytes: 64MiB, max_bytes: 512MiB}
        - {name: red-2, group: 1000}
        eviction: lru
        http: {address: "[::1]:0"}
        """,
    )
    assert config == Config(
        run_dir=Path("/r"),
        root=Path("/c"),
        state_dir=Path("/s"),
        ram_bytes=GIB,
        arena_dir=Path("/mnt/arena"),
        extent_bytes=32 * MIB,
        quarantine_s=60,
        restart_grace_s=0.5,
        tenants=(Tenant("blue", "gpu-users", 64 * MIB, 512 * MIB), Tenant("red-2", "1000", 0, None)),
        eviction="lru",
        http=Http("::1", 0),
    )
    assert config.http is not None
    assert config.http.address == "[::1]:0"


def test_the_example_in_the_docstring_is_valid(tmp_path: Path) -> None:
    doc = sys.modules["cachesvc.config"].__doc__ or ""
    example = "".join(line + "\n" for line in doc.splitlines() if line.startswith("    "))
    assert configured(tmp_path, example).tenants[0].group == "gpu-users"


@pytest.mark.parametrize("text", ["", "# nothing\n", "ram_bytes:\nhttp:\ntenants:\n", "http: {}\n"])
def test_absent_and_null_mean_the_default(tmp_path: Path, text: str) -> None:
    assert configured(tmp_path, text) == flagged()


@pytest.mark.parametrize("text", ["off", '"off"', '""', "false"])
def test_http_off(tmp_path: Path, text: str) -> None:
    assert configured(tmp_path, f"http: {{address: {text}}}").http is None


def test_flags_override_the_file(tmp_path: Path) -> None:
    text = "root: /c\nram_bytes: 1GiB\nhttp: {address: '127.0.0.1:1'}\n"
    flags = {"ram_bytes": "2GiB", "http.address": "127.0.0.1:2", "root": None, "socket": "/s/x.sock"}
    config = configured(tmp_path, text, flags)
    assert (config.root, config.ram_bytes, config.http) == (Path("/c"), 2 * GIB, Http("127.0.0.1", 2))
    assert config.socket_path("default") == Path("/s/x.sock")


def test_flags_may_be_relative_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert flagged(root="cache", state_dir=Path("state")).root == tmp_path / "cache"
    assert flagged(root="cache", state_dir=Path("state")).state_dir == tmp_path / "state"


def test_state_dir_follows_the_root() -> None:
    assert flagged(root="/elsewhere").state_dir == Path("/elsewhere/state")


def test_merged_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = "tenants:\n- &a {name: a, min_bytes: 64MiB}\n- {<<: *a, name: b}\n"
    assert configured(tmp_path, text).tenants == (Tenant("a", None, 64 * MIB), Tenant("b", None, 64 * MIB))


# --- errors: one line each, with the key, the value and what would do -------------------------------------------------

WRONG_VALUES = [
    ("ram_bites: 1GiB", "unknown key 'ram_bites'; the nearest valid one is ram_bytes"),
    ("socket: /x", "unknown key 'socket'; the nearest valid one is"),
    ("7: 1", "unknown key 7; the nearest valid one is"),
    ("tenants: [{name: a, max: 1}]", "tenants[0].unknown key 'max'; the nearest valid one is max_bytes"),
    ("http: {adress: x}", "http: unknown key 'adress'; the nearest valid one is address"),
    ("ram_bytes: 8Gi", "ram_bytes = '8Gi': Gi is no unit of size; use one of B, KiB"),
    ("ram_bytes: lots", "ram_bytes = 'lots': not a size; write whole bytes"),
    ("ram_bytes: 1.5", "ram_bytes = 1.5: not a size; write whole bytes"),
    ("ram_bytes: 31MiB", "holds less than 2 extents of 16MiB (one a tenant, 2 in any case); at least 32MiB"),
    ("{ram_bytes: 1GiB, extent_bytes: 1GiB}", "at least 2GiB would do, or a smaller extent_bytes"),
    ("{ram_bytes: 32MiB, tenants: [{name: a}, {name: b}, {name: c}]}", "less than 3 extents of 16MiB"),
    ("extent_bytes: 2KiB", "extent_bytes = 2KiB: too small to hold chunks; at least 64KiB would do"),
    ("extent_bytes: 0", "extent_bytes = 0: too small to hold chunks; at least 64KiB would do"),
    ("extent_bytes: 48MiB", "extent_bytes = 48MiB: not a power of two; 32MiB or 64MiB would do"),
    ("root: data", "root = 'data': not an absolute path; write one like /var/lib/cachesvc"),
    ("root: 3", "root = 3: not an absolute path"),
    (r'root: "/a\nb"', r"root = '/a\nb': not an absolute path"),
    ("quarantine_s: soon", "quarantine_s = 'soon': not a time; write seconds, 0 .. 604800"),
    ("quarantine_s: .nan", "quarantine_s = nan: not a time"),
    ("quarantine_s: 1e10", "quarantine_s = '1e10': not a time"),
    ("restart_grace_s: -1", "restart_grace_s = -1: not a time"),
    ("restart_grace_s: yes", "restart_grace_s = True: not a time"),
    ("quarantine_s: 4", "quarantine_s = 4.0: shorter than restart_grace_s; at least 5 would do"),
    ("eviction: fifo", "eviction = 'fifo': no such policy; arc or lru would do"),
    ("eviction: [arc]", "eviction = ['arc']: no such policy"),
    ("tenants: default", "tenants = 'default': not a list of tenants; write [{name: default}]"),
    ("tenants: [default]", "tenants = ['default']: not a list of tenants"),
    ("tenants: []", "tenants = []: 0 tenants; 1 .. 64 would do"),
    ("tenants: [{group: g}]", "tenants[0].name: missing; every tenant needs one, like name: default"),
    ("tenants: [{name: A}]", "tenants[0].name = 'A': not a tenant's name; 1 to 63 of a-z, 0-9 and - would do"),
    ("tenants: [{name: ../x}]", "tenants[0].name = '../x': not a tenant's name"),
    ("tenants: [{name: 5}]", "tenants[0].name = 5: not a tenant's name"),
    ('tenants: [{name: "a\\n"}]', r"tenants[0].name = 'a\n': not a tenant's name"),
    ("tenants: [{name: a}, {name: a}]", "tenants[1].name = 'a': used before; a name of its own would do"),
    ("tenants: [{name: a, group: []}]", "tenants[0].group = []: not a group; write its name or its number"),
    ("tenants: [{name: a, min_bytes: x}]", "tenants[0].min_bytes = 'x': not a size"),
    ("tenants: [{name: a, max_bytes: 1KiB}]", "max_bytes = 1KiB: one extent = 64MiB .. ram_bytes = 4GiB would do"),
    ("tenants: [{name: a, max_bytes: 5GiB}]", "[0].max_bytes = 5GiB: one extent = 64MiB .. ram_bytes = 4GiB"),
    ("tenants: [{name: a, min_bytes: 2GiB, max_bytes: 1GiB}]", "= 2GiB: more than max_bytes; at most 1GiB would do"),
    (
        "tenants: [{name: a, min_bytes: 3GiB}, {name: b, min_bytes: 2GiB}]",
        "[1].min_bytes = 2GiB: more than is left of ram_bytes, counted in whole extents of 64MiB; at most 1GiB",
    ),
    ("http: 127.0.0.1:80", "http = '127.0.0.1:80': not a mapping; write {address: \"127.0.0.1:8765\"}"),
    ("http: {address: localhost}", "http.address = 'localhost': not an address; write host:port like 127.0.0.1:8765"),
    ("http: {address: 8765}", "http.address = 8765: not an address"),
    ('http: {address: ":80"}', "http.address = ':80': not an address"),
    ('http: {address: "a:65536"}', "http.address = 'a:65536': not an address"),
    ('http: {address: "::1:80"}', "= '::1:80': not an address; write host:port like 127.0.0.1:8765 or [::1]:8765"),
    (f"run_dir: /{'d' * 90}", "cachesvc.sock is 6 bytes too long for a socket; a shorter run_dir would do"),
    ("just words", "holds 'just words'; write lines like ram_bytes: 8GiB"),
    ("[1, 2]", "holds [1, 2]; write lines like ram_bytes: 8GiB"),
    ("a: b: c", "line 1, column 5: mapping values are not allowed here; mend the YAML there"),
    ("ram_bytes: 1GiB\nroot: /c\nram_bytes: 2GiB", "line 3: ram_bytes comes twice; mend the YAML there"),
    ("{[a]: 1}", "found unhashable key; mend the YAML there"),
    ("--- 1\n--- 2", "line 2, column 1: but found another document"),
    ("ram_bytes: 2026-13-01", "month must be in 1..12; mend the YAML there"),
    ("!!map ab", "expected a mapping node, but found scalar; mend the YAML there"),
    ("ram_bytes: !!python/none", "could not determine a constructor for the tag"),
    ("ram_bytes: \x07", "mend the YAML there"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), WRONG_VALUES, ids=[text.splitlines()[0] for text, _ in WRONG_VALUES])
def test_error_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"ram": "1GiB"}, "unknown key 'ram'; the nearest valid one is"),
        ({"root": ""}, "root = '': not an absolute path"),
        ({"socket": "/run/cachesvc/admin.sock"}, "socket = '/run/cachesvc/admin.sock': that is the admin socket"),
        ({"socket": "/" + "s" * 107}, "1 bytes too long for a socket; a shorter socket would do"),
        (
            {"socket": "/s", "tenants": [{"name": "a"}, {"name": "b"}]},
            "socket = '/s': each tenant has its own; leave it out, or configure one tenant",
        ),
    ],
)
def test_error_line_of_flags(flags: Mapping[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, flags, environ={}, uid=0)
    assert line in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file or directory; --config needs a file"):
        load(tmp_path / "none.yaml", {})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path, {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"ram_bytes: \xff")
    with pytest.raises(ConfigError, match="byte 11 is no UTF-8; save the file as UTF-8 text"):
        load(binary, {})


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        flagged(eviction="x" * 1000)
    assert len(str(caught.value)) < 200


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["ram_bytes", "extent_bytes", "tenants", "http", "eviction", "quarantine_s", "socket", "group"]
        ),
        YAML_VALUES | st.lists(st.fixed_dictionaries({}, optional={"name": YAML_VALUES, "min_bytes": YAML_VALUES})),
        max_size=3,
    )
)
def test_any_value_is_taken_or_a_config_error(flags: dict[str, Any]) -> None:
    try:
        load(None, flags, environ={}, uid=0)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


def test_a_file_without_end_is_no_config() -> None:
    with pytest.raises(ConfigError, match=r"config /dev/zero: more than 1MiB; name a file of settings"):
        load(Path("/dev/zero"), {}, environ={}, uid=0)


# --- an arena that exists ---------------------------------------------------------------------------------------------


def test_shares_must_fit_the_extents_that_an_arena_was_made_with(tmp_path: Path) -> None:
    """Three minima of 300 MiB in 1 GiB: in extents of 16 MiB they fit, in extents of 256 MiB each takes 512 MiB."""
    three = "[{name: a, min_bytes: 300MiB}, {name: b, min_bytes: 300MiB}, {name: c, min_bytes: 300MiB}]"
    config = configured(tmp_path, f"{{ram_bytes: 1GiB, tenants: {three}}}")
    check_extents(config, 16 * MIB)
    with pytest.raises(ConfigError) as refusal:
        check_extents(config, 256 * MIB)
    line = str(refusal.value)
    assert "tenants[2].min_bytes = 300MiB: more than is left of ram_bytes" in line
    assert "the arena was made with extents of 256MiB: with extent_bytes: 16MiB it is made anew, empty" in line
    check_extents(configured(tmp_path, "{ram_bytes: 1GiB, extent_bytes: 256MiB}"), 256 * MIB)


# --- what is in force -------------------------------------------------------------------------------------------------


@given(
    st.builds(
        lambda extents, exponent, given, minimum, grace, eviction, http: {
            "ram_bytes": extents << exponent,
            "extent_bytes": 1 << exponent,
            "tenants": [{"name": "a", "group": "g", "min_bytes": minimum << exponent}, {"name": "b", **given}],
            "restart_grace_s": grace,
            "eviction": eviction,
            "http": {"address": http},
        },
        st.integers(4, 99),
        st.integers(16, 34),
        st.sampled_from([{}, {"max_bytes": 1 << 34 << 2}, {"group": 5}]).map(dict),
        st.integers(0, 4),
        st.floats(0, 600),
        st.sampled_from(["arc", "lru"]),
        st.sampled_from(["off", "127.0.0.1:0", "[::1]:8765", "node.local:80"]),
    )
)
def test_effective_reads_back(flags: dict[str, Any]) -> None:
    flags["tenants"][1].pop("max_bytes", None)
    config = load(None, flags, environ={}, uid=0)
    assert load(None, yaml.safe_load(effective(config)), environ={}, uid=0) == config


def test_effective_says_where_the_sockets_are() -> None:
    text = effective(flagged(socket="/s/x.sock"))
    assert "# socket of tenant default: /s/x.sock\n" in text
    assert text.endswith("# admin socket: /run/cachesvc/admin.sock\n")
    assert "ram_bytes: 4GiB\n" in text


# --- clients ----------------------------------------------------------------------------------------------------------

MOUNTED = "/run/cachesvc/cachesvc.sock"


@pytest.mark.parametrize(
    ("argument", "environ", "uid", "existing", "address"),
    [
        ("/a", {"CACHESVC_ADDRESS": "/b"}, 0, {MOUNTED}, "/a"),
        (None, {"CACHESVC_ADDRESS": "/b"}, 0, {MOUNTED}, "/b"),
        ("", {"CACHESVC_ADDRESS": ""}, 0, {MOUNTED}, MOUNTED),
        (None, {}, 0, set(), "/run/cachesvc/default/cachesvc.sock"),
        (None, USER, 7, {MOUNTED, "/run/user/7/cachesvc/default/cachesvc.sock"}, MOUNTED),
        (None, USER, 7, set(), "/run/user/7/cachesvc/default/cachesvc.sock"),
        (None, {}, 7, set(), "/run/cachesvc/default/cachesvc.sock"),
    ],
)
def test_client_address(
    argument: str | None, environ: dict[str, str], uid: int, existing: set[str], address: str
) -> None:
    assert client_address(argument, environ, uid=uid, exists=existing.__contains__) == address


def test_client_and_daemon_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing configured a client looks where the daemon of the same user listens."""
    for uid in (0, 7):
        daemon = load(None, {}, environ=USER, uid=uid)
        assert client_address(None, USER, uid=uid, exists=lambda path: False) == str(daemon.socket_path("default"))
    monkeypatch.setenv("CACHESVC_ADDRESS", str(tmp_path))
    assert client_address(None) == str(tmp_path)


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/cachesvc"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/cachesvc"),
        ({}, "/.cache/cachesvc"),
    ],
)
def test_cache_dir(environ: dict[str, str], path: str) -> None:
    assert cache_dir(environ) == Path(path)


def test_child_environment() -> None:
    ours = {"A": "1", "B": "2"}
    assert child_environment({"B": "3", "PYTHONPATH": "/x"}, ours) == {"A": "1", "B": "3", "PYTHONPATH": "/x"}
    assert child_environment({"PYTHONPATH": "/x"}, {"PYTHONPATH": "/y"}) == {"PYTHONPATH": "/x:/y"}
    assert child_environment({}, {"PYTHONPATH": "/y"}) == {"PYTHONPATH": "/y"}
    assert ours == {"A": "1", "B": "2"}


def test_importing_config_does_not_import_yaml() -> None:
    """An engine's process imports `config` for the address alone."""
    code = "import sys, cachesvc.config as config; config.client_address(None); sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


# --- an engine's environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environ", "seed"), [({}, "none"), ({"PYTHONHASHSEED": "7"}, "7")])
def test_hash_seed(environ: dict[str, str], seed: str) -> None:
    assert hash_seed(environ) == seed
