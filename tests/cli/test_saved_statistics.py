"""`--save-statistics` and `--statistics`: what is typed, what is said, what is refused and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.runtime import machine
from support.crashes import stopped_at
from support.tiny_models import sample_text, save_tiny

DENSE = ("--activations", "dense")


class Shop:
    """A model, and statistics of two runs of gblm: of the dense model, and as it is pruned."""

    def __init__(self, model: Path, folder: Path, text: Path) -> None:
        self.model, self.text = model, text
        self.size = ("--calibration", str(text), "--nsamples", "2", "--seqlen", "16")
        self.dense, self.pruned = folder / "dense", folder / "pruned"
        for saved, options in ((self.dense, DENSE), (self.pruned, ())):
            output = folder / f"{saved.name}-out"
            saving = ("--save-statistics", str(saved))
            assert main(["prune", str(model), str(output), *self.size, *options, *saving]) == 0


@pytest.fixture(scope="module")
def shop(small: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(small, tmp_path_factory.mktemp("shop"), text_file)


@pytest.fixture
def copied(shop: Shop, tmp_path: Path) -> Path:
    """Statistics to be damaged."""
    return Path(shutil.copytree(shop.dense, tmp_path / "copied"))


@pytest.fixture
def refused(capsys, tmp_path: Path) -> Callable[..., str]:
    """Prunes by statistics; returns what is said. Nothing is left behind."""

    def refused(model: Path, saved: Path, *options: str, code: int = 5) -> str:
        output = tmp_path / "out"
        taking = ["--statistics", str(saved), *options]
        assert main(["prune", str(model), str(output), *taking]) == code
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize(
    ("on_one_disk", "sentence", "options"),
    [
        ((), "what is saved for later runs needs ", "--save-statistics"),
        (
            ("out", "saved"),
            "the output and what is saved for later runs need ",
            "OUTPUT or --save-statistics",
        ),
    ],
)
def test_every_disk_must_have_room(
    on_one_disk: tuple[str, ...],
    sentence: str,
    options: str,
    shop: Shop,
    tmp_path: Path,
    capsys,
    monkeypatch,
) -> None:
    def same(one: Path, other: Path) -> bool:
        return one == other or {one.name, other.name} <= {*on_one_disk}

    def free(folder: Path) -> int:
        return 1000 if folder.name in ("saved", *on_one_disk) else 1 << 40

    monkeypatch.setattr(machine, "same_disk", same)
    monkeypatch.setattr(machine, "free_disk_bytes", free)
    asked = ["prune", str(shop.model), str(tmp_path / "out"), *shop.size, "--disk", "1GiB"]
    assert main([*asked, "--save-statistics", str(tmp_path / "saved")]) == 4
    said = capsys.readouterr().err
    assert sentence in said
    assert f"make room, or choose another {options}\n" in said


def test_what_is_saved_and_taken_is_said(shop: Shop, tmp_path: Path, capsys) -> None:
    asked = ["prune", str(shop.model), str(tmp_path / "one"), *shop.size]
    assert main([*asked, "--save-statistics", str(tmp_path / "saved")]) == 0
    assert f"the statistics are {tmp_path}/saved\n" in capsys.readouterr().out
    taking = ["--statistics", str(shop.dense), "--sparsity", "0.6"]
    assert main(["prune", str(shop.model), str(tmp_path / "two"), *taking]) == 0
    told = f"note: gradient_l1 taken from {shop.dense.name}; input_norm measured again\n"
    assert told in capsys.readouterr().out
    assert main(["prune", str(shop.model), str(tmp_path / "three"), *taking, *DENSE]) == 0
    assert f"input_norm and gradient_l1 taken from {shop.dense.name}\n" in capsys.readouterr().out
    with_magnitude = ["--method", "magnitude", *taking]
    assert main(["prune", str(shop.model), str(tmp_path / "four"), *with_magnitude]) == 0
    assert "taken from" not in capsys.readouterr().out


def test_the_plan_says_it(shop: Shop, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lowmem_gblm.commands.plan.machine_speed", lambda *_: None)
    asked = ["plan", str(shop.model)]
    assert main([*asked, *shop.size, "--save-statistics", str(tmp_path / "saved")]) == 0
    assert " KiB saved statistics\n" in capsys.readouterr().out
    assert main([*asked, *DENSE, "--statistics", str(shop.dense)]) == 0
    assert "stages       prune\n" in capsys.readouterr().out


HELD = "holds input_norm, gradient_l1; "
OF_ITS_OWN = " of the model pruned so far, which every run measures itself: add --activations dense"
TO_SAVE = ": save them with prune --method {} --activations dense --save-statistics"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--method", "sparsegpt", *DENSE),
            f"{HELD}sparsegpt with --activations dense needs gram{TO_SAVE.format('sparsegpt')}",
        ),
        (
            ("--method", "sparsegpt"),
            f"{HELD}sparsegpt with --activations pruned needs gram{OF_ITS_OWN}",
        ),
        (
            ("--method", "wanda"),
            f"{HELD}wanda with --activations pruned needs input_norm{OF_ITS_OWN}",
        ),
        (
            ("--gradient-norm", "l2"),
            f"{HELD}gblm with --activations pruned needs gradient_l2{TO_SAVE.format('gblm')}",
        ),
    ],
)
def test_a_statistic_that_is_missing_is_named(
    options: tuple[str, ...], sentence: str, shop: Shop, refused: Callable[..., str]
) -> None:
    assert f"{shop.dense} {sentence}" in refused(shop.model, shop.dense, *options)


def test_input_norms_of_a_pruned_model_do_not_serve(
    shop: Shop, refused: Callable[..., str]
) -> None:
    said = refused(shop.model, shop.pruned, "--method", "wanda", *DENSE)
    held = f"{shop.pruned} holds input_norm of the model it pruned, gradient_l1; "
    assert f"{held}wanda with --activations dense needs input_norm: save them" in said


def test_another_model_is_refused(shop: Shop, tmp_path: Path, refused: Callable[..., str]) -> None:
    other = save_tiny("llama", tmp_path / "other", blocks=2, width=16, seed=1)
    said = refused(other, shop.dense, *DENSE)
    assert f"the statistics in {shop.dense} are of another model (source_bytes: " in said
    assert "save those of this run, or leave out --statistics" in said


@pytest.mark.parametrize(
    ("options", "what", "difference"),
    [
        (("--nsamples", "3"), "other calibration samples", "nsamples: 2, now 3"),
        (("--seqlen", "17"), "other calibration samples", "seqlen: 16, now 17"),
        (("--seed", "1"), "other calibration samples", "seed: 0, now 1"),
        (("--bos", "always"), "other calibration samples", "bos: "),
        (("--calibration", "{other}"), "other calibration samples", "calibration_tokens: "),
        (("--dtype", "bfloat16"), "another precision", "dtype: 'float32', now 'bfloat16'"),
        (("--compute-weights", "int8"), "another precision", "compute_weights: 'auto', now 'int8'"),
    ],
)
@pytest.mark.parametrize("activations", ["dense", "pruned"])
def test_other_samples_and_another_precision_are_refused(
    options: tuple[str, str],
    what: str,
    difference: str,
    activations: str,
    shop: Shop,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(sample_text(4000, seed=1))
    typed = [one.format(other=other) for one in options]
    said = refused(shop.model, shop.dense, "--activations", activations, *typed)
    assert f"are of {what} (" in said
    assert difference in said


def test_the_same_text_elsewhere_is_the_same_text(shop: Shop, tmp_path: Path) -> None:
    text = shutil.copy(shop.text, tmp_path / "copy.txt")
    for number, activations in enumerate(("dense", "pruned")):
        taking = ["--statistics", str(shop.dense), "--calibration", str(text)]
        asked = ["prune", str(shop.model), str(tmp_path / f"out{number}"), *taking]
        assert main([*asked, "--activations", activations]) == 0


def test_a_text_that_has_changed_is_refused_where_it_is_needed(
    small: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    text, saved = tmp_path / "text.txt", tmp_path / "saved"
    text.write_text(sample_text(4000))
    size = ["--calibration", str(text), "--nsamples", "2", "--seqlen", "16"]
    output = str(tmp_path / "first")
    assert main(["prune", str(small), output, *size, "--save-statistics", str(saved)]) == 0
    text.write_text(sample_text(4000, seed=1))
    assert "samples (calibration_tokens: " in refused(small, saved)
    text.unlink()
    assert f"there is no text '{text}'" in refused(small, saved, code=2)
    assert main(["prune", str(small), str(tmp_path / "x"), "--statistics", str(saved),
                 "--method", "gradient"]) == 0  # fmt: skip


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "is damaged: block-00001.safetensors is missing. Save the statistics again"),
        (lambda path: path.write_bytes(b"short"), "block-00001.safetensors has 5 bytes, the rec"),
        (flip_a_byte, "is damaged: block-00001.safetensors has the SHA-256 "),
        (lambda path: (path.unlink(), path.mkdir()), "safetensors is a folder, expected a file"),
    ],
)
def test_a_damaged_file_is_named(
    damage: Callable[[Path], object],
    sentence: str,
    shop: Shop,
    copied: Path,
    refused: Callable[..., str],
) -> None:
    damage(copied / "block-00001.safetensors")
    assert sentence in refused(shop.model, copied, *DENSE)


def edited(copied: Path, **changes: Any) -> None:
    path = copied / "statistics.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: one for name, one in content.items() if one is not None}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 1}, "was saved in another format (1, expected 2): use the version of lowmem-g"),
        ({"identity": None}, "statistics.json is damaged: it lacks identity"),
        ({"calibration": {"seed": 0}}, "statistics.json is damaged: it lacks calibration, text_c"),
        ({"files": {}}, "statistics.json is damaged: not shards with their hashes: {}"),
        ({"precision": "bfloat16"}, "_proj.weight/gradient_l1 as torch.float32 ["),
    ],
)
def test_what_says_what_they_are_is_checked(
    changes: dict[str, Any],
    sentence: str,
    shop: Shop,
    copied: Path,
    refused: Callable[..., str],
) -> None:
    edited(copied, **changes)
    assert sentence in refused(shop.model, copied, *DENSE)


def test_a_matrix_that_was_not_pruned_has_no_statistics(
    shop: Shop, tmp_path: Path, refused: Callable[..., str]
) -> None:
    saved = tmp_path / "some"
    asked = ["prune", str(shop.model), str(tmp_path / "first"), *shop.size, *DENSE]
    assert (
        main([*asked, "--exclude", "*.1.self_attn.q_proj*", "--save-statistics", str(saved)]) == 0
    )
    said = refused(shop.model, saved, *DENSE)
    name = "model.layers.1.self_attn.q_proj.weight/input_norm"
    assert f"{saved} has no statistic {name}: the run that saved it has not pruned that" in said
    taking = ["--statistics", str(saved), "--include", "*.mlp.*", *DENSE]
    assert main(["prune", str(shop.model), str(tmp_path / "second"), *taking]) == 0


def test_unfinished_statistics_are_refused(
    shop: Shop, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def saving(output: Path, **options: Any) -> None:
        size = {"calibration": str(shop.text), "nsamples": 2, "seqlen": 16}
        lowmem_gblm.prune(shop.model, output, save_statistics=tmp_path / "new", **size, **options)

    stopped_at(saving, tmp_path / "first", "prune", 1)
    missing = "holds no complete statistics, as statistics.json is missing: "
    for folder in (tmp_path / "new.partial", tmp_path / "new"):
        said = refused(shop.model, folder, *DENSE)
        assert f"{folder} {missing}the run that saves them is unfinished: resume it" in said
    said = refused(shop.model, shop.model, *DENSE)
    assert f"{missing}give a folder that prune --save-statistics has made" in said
    shutil.copy(shop.text, tmp_path / "statistics.json")
    assert "statistics.json is damaged: " in refused(shop.model, tmp_path, *DENSE)


def test_a_folder_that_exists_is_not_overwritten(shop: Shop, tmp_path: Path, capsys) -> None:
    asked = ["prune", str(shop.model), str(tmp_path / "out"), *shop.size]
    assert main([*asked, "--save-statistics", str(shop.dense)]) == 5
    said = f"{shop.dense} exists already: choose another --save-statistics, or move it away"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("out", "--save-statistics", "s", "--method", "magnitude"),
            "magnitude measures nothing that could be saved: leave out --save-statistics",
        ),
        (("out", "--statistics-dtype", "int8"), "--statistics-dtype needs --save-statistics"),
        (
            ("out", "--save-statistics", "s", "--statistics", "s"),
            "--statistics takes what --save-statistics has saved already: give one of the two",
        ),
        (
            ("--save-statistics", "s", "--in-place", "--overwrite-my-only-copy"),
            "--save-statistics is for other runs with the dense model, and --in-place leaves none",
        ),
        (("out", "--save-statistics", "out"), "is out, which must not lie in out"),
        (("out", "--save-statistics", "out.work/s"), "is out.work/s, which must not lie in out.w"),
        (("s/out", "--save-statistics", "s"), "s/out.work, which must not lie in s: that is"),
        (("out", "--statistics", "out.work/s"), "--statistics is out.work/s, which must not lie"),
        (
            ("out", "--save-statistics", "{model}/s"),
            "inside MODEL, whose files are copied to every output: choose another place",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    options: tuple[str, ...], sentence: str, shop: Shop, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = [one.format(model=shop.model) for one in options]
    assert main(["prune", str(shop.model), *typed, *shop.size]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
