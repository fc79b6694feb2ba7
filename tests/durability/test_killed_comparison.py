"""A comparison that is killed at random moments ends with the same table and the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from support.crashes import Killer, content

KILLS = 10
# What every attempt measures for itself.
_TAKEN = ("seconds", "host_peak_bytes", "gpu_peak_bytes")


def told(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows without what they took, and without the place of their outputs."""

    def plain(one: dict[str, Any]) -> dict[str, Any]:
        output = one["output"] and str(Path(one["output"]).relative_to(folder))
        return {key: one[key] for key in one if key not in _TAKEN} | {"output": output}

    return [plain(row) | {"runs": [plain(run) for run in row["runs"]]} for row in rows]


@pytest.mark.parametrize(
    ("keep", "seeds"), [("best", [0, 1]), pytest.param("all", [0], marks=pytest.mark.slow)]
)
def test_killed_ten_times(
    keep: str, seeds: list[int], small: Path, text_file: Path, tmp_path: Path
) -> None:
    def compare(name: str) -> list[dict[str, Any]]:
        return lowmem_gblm.compare(
            small, ["gblm", "gradient", "magnitude"], tmp_path / name, alpha=[1, 100], keep=keep,
            seeds=seeds, nsamples=2, seqlen=16, calibration=str(text_file), text=str(text_file),
            windows=2,
        )  # fmt: skip

    expected = compare("whole")
    killer = Killer(0.4)
    while killer.kills < KILLS and killer.kills_one(lambda: compare("killed")):
        pass
    rows = compare("killed")
    assert killer.kills == KILLS
    assert told(rows, tmp_path / "killed") == told(expected, tmp_path / "whole")
    names = [
        sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("whole", "killed")
    ]
    assert names[0] == names[1]
    for name in set(names[0]) - {"comparison.json"}:
        assert content(tmp_path / "whole" / name) == content(tmp_path / "killed" / name)
