"""Settings: one frozen tree of plain values, and the only file that reads YAML, flags or environment variables.

Covers: the daemon's config (file and flags), its defaults, the relations between its limits, and where a client finds
its daemon. Not here: clocks, arenas and connections (constructor arguments of what uses them), the settings of an
engine (`connector`).

The file, all keys optional (sizes take `8GiB`, `512MiB`, `1GB` or bytes):

    run_dir: /run/cachesvc            # sockets; not root: $XDG_RUNTIME_DIR/cachesvc
    root: /var/lib/cachesvc           # the cache on disk; not root: $XDG_DATA_HOME/cachesvc
    state_dir: /var/lib/cachesvc/state  # the arena's bookkeeping and the lock; default <root>/state
    ram_bytes: 4GiB                   # the arena
    arena_dir: /dev/shm/cachesvc      # where it lies; not root: /dev/shm/cachesvc-<uid>
    extent_bytes: 64MiB               # default: see `default_extent_bytes`
    quarantine_s: 600                 # a slot whose writer can't be known dead is freed after it
    restart_grace_s: 5                # how long clients may name their tickets after a restart
    tenants: [{name: default, group: gpu-users, min_bytes: 0, max_bytes: 4GiB}]
    eviction: arc                     # or lru
    http: {address: "127.0.0.1:8765"}  # "" or off: no HTTP

Every error is one line that names the key, its value and what would do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from cachesvc.errors import ConfigError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

EXTENT_BYTES_MIN: Final = 64 * KIB
"""Each extent costs every client two mappings; and a chunk has half of one at the most."""

EXTENTS_MIN: Final = 2
"""With one extent nothing could ever move between slab classes."""

TENANTS_MAX: Final = 64
"""Each has a socket of its own, and metrics have a label for each."""

SOCKET_PATH_BYTES_MAX: Final = 107
"""`sun_path` of Linux is 108 bytes with its closing zero."""

SECONDS_MAX: Final = 7 * 24 * 3600
"""Longer than any client stays wedged; a larger number is a slip of the pen."""

PORT_MAX: Final = 65535

CONFIG_BYTES_MAX: Final = MIB
"""A config has some lines; this is a device, or another file."""

POLICIES: Final = ("arc", "lru")

_SIZE = re.compile(r"(\d+)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_SIZE_UNITS: Final = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_HTTP_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[\w.-]+):(\d{1,5})", re.ASCII)
_TENANT_NAME = re.compile(r"[a-z0-9-]{1,63}")

_KEYS: Final = (
    "run_dir",
    "state_dir",
    "root",
    "ram_bytes",
    "arena_dir",
    "extent_bytes",
    "quarantine_s",
    "restart_grace_s",
    "tenants",
    "eviction",
    "http",
)
_TENANT_KEYS: Final = ("name", "group", "min_bytes", "max_bytes")
_HTTP_KEYS: Final = ("address",)
_FLAG_KEYS: Final = (*_KEYS, "http.address", "socket")
_PATH_KEYS: Final = ("run_dir", "state_dir", "root", "arena_dir", "socket")

_T = TypeVar("_T")
_D = TypeVar("_D")

# --- the tree ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who shares chunks: everybody who comes through one socket. `min_bytes` of the arena are kept for it."""

    name: str
    group: str | None = None
    """Group (name or number) that may open the socket besides the daemon's user; None = the daemon's own group."""
    min_bytes: int = 0
    max_bytes: int | None = None
    """None = as much as others leave."""


@dataclass(frozen=True, slots=True)
class Http:
    """Where the admin API listens; port 0 = any free one."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """The form that config and flags take."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


HTTP_DEFAULT: Final = Http("127.0.0.1", 8765)
"""Loopback: whoever wants it elsewhere says so."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a daemon is told, checked. Made by `load`; paths are absolute."""

    run_dir: Path
    root: Path
    state_dir: Path
    ram_bytes: int
    arena_dir: Path
    extent_bytes: int | None
    """None = not asked for: an arena that exists keeps what it was made with, a new one gets the default."""
    quarantine_s: float
    restart_grace_s: float
    tenants: tuple[Tenant, ...]
    eviction: str
    http: Http | None
    """None = no HTTP."""
    socket: Path | None = None
    """`--socket`: the path of the only tenant's socket; None = in `run_dir`."""

    @property
    def admin_socket(self) -> Path:
        """The operator's socket (mode 0600), which sees every tenant."""
        return self.run_dir / "admin.sock"

    def socket_path(self, tenant: str) -> Path:
        """The socket of one tenant."""
        return self.socket or self.run_dir / tenant / "cachesvc.sock"


