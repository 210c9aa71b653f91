"""Tests mirror the packages; `support` holds fakes and oracles, `sim` the seeded simulation, `golden` fixed bytes."""
