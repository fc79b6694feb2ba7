"""Systems that no test runs on, as far as they can be pretended: Windows and macOS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem_gblm.runtime import memory

ON_WINDOWS = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None
from lowmem_gblm.cli.main import main
sys.exit(main(["verify", "nowhere"]))
"""


def test_windows_is_refused_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    # A slow import is announced before.
    assert done.stderr.endswith(
        "lowmem-gblm: lowmem-gblm runs on Linux and on macOS: on Windows, install it inside WSL 2\n"
    )


@pytest.mark.parametrize(("platform", "peak_bytes"), [("darwin", 5000), ("freebsd", 5000 << 10)])
def test_the_peak_is_counted_in_the_unit_of_the_system(
    platform: str, peak_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS counts bytes where others count KiB; neither has /proc."""
    used = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(memory, "resource", used)
    monkeypatch.setattr(memory, "_STATUS", Path("/nonexistent"))
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert memory.host_peak_bytes() == peak_bytes
