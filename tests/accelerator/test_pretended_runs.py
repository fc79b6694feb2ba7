"""Runs on the pretended accelerator, evaluations too: a CPU's bytes, no race, no needless wait.

Its negative controls are in `test_controls.py`; what it pretends is in `support/pretend`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.pretend.jobs import in_process
from support.tiny_models import save_tiny

METHODS = ("magnitude", "wanda", "gradient", "gblm", "sparsegpt")
# A dense model, one with experts, and one whose matrices are stored the other way round.
BLOCKS = {"llama": 3, "mixtral": 2, "gpt2": 2}
FEW, MORE = 2, 4
SEQLEN = 16
# Methods whose waits are compared, for a few samples and for more; experts are chosen by numbers,
# for which the model itself waits.
COMPARED = ("gblm", "sparsegpt")
CHOOSE_BY_NUMBERS = ("mixtral",)
FILES = ("model", "calibration", "text")

Jobs = list[tuple[dict[str, Any], dict[str, Any]]]


def jobs(architecture: str, every: bool) -> list[dict[str, Any]]:
    """`gblm` and `sparsegpt`, which measure all there is; Llama with every method, and otherwise.

    Args:
        every: The others with every method, and Llama with every method over dense activations.
    """
    llama = architecture == "llama"
    found: list[dict[str, Any]] = [
        {"method": method, "activations": "pruned"}
        for method in (METHODS if llama or every else COMPARED)
    ]
    found += [{"method": "gblm", "compute_weights": "int8"}]
    if llama:
        found += [
            {"method": method, "activations": "dense"}
            for method in (METHODS if every else COMPARED)
        ]
        found += [
            {"method": "gblm", "compute_weights": "nf4"},
            {"method": "gblm", "dtype": "bfloat16", "pattern": "2:4"},
            {"method": "gblm", "gradient_norm": "l2"},
            {"method": "gblm", "alpha": "auto", "activations": "dense", "compute_weights": "nf4"},
        ]
    if llama and every:
        found += [
            {"method": "sparsegpt", "compute_weights": "nf4"},
            {"method": "gblm", "alpha": "auto"},
        ]
    if llama or (every and architecture not in CHOOSE_BY_NUMBERS):
        found += [{"method": method, "nsamples": MORE} for method in COMPARED]
    return [{"nsamples": FEW, "seqlen": SEQLEN} | one for one in found]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)])
def all_runs(
    request: pytest.FixtureRequest, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Jobs:
    """Jobs with what was found, of one process: to import torch takes seconds."""
    folder = tmp_path_factory.mktemp("runs")
    asked = []
    for architecture, blocks in BLOCKS.items():
        model = str(save_tiny(architecture, folder / architecture, blocks=blocks, width=32))
        files = {"model": model, "calibration": str(text_file)}
        asked += [one | files for one in jobs(architecture, request.param)]
        asked += [{"model": model, "text": str(text_file), "seqlen": SEQLEN, "windows": MORE}]
        asked += [{"model": model, "questions": MORE}]
    return list(zip(asked, in_process("run", asked), strict=True))


@pytest.fixture(params=list(BLOCKS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runs(architecture: str, all_runs: Jobs) -> Jobs:
    return [
        ({name: value for name, value in job.items() if name not in FILES}, found)
        for job, found in all_runs
        if Path(job["model"]).name == architecture
    ]


def test_the_bytes_are_those_of_a_cpu(runs: Jobs) -> None:
    others = [(job, found) for job, found in runs if found["pretend"] != found["cpu"]]
    assert not others
    assert all(len(found["cpu"]) == 64 for _, found in runs)


def test_nothing_is_used_before_it_is_there_or_after_it_is_gone(runs: Jobs) -> None:
    assert not [(job, found["faults"][:3]) for job, found in runs if found["faults"]]


def test_the_host_waits_at_most_once_for_a_sample_in_a_block(runs: Jobs, architecture: str) -> None:
    def waits(**wanted: Any) -> dict[str, int]:
        (found,) = [found for job, found in runs if job == {"seqlen": SEQLEN, **wanted}]
        return {stage: sum(lines.values()) for stage, lines in found["waits"].items()}

    compared = {job["method"] for job, _ in runs if job.get("nsamples") == MORE}
    assert compared or architecture != "llama"
    for method in compared:
        few = waits(method=method, activations="pruned", nsamples=FEW)
        more = waits(method=method, nsamples=MORE)
        samples = (MORE - FEW) * BLOCKS[architecture]
        for stage in {"dense", "reverse", "prune"} & few.keys():
            assert more[stage] - few[stage] <= samples, (method, stage)


def test_the_peak_is_within_the_plan(runs: Jobs) -> None:
    over = [
        (job, found["peak_bytes"], found["planned_bytes"])
        for job, found in runs
        if found["peak_bytes"] > found["planned_bytes"] + SEGMENTS_BYTES
    ]
    assert not over


# Every stream of a tiny run takes segments of 2 MiB, whatever lies in them.
SEGMENTS_BYTES = 16 << 20
