"""The daemon's log: one line an event on stderr, and never a flood of the same line.

Covers: the root logger's handler and its limit. Not here: what is logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LINES_MAX: Final = 5
"""Of the same message (before its arguments are filled in), in any `WINDOW_S`."""
WINDOW_S: Final = 10.0


@dataclass(slots=True)
class _Window:
    began: float
    lines: int = 0
    left_out: int = 0


class Seldom(logging.Filter):
    """Lets `LINES_MAX` lines of a message through in each window; the next window's first says how many were left out.

    Messages are literals of our code, so the table of windows stays small. Threads may race for the last line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Is the line written?"""
        now = self._clock()
        window = self._windows.get(str(record.msg))
        if window is None or now >= window.began + WINDOW_S:
            left_out = 0 if window is None else window.left_out
            window = self._windows[str(record.msg)] = _Window(now)
            if left_out:
                record.msg = f"{record.msg} (and {left_out} more like it before)"
        window.lines += 1
        window.left_out += window.lines > LINES_MAX
        return window.lines <= LINES_MAX


def set_up() -> None:
    """Log to stderr from now on. Called once, by the daemon's process."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Seldom())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
