"""Functions that run a model, with the options of the command line as keywords.

Names, types and defaults are stated here for editors, type checkers and `help`; what an option
means is said once, where it is declared (`options.option`), and is in `help` by way of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem_gblm.api.arguments import Place, checked_listener
from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
from lowmem_gblm.commands.recipe import with_recipe
from lowmem_gblm.commands.request import (
    MAY_CHANGE,
    EvalRequest,
    PruneRequest,
    prune_request,
    sort_options,
)
from lowmem_gblm.commands.signatures import documented, with_arguments_of
from lowmem_gblm.options import as_path, options

if TYPE_CHECKING:
    from lowmem_gblm.commands.texts import Calibration
    from lowmem_gblm.runtime.progress import Listener

# Bytes, or a text such as "24GiB".
Size = int | str
Sparsity = str | float | Decimal
Pattern = str | tuple[int, int]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ComputeWeights = Literal["auto", "nf4", "int8"]
Bos = Literal["auto", "always", "never"]
GradientNorm = Literal["l1", "l2"]


@documented(PruneRequest)
def prune(
    model: Place,
    output: Place | None = None,
    *,
    recipe: Place | None = None,
    method: str = "gblm",
    sparsity: Sparsity | Mapping[str, Sparsity] | None = None,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    on_ragged: Literal["error", "keep"] = "error",
    alpha: float | str | None = None,
    gradient_norm: GradientNorm | None = None,
    method_options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    packing: bool = False,
    text_column: str = "text",
    bos: Bos = "auto",
    activations: Literal["pruned", "dense"] = "pruned",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    save_statistics: Place | None = None,
    statistics_dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    statistics: Place | None = None,
    in_place: bool = False,
    overwrite_my_only_copy: bool = False,
    in_place_shared: bool = False,
    accept_other_rounding: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    compute_weights: ComputeWeights = "auto",
    trust_remote_code: bool = False,
    gpu_memory: Size | None = None,
    cpu_memory: Size | None = None,
    disk: Size | None = None,
    work_dir: Place | None = None,
    max_shard_size: Size | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Prune `model` into the new folder `output`, or in place; return the content of pruning.json.

    Args:
        model: Folder, Hub id, or "demo".
        output: Folder to create; None with `in_place=True, overwrite_my_only_copy=True`, which
            overwrites the weights of `model` itself.
        recipe: YAML file, or the pruning.json of an output: its options stand for those that are
            left out here, or given as their default.
        method_options: Options of a method of another package, by name.
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: The run has failed; nothing is left under the name `output`.
    """
    asked = dict(locals())
    from lowmem_gblm.commands.prune.pipeline import prune as run

    return run(_request(asked), checked_listener(listener))


@documented(PruneRequest)
def resume(
    work_folder: Place,
    *,
    accept_other_rounding: bool = False,
    device: str = "auto",
    gpu_memory: Size | None = None,
    cpu_memory: Size | None = None,
    disk: Size | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Resume an interrupted `prune`; return the content of pruning.json.

    Args:
        work_folder: The OUTPUT.work folder that it has left.
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        JobError: The folder holds no job, or one of another version.
        LowmemGblmError: The run has failed again.
    """
    given = dict(locals())
    from lowmem_gblm.commands.prune.pipeline import prune as run
    from lowmem_gblm.commands.prune.resume import find_job

    changes = {name: given[name] for name in MAY_CHANGE}
    return run(
        find_job(Path(as_path("WORKDIR", work_folder)), **changes), checked_listener(listener)
    )


@documented(PruneRequest)
@with_arguments_of(prune)
def plan(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the same call of `prune` would take, from headers or config.json.

    This measures the machine for about two seconds, and writes nothing.

    Args:
        model: Folder, Hub id, or "demo".
        output: The folder that would be created; its disk counts.
        recipe: As for `prune`.
        method_options: Options of a method of another package, by name.
        listener: Not called.

    Raises:
        BudgetError: The run does not fit `cpu_memory`, `gpu_memory` or `disk`.
        LowmemGblmError: The request is bad, or the model cannot be used.
    """
    from lowmem_gblm.commands.plan import plan_request

    return plan_request(_request(asked)).as_json()


@documented(EvalRequest)
def evaluate(
    model: Place,
    *,
    text: Place | None = None,
    seqlen: int | None = None,
    windows: int | None = None,
    text_column: str = "text",
    bos: Bos = "auto",
    tasks: str | Sequence[str] = (),
    include_path: Place | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    compute_weights: ComputeWeights = "auto",
    trust_remote_code: bool = False,
    gpu_memory: Size | None = None,
    cpu_memory: Size | None = None,
    disk: Size | None = None,
    work_dir: Place | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of `model`, results of language tasks, or both in one sweep.

    Args:
        model: Folder, Hub id, or "demo".
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: The model or a text cannot be used, or a number is not finite.
    """
    asked = dict(locals())
    from lowmem_gblm.commands.evaluate import evaluate as run

    del asked["listener"]
    return run(EvalRequest(**asked), checked_listener(listener))


@documented(Grid, PruneRequest, EvalRequest)
def compare(
    model: Place,
    methods: str | Sequence[str],
    folder: Place,
    *,
    sparsity: Sparsity | Sequence[Sparsity] = (),
    pattern: Pattern | Sequence[Pattern] = (),
    seeds: int | Sequence[int] = 0,
    keep: Literal["none", "best", "all"] = "all",
    alpha: float | str | Sequence[float | str] | None = None,
    gradient_norm: GradientNorm | Sequence[GradientNorm] | None = None,
    method_options: Mapping[str, Any] | None = None,
    on_ragged: Literal["error", "keep"] = "error",
    calibration: Calibration | None = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    packing: bool = False,
    text_column: str = "text",
    bos: Bos = "auto",
    activations: Literal["pruned", "dense"] = "pruned",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    text: Place | None = None,
    windows: int | None = None,
    tasks: str | Sequence[str] = (),
    include_path: Place | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    accept_other_rounding: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    compute_weights: ComputeWeights = "auto",
    trust_remote_code: bool = False,
    gpu_memory: Size | None = None,
    cpu_memory: Size | None = None,
    disk: Size | None = None,
    work_dir: Place | None = None,
    max_shard_size: Size | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Prune `model` in every way of a grid into `folder`, measure each result, and return the rows.

    Args:
        model: Folder, Hub id, or "demo".
        folder: Gets an output for every run, called `METHOD` if only methods vary.
        method_options: Options of methods of other packages, each with one value or several.
        listener: Called with a `Tick` after every step, as by `ProgressBar()`.

    Raises:
        LowmemGblmError: A run has failed; the same call resumes the comparison.
    """
    asked = dict(locals())
    from lowmem_gblm.commands.compare.pipeline import compare as run

    for name in ("folder", "listener"):
        del asked[name]
    evaluation = {name: asked.pop(name) for name in EVALUATION}
    grid = Grid(**{one.name: asked.pop(one.name) for one in options(Grid)})
    values, given = sort_options(asked)
    place = Path(as_path("the folder", folder))
    return run(PruneRequest(**values), grid, place, evaluation, given, checked_listener(listener))


def _request(asked: Mapping[str, Any]) -> PruneRequest:
    """Return the request that the arguments of `prune` mean."""
    defaults = {name: one.default for name, one in signature(prune).parameters.items()}
    given = {name: value for name, value in asked.items() if value is not defaults[name]}
    recipe = given.pop("recipe", None)
    given.pop("listener", None)
    return prune_request(
        **with_recipe(None if recipe is None else as_path("recipe", recipe), given)
    )
