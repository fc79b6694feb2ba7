"""The hints for a user whose command was interrupted: what is kept, and what the command is for."""

import argparse
from pathlib import Path

RECORD = "pruning.json"


def nothing_left(arguments: argparse.Namespace) -> str:
    """Say that the command can only be begun again."""
    return "Nothing half-done is left. To begin again"


def prune_kept(arguments: argparse.Namespace) -> str | None:
    """Say what an interrupted `prune` has kept; None if it was done."""
    output = Path(made(arguments))
    if (output / RECORD).is_file():
        return None
    output = output.resolve() if arguments.in_place else output
    work_folder = (arguments.work_dir or output.parent) / f"{output.name}.work"
    if any((work_folder / "journal").glob("*.json")):
        return f"What is done is kept in {work_folder}. To resume"
    return "Nothing was done yet that could be kept. To begin again"


def made(arguments: argparse.Namespace) -> str:
    """Return the folder that `prune` writes: OUTPUT, or in place MODEL."""
    return str(arguments.output or arguments.model)


def evaluation_kept(arguments: argparse.Namespace) -> str:
    """Say where an interrupted `eval` has its finished blocks, as the interruption has noted."""
    notes = getattr(arguments.stopped, "__notes__", [])
    return f"{notes[0]}. To resume" if notes else nothing_left(arguments)


def resume_kept(arguments: argparse.Namespace) -> str | None:
    """Say what an interrupted `resume` has kept; None if it was done."""
    if arguments.output and (arguments.output / RECORD).is_file():
        return None
    return f"What is done is kept in {arguments.work_folder}. To resume"


def compare_kept(arguments: argparse.Namespace) -> str:
    """Say where an interrupted `compare` or `demo` has its finished rows."""
    if arguments.output is None:
        return nothing_left(arguments)
    return f"What is pruned is kept in {arguments.output}. To resume"


def upload_kept(arguments: argparse.Namespace) -> str:
    """Say that an interrupted `upload` resumes."""
    return "What was sent is not sent again. To resume"
