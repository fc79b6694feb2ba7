"""`verify`: good outputs pass, and every kind of tampering is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem_gblm
from lowmem_gblm.errors import CheckpointError, VerificationError
from support.tiny_models import save_tiny

INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
GOOD = [
    ("llama", {"method": "magnitude", "sparsity": "0.29"}),
    ("llama", {"method": "gradient", "sparsity": 0.7}),
    ("llama", {"method": "gblm", "activations": "dense"}),
    ("llama", {"method": "wanda", "pattern": "2:4"}),
    ("llama", {"method": "wanda", "pattern": "1:3"}),
    ("llama", {"method": "wanda", "pattern": "2:5", "on_ragged": "keep"}),
    ("llama", {"method": "sparsegpt", "sparsity": 0.5}),
    ("llama", {"method": "sparsegpt", "pattern": "2:4"}),
    ("llama", {"method": "sparsegpt", "pattern": "1:3"}),
    ("gpt2", {"method": "magnitude"}),
    ("gpt2", {"method": "gblm", "sparsity": "0.3"}),
    ("gpt2", {"method": "sparsegpt", "sparsity": "0.3"}),
    ("gpt2", {"method": "wanda", "pattern": "2:4"}),
    ("mixtral", {"method": "magnitude", "sparsity": "0.3"}),
    ("mixtral", {"method": "gblm"}),
    ("mixtral", {"method": "sparsegpt"}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """A tiny model of an architecture, made once. Not to be modified."""
    folder = tmp_path_factory.mktemp("models")

    def model(architecture: str) -> Path:
        if not (folder / architecture).exists():
            save_tiny(architecture, folder / architecture)
        return folder / architecture

    return model


def prune(model: Path, output: Path, text: Path, **options: Any) -> Path:
    lowmem_gblm.prune(model, output, nsamples=2, seqlen=32, calibration=str(text), **options)
    return output


@pytest.fixture(scope="module")
def good(tmp_path_factory, llama, text_file) -> Path:
    """Half pruned by wanda. Not to be modified."""
    output = tmp_path_factory.mktemp("good") / "out"
    return prune(llama, output, text_file, method="wanda", max_shard_size=1)


@pytest.fixture
def output(good, tmp_path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(good, tmp_path / "out"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_shard(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of the shard that holds `name`."""
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weight(folder: Path, edit: Callable[[torch.Tensor], object]) -> None:
    """Changes one pruned matrix in place."""
    edit_shard(folder, QUERY, lambda tensors: edit(tensors[QUERY]))


def promise(record: dict[str, Any], removed: float, columns: int = 0) -> None:
    """Promises other zeros in all groups, and a pattern that agrees with them."""
    for described in record["tensors"].values():
        (one,) = described["groups"]
        if columns:
            one.update(repeat=one["columns"] // columns, columns=columns)
        one["removed"] = int(one["columns"] * removed)
    record["sparsity"] = removed
    if columns:
        record["pattern"] = f"{columns - int(columns * removed)}:{columns}"


def first(condition: torch.Tensor) -> tuple[int, ...]:
    return tuple(condition.nonzero()[0].tolist())


@pytest.mark.parametrize(("architecture", "options"), GOOD)
def test_what_prune_writes_passes(architecture, options, models, tmp_path, text_file):
    model = models(architecture)
    output = prune(model, tmp_path / "out", text_file, **options)
    for against in (None, model):
        found = lowmem_gblm.verify(output, against)
        record = json.loads((output / "pruning.json").read_text())
        assert found["pruned_tensors"] == len(record["tensors"])
        assert found["sparsity_measured"] == record["sparsity_measured"]


def test_the_result_says_what_was_checked(good, llama):
    found = lowmem_gblm.verify(good, llama)
    assert (found["output"], found["against"]) == (str(good), str(llama))
    assert (found["tensors"], found["pruned_tensors"]) == (30, 21)


def test_zeros_that_the_source_had_are_no_fault(tmp_path, text_file):
    model = save_tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[QUERY][:, :30] = 0
    tensors[QUERY][3, 40] = -0.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    output = prune(model, tmp_path / "out", text_file, method="gradient", sparsity=0.3)
    assert lowmem_gblm.verify(output, model)


def change_a_kept_weight(weight):
    weight[first(weight != 0)] *= 2


def zero_another(weight):
    weight[first(weight != 0)] = 0


def restore_a_zero(weight):
    weight[first(weight == 0)] = 1


def move_a_zero_to_another_row(weight):
    weight[0, first(weight[0] == 0)[0]] = 1
    weight[5, first(weight[5] != 0)[0]] = 0


def negate_a_zero(weight):
    weight[first(weight == 0)] = -0.0


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_a_kept_weight, f"{QUERY} has 1 kept weights that differ from the source"),
        (zero_another, f"{QUERY}: 1 rows with too many zeros; the first, 0, has 25 instead of 24"),
        (restore_a_zero, f"{QUERY}: 1 rows with too few zeros; the first, 0, has 23 instead of 24"),
        (negate_a_zero, f"{QUERY} has a negative zero"),
    ],
)
def test_a_weight_that_is_not_the_source_s_is_found(tamper, message, output, llama):
    edit_weight(output, tamper)
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output, llama)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (zero_another, f"{QUERY} has 1153 zeros, pruning.json says 1152"),
        (restore_a_zero, f"{QUERY} has 1151 zeros, pruning.json says 1152"),
        (move_a_zero_to_another_row, f"{QUERY}: 1 rows with too few zeros; the first, 0, has 23"),
    ],
)
def test_wrong_counts_are_found_without_the_source(tamper, message, output):
    edit_weight(output, tamper)
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output)