# --- sizes ------------------------------------------------------------------------------------------------------------


def parse_size(value: object) -> int:
    """Bytes of `8GiB`, `512 MiB`, `1GB` (10^9), `4096` or 4096; ValueError with the reason for anything else.

    Fractions are refused: they hide how many bytes are meant.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a size; write whole bytes, or a whole number with a unit, like 8GiB, 512MiB or 1GB")
    number, unit = match.groups()
    for name, bytes_each in _SIZE_UNITS.items():
        if name.lower() == (unit or "B").lower():
            return int(number) * bytes_each
    raise ValueError(f"{unit} is no unit of size; use one of {', '.join(_SIZE_UNITS)}")


def format_size(size_bytes: int) -> str:
    """The shortest exact form that `parse_size` reads back."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _SIZE_UNITS[name] == 0:
            return f"{size_bytes // _SIZE_UNITS[name]}{name}"
    return str(size_bytes)


def default_extent_bytes(ram_bytes: int) -> int:
    """Extent size of a new arena: the power of two nearest (in log2) to `ram_bytes` / 64, within 16 MiB .. 1 GiB.

    64 extents: small enough steps to move memory between slab classes, few enough for every client to map them all.
    """
    extent_bytes = 16 * MIB
    # the next power of two is nearer from extent_bytes * sqrt(2) on; squared, so that whole numbers decide
    while extent_bytes < GIB and ram_bytes**2 >= 2 * (64 * extent_bytes) ** 2:
        extent_bytes *= 2
    return extent_bytes


# --- where things are -------------------------------------------------------------------------------------------------


def client_address(
    argument: str | None,
    environ: Mapping[str, str] = os.environ,
    *,
    uid: int | None = None,
    exists: Callable[[str], bool] = os.path.exists,
) -> str:
    """The socket that a client opens: `argument`, else CACHESVC_ADDRESS, else the first that exists of a pod's mount
    and the default tenant of this user's daemon. The last is the answer when none exists: the daemon may come yet."""
    named = argument or environ.get("CACHESVC_ADDRESS")
    if named:
        return named
    mounted = "/run/cachesvc/cachesvc.sock"
    run_dir = _run_dir(environ, os.geteuid() if uid is None else uid) or Path("/run/cachesvc")
    return mounted if exists(mounted) else str(run_dir / "default" / "cachesvc.sock")


def _run_dir(environ: Mapping[str, str], uid: int) -> Path | None:
    if uid == 0:
        return Path("/run/cachesvc")
    base = environ.get("XDG_RUNTIME_DIR", "")
    return Path(base) / "cachesvc" if base.startswith("/") else None


def _root(environ: Mapping[str, str], uid: int) -> Path | None:
    if uid == 0:
        return Path("/var/lib/cachesvc")
    base, home = environ.get("XDG_DATA_HOME", ""), environ.get("HOME", "")
    if base.startswith("/"):
        return Path(base) / "cachesvc"
    return Path(home) / ".local/share/cachesvc" if home.startswith("/") else None


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where this user keeps what can be made again: `$XDG_CACHE_HOME/cachesvc`, else `~/.cache/cachesvc`."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path(environ.get("HOME", "/")) / ".cache") / "cachesvc"


def hash_seed(environ: Mapping[str, str] = os.environ) -> str:
    """What vLLM seeds its block hashes with; `none` if nothing is set."""
    return environ.get("PYTHONHASHSEED", "none")


