"""Every exception of cachesvc: one root, kinds by what the caller should do.

"No" is a value (`types.KeyState`, `types.AllocateState`), never an exception.
"""

from __future__ import annotations


class CachesvcError(Exception):
    """Root. Its text is one line that says what happened and what to do."""


class OperatorError(CachesvcError):
    """The daemon can't start or go on until an operator changes something; `cachesvc` prints it and exits 2."""


class ConfigError(OperatorError):
    """A setting is unknown or has a value that can't be used."""


class ProtocolError(CachesvcError):
    """The peer sent bytes that break the wire protocol: its connection is told why and closed."""


class FormatError(CachesvcError):
    """Bytes on a medium aren't what their format says; the thing they describe is dropped (a miss)."""
