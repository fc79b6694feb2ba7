"""The selection: which of the tensors that can be pruned a run prunes, and to which pattern."""

from collections.abc import Iterable, Sequence

from lowmem_gblm.commands.pattern_rules import check_rules, rule_of
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods.masks import NofM, Pattern
from lowmem_gblm.model.prunable import PrunableWeight
from lowmem_gblm.planning.globs import check_globs, selected


def patterns_of(
    request: PruneRequest, prunable: Sequence[Sequence[PrunableWeight]], tensors: Iterable[str]
) -> dict[str, Pattern]:
    """Return by name on disk what a tensor is pruned to; what has no name there stays dense.

    `tensors` are the names of all tensors of the model. Raises `RequestError` for a glob without
    effect, for a width that a pattern does not fit, and if nothing is left to prune.
    """
    weights = [weight for block in prunable for weight in block]
    names = list(dict.fromkeys(weight.name for weight in weights))
    check_globs("include", request.include, names, "tensor that can be pruned")
    # A tensor that stays dense anyway may be excluded, too.
    check_globs("exclude", request.exclude, [*names, *tensors], "tensor of the model")
    check_rules(request.rules, names)
    rules = {name: rule_of(name, request.rules) for name in names}
    found = {
        name: rule.pattern
        for name, rule in rules.items()
        if rule is not None and selected(name, request.include, request.exclude)
    }
    if not found:
        raise RequestError(
            "--include, --exclude and the globs of --sparsity leave nothing to prune"
        )
    for weight in weights:
        pattern = found.get(weight.name)
        if isinstance(pattern, NofM):
            pattern.check_width(weight.name, weight.in_features)
    return found
