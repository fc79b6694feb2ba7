"""The progress of a run as bars of tqdm, in a terminal or a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from lowmem_gblm.runtime.progress import Tick

_GIB = 1024**3


class ProgressBar:
    """A listener that shows every stage of a run as a bar, with the time left of the entire run.

    Args:
        options: Those of `tqdm`, as `leave=False`, or `file` for another stream than stderr.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._bar: Any = None

    def __call__(self, tick: Tick) -> None:
        """Show a step."""
        if self._bar is None or self._bar.desc != tick.stage or tick.step < self._bar.n:
            self.close()
            self._bar = tqdm(total=tick.steps, desc=tick.stage, **self._options)
            # tqdm appends ": " to what it is given.
            self._bar.desc = tick.stage
        left = "" if tick.left_s is None else f", {tqdm.format_interval(tick.left_s)} left in all"
        self._bar.set_postfix_str(f"peak {tick.peak_bytes / _GIB:.1f} GiB{left}", refresh=False)
        self._bar.update(tick.step - self._bar.n)
        if tick.step == tick.steps:
            self.close()

    def close(self) -> None:
        """End the bar that is shown, as after an interruption."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
