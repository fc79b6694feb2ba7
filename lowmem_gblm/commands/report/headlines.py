"""What a report says first: sentences, each only where its numbers support it."""

import math
from collections.abc import Iterator, Sequence

from lowmem_gblm.commands.report.facts import number, windows
from lowmem_gblm.commands.report.measure import Measured, by_kind
from lowmem_gblm.commands.report.structure import Lines, total
from lowmem_gblm.errors import shown

# Ratios nearer to 1 are called about the same.
_WORTH_A_RATIO = 1.2
# Standard errors above chance, and times chance, from which lines are called stripes.
_ERRORS, _STRIPES = 5, 1.5
# Fractions: of dead lines, and between the sparsities of matrices, that are worth a sentence.
_DEAD, _EVEN = 0.001, 0.01
_LONGEST = 1000


def headlines(measured: Sequence[Measured]) -> list[str]:
    """Return the sentences, the most important first."""
    first, *others = measured
    found = [*_stripes(first), *_dead(first), *_uneven(first)]
    for other in others:
        found += _compared(first, other)
    # Names of tensors and texts come from files.
    return [shown(sentence, _LONGEST) for sentence in [*found, *_perplexities(measured)]]


def striped(lines: Lines) -> bool:
    """Return whether zeros are in stripes: beyond chance, and beyond the error of its estimate."""
    error = math.sqrt(2 / lines.lines)
    return lines.squares > max(_STRIPES, 1 + _ERRORS * error) * lines.squares_by_chance


def _stripes(one: Measured) -> Iterator[str]:
    label, kinds = one.output.label, by_kind(one.structures)
    for along, what in (("columns", "column"), ("rows", "row")):
        lines = {kind: getattr(found, along) for kind, found in kinds.items()}
        free = {kind: found for kind, found in lines.items() if found.dispersion is not None}
        if not free:
            continue
        every = total(free.values())
        kind, most = max(free.items(), key=lambda item: item[1].dispersion)
        varies = f"the zeros of a {what} vary {every.dispersion:.1f} times as much as by chance"
        if not striped(every):
            yield f"{label} leaves no stripes along {along}: {varies}."
        elif len(free) == 1:
            yield f"{label} prunes in stripes along {along}: {varies}."
        else:
            yield (
                f"{label} prunes in stripes along {along}: {varies}, most in {kind} "
                f"({most.dispersion:.1f} times)."
            )


def _compared(first: Measured, other: Measured) -> Iterator[str]:
    parts = [*_variance_ratio(first, other), *_agreement(first, other)]
    if parts:
        yield f"{'; '.join(parts)}."


def _variance_ratio(first: Measured, other: Measured) -> Iterator[str]:
    """Compare variances of columns, in the kind of matrix where they differ most."""
    ones, others = by_kind(first.structures), by_kind(other.structures)
    pairs = {kind: (ones[kind].columns, others[kind].columns) for kind in ones if kind in others}
    ratios = {
        kind: one.variance / two.variance
        for kind, (one, two) in pairs.items()
        if one.variance and two.variance
    }
    if not ratios:
        return
    kind, ratio = max(ratios.items(), key=lambda item: max(item[1], 1 / item[1]))
    error = math.sqrt(sum(2 / lines.lines for lines in pairs[kind]))
    more, less = first.output.label, other.output.label
    if ratio < 1:
        more, less, ratio = less, more, 1 / ratio
    if ratio < _WORTH_A_RATIO:
        span = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} times"
        yield f"{more} and {less} leave about the same column variance in every kind ({span})"
    elif ratio > 1 + _ERRORS * error:
        yield f"{more} masks leave {ratio:.1f} times the column variance of {less}'s in {kind}"


def _agreement(first: Measured, other: Measured) -> Iterator[str]:
    zeros = sum(first.structures[place].zeros for place in other.overlaps)
    if zeros:
        every = total(other.overlaps.values())
        yield (
            f"{every.common / zeros:.1%} of the zeros of {first.output.label} are zeros of "
            f"{other.output.label} too ({every.common_by_chance / zeros:.1%} by chance)"
        )


def _dead(one: Measured) -> Iterator[str]:
    kinds = by_kind(one.structures)
    for along, what in (("columns", "inputs"), ("rows", "outputs")):
        lines = {kind: getattr(found, along) for kind, found in kinds.items()}
        every = total(lines.values())
        if every.dead <= max(_DEAD * every.lines, 10 * every.dead_by_chance):
            continue
        kind, most = max(lines.items(), key=lambda item: item[1].dead / item[1].lines)
        yield (
            f"{one.output.label} leaves {every.dead:,} of {every.lines:,} {what} dead, with every "
            f"weight zero; most in {kind} ({most.dead / most.lines:.1%})."
        )


def _uneven(one: Measured) -> Iterator[str]:
    ranked = sorted(one.structures.items(), key=lambda item: item[1].sparsity)
    (fewest, least), (most, largest) = ranked[0], ranked[-1]
    if largest.sparsity - least.sparsity > _EVEN:
        yield (
            f"Zeros are not spread evenly over matrices: {least.sparsity:.1%} in {fewest.name}, "
            f"{largest.sparsity:.1%} in {most.name}."
        )


def _perplexities(measured: Sequence[Measured]) -> Iterator[str]:
    """Rank perplexities that were measured of all outputs on the same windows."""
    found: dict[str, dict[str, float]] = {}
    for one in measured:
        for result in one.output.evaluations:
            if (perplexity := number(result, "perplexity")) is not None:
                found.setdefault(windows(result), {})[one.output.label] = perplexity
    for on, values in found.items():
        if len(values) == len(measured) > 1:
            ranked = sorted(values, key=lambda label: values[label])
            listed = ", ".join(f"{label} {values[label]:.3f}" for label in ranked)
            yield f"Perplexity on {on}: {listed}."