def test_an_unpruned_tensor_that_changed_is_found(output, llama):
    edit_shard(output, NORM, lambda tensors: tensors[NORM].add_(1e-3))
    message = f"{NORM} was not to be pruned, and differs from the source"
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output, llama)


def test_a_tensor_that_the_index_forgot_is_found(output):
    edit_json(output / INDEX, lambda index: index["weight_map"].pop(NORM))
    with pytest.raises(VerificationError, match=f"{NORM} is in a shard, but not in {INDEX}"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NORM, f"{NORM} of the source is missing"),
        (QUERY, f"{QUERY} is in pruning.json, but not in the checkpoint"),
    ],
)
def test_a_tensor_that_is_gone_is_found(name, message, output, llama):
    edit_shard(output, name, lambda tensors: tensors.pop(name))
    edit_json(output / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output, llama)


def test_a_tensor_too_many_is_found(output, llama):
    shard = shard_of(output, NORM).name
    edit_shard(output, NORM, lambda tensors: tensors.update(extra=torch.ones(1)))
    edit_json(output / INDEX, lambda index: index["weight_map"].update(extra=shard))
    with pytest.raises(VerificationError, match="extra is not in the source"):
        lowmem_gblm.verify(output, llama)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (torch.Tensor.bfloat16, r"torch\.bfloat16 \[48\]"),
        (lambda norm: norm[:40].clone(), r"torch\.float32 \[40\]"),
    ],
)
def test_another_dtype_or_shape_is_found(change, found, output, llama):
    edit_shard(output, NORM, lambda tensors: tensors.update({NORM: change(tensors[NORM])}))
    message = rf"{NORM} is {found}, in the source torch\.float32 \[48\]"
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output, llama)


def test_a_stray_shard_is_found(output):
    save_file({"x": torch.ones(1)}, output / "stray.safetensors")
    with pytest.raises(VerificationError, match=rf"stray\.safetensors is not named in {INDEX}"):
        lowmem_gblm.verify(output)


def test_many_faults_are_counted_and_the_first_ones_named(output):
    for number in range(12):
        save_file({"x": torch.ones(1)}, output / f"stray{number:02}.safetensors")
    with pytest.raises(
        VerificationError, match=r"does not keep its promises:\n(stray.*\n){10}… and 2 more"
    ):
        lowmem_gblm.verify(output)


def without_hashes(folder: Path) -> None:
    edit_json(folder / "pruning.json", lambda record: record.pop("shards"))


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def changed(shard: Path) -> str:
    found = hashlib.sha256(shard.read_bytes()).hexdigest()
    return rf"{shard.name} has the SHA-256 {found}, the record says [0-9a-f]{{64}}\n?"


def test_what_prune_writes_is_hashed(good):
    assert lowmem_gblm.verify(good)["hashed_shards"] == 4
    assert lowmem_gblm.verify(good)["notes"] == []


def test_a_flipped_bit_in_an_unpruned_tensor_is_found_without_the_source(output):
    shard = shard_of(output, NORM)
    flip_a_bit(shard, -1)
    with pytest.raises(VerificationError, match=changed(shard) + "$"):
        lowmem_gblm.verify(output)


def test_a_flipped_bit_in_the_header_is_found(output):
    shard = shard_of(output, QUERY)
    flip_a_bit(shard, 12)
    with pytest.raises(VerificationError, match=changed(shard) + "tensor __letadata__ in"):
        lowmem_gblm.verify(output)


def test_a_flipped_bit_in_the_size_of_the_header_is_found(output):
    shard = shard_of(output, QUERY)
    flip_a_bit(shard, 7)
    with pytest.raises(VerificationError, match=changed(shard) + f".*{shard.name}"):
        lowmem_gblm.verify(output)


