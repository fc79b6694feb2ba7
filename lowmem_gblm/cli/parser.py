"""The commands and their arguments; a command is a function that adds it to the others."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowmem_gblm import __version__
from lowmem_gblm.cli import actions, interruptions
from lowmem_gblm.cli.actions import DEMO_FOLDER, DEMO_METHODS, Outcome
from lowmem_gblm.cli.comparison import TABLES
from lowmem_gblm.cli.completion import SHELLS
from lowmem_gblm.cli.console import Console
from lowmem_gblm.cli.options import add_options, methods_to_offer
from lowmem_gblm.cli.usage import Parser
from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
from lowmem_gblm.commands.request import MAY_CHANGE, EvalRequest, PruneRequest
from lowmem_gblm.embedded import EMBEDDED
from lowmem_gblm.planning.resources import Resources

_IN_PLACE = ("in_place", "overwrite_my_only_copy", "in_place_shared")
_VARIED = ("method", "sparsity", "pattern", "seed")
_STATISTICS = ("save_statistics", "statistics_dtype", "statistics")
_EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug, 2 bad request, failing disk, device or upload, 3 checkpoint "
    "unusable, 4 does not fit the budget or on the disk, 5 output exists or is in use, or "
    "statistics do not serve, 6 non-finite numbers, 7 verification failed, 130 interrupted."
)
Commands = Any


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Return what was typed after the name of the program; a wrong word is a `UsageError`."""
    return _parser(methods_to_offer(words)).parse_args(words)


def _parser(methods: Sequence[str]) -> Parser:
    parser = Parser(
        prog="lowmem-gblm",
        description="Prune large language models with gradients, one decoder block in memory at "
        "a time.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"lowmem-gblm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_prune(commands, methods)
    _add_resume(commands)
    _add_plan(commands, methods)
    _add_eval(commands)
    _add_compare(commands, methods)
    _add_verify(commands)
    _add_upload(commands)
    _add_report(commands)
    _add_pack(commands)
    _add_unpack(commands)
    _add_demo(commands)
    _add_completion(commands, parser)
    return parser


def _command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace, Console], Outcome],
    help: str,
    *,
    interrupted: Callable[[argparse.Namespace], str | None] = interruptions.nothing_left,
) -> Parser:
    """Add a command; `interrupted` says what is kept of one that was interrupted."""
    command: Parser = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run, interrupted=interrupted)
    output = command.group_of("json")
    output.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, of a failure too"
    )
    loudness = output.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q", "--quiet", action="store_true", help="nothing on stderr, unless the command fails"
    )
    loudness.add_argument(
        "-v", "--verbose", action="store_true",
        help="a line for every step, the reasons of the plan, the traceback of an error",
    )  # fmt: skip
    return command


def _takes_model(command: Parser) -> None:
    help = "a model folder, a Hub id, or demo (the embedded model)"
    command.add_argument("model", metavar="MODEL", help=help)


def _takes_output(command: Parser) -> None:
    command.add_argument("output", metavar="OUTPUT", help="folder made by prune")


def _add_prune(commands: Commands, methods: Sequence[str]) -> None:
    help, kept = "prune a model into a new checkpoint", interruptions.prune_kept
    command = _command(commands, "prune", actions.prune, help, interrupted=kept)
    _takes_model(command)
    command.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="folder to create; none with --in-place"
    )
    command.last = "output"
    add_options(command, PruneRequest, methods=methods, recipe=True)


def _add_resume(commands: Commands) -> None:
    help, kept = "resume an interrupted prune", interruptions.resume_kept
    command = _command(commands, "resume", actions.resume, help, interrupted=kept)
    command.add_argument("work_folder", metavar="WORKDIR", help="the OUTPUT.work folder it left")
    command.set_defaults(output=None)
    add_options(command, PruneRequest, only=MAY_CHANGE)


