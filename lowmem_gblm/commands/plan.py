"""The needs of a prune run, before anything is written."""

from dataclasses import replace

from lowmem_gblm.commands.estimate import check_disks, machine_speed
from lowmem_gblm.commands.paths import paths_of
from lowmem_gblm.commands.prune.scope import prune_scope
from lowmem_gblm.commands.prune.selection import patterns_of
from lowmem_gblm.commands.prune.setup import budget_for
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.model.open_model import open_model
from lowmem_gblm.model.prunable import prunable_weights
from lowmem_gblm.planning.plan import Plan
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.runtime.activity import activity

_DESCRIBED = "the weights are not here: their sizes are those that config.json describes"


def prunable_tensors(request: PruneRequest) -> dict[str, list[int]]:
    """Return the tensors that a run would prune, with the shape of each; needs no weights."""
    with activity(f"opening {request.model}"):
        model = open_model(request.model, request, to_plan=True)
    tensors = model.checkpoint.tensors
    prunable = prunable_weights(model.checkpoint, model.streamed)
    return {name: list(tensors[name].shape) for name in patterns_of(request, prunable, tensors)}


def plan_request(request: PruneRequest, *, measured: bool = True) -> Plan:
    """Return what a run would take; neither the weights nor the device need be here.

    With `measured`, this machine is measured for about two seconds, to predict the time.
    """
    with activity(f"opening {request.model}"):
        model = open_model(request.model, request, to_plan=True)
    scope, paths = prune_scope(request, model), paths_of(request)
    budget = budget_for(scope, paths, resumes=False)
    planned = plan(scope.work, budget)
    check_disks(planned, paths)
    if measured:
        speed = machine_speed(model, scope.weights, scope.work.seqlen, paths.work_folder)
        planned = plan(scope.work, budget, speed=speed)
    if not model.checkpoint.on_disk:
        planned = replace(planned, reasons=(*planned.reasons, _DESCRIBED))
    return planned
