"""A parser that helps: options in groups, and the nearest name for what is misspelt."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from lowmem_gblm.cli.failures import failure_of
from lowmem_gblm.cli.streams import write
from lowmem_gblm.errors import UsageError

METHOD_OPTIONS = "options of methods"
# Of every option the group in the help, in the order in which the help has them.
GROUPS = {
    "what to prune": (
        "method", "methods", "sparsity", "pattern", "on_ragged", "include", "exclude", "recipe",
        "tensors",
    ),
    METHOD_OPTIONS: (),
    "texts and samples": (
        "calibration", "packing", "nsamples", "seed", "seeds", "text", "windows", "seqlen",
        "text_column", "bos",
    ),
    "language tasks": ("tasks", "include_path", "num_fewshot", "limit"),
    "what to compare with": ("against",),
    "statistics": ("activations", "save_statistics", "statistics_dtype", "statistics"),
    "machine and budgets": (
        "device", "dtype", "compute_weights", "gpu_memory", "cpu_memory", "disk", "work_dir",
        "accept_other_rounding", "trust_remote_code",
    ),
    "in place": ("in_place", "overwrite_my_only_copy", "in_place_shared"),
    "output": (
        "output", "max_shard_size", "public", "html", "keep", "format", "json", "quiet",
        "verbose",
    ),
}  # fmt: skip
_ORDER = [name for names in GROUPS.values() for name in names]


def place_of(name: str) -> int:
    """Return where an option stands in the help; one without a group comes last."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are `UsageError` with its own usage.

    Attributes:
        last: The name of a positional argument that may be left out, behind another one: Python
            3.11 takes it only beside that.
    """

    last: str | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, **given)
        # Python 3.14 would colour a usage by what stdout is; usages go to stderr.
        self.color = False
        self._titled = {title: self.add_argument_group(title) for title in GROUPS}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return one of the `GROUPS`."""
        return self._titled[title]

    def group_of(self, name: str) -> argparse._ActionsContainer:
        """Return the group of an option; the parser itself for an option that is in none."""
        titles = (title for title, names in GROUPS.items() if name in names)
        return next(map(self.group, titles), self)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse all arguments; raise `UsageError` if some are left."""
        found, left = super().parse_known_args(args, namespace)
        if self.last and left and not left[0].startswith("-") and getattr(found, self.last) is None:
            setattr(found, self.last, left.pop(0))
        if left:
            hints = [self._hint(word.partition("=")[0]) for word in left if word.startswith("-")]
            self.error(
                "; ".join([f"unrecognized arguments: {' '.join(left)}", *filter(None, hints)])
            )
        return found, left

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`."""
        raise UsageError(message, self.format_usage())

    def _hint(self, option: str) -> str:
        nearest = _nearest(option, self._option_string_actions)
        return f"{option}: did you mean {nearest}?" if nearest else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            nearest = _nearest(value, action.choices or ())
            hint = f"; did you mean {nearest}?" if nearest else ""
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write a help, which fails like any result if stdout is gone."""
        try:
            write(file, message)
        except OSError as error:
            if file is not sys.stderr:
                raise SystemExit(failure_of(error).end(as_json=False)) from None


def _nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that a word begins or is most like, dashes aside; None if there is none."""
    bare, known = word.lstrip("-"), {name.lstrip("-"): name for name in names}
    beginning = [name for name in known if bare and name.startswith(bare)]
    found = beginning or get_close_matches(bare, known, n=1)
    return known[found[0]] if found else None
