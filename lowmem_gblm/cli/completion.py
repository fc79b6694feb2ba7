"""Completion for shells: a script that knows all commands, their options and choices."""

import argparse

# What stands for a path, by the name that the help has for a value.
_FOLDERS = ("MODEL", "OUTPUT", "OTHER", "WORKDIR", "DIR")
_FILES = ("FILE", "TEXT")
SHELLS = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes what `parser` parses in one of `SHELLS`."""
    import shtab

    kinds = dict.fromkeys(_FOLDERS, shtab.DIRECTORY) | dict.fromkeys(_FILES, shtab.FILE)
    for command in (parser, *subparsers(parser).values()):
        for action in command._actions:
            if action.metavar in kinds:
                action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
    found: str = shtab.complete(parser, shell=shell)
    return found


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands by their names."""
    found = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return {name: one for action in found for name, one in action.choices.items()}
