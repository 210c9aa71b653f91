"""Exceptions: one root, and kinds that say who has to act."""

from __future__ import annotations

import inspect

import pytest

from cachesvc import errors
from cachesvc.errors import CachesvcError, ConfigError, FormatError, OperatorError, ProtocolError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_one_root(kind: type[Exception]) -> None:
    assert issubclass(kind, CachesvcError)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_line_that_is_shown(kind: type[Exception]) -> None:
    assert str(kind("what happened; what to do")) == "what happened; what to do"
    assert kind.__doc__


def test_an_operator_mends_settings_but_not_peers_or_media() -> None:
    assert issubclass(ConfigError, OperatorError)
    assert not issubclass(ProtocolError, OperatorError)
    assert not issubclass(FormatError, OperatorError)


def test_no_kind_is_caught_by_accident() -> None:
    """A handler of a built-in exception (a full disk, a bad value of ours) must not swallow one of these."""
    assert all(kind.__mro__[-3:] == (Exception, BaseException, object) for kind in KINDS)
    assert not any(issubclass(kind, ValueError | OSError | RuntimeError) for kind in KINDS)
