"""The command line: argv to a request, one call, an exit code.

Results go to stdout (with `--json`, exactly one JSON object), progress and errors to stderr.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_gblm import __version__
from lowmem_gblm.cli.comparison import TABLES
from lowmem_gblm.cli.console import Console, evaluation_lines, plan_lines, prune_lines
from lowmem_gblm.cli.options import add_options, method_options_of, methods_to_offer, request_from
from lowmem_gblm.cli.streams import Parser, fail, fail_of_system, reserve_streams, tell, write
from lowmem_gblm.commands.compare.grid import EVALUATION, Grid
from lowmem_gblm.commands.request import DEMO, EvalRequest, PruneRequest
from lowmem_gblm.errors import INTERRUPTED, BudgetError, LowmemGblmError
from lowmem_gblm.options import options
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.runtime.signals import raise_on_signals

_DEMO_FOLDER = "lowmem-gblm-demo"
_DEMO_METHODS = "magnitude,gradient,wanda,gblm,sparsegpt"
_DEMO_SEQLEN = 256
_SMALLER = "Try a smaller --seqlen, or --device cpu"
_TAKES_MODEL = ("prune", "plan", "eval", "compare")
_MAY_CHANGE = ("device", "gpu_memory", "cpu_memory", "disk", "accept_other_rounding")
_IN_PLACE = ("in_place", "overwrite_my_only_copy", "in_place_shared")
_VARIED = ("method", "sparsity", "pattern", "seed")
_STATISTICS = ("save_statistics", "statistics_dtype", "statistics")
_PROGRAM = "lowmem-gblm"
_ENDED = "lowmem-gblm: ended at once. To resume, or to begin again:"
_NOTHING_LEFT = "Nothing half-done is left. To begin again"
_RECORD = "pruning.json"


class _Outcome(NamedTuple):
    """The outcome of a command, as JSON and as lines; a record in `folder` says the same."""

    result: dict[str, Any]
    lines: Sequence[str]
    folder: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (see `lowmem_gblm.errors`)."""
    reserve_streams()
    arguments = _parsed(argv)
    _quiet_libraries()
    typed = shlex.join([*_program(), *sys.argv[1:]] if argv is None else [_PROGRAM, *argv])
    try:
        with raise_on_signals(f"{_ENDED}\n{typed}\n", ends=argv is None):
            _print(arguments.run(arguments), as_json=arguments.json)
            return 0
    except KeyboardInterrupt:
        hint = arguments.interrupted(arguments)
        if hint is None:
            return fail(f"interrupted, but {_made(arguments)} is complete already.", INTERRUPTED)
        return fail(f"interrupted. {hint}:\n{typed}", INTERRUPTED)
    except LowmemGblmError as error:
        return fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError by its name: torch may not have been imported at all.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(f"out of memory: {error}. {_SMALLER}", BudgetError.exit_code)
    except OSError as error:
        return fail_of_system(error)


def _program() -> list[str]:
    """Return the words that call this program from the same terminal."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "lowmem_gblm"]
    if called.name == _PROGRAM and shutil.which(_PROGRAM) is None:
        return [str(called)]
    return [_PROGRAM]


def _kept(arguments: argparse.Namespace) -> str | None:
    """Say what an interrupted `prune` has kept; None if it was done."""
    output = Path(_made(arguments))
    if (output / _RECORD).is_file():
        return None
    output = output.resolve() if arguments.in_place else output
    work_folder = (arguments.work_dir or output.parent) / f"{output.name}.work"
    if any((work_folder / "journal").glob("*.json")):
        return f"What is done is kept in {work_folder}. To resume"
    return "Nothing was done yet that could be kept. To begin again"


def _made(arguments: argparse.Namespace) -> str:
    """Return the folder that `prune` writes: OUTPUT, or in place MODEL."""
    return str(arguments.output or arguments.model)


def _kept_in(arguments: argparse.Namespace) -> str | None:
    """Say what an interrupted `resume` has kept; None if it was done."""
    if arguments.output and (arguments.output / _RECORD).is_file():
        return None
    return f"What is done is kept in {arguments.work_folder}. To resume"


def _quiet_libraries() -> None:
    """Turn off messages of libraries for the user, before their first import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _prune(arguments: argparse.Namespace) -> _Outcome:
    output = None if arguments.output is None else Path(arguments.output)
    request = request_from(PruneRequest, arguments, output=output)
    return _pruned(request, _made(arguments))


