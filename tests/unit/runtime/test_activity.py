"""What takes long is logged while it runs, and what does not is not."""

from __future__ import annotations

import logging
import re
import time

import pytest

from lowmem_gblm.runtime.activity import activity

NAME = "lowmem_gblm.runtime.activity"


def test_what_takes_long_is_told_again_and_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{NAME}._FIRST_S", 0.01)
    monkeypatch.setattr(f"{NAME}._AGAIN_S", 0.01)
    with caplog.at_level(logging.INFO, NAME), activity("waiting"):
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages[:2] == ["waiting … 0 s", "waiting … 0 s"]


def test_what_is_short_is_told_to_the_verbose_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, NAME), activity("blinking"):
        pass
    assert caplog.messages == []
    with caplog.at_level(logging.DEBUG, NAME), activity("blinking"):
        pass
    assert re.fullmatch(r"blinking: \d\.\d s", caplog.messages[0])
