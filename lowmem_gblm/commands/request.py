"""The requests: every option once, with its help, its default and its meaning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lowmem_gblm.commands.method_options import check_method_options
from lowmem_gblm.commands.pattern_rules import (
    Rule,
    Sparsity,
    as_patterns,
    as_sparsities,
    pattern_rules,
)
from lowmem_gblm.commands.texts import IN_MEMORY, NAMED, InMemory, as_calibration, as_text
from lowmem_gblm.embedded import EMBEDDED, is_embedded
from lowmem_gblm.errors import JobError, RequestError, shown, shown_value
from lowmem_gblm.methods import find_method
from lowmem_gblm.options import (
    as_path,
    check_options,
    checked_options,
    flag_of,
    option,
    parse_bytes,
    parse_names,
)
from lowmem_gblm.planning.globs import as_globs
from lowmem_gblm.planning.resources import Resources
from lowmem_gblm.planning.sizes import STORES

DEFAULT_SEQLEN = 2048
DEFAULT_SHARD_BYTES = 5_000_000_000
# What may be another when a job is resumed.
MAY_CHANGE = ("device", "gpu_memory", "cpu_memory", "disk", "accept_other_rounding")
_FOLDERS = ("output", "work_dir", "save_statistics", "statistics")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Resources):
    """The options of commands that cut windows from a text."""

    text_column: str = option(
        "text",
        "column of the text, or of conversations for calibration, in .jsonl, .json.gz and "
        ".parquet files and on the Hub",
        metavar="NAME",
    )
    bos: str = option(
        "auto", "begin every window with <bos>; auto: for the Gemma family, which needs it",
        choices=("auto", "always", "never"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PruneRequest(TextOptions):
    """A job for `prune`; without an `output` it is in place, or only to be planned."""

    model: str
    output: Path | None = None
    method: str = option("gblm", "how weights are ranked", metavar="METHOD")
    method_options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Sparsity | Mapping[str, Sparsity] | None = option(
        None, "fraction of zeros, between 0 and 1 [0.5]", parse=as_sparsities, metavar="FRACTION"
    )
    pattern: str | Mapping[str, str] | None = option(
        None, "N:M keeps N of every M along the inputs, as 2:4", parse=as_patterns, metavar="N:M"
    )
    on_ragged: str = option(
        "error",
        "what to do with a width that M does not divide: refuse, or keep the tail dense",
        choices=("error", "keep"),
    )
    calibration: str | InMemory | None = option(
        None, "c4, wikitext2, demo, a .txt .jsonl .json.gz .parquet file, or a data set of the Hub "
        "as owner/name:config:split [c4]", parse=as_calibration, metavar="TEXT",
    )  # fmt: skip
    packing: bool = option(
        False, "join short documents in random order, and cut samples from that", parse=bool
    )
    nsamples: int = option(128, "calibration samples", parse=int, metavar="N")
    seqlen: int | None = option(
        None, "tokens per sample [2048, or the model's positions if fewer]", parse=int,
        metavar="T",
    )  # fmt: skip
    seed: int = option(0, "of the draw of calibration samples", parse=int, metavar="SEED")
    activations: str = option(
        "pruned",
        "what a block's input norms come from: the model pruned so far, or the dense one",
        choices=("pruned", "dense"),
    )
    save_statistics: Path | None = option(
        None, "save what weights are ranked by for later runs, in a new folder", identity=False,
        parse=Path, metavar="DIR",
    )  # fmt: skip
    statistics_dtype: str = option(
        "float32", "of gradient magnitudes that are saved", choices=tuple(STORES)
    )
    statistics: Path | None = option(
        None, "rank weights by what an earlier run has saved, as far as that serves",
        identity=False, parse=Path, metavar="DIR",
    )  # fmt: skip
    accept_other_rounding: bool = option(
        False, "resume an interrupted job on another device than it was begun on",
        identity=False, parse=bool,
    )  # fmt: skip
    in_place: bool = option(
        False, "overwrite the weights of MODEL itself, which must be a folder; no OUTPUT",
        parse=bool,
    )  # fmt: skip
    overwrite_my_only_copy: bool = option(
        False, "say to --in-place that the dense model may go", identity=False, parse=bool
    )
    in_place_shared: bool = option(
        False, "say to --in-place that the files may be those of others, too: links, a Hub cache",
        identity=False, parse=bool,
    )  # fmt: skip
    max_shard_size: int | None = option(
        None, "bytes of a shard of OUTPUT at most, as 2GB; a block is never divided [5GB]",
        parse=parse_bytes, metavar="SIZE",
    )  # fmt: skip
    include: tuple[str, ...] = option(
        (), "prune only tensors whose name matches (repeatable)", metavar="GLOB", repeat=True
    )
    exclude: tuple[str, ...] = option(
        (), "leave tensors dense whose name matches (repeatable)", metavar="GLOB", repeat=True
    )

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "model", as_path("MODEL", self.model))
        if self.output is not None:
            object.__setattr__(self, "output", Path(as_path("OUTPUT", self.output)))
        _ = self.options
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_globs(name, getattr(self, name)))
        if isinstance(self.calibration, InMemory) and self.calibration.tokens_NT is not None:
            self._take_samples(*self.calibration.tokens_NT.shape)
        if self.nsamples < 1:
            raise RequestError(f"--nsamples must be at least 1; got {self.nsamples}")
        if self.seqlen is not None and self.seqlen < 2:
            raise RequestError(f"--seqlen must be at least 2 tokens; got {self.seqlen}")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise RequestError(f"--max-shard-size must be at least 1B; got {self.max_shard_size}")
        self._check_place()
        self._check_statistics()
        self._check_names()
        _ = self.rules

    def _take_samples(self, nsamples: int, seqlen: int) -> None:
        """Take the number and the length of samples that are given as token ids."""
        for name, found in (("nsamples", nsamples), ("seqlen", seqlen)):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, found):
                raise RequestError(
                    f"the samples that are given are {nsamples} of {seqlen} tokens: leave out "
                    f"{flag_of(name)}"
                )
            object.__setattr__(self, name, found)

    def _check_place(self) -> None:
        if not self.in_place:
            for name in ("overwrite_my_only_copy", "in_place_shared"):
                if getattr(self, name):
                    raise RequestError(f"{flag_of(name)} needs --in-place")
        elif self.output is not None:
            raise RequestError(
                f"--in-place overwrites {self.model} itself: give that, or the OUTPUT "
                f"{self.output}, not both"
            )
        elif self.max_shard_size is not None:
            raise RequestError("--in-place keeps the shards of MODEL: leave out --max-shard-size")
        elif is_embedded(self.model):
            raise RequestError("--in-place needs a model folder; the embedded model stays as it is")

    def _check_statistics(self) -> None:
        if self.save_statistics is None:
            if self.statistics_dtype != "float32":
                raise RequestError("--statistics-dtype needs --save-statistics")
        elif self.statistics is not None:
            raise RequestError(
                "--statistics takes what --save-statistics has saved already: give one of the two"
            )
        elif self.in_place:
            raise RequestError(
                "--save-statistics is for other runs with the dense model, and --in-place leaves "
                "none: give one of the two"
            )

    def _check_names(self) -> None:
        """Raise `RequestError` for a name or an option that is not UTF-8, as JSON has to be."""
        for name, value in {**to_json(self), **self.method_options}.items():
            try:
                "".join(value if isinstance(value, tuple) else str(value)).encode()
            except UnicodeEncodeError:
                raise RequestError(
                    f"the {name} is not UTF-8: {value!r}. Give it another name, or use a link"
                ) from None

    @cached_property
    def options(self) -> Any:
        """Return the options of the method, defaults included: an instance of its class."""
        method = find_method(self.method)
        check_method_options(method, self.method_options, [one.name for one in fields(self)])
        return method.options(**checked_options(method.options, self.method_options))

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Return what `sparsity`, `pattern` and `on_ragged` mean together."""
        return pattern_rules(self.sparsity, self.pattern, keep_ragged_tail=self.on_ragged == "keep")

    @property
    def shard_bytes(self) -> int:
        """Return the most bytes of a shard of the output."""
        return self.max_shard_size or DEFAULT_SHARD_BYTES

    @property
    def calibration_text(self) -> str:
        """Return where samples come from: a file by its full name, C4, or the text of "demo"."""
        if isinstance(self.calibration, InMemory):
            return IN_MEMORY
        asked = self.calibration or (EMBEDDED if is_embedded(self.model) else "c4")
        is_file = asked not in NAMED and Path(asked).exists()
        return str(Path(asked).resolve()) if is_file else asked