def _resume(arguments: argparse.Namespace) -> _Outcome:
    from lowmem_gblm.commands.paths import paths_of
    from lowmem_gblm.commands.prune.resume import find_job

    defaults = {one.name: one.default for one in options(PruneRequest)}
    given = {name: getattr(arguments, name) for name in _MAY_CHANGE}
    changed = {name: value for name, value in given.items() if value != defaults[name]}
    request = find_job(Path(arguments.work_folder), **changed)
    arguments.output = paths_of(request).output
    return _pruned(request, _made(arguments))


def _pruned(request: PruneRequest, made: str) -> _Outcome:
    from lowmem_gblm.commands.prune.pipeline import prune

    with Console(sys.stderr) as console:
        record = prune(request, console)
    return _Outcome(record, prune_lines(record, made), Path(made))


def _plan(arguments: argparse.Namespace) -> _Outcome:
    from lowmem_gblm.commands.plan import plan_request

    plan = plan_request(request_from(PruneRequest, arguments)).as_json()
    return _Outcome(plan, plan_lines(plan))


def _eval(arguments: argparse.Namespace) -> _Outcome:
    from lowmem_gblm.commands.evaluate import evaluate

    with Console(sys.stderr) as console:
        result = evaluate(request_from(EvalRequest, arguments), console)
    return _Outcome(result, evaluation_lines(result))


def _verify(arguments: argparse.Namespace) -> _Outcome:
    from lowmem_gblm.commands.verify import verify

    result = verify(arguments.output, arguments.against)
    checked = f"against {arguments.against}" if arguments.against else "by itself"
    line = (
        f"{arguments.output} keeps its promises, checked {checked}: {result['tensors']} "
        f"tensors, {result['pruned_tensors']} of them pruned to "
        f"{result['sparsity_measured']:.2%} zeros"
    )
    return _Outcome(result, [line, *(f"note: {note}" for note in result["notes"])])


def _report(arguments: argparse.Namespace) -> _Outcome:
    from lowmem_gblm.commands.report.pipeline import report

    result = report(arguments.output, arguments.against, arguments.html)
    written = [f"the report is {arguments.html}"] if arguments.html else []
    return _Outcome(result, [*result["headlines"], *written])


def _compare(arguments: argparse.Namespace) -> _Outcome:
    request = request_from(PruneRequest, arguments, sparsity=None, pattern=None, method_options={})
    evaluation = {name: getattr(arguments, name) for name in EVALUATION}
    return _compared(arguments, request, Path(arguments.output), evaluation)


def _demo(arguments: argparse.Namespace) -> _Outcome:
    resources = {one.name: getattr(arguments, one.name) for one in options(Resources)}
    request = PruneRequest(model=DEMO, seqlen=_DEMO_SEQLEN, **resources)
    folder = Path(arguments.output) if arguments.output else _free_folder(Path(_DEMO_FOLDER))
    return _compared(arguments, request, folder, {})


def _compared(
    arguments: argparse.Namespace, request: PruneRequest, folder: Path, evaluation: dict[str, Any]
) -> _Outcome:
    from lowmem_gblm.commands.compare.pipeline import compare

    varied = {one.name for one in options(Grid)} & vars(arguments).keys()
    grid = Grid(**{name: getattr(arguments, name) for name in varied})
    given = method_options_of(arguments)
    with Console(sys.stderr) as console:
        rows = compare(request, grid, folder, evaluation, given, console, console.announce)
        for note in dict.fromkeys(note for row in rows for note in row["notes"]):
            console.announce(f"note: {note}")
    lines = TABLES[getattr(arguments, "format", "table")](rows)
    return _Outcome({"model": request.model, "rows": rows}, lines)


