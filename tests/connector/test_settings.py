"""What users may set, and which vLLM is theirs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cachesvc.connector.settings import READ, TRIED, VLLMS_OWN, Settings, check_version


def test_defaults() -> None:
    assert Settings.read({}) == Settings(None, 2000, 256, "fresh", "")


def test_all_of_ours() -> None:
    extra = {"address": "/s", "load_deadline_ms": 0.5, "min_load_tokens": 0, "on_reset": "keep", "reset_epoch": "e"}
    assert Settings.read(extra) == Settings("/s", 0.5, 0, "keep", "e")


def test_what_is_vllms_passes() -> None:
    assert Settings.read(dict.fromkeys(VLLMS_OWN, "anything")) == Settings()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("adress", "address"),
        ("load_deadline", "load_deadline_ms"),
        ("blocks_per_chunks", "blocks_per_chunk"),
        ("offload_prompts_only", "offload_prompt_only"),
        ("onreset", "on_reset"),
        ("\u00fc", ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is not known, did you mean '{nearest}"):
        Settings.read({name: 1})


@pytest.mark.parametrize(
    "extra",
    [
        {"address": ""},
        {"address": 5},
        {"load_deadline_ms": -1},
        {"load_deadline_ms": "2000"},
        {"load_deadline_ms": True},
        {"load_deadline_ms": float("nan")},
        {"load_deadline_ms": 1 << 31},
        {"min_load_tokens": None},
        {"on_reset": "never"},
        {"reset_epoch": 3},
    ],
)
def test_values_that_cannot_be(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))):
        Settings.read(extra)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.32.1.post2", "0.32.0+cpu", "0.32"])
def test_tried_versions(version: str, caplog: pytest.LogCaptureFixture) -> None:
    assert check_version(version) in TRIED
    assert caplog.records == []


def test_versions_whose_source_was_read_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm.cachesvc"):
        assert check_version("0.33.0rc1") in READ
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.33.0rc1" in caplog.text


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.32.0", "dev", "", "0", "0.x.1"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"0\.31, 0\.32, 0\.33"):
        check_version(version)
