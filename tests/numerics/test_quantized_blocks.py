"""A block in 4 or 8 bits computes what the same block with the dequantized matrices computes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lowmem_gblm.errors import UnsupportedModel
from lowmem_gblm.model.bnb import Quantized
from lowmem_gblm.model.matmul_tap import MatmulWeight, Tap
from lowmem_gblm.model.quantized_block import PackedWeights, pack_block
from lowmem_gblm.sweeps.statistics.gradient import GradientL1
from lowmem_gblm.sweeps.statistics.input_norm import InputNorm
from support.tiny_models import tiny_model
from unit.model.test_bnb import KINDS, bytes_of, pruned, quantized_bytes

CPU = torch.device("cpu")
BLOCK_ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "mixtral")


@dataclass
class Case:
    """The first block of a tiny model, what it can be pruned in, and how it is called."""

    block: nn.Module
    slots: list[MatmulWeight]
    hidden: Tensor
    kwargs: dict[str, object]

    def packed(self, kind: str) -> tuple[nn.Module, PackedWeights]:
        block = copy.deepcopy(self.block)
        return block, pack_block(block, self.slots, kind, CPU)

    def unpacked(self, packed: PackedWeights) -> nn.Module:
        """The block with the dequantized matrices in full."""
        block = copy.deepcopy(self.block)
        for slot in packed.slots:
            slot.stored(block).copy_(packed.stored(slot))
        return block

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        out = block(hidden, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def measure(
        self,
        block: nn.Module,
        packed: PackedWeights | None = None,
        leave_out: MatmulWeight | None = None,
    ) -> tuple[Tensor, Tensor, dict[MatmulWeight, Tensor], list[Tensor | None]]:
        """Output, gradient of the input, gradient magnitudes and input norms."""
        gradient, norm = GradientL1(), InputNorm(1)
        tap = Tap(block, self.slots, [gradient, norm])
        tap.skip(leave_out)
        hidden = self.hidden.clone().requires_grad_()
        if packed is None:
            with tap:
                out = self.run(block, hidden)
        else:
            with packed, tap:
                out = self.run(block, hidden)
        tap.check_all_seen()
        arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        (leaving,) = torch.autograd.grad(out, hidden, arriving)
        gradient.finish_sample()
        return out, leaving, gradient.results(), [norm.result(slot) for slot in self.slots]


def first_block(architecture: str, dtype: torch.dtype = torch.float32) -> Case:
    model = tiny_model(architecture, width=40).to(dtype).requires_grad_(False)
    model.set_experts_implementation("eager")
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    seen: list[tuple[Tensor, dict[str, object]]] = []
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    model(input_ids=torch.arange(5, 26)[None], use_cache=False)
    layers[0]._forward_pre_hooks.clear()
    layers[0]._forward_pre_hooks_with_kwargs.clear()
    return Case(layers[0], slots_of(layers[0]), *seen[0])


def slots_of(block: nn.Module) -> list[MatmulWeight]:
    slots: list[MatmulWeight] = []
    for name, parameter in block.named_parameters():
        owner = block.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3:
            slots += [
                MatmulWeight(parameter=name, expert=e, in_first=False)
                for e in range(len(parameter))
            ]
        elif parameter.ndim == 2 and isinstance(owner, (nn.Linear, Conv1D)):
            in_first = isinstance(owner, Conv1D)
            slots.append(MatmulWeight(parameter=name, expert=None, in_first=in_first))
    return slots


@pytest.fixture(scope="module", params=BLOCK_ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Case:
    return first_block(request.param)


def assert_same_measures(found: tuple, expected: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for slot in expected[2]:
        assert torch.equal(found[2][slot], expected[2][slot]), slot
    for norm, expected_norm in zip(found[3], expected[3], strict=True):
        assert (norm is None) == (expected_norm is None)
        assert norm is None or torch.equal(norm, expected_norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_block_is_the_block_with_dequantized_matrices_to_the_bit(
    case: Case, kind: str
) -> None:
    block, packed = case.packed(kind)
    found = case.measure(block, packed)
    assert_same_measures(found, case.measure(case.unpacked(packed)))
    dense = case.measure(case.block)
    assert not torch.equal(found[0], dense[0])
    error = (found[0] - dense[0]).norm() / dense[0].norm()
    assert error < {"nf4": 0.5, "int8": 0.1}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_block_computes_in_bfloat16(kind: str) -> None:
    case = first_block("llama", torch.bfloat16)
    block, packed = case.packed(kind)
    with torch.no_grad(), packed:
        out = case.run(block, case.hidden)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, case.run(case.unpacked(packed), case.hidden))


def test_the_backward_pass_of_a_product_left_out_finds_its_matrix() -> None:
    case = first_block("llama")
    block, packed = case.packed("nf4")
    last = next(slot for slot in case.slots if "down_proj" in slot.parameter)
    found = case.measure(block, packed, leave_out=last)
    expected = case.measure(case.unpacked(packed))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], expected[1])


def test_all_but_the_matrices_is_as_it_was(case: Case) -> None:
    block, packed = case.packed("int8")
    names = {slot.parameter for slot in packed.slots}
    for name, parameter in block.named_parameters():
        original = case.block.get_parameter(name)
        assert not parameter.requires_grad
        assert parameter.shape == original.shape
        assert parameter.dtype == original.dtype
        assert (name in names) or torch.equal(parameter, original)


def test_stand_ins_take_a_row_and_packed_matrices_what_arithmetic_says(case: Case) -> None:
    block, packed = case.packed("nf4")
    for slot in packed.slots:
        parameter = block.get_parameter(slot.parameter)
        experts = parameter.shape[0] if parameter.ndim == 3 else 1
        assert parameter.untyped_storage().nbytes() == 4 * (experts + parameter.shape[-1] - 1)
    sizes = [slot.stored(block).numel() for slot in packed.slots]
    found = sum(map(bytes_of, packed._matrices.values()))
    assert found == sum(quantized_bytes(size, "nf4") for size in sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantized_matrix_outlives_its_product(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, packed = case.packed(kind)
    made = dequantizations(monkeypatch)
    hidden = case.hidden.clone().requires_grad_()
    with packed:
        out = case.run(block, hidden)
    forward = len(made)
    assert forward >= len({slot.parameter for slot in case.slots})
    assert not any(memory() is not None for memory in made)
    out.sum().backward()
    assert len(made) == 2 * forward
    assert not any(memory() is not None for memory in made)


def dequantizations(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """A weak reference to the memory of every matrix that is dequantized."""
    made: list[Callable[[], object]] = []
    original = Quantized.dequantized

    def watched(self: Quantized) -> Tensor:
        memory = original(self).numpy().copy()
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    monkeypatch.setattr(Quantized, "dequantized", watched)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(case: Case, kind: str) -> None:
    block = copy.deepcopy(case.block)
    for slot in case.slots:
        slot.stored(block).copy_(pruned(slot.stored(block)))
    packed = pack_block(copy.deepcopy(block), case.slots, kind, CPU)
    for slot in case.slots:
        assert (packed.stored(slot)[slot.stored(block) == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_replaced_alone(case: Case, kind: str) -> None:
    block, packed = case.packed(kind)
    before = {slot: packed.stored(slot) for slot in packed.slots}
    changed = case.slots[-1]
    matrix = pruned(changed.stored(case.block))
    packed.set(changed, matrix)
    for slot in packed.slots:
        assert torch.equal(packed.stored(slot), before[slot]) == (slot != changed)
    assert (packed.stored(changed)[matrix == 0] == 0).all()
    assert_same_measures(case.measure(block, packed), case.measure(case.unpacked(packed)))


def test_every_expert_is_packed_where_one_is_named() -> None:
    case = first_block("mixtral")
    named = next(slot for slot in case.slots if slot.expert == 2)
    packed = pack_block(copy.deepcopy(case.block), [named], "nf4", CPU)
    assert packed.slots == [
        MatmulWeight(parameter=named.parameter, expert=expert, in_first=False)
        for expert in range(4)
    ]


class Product(nn.Module):
    """A weight and what is computed with it."""

    def __init__(self, shape: tuple[int, ...], form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight)


BIAS = torch.linspace(-1, 1, 7)
OUT_FIRST = {
    "linear": linear,
    "linear with names": lambda x, W: linear(weight=W, input=x),
    "linear with a bias": lambda x, W: linear(x, W, BIAS[: W.shape[0]]),
    "x @ W.T": lambda x, W: x @ W.T,
    "torch.matmul": lambda x, W: torch.matmul(x, W.transpose(0, 1)),
    "torch.mm": lambda x, W: torch.mm(x[0], W.t()),
}
IN_FIRST = {
    "x @ W": lambda x, W: x @ W,
    "addmm": lambda x, W: torch.addmm(BIAS[: W.shape[1]], x[0], W),
    "addmm with names": lambda x, W: torch.addmm(
        BIAS[: W.shape[1]], mat1=x[0], mat2=W, beta=0.5, alpha=3
    ),
    "linear of the transpose": lambda x, W: linear(x, W.T),
}
FORMS = [(False, name) for name in OUT_FIRST] + [(True, name) for name in IN_FIRST]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert", [None, 1])
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (7, 7), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize(("in_first", "name"), FORMS, ids=[name for _, name in FORMS])
def test_every_form_of_a_product(
    in_first: bool, name: str, rows: int, columns: int, expert: int | None, kind: str
) -> None:
    form = (IN_FIRST if in_first else OUT_FIRST)[name]
    shape = (rows, columns) if expert is None else (3, rows, columns)
    block = Product(shape, lambda x, W: form(x, W if expert is None else W[torch.tensor(expert)]))
    slot = MatmulWeight(parameter="weight", expert=expert, in_first=in_first)
    hidden = torch.randn(1, 9, rows if in_first else columns)
    case = Case(block, [slot], hidden, {})
    packed_block, packed = case.packed(kind)
    assert_same_measures(case.measure(packed_block, packed), case.measure(case.unpacked(packed)))


def forward_packed(shape: tuple[int, ...], form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    block = Product(shape, form)
    expert = 0 if len(shape) == 3 else None
    slot = MatmulWeight(parameter="weight", expert=expert, in_first=False)
    packed = pack_block(block, [slot], "nf4", CPU)
    hidden = torch.randn(4, shape[-1], requires_grad=True)
    with packed:
        return block(hidden)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((6, 8), lambda x, W: linear(x, W[:3])),
        ((6, 8), lambda x, W: linear(x, W[3:])),
        ((2, 6, 8), lambda x, W: linear(x[:, :5], W[0, :, :5])),
    ],
)
def test_a_matrix_that_is_multiplied_in_parts_is_refused(shape, form) -> None:
    with pytest.raises(UnsupportedModel, match=r"weight.* is multiplied in parts"):
        forward_packed(shape, form)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((6, 8), lambda x, W: linear(x, W * 2)),
        ((6, 8), lambda x, W: linear(x, W.double().float())),
        ((6, 8), lambda x, W: linear(x[:, :5], W[:, 3:])),
        ((6, 8), lambda x, W: torch.einsum("ti,oi->to", x, W)),
        ((6, 8), lambda x, W: linear(x, torch.cat([W, W]))),
        ((2, 6, 8), lambda x, W: torch.bmm(x.expand(2, -1, -1), W.mT)),
    ],
)
def test_any_other_use_of_a_matrix_is_refused(shape, form) -> None:
    with pytest.raises(UnsupportedModel, match=r"uses weight in \w+, which cannot be followed"):
        forward_packed(shape, form)


def test_what_is_computed_from_a_stand_in_outside_is_not_a_number() -> None:
    block = Product((6, 8), linear)
    pack_block(block, [MatmulWeight(parameter="weight", expert=None, in_first=False)], "nf4", CPU)
    assert block(torch.ones(1, 8)).isnan().all()


def test_a_change_of_what_the_backward_pass_needs_is_noticed() -> None:
    out = forward_packed((6, 8), lambda x, W: (y := linear(x, W)) * y + 0 * y.mul_(2))
    with pytest.raises(UnsupportedModel, match="changes a tensor that its backward pass needs"):
        out.sum().backward()
