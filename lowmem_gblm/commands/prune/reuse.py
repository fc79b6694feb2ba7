"""Statistics between runs: which of them serve a run, and what they are of.

Gradients are always those of the dense model: they serve every later run with the same model, text
and precision. So do input norms and gram matrices of the dense model, with `--activations dense`.
Those of a model that is pruned block by block belong to one run; another run measures its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.commands.texts import InMemory
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.options import options
from lowmem_gblm.storage.hub import public_name
from lowmem_gblm.storage.job_state import differences
from lowmem_gblm.storage.statistics_folder import CALIBRATION, StatisticsFolder
from lowmem_gblm.sweeps.statistics import NeededStatistics
from lowmem_gblm.sweeps.statistics.base import GradientStatistic

# What must agree in the identities of two jobs for one to take statistics of the other.
_SAMPLES = ("calibration_tokens", "bos", "nsamples", "seqlen", "seed")
_MODEL = ("source_headers", "source_bytes", "source_config", "source_pruned")
_COMPUTING = ("dtype", "compute_weights")


def with_its_samples(request: PruneRequest, saved: StatisticsFolder) -> PruneRequest:
    """Return the request with the calibration samples of saved statistics, where none is asked."""
    defaults = {one.name: one.default for one in options(PruneRequest)}
    left = [name for name in CALIBRATION if getattr(request, name) == defaults[name]]
    return replace(request, **{name: saved.manifest["calibration"][name] for name in left})


def asks_other_text(request: PruneRequest, saved: StatisticsFolder | None) -> bool:
    """Return whether the samples of a request may be others than those of saved statistics."""
    if saved is None or isinstance(request.calibration, InMemory):
        return saved is not None
    asked = {
        "calibration": request.calibration_text,
        "text_column": request.text_column,
        "bos": request.bos,
        "packing": request.packing,
    }
    return not asked.items() <= saved.manifest["calibration"].items()


def check_saves(request: PruneRequest, needed: NeededStatistics) -> None:
    """Raise `RequestError` if there is nothing to save."""
    if request.save_statistics is not None and not needed.classes:
        raise RequestError(
            f"{request.method} measures nothing that could be saved: leave out --save-statistics"
        )


def serving_names(request: PruneRequest, needed: NeededStatistics) -> list[str]:
    """Return the names of the statistics that serve every run with the same model and samples."""
    dense = request.activations == "dense"
    return [one.name for one in needed.classes if dense or issubclass(one, GradientStatistic)]


def taken_names(
    request: PruneRequest, needed: NeededStatistics, saved: StatisticsFolder | None
) -> list[str]:
    """Return the names of the statistics that a run takes; the others it measures.

    Raises `JobError` if one that would serve is missing, or if none would serve.
    """
    if saved is None or not needed.classes:
        return []
    serving = serving_names(request, needed)
    streams = saved.manifest["streams"]
    missing = [name for name in serving if streams.get(name) != "dense"]
    if serving and not missing:
        return serving
    held = [
        name if stream == "dense" else f"{name} of the model it pruned"
        for name, stream in streams.items()
    ]
    wanted = ", ".join(missing or needed.names)
    what_to_do = (
        f": save them with prune --method {request.method} --activations dense --save-statistics"
        if missing
        else " of the model pruned so far, which every run measures itself: add --activations "
        "dense, or leave out --statistics"
    )
    raise JobError(
        f"{saved.folder} holds {', '.join(held)}; {request.method} with --activations "
        f"{request.activations} needs {wanted}{what_to_do}"
    )


def check_serves(saved: StatisticsFolder, found: Mapping[str, Any]) -> None:
    """Raise `JobError` if saved statistics are of another model, text or precision than a job's.

    `found` is the identity of the job.
    """
    held = saved.manifest["identity"]
    for what, names in (
        ("another model", _MODEL),
        ("other calibration samples", _SAMPLES),
        ("another precision", _COMPUTING),
    ):
        other = differences(
            {name: held.get(name) for name in names}, {name: found.get(name) for name in names}
        )
        if other:
            raise JobError(
                f"the statistics in {saved.folder} are of {what} ({'; '.join(other.values())}): "
                f"save those of this run, or leave out --statistics"
            )


def rounded_to(saved: StatisticsFolder | None, taken: NeededStatistics) -> list[str]:
    """Return what gradient magnitudes that are taken were rounded to; empty if they are exact."""
    if saved is None or taken.gradient is None:
        return []
    return sorted({saved.manifest["precision"], saved.manifest["stored_precision"]} - {"float32"})


def reuse_notes(
    saved: StatisticsFolder | None, taken: NeededStatistics, measured: NeededStatistics
) -> list[str]:
    """Return sentences for the record: what a run has taken, and where it is not exact."""
    if saved is None or not taken.classes:
        return []
    manifest, where = saved.manifest, public_name(str(saved.folder))
    again = f"; {' and '.join(measured.names)} measured again" if measured.classes else ""
    notes = [f"{' and '.join(taken.names)} taken from {where}{again}"]
    rounded = rounded_to(saved, taken)
    if rounded:
        notes.append(
            f"gradient magnitudes in {where} are rounded to {' and '.join(rounded)}"
            f": some decisions will be others than in float32"
        )
    if manifest["dropped_samples"]:
        notes.append(
            f"{len(manifest['dropped_samples'])} of {manifest['calibration']['nsamples']} "
            f"calibration samples turned non-finite and are not in {where}"
        )
    return notes
