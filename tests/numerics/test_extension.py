"""What another package adds, without an edit in this one: methods, their options, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.errors import RequestError
from lowmem_gblm.methods import Method, Statistics, by_score, find_method, method_names
from lowmem_gblm.model.matmul_tap import Matmul, MatmulWeight
from lowmem_gblm.options import check_options, option
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from lowmem_gblm.sweeps.statistics import find_statistic, needed_statistics
from lowmem_gblm.sweeps.statistics.base import ActivationStatistic
from support.crashes import content

METHODS, STATISTICS = "lowmem_gblm.methods", "lowmem_gblm.statistics"
Install = Callable[[str, str, str], None]


@dataclass(frozen=True, kw_only=True)
class SeededOptions:
    """An option whose name every run has."""

    seed: int = option(0, "of something else", parse=int)

    def __post_init__(self) -> None:
        check_options(self)


class MeanAbsolute(ActivationStatistic):
    """`(1/N) sum_n sum_t |x_n[t, j]|`, float32 [in]."""

    name = "mean_absolute"
    axes = ("in",)

    def __init__(self, nsamples: int) -> None:
        super().__init__(nsamples)
        self._sums: dict[MatmulWeight, Tensor] = {}

    def observe(self, matmul: Matmul) -> None:
        total_I = matmul.input_TI.float().abs().sum(dim=0)
        self._sums[matmul.slot] = self._sums.get(matmul.slot, 0) + total_I

    def finish_sample(self) -> None:
        pass

    def sums(self) -> dict[MatmulWeight, Tensor]:
        return self._sums

    def is_finite(self) -> bool:
        return all(bool(total.isfinite().all()) for total in self._sums.values())

    def result(self, matrix: MatmulWeight) -> Tensor | None:
        return self._sums[matrix] / self._nsamples if matrix in self._sums else None


@dataclass(frozen=True, kw_only=True)
class PowerOptions:
    """An option that only this method has."""

    power: float = option(1.0, "of the mean absolute input", parse=float, metavar="P")


def power_scores(weight_OI: Tensor, statistics: Statistics, options: PowerOptions) -> Tensor:
    return weight_OI.abs() * statistics["mean_absolute"] ** options.power


POWER = Method(
    name="power", title="|W|·mean|X|^p", paper="none", needs=("mean_absolute",), group="row",
    decide=by_score(power_scores, "row", rowwise=True), options=PowerOptions,
)  # fmt: skip


def method(name: str, options: type = SeededOptions) -> Method:
    score = by_score(lambda weight, statistics, options: weight.abs(), "row")
    return Method(
        name=name, title=name, paper="none", needs=(), group="row", decide=score, options=options
    )


SEEDED = method("seeded")
MISNAMED = method("other")
NO_METHOD = "a text"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make this file a package that gives something by an entry point, as pip would note it."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def give(group: str, name: str, value: str) -> None:
        info = tmp_path / "site" / f"{name}_package-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")

    return give


def test_a_method_of_another_package_is_named_without_importing_the_package(
    install: Install,
) -> None:
    install(METHODS, "far", "a_package_that_is_not_there:METHOD")
    assert "far" in method_names()
    assert find_method("wanda").name == "wanda"


def test_a_name_of_our_own_is_never_that_of_another_package(install: Install) -> None:
    install(METHODS, "wanda", "a_package_that_is_not_there:METHOD")
    assert find_method("wanda").paper.startswith("Sun")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "a_package_that_is_not_there:METHOD",
            "the method 'far' of the package far-package cannot be loaded: ModuleNotFoundError",
        ),
        (f"{__name__}:NOTHING", "of the package far-package cannot be loaded: AttributeError"),
        (f"{__name__}:NO_METHOD", "of the package far-package is no lowmem_gblm.methods.Method of"),
        (f"{__name__}:MISNAMED", "of the package far-package is no lowmem_gblm.methods.Method of"),
    ],
)
def test_a_broken_package_is_named_and_hurts_nobody_else(
    value: str, sentence: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(METHODS, "far", value)
    with pytest.raises(RequestError, match=sentence):
        lowmem_gblm.plan("demo", method="far")
    assert main(["plan", "demo", "--method", "far"]) == 2
    assert sentence in capsys.readouterr().err
    with pytest.raises(RequestError, match="--alpha is no option of wanda: it belongs to gblm"):
        lowmem_gblm.plan("demo", method="wanda", alpha=1)
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    said = capsys.readouterr()
    assert "--alpha A" in said.out
    assert sentence in said.err


def test_an_option_that_every_run_has_is_refused(install: Install) -> None:
    install(METHODS, "seeded", f"{__name__}:SEEDED")
    with pytest.raises(RequestError, match="the method seeded has an option --seed, which every"):
        lowmem_gblm.plan("demo", method="seeded")


def test_an_option_of_no_method_is_refused() -> None:
    with pytest.raises(RequestError, match="there is no option 'alhpa' of any method"):
        lowmem_gblm.plan("demo", method_options={"alhpa": 1})


@pytest.fixture
def power(install: Install) -> None:
    """A method with an option, and the statistic that it needs."""
    install(METHODS, "power", f"{__name__}:POWER")
    install(STATISTICS, "mean_absolute", f"{__name__}:MeanAbsolute")


def power_of(power: float) -> dict[str, Any]:
    return {"method_options": {"power": power}}


@pytest.fixture
def asked(text_file: Path) -> dict[str, object]:
    return {"calibration": str(text_file), "nsamples": 2, "seqlen": 32}


@pytest.mark.usefixtures("power")
def test_a_method_and_a_statistic_of_other_packages_prune(
    small: Path, asked: dict[str, object], tmp_path: Path
) -> None:
    records = [
        lowmem_gblm.prune(small, tmp_path / f"{power}", method="power", **power_of(power), **asked)
        for power in (0, 1.0)
    ]
    assert [record["power"] for record in records] == [0, 1.0]
    assert (records[0]["alpha"], records[0]["gradient_norm"]) == (None, None)
    for power in ("0", "1.0"):
        assert lowmem_gblm.verify(tmp_path / power, small)["pruned_tensors"] == 14
    # Without the statistic, and by row, this is magnitude; with it, other weights go.
    assert content(tmp_path / "0") != content(tmp_path / "1.0")


@pytest.mark.usefixtures("power")
def test_its_flag_says_what_its_keyword_says(
    small: Path, asked: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lowmem_gblm.prune(small, tmp_path / "keyword", method="power", **power_of(2.5), **asked)
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    words += ["--method", "power", "--power", "2.5"]
    assert main(["prune", str(small), str(tmp_path / "flag"), *words]) == 0
    assert content(tmp_path / "flag") == content(tmp_path / "keyword")
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    assert "power: of the mean absolute input [1.0]" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(RequestError, match="--power is no option of gblm: it belongs to power"):
        lowmem_gblm.plan(small, **power_of(2.0))


@pytest.mark.usefixtures("power")
def test_its_option_outlives_an_interruption(
    small: Path, asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowmem_gblm.prune(small, tmp_path / "once", method="power", **power_of(0.5), **asked)
    decide, seen = BlockPruner.prune, []

    def stop_in_block_1(pruner: BlockPruner, block: object, *args: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(block)
        decide(pruner, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPruner, "prune", stop_in_block_1)
        with pytest.raises(KeyboardInterrupt):
            lowmem_gblm.prune(small, tmp_path / "twice", method="power", **power_of(0.5), **asked)
    assert main(["resume", str(tmp_path / "twice.work")]) == 0
    assert content(tmp_path / "twice") == content(tmp_path / "once")


@pytest.mark.usefixtures("power")
def test_an_option_goes_to_the_methods_of_a_comparison_that_have_it(
    small: Path, asked: dict[str, object], text_file: Path, tmp_path: Path
) -> None:
    texts = {"text": str(text_file), "windows": 1}
    lowmem_gblm.compare(small, ["power", "wanda"], tmp_path, **power_of(2.0), **asked, **texts)
    records = [lowmem_gblm.verify(tmp_path / name, small) for name in ("power", "wanda")]
    assert [record["pruned_tensors"] for record in records] == [14, 14]
    with pytest.raises(RequestError, match="--alpha is no option of power, wanda: it belongs to"):
        lowmem_gblm.compare(small, ["power", "wanda"], tmp_path / "none", alpha=2, **asked, **texts)


def test_a_statistic_of_this_package_comes_first(install: Install) -> None:
    install(STATISTICS, "gram", "a_package_that_is_not_there:Gram")
    assert find_statistic("gram").axes == ("in", "in")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("a_package_that_is_not_there:X", "statistic 'far' of the package far-package cannot be"),
        (f"{__name__}:MeanAbsolute", "of the package far-package is no ActivationStatistic or Gra"),
        (f"{__name__}:POWER", "of the package far-package is no ActivationStatistic or Gradient"),
    ],
)
def test_a_broken_statistic_is_named(value: str, sentence: str, install: Install) -> None:
    install(STATISTICS, "far", value)
    with pytest.raises(RequestError, match=sentence):
        needed_statistics(["far"])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown statistic 'far': there are gradient_l1, grad"):
        needed_statistics(["far"])
    with pytest.raises(RequestError, match="a method may need one statistic of gradients; this"):
        needed_statistics(["gradient_l1", "gradient_l2"])


def test_statistics_are_cut_by_what_they_belong_to() -> None:
    values = {"gradient_l1": torch.rand(4, 3), "input_norm": torch.rand(3)}
    cut = Statistics(values, per_output=["gradient_l1"]).of_rows(slice(1, 3))
    assert cut["gradient_l1"].equal(values["gradient_l1"][1:3])
    assert cut["input_norm"].equal(values["input_norm"])
    assert (len(cut), set(cut), "gram" in cut) == (2, set(values), False)
    with pytest.raises(AssertionError, match="reads the statistic 'gram', which its `needs` does"):
        cut["gram"]
