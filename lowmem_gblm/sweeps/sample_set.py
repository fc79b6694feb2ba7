"""Which calibration samples are still active.

A sample whose hidden states, loss or gradients turn non-finite is dropped from all later work;
where too many are dropped, a sweep ends with NonFiniteError.

    dense, head     no statistics have been gathered: as if the sample had not been drawn
    reverse, search, prune
                    the block in which it is found is measured again without it; what the sample
                    gave to earlier blocks stays

Averages are over the samples that are in them. Where only the gradients of a scaled loss overflow,
the sample is first tried with a smaller scale, a power of two that is divided out exactly.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_gblm.errors import NonFiniteError

# One try divides by 2^4; after three of them the smallest gradients vanish.
_STEP = 4
_LARGEST = 3 * _STEP


class SampleSet:
    """The active samples of a run.

    Args:
        scaled: Whether their losses have a scale that can be reduced.
        tolerated: The share of samples that may be dropped.
        what: The noun for a sample, for messages.

    Attributes:
        dropped: `sample`, `pass` and `block` (None for the head) of every dropped sample, in order.
        exponents: Of samples with a reduced scale: by which power of two.
    """

    def __init__(
        self,
        count: int,
        *,
        scaled: bool = False,
        tolerated: float = 0.1,
        what: str = "calibration sample",
    ) -> None:
        self.dropped: list[dict[str, Any]] = []
        self.exponents: dict[int, int] = {}
        self._count = count
        self._scaled = scaled
        self._tolerated = tolerated
        self._what = what
        self._told: tuple[int, dict[int, int]] = (0, {})

    @property
    def active(self) -> list[int]:
        """Numbers of the samples that count, in the order in which they were drawn."""
        gone = {one["sample"] for one in self.dropped}
        return [n for n in range(self._count) if n not in gone]

    def drop(self, numbers: Sequence[int], name: str, block: int | None) -> None:
        """Drop these samples of the pass `name`; raise `NonFiniteError` if too many are dropped."""
        self.dropped += [{"sample": n, "pass": name, "block": block} for n in numbers]
        if len(self.dropped) > self._tolerated * self._count:
            raise NonFiniteError(
                f"{len(self.dropped)} of {self._count} {self._what}s have turned non-finite, at "
                f"most {self._tolerated:.0%} may: {self._where()}. Look at the weights there, or "
                f"try --dtype bfloat16 or float32"
            )

    def reduce_scale(self, number: int) -> bool:
        """Have the loss of a sample multiplied with less; False if that makes no sense any more."""
        exponent = self.exponents.get(number, 0) + _STEP
        if not self._scaled or exponent > _LARGEST:
            return False
        self.exponents[number] = exponent
        return True

    def exponent(self, number: int) -> int:
        """By which power of two the loss of a sample is smaller than that of others."""
        return self.exponents.get(number, 0)

    def journal_entry(self) -> dict[str, Any]:
        """Return the changes since the last call, for the journal."""
        dropped, exponents = self._told
        self._told = len(self.dropped), dict(self.exponents)
        changed = {n: power for n, power in self.exponents.items() if exponents.get(n) != power}
        return {
            "dropped_samples": self.dropped[dropped:],
            "weakened_samples": [[n, power] for n, power in changed.items()],
        }

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Take over what an earlier attempt has found."""
        self.dropped += entry["dropped_samples"]
        self.exponents |= {n: power for n, power in entry["weakened_samples"]}
        self._told = len(self.dropped), dict(self.exponents)

    def notes(self) -> list[str]:
        """Return a sentence for the record, if samples were dropped."""
        if not self.dropped:
            return []
        return [
            f"{len(self.dropped)} of {self._count} {self._what}s turned non-finite and were left "
            f"out: {self._where()}"
        ]

    def _where(self) -> str:
        first = self.dropped[0]
        block = "" if first["block"] is None else f"block {first['block']} of "
        return f"it began with {self._what} {first['sample']} in {block}the {first['pass']} pass"