def _add_plan(commands: Commands, methods: Sequence[str]) -> None:
    help = "what a prune run would take, from headers alone"
    command = _command(commands, "plan", actions.plan, help)
    _takes_model(command)
    tensors = command.group_of("tensors")
    tensors.add_argument(
        "--tensors", action="store_true", help="only list the tensors that would be pruned"
    )
    add_options(command, PruneRequest, methods=methods, recipe=True)


def _add_eval(commands: Commands) -> None:
    help, kept = "perplexity and language tasks, streamed", interruptions.evaluation_kept
    command = _command(commands, "eval", actions.evaluate, help, interrupted=kept)
    _takes_model(command)
    add_options(command, EvalRequest)


def _add_compare(commands: Commands, methods: Sequence[str]) -> None:
    help, kept = "several methods on one model, one table", interruptions.compare_kept
    command = _command(commands, "compare", actions.compare, help, interrupted=kept)
    _takes_model(command)
    command.group_of("output").add_argument(
        "--output", default="comparison", metavar="DIR", help="gets DIR/METHOD [%(default)s]"
    )
    command.group_of("format").add_argument(
        "--format", default="table", choices=tuple(TABLES), help="of what is printed [%(default)s]"
    )
    add_options(command, Grid)
    add_options(command, EvalRequest, only=EVALUATION)
    add_options(
        command, PruneRequest, without=(*_VARIED, *_IN_PLACE, *_STATISTICS), methods=methods,
        several=True,
    )  # fmt: skip


def _add_verify(commands: Commands) -> None:
    help = "prove that an output keeps its promises"
    command = _command(commands, "verify", actions.verify, help)
    _takes_output(command)
    against = command.group_of("against")
    against.add_argument("--against", metavar="MODEL", help="the model it was made from")


def _add_upload(commands: Commands) -> None:
    help, kept = "verify an output, and upload it to the Hub", interruptions.upload_kept
    command = _command(commands, "upload", actions.upload, help, interrupted=kept)
    _takes_output(command)
    command.add_argument("repo", metavar="REPO", help="as you/name; made if need be")
    against = command.group_of("against")
    against.add_argument("--against", metavar="MODEL", help="the model it was made from")
    public = command.group_of("public")
    public.add_argument("--public", action="store_true", help="make a new REPO public [private]")


def _add_report(commands: Commands) -> None:
    command = _command(commands, "report", actions.report, "the structure of masks, on a page")
    _takes_output(command)
    command.group_of("against").add_argument(
        "--against", metavar="OTHER", nargs="+", default=[], help="other outputs of the same model"
    )
    html = command.group_of("html")
    html.add_argument("--html", metavar="FILE", type=Path, help="the page to write [none]")


def _add_pack(commands: Commands) -> None:
    command = _command(commands, "pack", actions.pack, "store a checkpoint without its zeros")
    _takes_output(command)
    command.add_argument("packed", metavar="PACKED", help="folder to create")


def _add_unpack(commands: Commands) -> None:
    help = "restore what was packed, byte for byte"
    command = _command(commands, "unpack", actions.unpack, help)
    command.add_argument("packed", metavar="PACKED", help="folder made by pack")
    command.add_argument("output", metavar="OUTPUT", help="folder to create")


def _add_demo(commands: Commands) -> None:
    help, kept = "all methods on the embedded model, offline", interruptions.compare_kept
    command = _command(commands, "demo", actions.demo, help, interrupted=kept)
    command.set_defaults(model=EMBEDDED, methods=DEMO_METHODS)
    output = command.group_of("output")
    output.add_argument("--output", metavar="DIR", help=f"folder to create [{DEMO_FOLDER}]")
    add_options(command, Resources)


def _add_completion(commands: Commands, parser: Parser) -> None:
    help = "the script with which a shell completes commands and options"
    command = _command(commands, "completion", actions.completion, help)
    command.set_defaults(parser=parser)
    command.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
