"""The candidates for the options of a method, and which of them is chosen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem_gblm.errors import NonFiniteError


@dataclass
class OptionSearch:
    """A choice among options of a method.

    Attributes:
        candidates: The options to choose among; empty where nothing is to be chosen.
        losses: Of every candidate, the mean loss of held-out windows in the model it prunes, in
            nats per token; None where it is not finite. Empty before they are known.
    """

    candidates: Sequence[Any] = ()
    losses: list[float | None] = field(default_factory=list)

    @property
    def chosen(self) -> int:
        """Return the number of the candidate with the least loss, the first of several.

        Raises:
            NonFiniteError: No loss is finite.
        """
        finite = [(loss, number) for number, loss in enumerate(self.losses) if loss is not None]
        if not finite:
            raise NonFiniteError(
                f"the loss of held-out windows is not finite in any of the {len(self.losses)} "
                f"models to choose among: give the option a value instead of auto"
            )
        return min(finite)[1]

    @property
    def values(self) -> list[dict[str, Any]]:
        """Return the options of every candidate that are not alike in all of them."""
        every = [asdict(one) for one in self.candidates]
        varied = [name for name in every[0] if len({one[name] for one in every}) > 1]
        return [{name: one[name] for name in varied} for one in every]

    def notes(self, windows: int) -> list[str]:
        """Return a sentence for the record, if something was chosen."""
        if not self.candidates:
            return []
        values = " and ".join(f"{name} {value}" for name, value in self.values[self.chosen].items())
        return [
            f"{values} has the least loss of {len(self.candidates)} candidates, "
            f"{self.losses[self.chosen]:.4f} on {windows} held-out windows"
        ]
