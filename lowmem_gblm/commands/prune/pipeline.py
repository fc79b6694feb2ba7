"""The complete prune run on one page: read this file first.

The decoder blocks are streamed up to three times, and each pruned block is written the moment it is
done. Boundary i is the hidden states that enter block i. Boundaries and gradient magnitudes are
stored in the work folder until the last step that reads them. What every step reads, writes and
drops is the table of steps (`planning.steps`); which sweeps run follows from what the method needs
(`planning.schedule`). A step is durable when it ends: an interrupted run resumes with the step that
was under way, and `commands.prune.endings` says what is kept after an error.

    embed     every sample through the embeddings: boundary 0
    dry_run   in place, where no dense sweep runs: one sample through all blocks, before the first
              is overwritten
    dense     first block to last: forward, keeping boundaries
    head      norm, head and loss: the gradient of the loss at the last boundary
    reverse   last block to first: forward again and backward, gradient magnitudes of the dense
              model; with `--activations dense` each block is pruned and written here
    search    where an option of the method is "auto": first block to last, held-out windows through
              the blocks as every candidate for the option prunes them
    choose    norm, head and loss of these windows: the candidate with the least loss is chosen
    prune     first block to last: activations of the model pruned so far, decide, write, advance
    finish    what lies outside the blocks, side files, model card, pruning.json, index, one rename

Statistics that an earlier run has saved are not measured again: of the sweeps above only those run
that the others need (`commands.prune.reuse`).
"""

from typing import Any

from lowmem_gblm.commands.card import model_card
from lowmem_gblm.commands.paths import check_paths
from lowmem_gblm.commands.prune.record import run_record, saved_manifest
from lowmem_gblm.commands.prune.scope import draw_samples, prune_scope
from lowmem_gblm.commands.prune.session import start_or_resume
from lowmem_gblm.commands.prune.setup import prepare
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.runtime import memory
from lowmem_gblm.runtime.activity import activity
from lowmem_gblm.runtime.progress import Listener
from lowmem_gblm.storage.job_state import job_to_resume
from lowmem_gblm.storage.locking import model_lock
from lowmem_gblm.sweeps.boundaries import embed
from lowmem_gblm.sweeps.dense import dense_sweep, loss_gradients
from lowmem_gblm.sweeps.dry_run import dry_run
from lowmem_gblm.sweeps.prune import prune_sweep
from lowmem_gblm.sweeps.reverse import reverse_sweep
from lowmem_gblm.sweeps.search import choose_candidate, search_sweep


def prune(request: PruneRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Prune a model into a new checkpoint, or in place; return the content of pruning.json.

    After an error nothing is left under the name OUTPUT; in place see `storage.in_place`.
    """
    paths = check_paths(request)
    memory.reset_host_peak()
    memory.settle_allocator()
    # Headers and configuration; no weight is read.
    with activity(f"opening {request.model}"):
        model = open_model(request.model, request, unfinished=request.in_place)
    with model_lock(model.folder, alone=request.in_place):
        previous = job_to_resume(
            model.folder, paths.output, paths.work_folder, in_place=request.in_place
        )
        scope = prune_scope(request, model)
        with activity("drawing calibration samples"):
            samples_NT = draw_samples(scope)
        with activity("preparing the run"):
            setup = prepare(scope, paths, samples_NT, previous)
        stages = scope.work.schedule.stages
        with start_or_resume(setup, listener) as run:
            if "embed" in stages:
                embed(run)
            if "dry_run" in stages:
                dry_run(run)
            if "reverse" in stages:
                dense_sweep(run)
                loss_gradients(run)
                reverse_sweep(run)
            if "search" in stages:
                search_sweep(run)
                choose_candidate(run)
            if "prune" in stages:
                prune_sweep(run)
            run.write_rest()
            record = run_record(setup, run)
            return run.publish(record, model_card(scope, record), saved_manifest(setup, run))