def test_a_truncated_shard_is_found(output):
    shard = shard_of(output, QUERY)
    size = len(shard.read_bytes())
    shard.write_bytes(shard.read_bytes()[:-1])
    message = rf"{shard.name} has {size - 1} bytes, the record says {size}\ntensor .* ends at byte"
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output)


def test_a_missing_shard_is_found(output):
    shard = shard_of(output, QUERY)
    shard.unlink()
    with pytest.raises(VerificationError, match=f"{shard.name} is missing\n.*{shard.name}, which"):
        lowmem_gblm.verify(output)


def test_a_shard_too_many_is_found_though_the_index_names_it(output):
    save_file({"x": torch.ones(1)}, output / "more.safetensors")
    edit_json(output / INDEX, lambda index: index["weight_map"].update(x="more.safetensors"))
    with pytest.raises(VerificationError, match=r"more\.safetensors has no hash in pruning\.json"):
        lowmem_gblm.verify(output)


def test_changed_shards_count_among_the_violations(output):
    for shard in output.glob("*.safetensors"):
        flip_a_bit(shard, -1)
    for number in range(12):
        save_file({"x": torch.ones(1)}, output / f"stray{number:02}.safetensors")
    with pytest.raises(
        VerificationError,
        match=r"promises:\n(model-.* has the SHA-256 .*\n){4}(stray.*\n){6}… and 6",
    ):
        lowmem_gblm.verify(output)


def test_an_output_that_is_older_than_hashes_is_checked_all_the_same(output, llama):
    without_hashes(output)
    found = lowmem_gblm.verify(output, llama)
    assert found["hashed_shards"] == 0
    assert found["notes"] == [
        "pruning.json is older than hashes: a change that leaves every count as it is goes unseen"
    ]
    edit_weight(output, zero_another)
    with pytest.raises(VerificationError, match="1153 zeros"):
        lowmem_gblm.verify(output)


def test_without_hashes_a_truncated_shard_is_refused(output):
    without_hashes(output)
    shard = shard_of(output, QUERY)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"tensor .* in .*{shard.name} ends at byte .* trunc"
    ):
        lowmem_gblm.verify(output)


