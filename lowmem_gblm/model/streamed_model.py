"""The streamed model: a Hugging Face model on `meta` whose decoder blocks are filled one at a time.

The model's *own* forward tells how each block is called (rotary embeddings, masks per layer type,
anything else): stubs replace the blocks and record their arguments. Embeddings, final norm, head
and loss are the model's own code too. There is no table of architectures.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowmem_gblm.errors import CheckpointError, UnsupportedModel
from lowmem_gblm.model.block_calls import Call, Recorder, check_same, replaying, stubs_in
from lowmem_gblm.model.conversion import NameConversion
from lowmem_gblm.model.lengths import rounded_up
from lowmem_gblm.model.matmul_tap import Tap
from lowmem_gblm.model.meta_model import FOREIGN_ERRORS, build_meta_model, find_layers, reason
from lowmem_gblm.model.quantized_block import PackedWeights
from lowmem_gblm.model.shared_prefix import SharedPrefix
from lowmem_gblm.runtime.accelerator import (
    fuses_attention,
    is_accelerator,
    is_device_error,
    release_cache,
)
from lowmem_gblm.runtime.memory import give_back_freed
from lowmem_gblm.storage.checkpoint.reader import Checkpoint

HEAD_LOGITS = 1 << 24
# Between two powers of two, positions are padded to one of so many numbers.
_LOGIT_SHAPES = 8
_IGNORED = -100
_Shape = tuple[torch.Size, SharedPrefix | None]


class StreamedModel:
    """A model without the weights of its decoder blocks.

    Attributes:
        model: The Hugging Face model; the parameters of blocks that are not resident are on `meta`.
        config: The configuration of the text model.
        attention_matrices: Whether attention holds its complete [heads, T, T] probabilities.
        window: How many tokens some blocks see at most, the last ones; None or 0 if all see all.
        block_tensors: For every block, the names on disk of its tensors.
        rest_tensors: The names on disk of all other tensors the model uses.
        packed: The contexts of resident blocks that are held in 4 or 8 bits, by index.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.model = build_meta_model(checkpoint, dtype, trust_remote_code=trust_remote_code)
        self._decoder = self.model.get_decoder()
        self._prefix, self._layers = find_layers(self.model)
        self.depth = len(self._layers)
        self.config: PretrainedConfig = self.model.config.get_text_config()
        self.attention_matrices = _holds_attention_matrices(self.model.config, device, dtype)
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self._calls: dict[_Shape, list[Call]] = {}
        self._first: dict[_Shape, Tensor] = {}
        self._arguments: dict[SharedPrefix, dict[str, Tensor]] = {}
        self.packed: dict[int, PackedWeights] = {}
        self._returns_tuple = False
        self.conversion = NameConversion(self.model)
        self.block_tensors, self.rest_tensors = self._group(checkpoint)

    def block(self, index: int) -> nn.Module:
        """Return the module of one block; its parameters are on `meta` unless it is resident."""
        block: nn.Module = self._layers[index]
        return block

    def block_prefix(self, index: int) -> str:
        """Return the beginning of the names of the block's parameters."""
        return f"{self._prefix}.{index}."

    @contextmanager
    def filled(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Run the body with all that is outside the blocks loaded: embeddings, norms, head."""
        self.fill(checkpoint)
        try:
            yield
        finally:
            inside = {module for block in self._layers for module in block.modules()}
            _free(module for module in self.model.modules() if module not in inside)
            give_back_freed()
            release_cache(self.device)

    def fill(self, checkpoint: Checkpoint) -> None:
        """Load all that is outside the blocks onto the device, tied weights included."""
        self.conversion.load(
            {name: checkpoint.read_finite(name) for name in self.rest_tensors}, self.device
        )
        self.model.tie_weights()
        self.model.requires_grad_(False)
        for name, buffer in list(self.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
        for name, value in self.model.named_parameters():
            if value.is_meta and not name.startswith(f"{self._prefix}."):
                raise CheckpointError(f"{checkpoint.folder} lacks the tensor for {name}")

    def load_block(self, index: int, tensors: dict[str, Tensor], *, on_host: bool = False) -> None:
        """Fill a block from tensors named as on disk; `on_host`, it stays there to be packed."""
        self.conversion.load(tensors, torch.device("cpu") if on_host else self.device)
        block = self.block(index)
        block.requires_grad_(False)
        empty = [name for name, value in block.named_parameters() if value.is_meta]
        if empty:
            raise CheckpointError(
                f"decoder block {index} lacks {self.block_prefix(index)}{empty[0]} "
                f"({len(empty)} such tensors)"
            )

    def free_block(self, index: int) -> None:
        """Free the memory of a block's parameters. Buffers stay: they are not on disk."""
        self.packed.pop(index, None)
        _free(self.block(index).modules())

    def embed(self, tokens_BT: Tensor, layout: SharedPrefix | None = None) -> Tensor:
        """Return the hidden states [B, T, hidden] that enter block 0.

        The first sample of a shape and layout also records how each block is called; with the next
        other one it must be called with equal arguments.
        """
        recorder = Recorder(self.depth)
        sentence = (
            f"{type(self.model).__name__} cannot be run around stand-ins for its decoder blocks"
        )
        with torch.no_grad(), _explained(sentence), stubs_in(self._layers, recorder.visit):
            output = self._run_decoder(tokens_BT, layout)
        self._returns_tuple |= recorder.returns_tuple(output.last_hidden_state)
        shape = tokens_BT.shape, layout
        if shape not in self._calls:
            self._calls[shape] = recorder.calls
            self._first[shape] = tokens_BT
        elif shape in self._first and not torch.equal(self._first[shape], tokens_BT):
            check_same(self._calls[shape], recorder.calls)
            del self._first[shape]
        return recorder.entering

    def forward_block(
        self,
        index: int,
        hidden: Tensor,
        tap: Tap | None = None,
        layout: SharedPrefix | None = None,
    ) -> Tensor:
        """Run one resident block on hidden states [B, T, hidden]; return the same shape."""
        call = self._calls[hidden.shape[:2], layout][index]
        contexts: list[AbstractContextManager[Any] | None] = [self.packed.get(index), tap]
        if not type(self.model).__module__.startswith("transformers."):
            sentence = f"the code that comes with the checkpoint cannot run decoder block {index}"
            contexts.insert(0, _explained(sentence))
        with ExitStack() as within:
            for context in filter(None, contexts):
                within.enter_context(context)
            out = self.block(index)(hidden, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return result

    def loss_and_gradient(
        self, hidden: Tensor, tokens_BT: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the mean next-token cross-entropy of one row [1, T], and its gradient.

        The gradient [1, T, hidden] is by `hidden`, times `scale`.
        """
        hidden = hidden.detach().requires_grad_()
        labels_T = nn.functional.pad(self._ids(tokens_BT)[0, 1:], (0, 1), value=_IGNORED)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        pieces: list[Tensor] = []
        with torch.enable_grad():
            output = self._decoded(hidden, tokens_BT)
            normed = output.last_hidden_state
            for part, chunk, logits in self._logit_chunks(output, normed, tokens_BT):
                summed = nn.functional.cross_entropy(
                    logits.float(), labels_T[part], ignore_index=_IGNORED, reduction="sum"
                )
                loss = summed / (len(labels_T) - 1)
                pieces.append(torch.autograd.grad(loss * scale, chunk)[0])
                total += loss.detach()
        (gradient,) = torch.autograd.grad(normed, hidden, torch.cat(pieces, dim=1))
        return total, gradient

    @torch.no_grad()
    def token_losses(
        self,
        hidden: Tensor,
        tokens_BT: Tensor,
        places_K: Tensor,
        labels_K: Tensor,
        layout: SharedPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of labels, float32 [K], and whether each is the likeliest token.

        `places_K` are positions in the flattened batch, and only there are logits computed.
        """
        count, added = len(labels_K), self._added(len(labels_K))
        places_K = nn.functional.pad(places_K, (0, added)).to(self.device)
        labels_K = self._ids(nn.functional.pad(labels_K, (0, added)))
        output = self._decoded(hidden, tokens_BT, layout)
        normed = output.last_hidden_state.flatten(0, 1)[places_K][None]
        tokens = self._ids(tokens_BT).flatten()[places_K][None]
        losses, likeliest = [], []
        for part, _, logits in self._logit_chunks(output, normed, tokens):
            labels = labels_K[part]
            losses.append(nn.functional.cross_entropy(logits.float(), labels, reduction="none"))
            likeliest.append(_are_likeliest(labels, logits))
        return torch.cat(losses)[:count], torch.cat(likeliest)[:count]

    def _added(self, count: int) -> int:
        """Return how many positions to add for logits of few shapes: oneDNN keeps code for each."""
        last = count % self._logit_positions
        return min(rounded_up(last, _LOGIT_SHAPES), self._logit_positions) - last

    def _ids(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, torch.int64)

    def _decoded(
        self, hidden: Tensor, tokens_BT: Tensor, layout: SharedPrefix | None = None
    ) -> Any:
        """Return the output of the decoder whose last block returns `hidden`."""
        with stubs_in(self._layers, replaying(hidden, self.depth, self._returns_tuple)):
            return self._run_decoder(tokens_BT, layout)

    def _run_decoder(self, tokens_BT: Tensor, layout: SharedPrefix | None) -> Any:
        how: dict[str, Tensor] = {}
        if layout is not None:
            if layout not in self._arguments:
                self._arguments[layout] = layout.arguments(self.dtype, self.device)
            how = self._arguments[layout]
        return self._decoder(input_ids=self._ids(tokens_BT), use_cache=False, **how)

    def forget_calls(self) -> None:
        """Free what `embed` has recorded, to begin with other samples."""
        for recorded in (self._calls, self._first, self._arguments):
            recorded.clear()

    def _logit_chunks(
        self, output: Any, normed: Tensor, tokens_BT: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield parts of a row [1, T]: their places, normed hidden states and logits."""
        for start in range(0, normed.shape[1], self._logit_positions):
            part = slice(start, start + self._logit_positions)
            # Not [:, part]: its strides would have every product copy the head.
            chunk = normed[0, part][None].detach().requires_grad_(normed.requires_grad)
            yield part, chunk, self._logits(output, chunk, self._ids(tokens_BT[:, part]))[0]

    @property
    def _logit_positions(self) -> int:
        """Return the positions whose logits are computed at once."""
        vocab_size: int = self.config.vocab_size
        return max(1, HEAD_LOGITS // vocab_size)

    def _logits(self, output: Any, chunk: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of the model's own forward with a decoder that returns `chunk`."""
        output = copy.copy(output)
        output.last_hidden_state = chunk

        def fixed(*args: Any, **kwargs: Any) -> Any:
            return output

        self._decoder.forward = fixed
        try:
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            del self._decoder.forward
        return logits

    def _group(self, checkpoint: Checkpoint) -> tuple[list[list[str]], list[str]]:
        """Return names on disk of the tensors of each block, and of the others the model uses."""
        blocks: list[list[str]] = [[] for _ in range(self.depth)]
        rest: list[str] = []
        for name, target in self.conversion.in_module(checkpoint.tensors).items():
            if target is None:
                continue
            if target.startswith(f"{self._prefix}."):
                blocks[int(target[len(self._prefix) + 1 :].split(".")[0])].append(name)
            else:
                rest.append(name)
        for index, names in enumerate(blocks):
            if not names:
                raise CheckpointError(f"{checkpoint.folder} has no tensor of decoder block {index}")
        return blocks, rest


def _holds_attention_matrices(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether attention without a mask holds its complete [heads, T, T] probabilities."""
    if config._attn_implementation == "eager":
        return True
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return not fuses_attention(device, dtype, heads, key_heads, head_width)


@contextmanager
def _explained(sentence: str) -> Iterator[None]:
    """Run the body; an error of the model's code becomes a sentence, one of a device stays."""
    try:
        yield
    except FOREIGN_ERRORS as error:
        if is_device_error(error):
            raise
        raise UnsupportedModel(f"{sentence}: {reason(error)}") from error


def _are_likeliest(labels_K: Tensor, logits_KV: Tensor) -> Tensor:
    """Return whether each label is the first token of those with the largest logit.

    On a CPU the maximum takes a tenth of the time of its place, which only few labels need.
    """
    if is_accelerator(logits_KV.device):
        return logits_KV.argmax(dim=1) == labels_K
    of_label_K = logits_KV.gather(1, labels_K[:, None])[:, 0]
    found_K = of_label_K == logits_KV.amax(dim=1)
    found_K[found_K.clone()] = logits_KV[found_K].argmax(dim=1) == labels_K[found_K]
    return found_K


def _free(modules: Iterable[nn.Module]) -> None:
    """Free the memory of the modules' own parameters. Buffers stay: they are not on disk."""
    for module in modules:
        for name, value in module.named_parameters(recurse=False):
            on_meta = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
            setattr(module, name, on_meta)
