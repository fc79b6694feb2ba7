"""Between names on disk and in the module. The only file that touches transformers' conversion API.

Transformers may rename, stack, split or transpose what a checkpoint holds (`block_sparse_moe
.experts.3.w1.weight` on disk is a slice of `mlp.experts.gate_up_proj` in the module). Loading goes
through its own conversion; which part of which parameter a tensor on disk becomes is found by
sending coordinates back through the reverse conversion.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from lowmem_gblm.errors import CheckpointError, UnsupportedModel, shown

_PROBE = 8
# No parameter has so long a name, and a megabyte would keep the patterns of transformers busy.
_LONGEST_NAME = 1000


@dataclass(frozen=True, kw_only=True)
class Region:
    """The place in the module of one 2-D tensor on disk (or one leading index of a 3-D one).

    Attributes:
        disk_index: Leading index on disk, None if the tensor on disk is 2-D.
        parameter: Full name of the parameter in the module.
        expert: Leading index in the module, None if the parameter is 2-D.
        rows, columns: The part of the stored matrix.
        transposed: Whether rows on disk are columns in the module.
    """

    disk_index: int | None
    parameter: str
    expert: int | None
    rows: slice
    columns: slice
    transposed: bool


class NameConversion:
    """The renaming and conversion of the tensors of a checkpoint for a model on `meta`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._conversions = get_model_conversion_mapping(model)
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}

    def in_module(self, names_on_disk: Iterable[str]) -> dict[str, str | None]:
        """Return the name in the module of every tensor on disk; None if the model ignores it."""
        return {name: target for name, target, _ in self._rename(names_on_disk)}

    def taken_over(self, names_on_disk: Iterable[str]) -> dict[str, str]:
        """Return the name in the module of each tensor that is one parameter, unconverted."""
        renamed = list(self._rename(names_on_disk))
        sources = Counter(target for _, target, _ in renamed)
        return {
            name: target
            for name, target, converted in renamed
            if target is not None and converted is None and sources[target] == 1
        }

    def is_split_off(self, parameter: str) -> bool:
        """Return whether a parameter may share its tensor on disk with other parameters."""
        splitting = self._splitting()
        return any(target in parameter for one in splitting for target in one.target_patterns)

    def _splitting(self) -> list[WeightConverter]:
        """Return the conversions that make several parameters of a tensor."""
        converters = (one for one in self._conversions if isinstance(one, WeightConverter))
        return [one for one in converters if len(one.target_patterns) > 1]

    def _rename(self, names_on_disk: Iterable[str]) -> Iterator[tuple[str, str | None, str | None]]:
        """Yield name on disk, name in the module or None, and pattern of its conversion or None."""
        conversions = copy.deepcopy(self._conversions)
        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in conversions if isinstance(one, WeightConverter)]
        prefix = self._model.base_model_prefix
        known = dict.fromkeys(self._shapes, 0)
        for name in names_on_disk:
            if len(name) > _LONGEST_NAME:
                yield name, None, None
                continue
            renamed, source = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known:
                renamed, source = rename_source_key(name, [], [], prefix, known)
            yield name, renamed if renamed in known else None, source

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Set parameters on the device, and buffers, from CPU tensors named as on disk.

        Where dtype and device agree their memory is shared, not copied.
        """
        conversions = copy.deepcopy(self._conversions)
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self._model.dtype,
            dtype_plan=self._model._get_dtype_plan(self._model.dtype),
            weight_mapping=conversions,
        )
        with _quietly():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config, None)
        for name, found, expected in sorted(info.mismatched_keys, key=str):
            raise CheckpointError(
                f"{name} has the shape {list(found)}, the architecture expects {list(expected)}"
            )
        if info.conversion_errors:
            name, message = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{name} could not be converted: {_sentence(message)}")

    def regions(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Region]]:
        """Return the parts of the module that tensors on disk of these shapes, 2-D or 3-D, are."""
        in_module, taken_over = self.in_module(shapes), self.taken_over(shapes)
        plain: dict[str, list[Region]] = {}
        converted: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            target = in_module[name]
            if target is None or len(shape) not in (2, 3):
                continue
            if name in taken_over and self._shapes[target] == shape:
                plain[name] = _identity(target, shape)
            else:
                converted[name] = shape
        if converted:
            plain.update(self._probe(converted))
        return plain

    def _probe(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Region]]:
        """Find regions by sending coordinates through the reverse conversion."""
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        targets = {name for name in self.in_module(shapes).values() if name is not None}
        self._check_whole(shapes)
        self.load(meta, torch.device("meta"))
        row_codes: dict[str, Tensor] = {}
        column_codes: dict[str, Tensor] = {}
        for target in targets:
            row_codes |= self._revert(target, 0)
            column_codes |= self._revert(target, 1)
        regions: dict[str, list[Region]] = {}
        for name, shape in shapes.items():
            if name not in row_codes:
                raise UnsupportedModel(
                    f"it cannot be followed which part of the model {name} becomes: its name or "
                    f"number does not fit those of the tensors beside it"
                )
            regions[name] = [
                self._decode(name, index, row_codes[name], column_codes[name])
                for index in (range(shape[0]) if len(shape) == 3 else (None,))
            ]
        return regions

    def _check_whole(self, names_on_disk: Iterable[str]) -> None:
        """Raise `UnsupportedModel` for a tensor that is split into several parameters."""
        splitting = {pattern for one in self._splitting() for pattern in one.source_patterns}
        for name, _, pattern in self._rename(names_on_disk):
            if pattern in splitting:
                raise UnsupportedModel(f"{name} is split into several parameters of the model")

    def _revert(self, target: str, axis: int) -> dict[str, Tensor]:
        """Return what the reverse conversion makes of a parameter that holds its own coordinates.

        Only the probed axis has its real length, so this takes little memory. A code is
        (number of the parameter, expert, position on the axis) as one integer.
        """
        shape = self._shapes[target]
        experts = shape[0] if len(shape) == 3 else 1
        length = shape[-2 + axis]
        number = list(self._shapes).index(target)
        codes = torch.arange(experts * length).view(experts, length) + (number << 40)
        wide = codes[:, :, None] if axis == 0 else codes[:, None, :]
        tensor = wide.expand(-1, length if axis == 0 else _PROBE, _PROBE if axis == 0 else length)
        if len(shape) == 2:
            tensor = tensor[0]
        with _quietly():
            return dict(revert_weight_conversion(self._model, {target: tensor.contiguous()}))

    def _decode(self, name: str, index: int | None, rows: Tensor, columns: Tensor) -> Region:
        row_codes = rows if index is None else rows[index]
        column_codes = columns if index is None else columns[index]
        transposed = bool((row_codes[:, 0] == row_codes[0, 0]).all()) and row_codes.shape[0] > 1
        along_rows = row_codes[0] if transposed else row_codes[:, 0]
        along_columns = column_codes[:, 0] if transposed else column_codes[0]
        target = list(self._shapes)[int(along_rows[0]) >> 40]
        shape = self._shapes[target]
        row_slice, expert = _slice(name, along_rows, shape[-2])
        column_slice, _ = _slice(name, along_columns, shape[-1])
        return Region(
            disk_index=index,
            parameter=target,
            expert=expert if len(shape) == 3 else None,
            rows=row_slice,
            columns=column_slice,
            transposed=transposed,
        )


def as_stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors named as in the module as `save_pretrained` would name and shape them."""
    with _quietly():
        return dict(revert_weight_conversion(model, dict(tensors)))