def test_without_hashes_a_missing_shard_is_refused(output):
    without_hashes(output)
    shard = shard_of(output, QUERY)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"the shard {shard.name}, which is missing"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    "shards",
    [
        {},
        [],
        {"model.safetensors": 3},
        {"../model.safetensors": {"bytes": 3, "sha256": "0" * 64}},
        {"model.safetensors": {"bytes": "3", "sha256": "0" * 64}},
        {"model.safetensors": {"bytes": 3, "sha256": "0" * 63}},
        {"model.safetensors": {"bytes": 3}},
    ],
)
def test_hashes_that_make_no_sense_are_refused(shards, output):
    edit_json(output / "pruning.json", lambda record: record.update(shards=shards))
    with pytest.raises(CheckpointError, match=r"pruning\.json is not valid: .*not (a )?shard"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize("name", ["pruning.json", INDEX])
def test_a_missing_file_is_refused(name, output):
    (output / name).unlink()
    with pytest.raises(CheckpointError, match=rf"has no {name}|neither .* nor {name}"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda one: one["tensors"][QUERY].update(zeros=1000), "sparsity_measured is 0.5, the ten"),
        (lambda one: one.update(sparsity_measured=0.6), "sparsity_measured is 0.6, the tensors gi"),
        (lambda one: one["tensors"][QUERY].update(shape=[24, 48]), rf"{QUERY} has the shape \[48"),
        (lambda one: one["tensors"].pop(QUERY), f"{QUERY} was not to be pruned, and differs"),
        (
            lambda one: promise(one, 0.75),
            r"q_proj\.weight: 48 rows with too few zeros; the first, 0, has 24",
        ),
        (
            lambda one: promise(one, 0.25),
            r"k_proj\.weight: 24 rows with too many zeros; the first, 0, has 24",
        ),
        (
            lambda one: promise(one, 0.5, columns=4),
            "groups of 4 with too few zeros; the first, ",
        ),
        (lambda one: one["tensors"][QUERY].update(layout="in,out"), f"{QUERY}: .* rows with too"),
    ],
)
def test_a_record_that_is_not_true_is_found(edit, message, output, llama):
    edit_json(output / "pruning.json", edit)
    with pytest.raises(VerificationError, match=message):
        lowmem_gblm.verify(output, llama)


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one.update(sparsity=0.75),
        lambda one: one.update(sparsity=0.25),
        lambda one: one.update(pattern="2:4"),
        lambda one: one.update(group="matrix"),
        lambda one: one["tensors"][QUERY]["groups"][0].update(removed=23),
        lambda one: one["tensors"][QUERY]["groups"][0].update(columns=4, repeat=12, removed=2),
    ],
)
def test_groups_that_are_not_the_pattern_are_found(edit, output):
    edit_json(output / "pruning.json", edit)
    with pytest.raises(VerificationError, match=r"pruning\.json promises .*, which is not"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize("key", ["tensors", "pattern", "group", "sparsity_measured"])
def test_a_record_without_what_is_promised_is_refused(key, output):
    edit_json(output / "pruning.json", lambda record: record.pop(key))
    with pytest.raises(CheckpointError, match=rf"pruning\.json lacks {key}"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(tensors={}),
        lambda record: record.update(tensors=[QUERY]),
        lambda record: record.update(sparsity=7),
        lambda record: record.update(sparsity=7.0),
        lambda record: record.update(sparsity="1e999999999"),
        lambda record: record.update(sparsity=None, pattern=3),
        lambda record: record.update(pattern="all"),
        lambda record: record["tensors"][QUERY].pop("layout"),
        lambda record: record["tensors"][QUERY].pop("zeros"),
        lambda record: record["tensors"].update({QUERY: 3}),
        lambda record: record["tensors"][QUERY].pop("groups"),
        lambda record: record["tensors"][QUERY].update(groups=[]),
        lambda record: record["tensors"][QUERY].update(groups=[{"rows": 1}]),
        lambda record: record["tensors"][QUERY]["groups"][0].update(removed=49),
        lambda record: record["tensors"][QUERY]["groups"][0].update(removed=True),
        lambda record: record["tensors"][QUERY]["groups"][0].update(rows=7),
        lambda record: record["tensors"][QUERY]["groups"][0].update(columns=47),
        lambda record: record["tensors"][QUERY]["groups"][0].update(repeat=0),
        lambda record: record["tensors"][QUERY].update(shape="48"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(edit, output):
    edit_json(output / "pruning.json", edit)
    with pytest.raises((CheckpointError, VerificationError), match=r"pruning\.json"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, []])
def test_an_index_that_makes_no_sense_is_refused(index, output):
    (output / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=INDEX):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize(
    ("edit", "violation"),
    [
        (lambda path: path.unlink(), "config.json of the source is missing"),
        (lambda path: path.write_text(path.read_text() + " "), "config.json is not that of the so"),
    ],
)
def test_a_side_file_that_is_gone_or_changed_is_found(edit, violation, output, llama):
    edit(output / "config.json")
    with pytest.raises(VerificationError, match=violation):
        lowmem_gblm.verify(output, llama)


def test_an_output_without_a_configuration_is_found_without_the_source(output):
    (output / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"promises:\nconfig\.json is missing$"):
        lowmem_gblm.verify(output)


@pytest.mark.parametrize("sharded", [False, True])
def test_other_weights_of_a_model_pruned_in_place_are_its_own(sharded, text_file, tmp_path):
    model = save_tiny("llama", tmp_path / "model", sharded=sharded)
    save_file({"x": torch.ones(1)}, model / "consolidated.safetensors")
    lowmem_gblm.prune(
        model, in_place=True, overwrite_my_only_copy=True, nsamples=2, seqlen=32,
        calibration=str(text_file),
    )  # fmt: skip
    assert lowmem_gblm.verify(model)
    edit_json(model / "pruning.json", lambda record: record.update(in_place=False))
    with pytest.raises(VerificationError, match=r"consolidated\.safetensors is not named in"):
        lowmem_gblm.verify(model)


def test_a_shard_of_a_model_pruned_in_place_that_the_index_forgot_is_found(output):
    save_file({"x": torch.ones(1)}, output / "more.safetensors")
    data = (output / "more.safetensors").read_bytes()
    more = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def edit(record):
        record["in_place"] = True
        record["shards"]["more.safetensors"] = more

    edit_json(output / "pruning.json", edit)
    with pytest.raises(VerificationError, match=r"more\.safetensors is not named in"):
        lowmem_gblm.verify(output)


def test_an_edited_model_card_is_no_fault(output, llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    (source / "README.md").write_text("dense")
    (output / "README.md").unlink()
    with pytest.raises(VerificationError, match=r"README\.md of the source is missing"):
        lowmem_gblm.verify(output, source)
    (output / "README.md").write_text("pruned")
    lowmem_gblm.verify(output, source)


def test_a_source_that_is_another_model_is_found(output, models):
    with pytest.raises(VerificationError, match="of the source is missing"):
        lowmem_gblm.verify(output, models("gpt2"))


def test_a_violation_has_the_exit_code_seven():
    assert VerificationError.exit_code == 7