def child_environment(changes: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a child process: ours with `changes`; PYTHONPATH is put before ours."""
    child = {**environ, **changes}
    if "PYTHONPATH" in changes and environ.get("PYTHONPATH"):
        child["PYTHONPATH"] = os.pathsep.join((changes["PYTHONPATH"], environ["PYTHONPATH"]))
    return child


# --- reading ----------------------------------------------------------------------------------------------------------


def load(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    environ: Mapping[str, str] = os.environ,
    uid: int | None = None,
) -> Config:
    """The config of a daemon: `overrides` (flags) before the file, the file before the defaults.

    `overrides` has the keys of the file, `http.address` and `socket`; None = the flag wasn't given. Relative paths are
    taken from the working directory in flags and refused in the file. ConfigError for anything unknown, unreadable or
    contradictory.
    """
    settings = {} if path is None else _read_file(path)
    _known(settings, _KEYS, f"config {path}: ")
    _known(overrides, _FLAG_KEYS, "")
    flags = {key: value for key, value in overrides.items() if value is not None}
    for key in flags.keys() & _PATH_KEYS:
        flags[key] = os.path.abspath(given) if (given := str(flags[key])) else ""
    settings = settings | flags
    if "http.address" in settings:
        settings["http"] = {"address": settings.pop("http.address")}
    config = _build(settings, environ, os.geteuid() if uid is None else uid)
    _check_memory(config)
    _check_tenants(config)
    _check_times(config)
    _check_sockets(config)
    return config


def check_extents(config: Config, extent_bytes: int) -> None:
    """ConfigError if the tenants' shares don't fit an arena that was made with extents of this size."""
    if config.extent_bytes is not None:
        return
    try:
        made = replace(config, extent_bytes=extent_bytes)
        _check_memory(made)
        _check_tenants(made)
    except ConfigError as error:
        size = _shown(default_extent_bytes(config.ram_bytes))
        raise ConfigError(
            f"{error}; the arena was made with extents of {_shown(extent_bytes)}: with extent_bytes: {size} it is made "
            f"anew, empty"
        ) from error


def effective(config: Config) -> str:
    """The config as YAML that `load` reads back, with comments for what follows from it."""
    import yaml

    tenants = [
        {"name": tenant.name, "group": tenant.group, "min_bytes": format_size(tenant.min_bytes)}
        | ({} if tenant.max_bytes is None else {"max_bytes": format_size(tenant.max_bytes)})
        for tenant in config.tenants
    ]
    settings = {
        "run_dir": str(config.run_dir),
        "root": str(config.root),
        "state_dir": str(config.state_dir),
        "ram_bytes": format_size(config.ram_bytes),
        "arena_dir": str(config.arena_dir),
        "extent_bytes": None if config.extent_bytes is None else format_size(config.extent_bytes),
        "quarantine_s": config.quarantine_s,
        "restart_grace_s": config.restart_grace_s,
        "tenants": tenants,
        "eviction": config.eviction,
        "http": {"address": config.http.address if config.http else "off"},
    }
    notes = [f"# socket of tenant {t.name}: {config.socket_path(t.name)}\n" for t in config.tenants]
    if config.extent_bytes is None:
        size = format_size(default_extent_bytes(config.ram_bytes))
        notes.insert(0, f"# extent_bytes of a new arena: {size}; one that exists keeps its own\n")
    return yaml.safe_dump(settings, sort_keys=False) + "".join(notes) + f"# admin socket: {config.admin_socket}\n"


def _read_file(path: Path) -> dict[str, object]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice; YAML's own loader lets the last one win in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                name = str(key.value)
                if name in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {name} comes twice")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        with path.open("rb") as file:
            body = file.read(CONFIG_BYTES_MAX + 1)
        if len(body) > CONFIG_BYTES_MAX:
            raise ConfigError(f"config {path}: more than {format_size(CONFIG_BYTES_MAX)}; name a file of settings")
        content = Loader(body.decode("utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}; --config needs a file that can be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: byte {error.start} is no UTF-8; save the file as UTF-8 text") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that doesn't exist
        raise ConfigError(f"config {path}: {_yaml_story(error)}; mend the YAML there") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}: holds {_shown(content)}; write lines like ram_bytes: 8GiB")
    return content


def _yaml_story(error: Exception) -> str:
    """The problem and its place in one line; PyYAML tells them over several."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or " ".join(str(error).split()))


def _build(settings: Mapping[str, object], environ: Mapping[str, str], uid: int) -> Config:
    root = _directory(settings, "root", _root(environ, uid), "neither XDG_DATA_HOME nor HOME is set")
    run_dir = _directory(settings, "run_dir", _run_dir(environ, uid), "XDG_RUNTIME_DIR is not set")
    arena_dir = Path("/dev/shm/cachesvc" if uid == 0 else f"/dev/shm/cachesvc-{uid}")
    return Config(
        run_dir=run_dir,
        root=root,
        state_dir=_read(settings, "state_dir", _path, root / "state"),
        ram_bytes=_read(settings, "ram_bytes", parse_size, 4 * GIB),
        arena_dir=_read(settings, "arena_dir", _path, arena_dir),
        extent_bytes=_read(settings, "extent_bytes", parse_size, None),
        quarantine_s=_read(settings, "quarantine_s", _seconds, 600.0),
        restart_grace_s=_read(settings, "restart_grace_s", _seconds, 5.0),
        tenants=_read(settings, "tenants", _tenants, (Tenant("default"),)),
        eviction=_read(settings, "eviction", _eviction, "arc"),
        http=_read(settings, "http", _http, HTTP_DEFAULT),
        socket=_read(settings, "socket", _path, None),
    )


def _read(
    settings: Mapping[str, object], key: str, parse: Callable[[object], _T], default: _D, prefix: str = ""
) -> _T | _D:
    """`settings[key]` parsed, `default` if it is absent or null; what `parse` finds wrong becomes the error's line."""
    value = settings.get(key)
    if value is None:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{prefix}{key} = {_shown(value)}: {error}") from error


def _directory(settings: Mapping[str, object], key: str, default: Path | None, why_none: str) -> Path:
    directory = _read(settings, key, _path, default)
    if directory is None:
        raise ConfigError(f"{key}: {why_none}, so there is no default; set {key}")
    return directory


def _known(settings: Iterable[object], keys: tuple[str, ...], prefix: str) -> None:
    for key in settings:
        if key not in keys:
            nearest = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{prefix}unknown key {_shown(key)}; the nearest valid one is {nearest}")


def _shown(value: object) -> str:
    """A value as it may stand in a line of text: short and without line breaks."""
    text = format_size(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- one value each: ValueError says what would do --------------------------------------------------------------------


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
        raise ValueError("not an absolute path; write one like /var/lib/cachesvc")
    return Path(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_MAX:
        raise ValueError(f"not a time; write seconds, 0 .. {SECONDS_MAX}")
    return float(value)


def _eviction(value: object) -> str:
    if value not in POLICIES:
        raise ValueError(f"no such policy; {' or '.join(POLICIES)} would do")
    return str(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not _TENANT_NAME.fullmatch(value):
        raise ValueError("not a tenant's name; 1 to 63 of a-z, 0-9 and - would do")
    return value


def _group(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value):
        raise ValueError("not a group; write its name or its number")
    return str(value)


def _http(value: object) -> Http | None:
    if not isinstance(value, dict):
        raise ValueError('not a mapping; write {address: "127.0.0.1:8765"}')
    _known(value, _HTTP_KEYS, "http: ")
    return _read(value, "address", _http_address, HTTP_DEFAULT, "http.")


def _http_address(value: object) -> Http | None:
    if value in ("", "off", False):  # YAML reads a bare off as False
        return None
    match = _HTTP_ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) > PORT_MAX:
        raise ValueError("not an address; write host:port like 127.0.0.1:8765 or [::1]:8765, or off")
    return Http(match[1].strip("[]"), int(match[2]))


def _tenants(value: object) -> tuple[Tenant, ...]:
    if not isinstance(value, list) or not all(isinstance(tenant, dict) for tenant in value):
        raise ValueError("not a list of tenants; write [{name: default}]")
    if not 1 <= len(value) <= TENANTS_MAX:
        raise ValueError(f"{len(value)} tenants; 1 .. {TENANTS_MAX} would do")
    return tuple(_tenant(tenant, f"tenants[{i}].") for i, tenant in enumerate(value))


def _tenant(settings: Mapping[str, object], prefix: str) -> Tenant:
    _known(settings, _TENANT_KEYS, prefix)
    if settings.get("name") is None:
        raise ConfigError(f"{prefix}name: missing; every tenant needs one, like name: default")
    return Tenant(
        name=_read(settings, "name", _name, "", prefix),
        group=_read(settings, "group", _group, None, prefix),
        min_bytes=_read(settings, "min_bytes", parse_size, 0, prefix),
        max_bytes=_read(settings, "max_bytes", parse_size, None, prefix),
    )


# --- relations between values -----------------------------------------------------------------------------------------


def _refuse(key: str, value: object, reason: str) -> NoReturn:
    raise ConfigError(f"{key} = {_shown(value)}: {reason}")


def _check_memory(config: Config) -> None:
    """An extent is a power of two, and there are enough of them."""
    asked = config.extent_bytes
    if asked is not None and asked < EXTENT_BYTES_MIN:
        _refuse("extent_bytes", asked, f"too small to hold chunks; at least {_shown(EXTENT_BYTES_MIN)} would do")
    if asked is not None and asked.bit_count() != 1:
        below = 1 << (asked.bit_length() - 1)
        _refuse("extent_bytes", asked, f"not a power of two; {_shown(below)} or {_shown(2 * below)} would do")
    extent_bytes = asked or default_extent_bytes(config.ram_bytes)
    needed = max(EXTENTS_MIN, len(config.tenants))
    if config.ram_bytes // extent_bytes < needed:
        reason = f"holds less than {needed} extents of {_shown(extent_bytes)} (one a tenant, {EXTENTS_MIN} in any case)"
        least = _shown(needed * extent_bytes)
        _refuse("ram_bytes", config.ram_bytes, f"{reason}; at least {least} would do, or a smaller extent_bytes")


def _check_tenants(config: Config) -> None:
    """Names are unique, minima fit together, every maximum leaves room for an extent. Memory is given by extents."""
    extent_bytes = config.extent_bytes or default_extent_bytes(config.ram_bytes)
    left_bytes = config.ram_bytes // extent_bytes * extent_bytes
    for i, tenant in enumerate(config.tenants):
        key = f"tenants[{i}]"
        if tenant.name in (earlier.name for earlier in config.tenants[:i]):
            _refuse(f"{key}.name", tenant.name, "used before; a name of its own would do")
        max_bytes = config.ram_bytes if tenant.max_bytes is None else tenant.max_bytes
        if not extent_bytes <= max_bytes <= config.ram_bytes:
            span = f"one extent = {_shown(extent_bytes)} .. ram_bytes = {_shown(config.ram_bytes)}"
            _refuse(f"{key}.max_bytes", max_bytes, f"{span} would do")
        if tenant.min_bytes > max_bytes:
            _refuse(f"{key}.min_bytes", tenant.min_bytes, f"more than max_bytes; at most {_shown(max_bytes)} would do")
        reserved_bytes = -(-tenant.min_bytes // extent_bytes) * extent_bytes
        if reserved_bytes > left_bytes:
            reason = f"more than is left of ram_bytes, counted in whole extents of {_shown(extent_bytes)}"
            _refuse(f"{key}.min_bytes", tenant.min_bytes, f"{reason}; at most {_shown(left_bytes)} would do")
        left_bytes -= reserved_bytes


def _check_times(config: Config) -> None:
    """Nothing is freed by time before the clients had their grace to name it."""
    least = config.restart_grace_s
    if config.quarantine_s < least:
        _refuse("quarantine_s", config.quarantine_s, f"shorter than restart_grace_s; at least {least:g} would do")


def _check_sockets(config: Config) -> None:
    """Every path fits a socket's address, and no two are the same."""
    if config.socket is not None and len(config.tenants) > 1:
        _refuse("socket", str(config.socket), "each tenant has its own; leave it out, or configure one tenant")
    if config.socket == config.admin_socket:
        _refuse("socket", str(config.socket), "that is the admin socket; any other path would do")
    for path in (config.admin_socket, *(config.socket_path(tenant.name) for tenant in config.tenants)):
        over = len(os.fsencode(path)) - SOCKET_PATH_BYTES_MAX
        if over > 0:
            key, value = ("socket", config.socket) if path == config.socket else ("run_dir", config.run_dir)
            _refuse(key, str(value), f"{path} is {over} bytes too long for a socket; a shorter {key} would do")
