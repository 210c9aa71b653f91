"""No flood of the same line."""

from __future__ import annotations

import logging
import subprocess
import sys

from cachesvc.daemon.logs import LINES_MAX, WINDOW_S, Seldom


def line(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "file", 1, text, args, None)


def test_the_same_message_is_limited_whatever_its_arguments() -> None:
    now = [0.0]
    seldom = Seldom(lambda: now[0])
    through = [seldom.filter(line("lost %d", n)) for n in range(LINES_MAX + 7)]
    assert through == [True] * LINES_MAX + [False] * 7
    assert seldom.filter(line("something else"))
    now[0] = WINDOW_S
    first = line("lost %d", 99)
    assert seldom.filter(first)
    assert first.getMessage() == "lost 99 (and 7 more like it before)"
    second = line("lost %d", 100)
    assert seldom.filter(second)
    assert second.getMessage() == "lost 100"


def test_lines_on_stderr() -> None:
    code = "import logging; from cachesvc.daemon import logs; logs.set_up(); logging.getLogger('a.b').info('so %d', 1)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.endswith(" INFO a.b: so 1\n")
    assert run.stderr.count("\n") == 1