def prune_request(model: str, output: Path | None = None, **asked: Any) -> PruneRequest:
    """Return the request that flat keywords mean: its fields, and options of its method."""
    values, method_options = sort_options(asked)
    return PruneRequest(model=model, output=output, method_options=method_options, **values)


def sort_options(asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a prune request among flat keywords, and all options of methods.

    Those are the other keywords, where None stands for one that is not given, and what is in
    `method_options`.
    """
    known = {one.name for one in fields(PruneRequest)} - {"method_options"}
    others = {name: value for name, value in asked.items() if name not in known}
    more = others.pop("method_options", None) or {}
    if not isinstance(more, Mapping):
        raise RequestError(f"method_options must be a dictionary; got {shown_value(more)}")
    given = {name: value for name, value in others.items() if value is not None}
    return {name: asked[name] for name in known & asked.keys()}, {**given, **more}


@dataclass(frozen=True, kw_only=True)
class EvalRequest(TextOptions):
    """A job for `eval`."""

    model: str
    text: str | None = option(
        None, "wikitext2, c4, demo, or a .txt .jsonl .json.gz .parquet file [wikitext2]",
        parse=as_text, metavar="TEXT",
    )  # fmt: skip
    seqlen: int | None = option(
        None, "tokens per window [2048, or the model's positions if fewer]; tasks: most that the "
        "model reads of a question, which loses its beginning [the model's positions]", parse=int,
        metavar="T",
    )  # fmt: skip
    windows: int | None = option(None, "use only the first N windows [all]", parse=int, metavar="N")
    tasks: tuple[str, ...] = option(
        (), "tasks of lm-evaluation-harness, as boolq,arc_easy: names, groups or globs; with them, "
        "perplexity is measured if --text is given", parse=parse_names, metavar="A,B,…",
    )  # fmt: skip
    include_path: Path | None = option(
        None, "folder with task files (.yaml) of your own; they may run code", parse=Path,
        metavar="DIR",
    )  # fmt: skip
    num_fewshot: int | None = option(
        None, "examples before each question [as the task says, else 0]", parse=int, metavar="N"
    )
    limit: int | None = option(None, "only the first N questions of a task [all]", parse=int,
        metavar="N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "model", as_path("MODEL", self.model))
        for name in ("include_path", "num_fewshot", "limit"):
            if getattr(self, name) is not None and not self.tasks:
                raise RequestError(f"{flag_of(name)} is about tasks: name some with --tasks")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise RequestError(f"--num-fewshot must be at least 0; got {self.num_fewshot}")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"--limit must be at least 1; got {self.limit}")
        if self.windows is not None and self.windows < 1:
            raise RequestError(f"--windows must be at least 1; got {self.windows}")
        if self.seqlen is not None and self.seqlen < 2:
            raise RequestError(f"--seqlen must be at least 2 tokens; got {self.seqlen}")

    @property
    def measures_text(self) -> bool:
        """Return whether perplexity is asked for."""
        return self.text is not None or not self.tasks

    @property
    def evaluation_text(self) -> str:
        """Return the text to measure on: as asked, else WikiText-2, or the embedded text."""
        return self.text or (EMBEDDED if is_embedded(self.model) else "wikitext2")


def to_json(request: PruneRequest) -> dict[str, Any]:
    """Return all options, with full paths, so that the request can be made again from anywhere."""
    asked = {one.name: getattr(request, one.name) for one in fields(request)}
    if Path(request.model).exists() and not is_embedded(request.model):
        asked["model"] = str(Path(request.model).absolute())
    for name in _FOLDERS:
        if asked[name] is not None:
            asked[name] = str(asked[name].absolute())
    # With its meaning: a model called "demo" has the embedded text, its full name has not.
    asked["calibration"] = request.calibration_text
    asked["method_options"] = dict(request.method_options)
    if isinstance(request.sparsity, Mapping):
        asked["sparsity"] = {glob: str(one) for glob, one in request.sparsity.items()}
    elif request.sparsity is not None:
        asked["sparsity"] = str(request.sparsity)
    return asked


def request_from_json(asked: Mapping[str, Any]) -> PruneRequest:
    """Return the request that `to_json` of this version has described, else raise `JobError`."""
    values = dict(asked)
    differing = sorted({one.name for one in fields(PruneRequest)} ^ values.keys())
    if differing:
        raise JobError(
            f"the job was begun by another version of lowmem-gblm, whose options are not those of "
            f"this one ({shown(', '.join(differing))}): resume it with that version"
        )
    return PruneRequest(**values)


def resolve_seqlen(seqlen: int | None, positions: int | None) -> int:
    """Return tokens per sample: as asked, else 2048 or what the model's positions allow."""
    if seqlen is None:
        return min(DEFAULT_SEQLEN, positions or DEFAULT_SEQLEN)
    if positions is not None and seqlen > positions:
        raise RequestError(f"--seqlen {seqlen} is beyond the {positions} positions of the model")
    return seqlen