def _free_folder(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, … that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(one for one in chain([path], others) if not one.exists())


def _print(outcome: _Outcome, *, as_json: bool) -> None:
    """Print an outcome; if that fails, name the record that has it."""
    result, lines, folder = outcome
    text = json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines)
    try:
        write(sys.stdout, f"{text}\n")
    except OSError as error:
        if folder is None:
            raise
        tell(f"the result could not be printed ({error}): it is in {folder / _RECORD}")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse argv; Python 3.11 takes an OUTPUT that can be left out only beside MODEL."""
    parser = _parser(methods_to_offer(sys.argv[1:] if argv is None else argv))
    arguments, left = parser.parse_known_args(argv)
    missing = arguments.run is _prune and arguments.output is None
    if missing and left and not left[0].startswith("-"):
        arguments.output = left.pop(0)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _parser(methods: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="lowmem-gblm",
        description="Prune large language models with gradients, one decoder block in memory at "
        "a time.",
        epilog="Exit codes: 0 done, 2 bad request or failing disk, 3 checkpoint unusable, 4 does "
        "not fit the budget or on the disk, 5 output exists or is in use, or statistics do not "
        "serve, 6 non-finite numbers, "
        "7 verification failed, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"lowmem-gblm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = _command(commands, "prune", _prune, "prune a model into a new checkpoint")
    command.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="folder to create; none with --in-place"
    )
    command.set_defaults(interrupted=_kept)
    add_options(command, PruneRequest, methods=methods)

    command = _command(commands, "resume", _resume, "resume an interrupted prune")
    command.add_argument("work_folder", metavar="WORKDIR", help="the OUTPUT.work folder it left")
    command.set_defaults(interrupted=_kept_in, output=None)
    add_options(command, PruneRequest, only=_MAY_CHANGE)

    command = _command(commands, "plan", _plan, "what a prune run would take, from headers alone")
    add_options(command, PruneRequest, methods=methods)

    command = _command(commands, "eval", _eval, "perplexity and language tasks, streamed")
    add_options(command, EvalRequest)

    command = _command(commands, "compare", _compare, "several methods on one model, one table")
    command.set_defaults(
        interrupted=lambda typed: f"What is pruned is kept in {typed.output}. To resume"
    )
    command.add_argument(
        "--output", default="comparison", metavar="DIR", help="gets DIR/METHOD [%(default)s]"
    )
    command.add_argument(
        "--format", default="table", choices=tuple(TABLES), help="of what is printed [%(default)s]"
    )
    add_options(command, Grid)
    add_options(command, EvalRequest, only=EVALUATION)
    add_options(
        command, PruneRequest, without=(*_VARIED, *_IN_PLACE, *_STATISTICS), methods=methods,
        several=True,
    )  # fmt: skip

    command = _command(commands, "verify", _verify, "prove that an output keeps its promises")
    command.add_argument("output", metavar="OUTPUT", help="folder made by prune")
    command.add_argument("--against", metavar="MODEL", help="the model it was made from")

    command = _command(commands, "report", _report, "the structure of masks, on a page")
    command.add_argument("output", metavar="OUTPUT", help="folder made by prune")
    command.add_argument(
        "--against", metavar="OTHER", nargs="+", default=[], help="other outputs of the same model"
    )
    command.add_argument("--html", metavar="FILE", type=Path, help="the page to write [none]")

    command = _command(commands, "demo", _demo, "all methods on the embedded model, offline")
    command.set_defaults(
        model=DEMO, methods=_DEMO_METHODS,
        interrupted=lambda _: "What is pruned stays. To begin again",
    )  # fmt: skip
    command.add_argument("--output", metavar="DIR", help=f"folder to create [{_DEMO_FOLDER}]")
    add_options(command, Resources)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], _Outcome], help: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run, interrupted=lambda _: _NOTHING_LEFT)
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    if name in _TAKES_MODEL:
        help = "a model folder, a Hub id, or demo (the embedded model)"
        command.add_argument("model", metavar="MODEL", help=help)
    return command
