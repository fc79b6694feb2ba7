"""The whole method in memory: what the streaming product is tested against.

Written from the mathematics alone and importing nothing of the product: the model is held whole,
gradients come from full autograd, one sample at a time, on the CPU in float32. It is meant to be
plainly right, not fast.

Shapes: N samples, T tokens, O outputs, I inputs, E experts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

COLUMN_BLOCK = 128
DAMPING = 0.01
INPUT_STATISTIC = {"wanda": "norm", "gblm": "norm", "sparsegpt": "gram"}

Record = Callable[[str, Tensor], None]


def text_windows_after_bos(token_ids: Tensor, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Draws windows [N, T] as `text_windows`, each begun by the first token, which is `<bos>`."""
    windows = text_windows(token_ids[1:], nsamples, seqlen - 1, seed)
    return torch.stack([torch.cat([token_ids[:1], window]) for window in windows])


def text_windows(token_ids: Tensor, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Draws calibration windows [N, T] from one tokenized text [n]."""
    draw = random.Random(seed)
    starts = [draw.randint(0, len(token_ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([token_ids[start : start + seqlen] for start in starts])


def document_windows(
    documents: Sequence[Sequence[int]], nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """Draws calibration windows [N, T] from tokenized documents, redrawing the short ones."""
    draw = random.Random(seed)
    windows = []
    while len(windows) < nsamples:
        document = documents[draw.randint(0, len(documents) - 1)]
        if len(document) > seqlen:
            start = draw.randint(0, len(document) - seqlen - 1)
            windows.append(torch.tensor(document[start : start + seqlen]))
    return torch.stack(windows)


@torch.no_grad()
def perplexity(
    model: nn.Module, token_ids: Tensor, seqlen: int, windows: int | None = None
) -> float:
    """Perplexity of one tokenized text [n] over non-overlapping windows, the tail dropped.

    Args:
        model: a causal language model; it is put into eval mode.
        token_ids: the text, tokenized once.
        seqlen: tokens per window, of which `seqlen - 1` are predicted.
        windows: how many windows to read, from the first; all when None.
    """
    _prepare(model)
    available = len(token_ids) // seqlen
    count = available if windows is None else min(windows, available)
    losses = []
    for window in token_ids[: count * seqlen].view(count, 1, seqlen):
        logits = model(input_ids=window, use_cache=False).logits
        losses.append(F.cross_entropy(logits[0, :-1].float(), window[0, 1:]).item())
    return math.exp(math.fsum(losses) / count)


@dataclass(frozen=True)
class Matrix:
    """One prunable tensor as it lies on disk, and where it lives in the model.

    Attributes:
        name: the tensor's name on disk.
        block: index of the decoder block it belongs to.
        parameter: the live parameter that holds it, whole or with others.
        locate: takes a tensor stored like `parameter` to this matrix's view [O, I].
    """

    name: str
    block: int
    parameter: nn.Parameter
    locate: Callable[[Tensor], Tensor]

    def view(self) -> Tensor:
        """The live weight as a view [O, I]: writing into it changes the model."""
        return self.locate(self.parameter.data)

    def gradient(self) -> Tensor:
        """The parameter's current gradient as a view [O, I]."""
        assert self.parameter.grad is not None, f"{self.name} received no gradient"
        return self.locate(self.parameter.grad)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's decoder blocks."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of {count} blocks")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module holds all experts' weights in two 3-D parameters, as Mixtral does."""
    fused = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(item, nn.Parameter) and item.dim() == 3 for item in fused)


def prunable(model: nn.Module) -> list[Matrix]:
    """Every 2-D weight that multiplies activations inside a decoder block, in module order."""
    prefix, blocks = decoder_blocks(model)
    found = []
    for block, block_module in enumerate(blocks):
        for path, module in block_module.named_modules(prefix=f"{prefix}.{block}"):
            found += _matrices_of(path, block, module)
    return found


def _matrices_of(path: str, block: int, module: nn.Module) -> list[Matrix]:
    """The matrices that this one module multiplies by, its children's left out."""
    if isinstance(module, nn.Linear):
        return [Matrix(f"{path}.weight", block, module.weight, lambda stored: stored)]
    if isinstance(module, Conv1D):
        return [Matrix(f"{path}.weight", block, module.weight, lambda stored: stored.T)]
    if is_fused_experts(module):
        return [
            matrix
            for expert in range(module.down_proj.shape[0])
            for matrix in _expert_matrices(path, block, module, expert)
        ]
    return []


def expert_names(path: str, expert: int) -> tuple[str, ...]:
    """Names on disk of one expert's gate, up and down weights."""
    disk_path = path.replace(".mlp.experts", ".block_sparse_moe.experts")
    return tuple(f"{disk_path}.{expert}.{part}.weight" for part in ("w1", "w3", "w2"))


def _expert_matrices(path: str, block: int, module: nn.Module, expert: int) -> list[Matrix]:
    """The gate, up and down matrices of one expert: the fused rows are gate, then up."""
    width = module.down_proj.shape[2]
    gate, up, down = expert_names(path, expert)
    return [
        Matrix(gate, block, module.gate_up_proj, lambda stored: stored[expert, :width]),
        Matrix(up, block, module.gate_up_proj, lambda stored: stored[expert, width:]),
        Matrix(down, block, module.down_proj, lambda stored: stored[expert]),
    ]


@contextmanager
def recorded_inputs(model: nn.Module, blocks: Sequence[int], record: Record) -> Iterator[None]:
    """Calls `record(name, rows [rows, I])` whenever a matrix of these blocks is used."""
    prefix, modules = decoder_blocks(model)
    with ExitStack() as undo:
        for block in blocks:
            for path, module in modules[block].named_modules(prefix=f"{prefix}.{block}"):
                if isinstance(module, nn.Linear | Conv1D):
                    hook = partial(_record_rows, record, f"{path}.weight")
                    undo.callback(module.register_forward_pre_hook(hook).remove)
                elif is_fused_experts(module):
                    # An instance attribute hides the class's forward until it is deleted.
                    module.forward = partial(_run_experts, module, record, path)
                    undo.callback(module.__dict__.pop, "forward")
        yield


def _record_rows(record: Record, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A forward pre-hook: hands the input over as rows [rows, I]."""
    record(name, args[0].reshape(-1, args[0].shape[-1]))


def _run_experts(
    module: nn.Module, record: Record, path: str, rows: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """Runs the experts one by one, recording the rows that each of them sees.

    The operations and their order are those of transformers' eager Mixtral, bit for bit.

    Args:
        module: the fused experts.
        record: called as `record(name, rows)` for gate, up and down of each expert in use.
        path: the module's name in the model.
        rows: hidden states [tokens, hidden].
        chosen: the experts of each token [tokens, k].
        weights: and their weights [tokens, k].
    """
    result = torch.zeros_like(rows)
    for expert in range(module.down_proj.shape[0]):
        position, token = torch.where((chosen == expert).T)
        if not len(token):
            continue
        gate_name, up_name, down_name = expert_names(path, expert)
        seen = rows[token]
        record(gate_name, seen)
        record(up_name, seen)
        gate, up = F.linear(seen, module.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
        record(down_name, inner)
        output = F.linear(inner, module.down_proj[expert]) * weights[token, position, None]
        result.index_add_(0, token, output.to(result.dtype))
    return result


def losses_and_gradients(
    model: nn.Module, samples: Tensor, norm: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradient magnitudes of the model as it is, by full autograd.

    Args:
        model: a causal language model; it is put into eval mode.
        samples: token ids [N, T].
        norm: "l1" sums `abs(g)` over samples, "l2" takes the root of the summed squares.

    Returns:
        The N losses (float32 scalars), and for each name on disk the magnitude [O, I], float32.
    """
    _prepare(model)
    model.requires_grad_(True)
    matrices = prunable(model)
    total = {m.name: torch.zeros(m.view().shape, dtype=torch.float32) for m in matrices}
    losses = []
    model.zero_grad(set_to_none=True)
    for sample in samples.unsqueeze(1):
        loss = model(input_ids=sample, labels=sample, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach().float())
        for matrix in matrices:
            gradient = matrix.gradient().float()
            total[matrix.name] += gradient.abs() if norm == "l1" else gradient**2
        model.zero_grad(set_to_none=True)
    return losses, total if norm == "l1" else {name: sums.sqrt() for name, sums in total.items()}


@torch.no_grad()
def input_statistics(
    model: nn.Module, samples: Tensor, blocks: Sequence[int], statistic: str
) -> dict[str, Tensor]:
    """Input norms [I] ("norm") or gram matrices [I, I] ("gram") of these blocks' matrices.

    Each sample's part is computed first, then added to a float32 accumulator, in sample order.
    """
    _prepare(model)
    widths = {m.name: m.view().shape[1] for m in prunable(model) if m.block in blocks}
    shapes = {name: (i,) if statistic == "norm" else (i, i) for name, i in widths.items()}
    total = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def record(name: str, rows: Tensor) -> None:
        rows = rows.float()
        total[name] += rows.square().sum(0) if statistic == "norm" else rows.T @ rows

    with recorded_inputs(model, blocks, record):
        for sample in samples.unsqueeze(1):
            model(input_ids=sample, use_cache=False)
    if statistic == "norm":
        return {name: (sums / len(samples)).sqrt() for name, sums in total.items()}
    return {name: sums * (2 / len(samples)) for name, sums in total.items()}


def _prepare(model: nn.Module) -> None:
    """Puts the model into eval mode, fused experts run by transformers' plain loop."""
    model.eval()
    if any(is_fused_experts(module) for module in model.modules()):
        model.set_experts_implementation("eager")


def removals(count: int, sparsity: str | Decimal) -> int:
    """How many of `count` weights go: `floor(count * sparsity)`, in exact arithmetic."""
    return math.floor(count * Fraction(sparsity))


def keep_rows(score: Tensor, removed: int) -> Tensor:
    """Removes the `removed` smallest scores of each row [rows, n], ties from the left first."""
    order = score.argsort(dim=1, stable=True)
    keep = torch.ones(score.shape, dtype=torch.bool)
    return keep.scatter(1, order[:, :removed], False)


def keep_groups(score: Tensor, n_of_m: tuple[int, int]) -> Tensor:
    """Keeps the N largest of every M neighbours in a row of the scores [O, I]."""
    kept, group = n_of_m
    if score.shape[1] % group:
        raise ValueError(f"{group} does not divide the width {score.shape[1]}")
    return keep_rows(score.reshape(-1, group), group - kept).view(score.shape)


def keep_matrix(score: Tensor, sparsity: str | Decimal) -> Tensor:
    """Removes the smallest scores of the whole matrix [O, I], ties in row-major order."""
    removed = removals(score.numel(), sparsity)
    return keep_rows(score.reshape(1, -1), removed).view(score.shape)


def keep_by_score(
    score: Tensor,
    *,
    method: str,
    sparsity: str | Decimal | None,
    n_of_m: tuple[int, int] | None,
) -> Tensor:
    """The keep decisions [O, I] that a method's comparison group and the pattern ask for."""
    if n_of_m is not None:
        return keep_groups(score, n_of_m)
    if method == "magnitude":
        return keep_matrix(score, sparsity)
    return keep_rows(score, removals(score.shape[1], sparsity))


def score_of(
    method: str, weight: Tensor, input_norm: Tensor | None, gradient: Tensor | None, alpha: float
) -> Tensor:
    """The score [O, I] of a weight [O, I]: larger is kept. An all-zero row falls back to abs(W)."""
    size = weight.float().abs()
    if method == "magnitude":
        return size
    if method == "wanda":
        score = size * input_norm
    elif method == "gradient":
        score = size * gradient
    elif method == "gblm":
        score = size * input_norm + alpha * (size * gradient)
    else:
        raise ValueError(f"unknown method {method!r}")
    empty_rows = (score == 0).all(dim=1, keepdim=True)
    return torch.where(empty_rows, size, score)


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped gram matrix's inverse [I, I], dead columns at 1."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: str | Decimal | None,
    n_of_m: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """The OBS sweep over one matrix (SparseGPT, Frantar and Alistarh, 2023).

    Columns that no input ever reached become zero. Where none was reached (an expert that saw no
    token) the weight stands as it is, and the sweep comes down to the weights' magnitude.

    Returns:
        The updated weight [O, I] in float32 and the keep decisions [O, I].
    """
    weight = weight.float().clone()
    dead = gram.diagonal() == 0
    if not dead.all():
        weight[:, dead] = 0
    factor = inverse_factor(gram)
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for start in range(0, weight.shape[1], COLUMN_BLOCK):
        here = slice(start, start + COLUMN_BLOCK)
        errors, keep[:, here] = _sweep_columns(
            weight[:, here], factor[here, here], sparsity=sparsity, n_of_m=n_of_m
        )
        rest = slice(start + COLUMN_BLOCK, None)
        weight[:, rest] -= errors @ factor[here, rest]
    return weight, keep


def _sweep_columns(
    weight: Tensor,
    factor: Tensor,
    *,
    sparsity: str | Decimal | None,
    n_of_m: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """Prunes one column block [O, columns] in place; returns its errors and keep decisions."""
    scale = factor.diagonal()
    errors = torch.zeros_like(weight)
    if n_of_m is None:
        keep = keep_matrix(weight**2 / scale**2, sparsity)
    else:
        keep = torch.ones(weight.shape, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if n_of_m is not None and column % n_of_m[1] == 0:
            group = slice(column, column + n_of_m[1])
            keep[:, group] = keep_groups(weight[:, group] ** 2 / scale[group] ** 2, n_of_m)
        before = weight[:, column].clone()
        after = before.masked_fill(~keep[:, column], 0)
        errors[:, column] = (before - after) / scale[column]
        weight[:, column:] -= errors[:, column, None] * factor[column, column:]
        # What the update leaves in this column differs from the decision by rounding.
        weight[:, column] = after
    return errors, keep


def prune(
    model: nn.Module,
    samples: Tensor | None,
    *,
    method: str,
    sparsity: str | Decimal | None = None,
    n_of_m: tuple[int, int] | None = None,
    alpha: float = 100.0,
    norm: str = "l1",
    activations: str = "pruned",
) -> dict[str, Tensor]:
    """Prunes a model in place, block by block.

    Args:
        model: a causal language model in float32 on the CPU.
        samples: token ids [N, T]; magnitude needs none.
        method: magnitude, wanda, gradient, gblm or sparsegpt.
        sparsity: the exact fraction of zeros, such as "0.5"; or else
        n_of_m: `(N, M)`, N kept of every M along the input dimension.
        alpha: weight of the gradient term in gblm.
        norm: "l1" or "l2", how gradient magnitudes add up over samples.
        activations: "pruned" takes each block's inputs from the blocks pruned before it,
            "dense" takes all of them from the dense model.

    Returns:
        For each name on disk the keep decisions [O, I]: True stays.
    """
    if (sparsity is None) == (n_of_m is None):
        raise ValueError("give either sparsity or n_of_m")
    matrices = prunable(model)
    blocks = sorted({matrix.block for matrix in matrices})
    statistic = INPUT_STATISTIC.get(method)
    gradients, inputs, keep = {}, {}, {}
    if method in ("gradient", "gblm"):
        gradients = losses_and_gradients(model, samples, norm)[1]
    if statistic and activations == "dense":
        inputs = input_statistics(model, samples, blocks, statistic)
    for block in blocks:
        if statistic and activations == "pruned":
            inputs = input_statistics(model, samples, [block], statistic)
        for matrix in (m for m in matrices if m.block == block):
            name = matrix.name
            keep[name] = _prune_matrix(
                matrix.view(),
                inputs.get(name),
                gradients.get(name),
                method=method,
                alpha=alpha,
                sparsity=sparsity,
                n_of_m=n_of_m,
            )
    return keep


def _prune_matrix(
    weight: Tensor,
    inputs: Tensor | None,
    gradient: Tensor | None,
    *,
    method: str,
    alpha: float,
    **pattern: str | Decimal | tuple[int, int] | None,
) -> Tensor:
    """Prunes one live weight [O, I] in place and returns its keep decisions [O, I]."""
    if method == "sparsegpt":
        updated, keep = sparsegpt(weight, inputs, **pattern)
        weight.copy_(updated)
        return keep
    score = score_of(method, weight, inputs, gradient, alpha)
    keep = keep_by_score(score, method=method, **pattern)
    weight.masked_fill_(~keep, 0)
    return keep
