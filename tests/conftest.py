"""What every test run shares: how hypothesis searches. Fakes and helpers are in `tests.support`."""

from __future__ import annotations

from hypothesis import settings

# Time is only a guard against hanging (pytest's own timeout), and a failure prints what replays it.
settings.register_profile("cachesvc", deadline=None, print_blob=True)
settings.load_profile("cachesvc")
