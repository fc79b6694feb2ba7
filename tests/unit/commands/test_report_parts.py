"""What a report is made of: places of tensors, sentences, images and paths."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest
import torch
from torch import Tensor

from lowmem_gblm.commands.promised_groups import PromisedGroups
from lowmem_gblm.commands.report.charts import level, png_uri, steps
from lowmem_gblm.commands.report.facts import facts
from lowmem_gblm.commands.report.headlines import headlines
from lowmem_gblm.commands.report.kinds import Place, places
from lowmem_gblm.commands.report.measure import Measured, by_kind, representatives
from lowmem_gblm.commands.report.outputs import Output
from lowmem_gblm.commands.report.structure import overlap, structure

SIDE = 64


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.k_proj.weight", 12, "k_proj"),
        ("h.3.attn.c_proj.weight", 3, "attn.c_proj"),
        ("h.3.mlp.c_proj.weight", 3, "mlp.c_proj"),
        ("model.layers.0.mlp.experts.7.w1.weight", 0, "w1"),
        ("model.layers.0.mlp.experts.gate_up_proj", 0, "gate_up_proj"),
        ("lone.weight", None, "lone"),
        ("weight", None, "weight"),
    ],
)
def test_a_name_says_where_a_tensor_is(name: str, block: int | None, kind: str) -> None:
    others = ["h.3.attn.c_proj.weight", "h.4.mlp.c_proj.weight", "model.layers.1.mlp.w2"]
    found = places([*others, name])[name]
    assert (found.block, found.kind) == (block, kind)


def test_experts_of_a_block_have_one_place() -> None:
    names = [f"model.layers.{block}.experts.{n}.w1.weight" for block in (0, 1) for n in range(4)]
    found = set(places(names).values())
    assert found == {
        Place(block, "w1", f"model.layers.{block}.experts.*.w1.weight") for block in (0, 1)
    }


def test_a_kind_that_is_the_end_of_another_is_told_from_it() -> None:
    found = places(["h.0.proj.weight", "h.0.attn.proj.weight", "h.0.mlp.proj.weight"])
    kinds = [place.kind for place in found.values()]
    assert sorted(kinds) == ["attn.proj", "mlp.proj", "proj"]


def measured(label: str, masks: dict[str, Tensor], first: Measured | None = None) -> Measured:
    """Masks of rows of equal numbers of zeros, by the name of the tensor."""
    output = Output(path=label, label=label, record={}, checkpoint=None, evaluations=[], notes=[])
    found = Measured(output=output)
    for name, place in places(masks).items():
        zero = masks[name]
        found.tensors[place] = name
        found.structures[place] = structure(zero, [PromisedGroups(1, zero.shape[1], 1, 0)])
        if first is not None:
            found.overlaps[place] = overlap(zero, zero)
    return found


def random_rows(seed: int) -> Tensor:
    """Half of every row is zero, at random places."""
    score = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return score.argsort(dim=1).argsort(dim=1) < SIDE // 2


def striped_rows() -> Tensor:
    return (torch.arange(SIDE) % 2 == 0).repeat(SIDE, 1)


def test_sentences_say_what_the_numbers_support() -> None:
    chance = {f"h.{block}.k.weight": random_rows(block) for block in range(8)}
    stripes = {name: striped_rows() if "0" in name else mask for name, mask in chance.items()}
    even, uneven = measured("even", chance), measured("uneven", stripes)
    ratio = by_kind(uneven.structures)["k"].columns.variance
    ratio /= by_kind(even.structures)["k"].columns.variance
    assert headlines([even])[0].startswith("even leaves no stripes along columns: ")
    found = headlines([uneven, measured("even", chance, uneven)])
    assert found[0].startswith("uneven prunes in stripes along columns: ")
    assert (
        "uneven leaves 32 of 512 inputs dead, with every weight zero; most in k (6.2%)" in found[1]
    )
    assert f"uneven masks leave {ratio:.1f} times the column variance of even's in k" in found[2]
    turned = headlines([even, measured("uneven", stripes, even)])
    assert f"uneven masks leave {ratio:.1f} times the column variance of even's in k" in turned[1]
    assert "100.0% of the zeros of even are zeros of uneven too (50.0% by chance)" in turned[1]


def test_about_the_same_variance_is_called_so_and_noise_is_not_told() -> None:
    one = measured("one", {f"h.{n}.k.weight": random_rows(n) for n in range(20)})
    two = measured("two", {f"h.{n}.k.weight": random_rows(n + 50) for n in range(20)})
    assert "leave about the same column variance in every kind" in headlines([one, two])[-1]
    few = [
        measured(label, {"h.0.k.weight": random_rows(seed)})
        for label, seed in (("one", 0), ("two", 1))
    ]
    ratios = [found.structures[place].columns.variance for found in few for place in found.tensors]
    assert max(ratios) / min(ratios) > 1.2
    assert not [sentence for sentence in headlines(few) if "column variance" in sentence]


def test_the_median_matrix_represents_its_kind() -> None:
    masks = {"h.0.k.weight": random_rows(0), "h.2.k.weight": striped_rows()}
    masks["h.1.k.weight"] = torch.cat([striped_rows()[:8], random_rows(1)[8:]])
    assert [place.block for place in representatives(measured("m", masks))] == [1]


def test_an_image_is_a_png_of_the_density() -> None:
    shades = torch.linspace(0, 1, 12).view(3, 4)
    data = base64.b64decode(png_uri(shades).removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, rest = {}, data[8:]
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        kind, content = rest[4:8], rest[8 : 8 + length]
        assert struct.unpack(">I", rest[8 + length : 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind], rest = content, rest[12 + length :]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 4, 3, 8, 0, 0, 0, 0)
    lines = zlib.decompress(chunks[b"IDAT"])
    assert [lines[at] for at in (0, 5, 10)] == [0, 0, 0]
    pixels = [lines[1 + 5 * row : 5 + 5 * row] for row in range(3)]
    assert b"".join(pixels) == bytes(round(255 * at / 11) for at in range(12))


def test_steps_go_up_and_down_where_the_numbers_do() -> None:
    assert steps([0, 2, 2, 4, 0], 4, 20, closed=True) == "M1 20V10H3V0H4V20Z"
    assert steps([0, 2, 0, 4, 0], 4, 20, closed=False) == "M1 20V10H2V20H3V0H4V20"
    assert steps([0, 0.001, 0], 4, 20, closed=True) == ""


def test_colours_are_on_a_logarithmic_scale() -> None:
    assert [level(value) for value in (0.2, 1, 10, 100, 1e9)] == [0, 0, 50, 100, 100]


def test_facts_tell_what_is_recorded_and_nothing_else() -> None:
    run = {
        "method": "m",
        "alpha": "auto",
        "search": {"chosen": {"alpha": 5.0}},
        "group": "row",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "updates_weights": False,
        "seconds": {"total": 10**400},
        "memory": "much",
        "bytes": {"read": 2048, "written": True},
        "versions": 3,
        "notes": "none",
    }
    scores = {"boolq": {"alias": "b", "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,none": None}}
    one = {
        "run": run,
        "total": {"sparsity": 0.25},
        "notes": [],
        "evaluations": [
            {"results": scores},
            {"perplexity": 12.5, "text": "t", "windows": 3, "seqlen": 8, "bos": "always"},
        ],
    }
    assert dict(facts([one])) == {
        "Method": [["m", "alpha auto, which has chosen 5"]],
        "Pattern": [["50.0% of each row", "25.00% zeros measured"]],
        "Checkpoint": [["read 2.0 KiB"]],
        "Perplexity": [["12.500 on t (3 windows of 8 tokens, each begun with <bos>)"]],
        "Tasks": [["boolq acc 0.500 ± 0.250"]],
    }
    run |= {"pattern": {"a*": "2:4", "*": "unstructured"}, "sparsity": {"a*": 0.5, "*": 0.3}}
    assert dict(facts([one]))["Pattern"] == [
        ["a*: 2:4 along the inputs", "*: 30.0% of each row", "25.00% zeros measured"]
    ]