def _identity(parameter: str, shape: tuple[int, ...]) -> list[Region]:
    whole = slice(None)
    return [
        Region(
            disk_index=index,
            parameter=parameter,
            expert=index,
            rows=whole,
            columns=whole,
            transposed=False,
        )
        for index in (range(shape[0]) if len(shape) == 3 else (None,))
    ]


def _slice(name: str, codes: Tensor, length: int) -> tuple[slice, int]:
    """Return the slice, and the expert, that a run of codes stands for."""
    positions = codes & ((1 << 40) - 1)
    expert, start = divmod(int(positions[0]), length)
    step = int(positions[1] - positions[0]) if len(positions) > 1 else 1
    expected = positions[0] + step * torch.arange(len(positions))
    if step < 1 or not torch.equal(positions, expected):
        raise UnsupportedModel(f"{name} becomes no regular slice of a parameter")
    return slice(start, start + step * (len(positions) - 1) + 1, step), expert


def _sentence(message: str) -> str:
    """Return the message of an error of transformers without its traceback."""
    lines = message.splitlines() or [""]
    return shown(lines[-2] if lines[0].startswith("Traceback") else lines[0], _LONGEST_NAME)


class _quietly:
    """A context without the library's progress bars."""

    def __enter__(self) -> None:
        self._was_active = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        if self._was_active:
            transformers_logging.enable_progress_bar()
