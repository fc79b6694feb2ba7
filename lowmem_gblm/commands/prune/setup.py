"""The setup of a run: all that is known before its first step.

Nothing is drawn, hashed or downloaded later.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem_gblm.commands.calibration import Samples
from lowmem_gblm.commands.estimate import budget_of, check_disks
from lowmem_gblm.commands.paths import Paths
from lowmem_gblm.commands.prune.identity import identity, source_bytes
from lowmem_gblm.commands.prune.reuse import check_serves
from lowmem_gblm.commands.prune.scope import PruneScope
from lowmem_gblm.commands.request import to_json
from lowmem_gblm.planning.plan import Budget, Plan
from lowmem_gblm.planning.planner import plan
from lowmem_gblm.planning.sizes import Choices
from lowmem_gblm.planning.steps import Step, step_table
from lowmem_gblm.storage.disk_errors import explained, to_resume
from lowmem_gblm.storage.job_state import check_same_job
from lowmem_gblm.storage.locking import size_on_disk


@dataclass(frozen=True, kw_only=True)
class PruneSetup:
    """Everything that is known before the first step of a run.

    `previous` is the description of the job that is resumed, or None.
    """

    scope: PruneScope
    paths: Paths
    samples: Samples
    budget: Budget
    plan: Plan
    table: tuple[Step, ...]
    identity: Mapping[str, Any]
    previous: Mapping[str, Any] | None

    def description(self) -> dict[str, Any]:
        """Return what identifies the job, how to ask for it again, and what was chosen."""
        return {
            "identity": self.identity,
            "folder": str(self.paths.work_folder.resolve()),
            "output": str(self.paths.output.resolve()),
            "request": to_json(self.scope.request),
            "choices": asdict(self.plan.choices),
        }


def prepare(
    scope: PruneScope, paths: Paths, samples: Samples, previous: Mapping[str, Any] | None
) -> PruneSetup:
    """Return the setup of a run; a `JobError` names every difference to the job that is there."""
    try:
        found = identity(scope, paths, samples.tokens_NT, previous)
        _check_taken(scope, found, resumes=previous is not None)
    except OSError as error:
        if error.errno is None:
            raise
        what_to_do = to_resume(paths.work_folder, kept=previous is not None)
        raise explained(error, "", what_to_do) from error
    kept = None
    if previous is not None:
        check_same_job(paths.work_folder, previous["identity"], found)
        kept = Choices(**previous["choices"])
    budget = budget_for(scope, paths, resumes=previous is not None)
    planned = plan(scope.work, budget, kept=kept)
    check_disks(planned, paths)
    return PruneSetup(
        scope=scope,
        paths=paths,
        samples=samples,
        budget=budget,
        plan=planned,
        table=step_table(scope.work, planned.choices),
        identity=found,
        previous=previous,
    )


def _check_taken(scope: PruneScope, found: Mapping[str, Any], *, resumes: bool) -> None:
    """Raise `JobError` unless saved statistics are of this model and these samples, and complete.

    A job that is resumed has begun with them, and may have overwritten the model since.
    """
    if scope.saved is None:
        return
    if not resumes:
        # The identity of a job in place leaves out what it will overwrite.
        every = {"source_bytes": source_bytes(scope.model.checkpoint)}
        check_serves(scope.saved, {**found, **every})
    scope.saved.check({name: one for block in scope.files for name, one in block.items()})


def budget_for(scope: PruneScope, paths: Paths, *, resumes: bool) -> Budget:
    """Return what a run may use; what an earlier attempt has written counts as free."""
    request = scope.request
    found = budget_of(request, scope.model.streamed.device, paths.written)
    if not resumes or request.disk is not None or found.disk_bytes is None:
        return found
    return replace(found, disk_bytes=found.disk_bytes + sum(map(size_on_disk, paths.unfinished)))
