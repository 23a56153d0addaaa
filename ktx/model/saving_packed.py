"""Saves a loaded model as a checkpoint of packed weights, each in its type in memory, for ktx.weights.packed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model.checkpoint_folder import (
    CheckpointContent,
    CheckpointFolder,
    Pieces,
    TensorSlot,
    checkpoint_name,
    checkpoint_state,
    config_of,
    omitted_names,
)
from ktx.ops.base import Operator
from ktx.ops.float_views import Dequantized
from ktx.ops.packed_state import PackedState
from ktx.ops.tied import TiedLinear
from ktx.quant.types import FP8_BLOCK
from ktx.weights.base import EXPANDED
from ktx.weights.gguf_files import ggufs_in
from ktx.weights.packed import packed_metadata, part_name, quantization_config
from ktx.weights.safetensors import scale_name

State = dict[str, list[PackedState] | torch.Tensor]


def save_packed(model: Any, folder: CheckpointFolder, progress: bool | ProgressSink) -> None:
    """Writes weights, configuration, generation configuration, and the tokenizer unless the folder has one.

    A model that ktx.load loads from the folder computes the same bits. A matrix is written as rows of blocks of its
    type, some rows at a time; all other tensors are written in their float type.

    Args:
        model: a loaded model.
        folder: the target folder.
        progress: as in ktx.load.

    Raises:
        UsageError: a module cannot return its packed weights, or a loaded model would not have some of the tensors.
        DoesNotFit: the disk has too little space; the folder is unchanged.
    """
    if folder.path.is_dir() and (ggufs := ggufs_in(folder.path)):
        raise UsageError(
            f"save_pretrained: {folder.path} holds {ggufs[0].name}, so ktx.load could not tell which weights to load;"
            " use another folder"
        )
    state = _collect_state(model)
    _check_names(model, state)
    stored: dict[str, PackedState] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            plain[name] = value
        else:
            stored |= {part_name(name, i, len(value)): part for i, part in enumerate(value)}
    places = {name: TensorSlot(tuple(value.shape), value.dtype) for name, value in plain.items()}
    for name, matrix in stored.items():
        *leading, rows, columns = matrix.shape
        places[name] = TensorSlot((*leading, rows, matrix.qtype.row_bytes(columns)), torch.uint8)
        if matrix.qtype.name == "F8_E4M3":
            scales = (*leading, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            places[scale_name(name)] = TensorSlot(scales, torch.float32)

    def metadata(names: Iterable[str]) -> dict[str, str]:
        return packed_metadata({name: stored[name].qtype.name for name in names if name in stored})

    config = config_of(model, model.dtype, quantization_config())
    content = CheckpointContent(config, places, _yield_pieces(plain, stored), metadata)
    folder.write(model, content, "use another disk", progress)


def _yield_pieces(plain: dict[str, torch.Tensor], stored: dict[str, PackedState]) -> Pieces:
    """Yields all tensors in pieces, as `Pieces` describes: the plain ones, then packed matrices some rows at a time."""
    for name, value in plain.items():
        yield name, 0, value
    for name, matrix in stored.items():
        yield from _yield_rows(name, matrix)


def _yield_rows(name: str, matrix: PackedState) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yields a matrix in pieces of some rows, with its block scales, so that few rows are unpacked at a time."""
    data_offset, scale_offset = 0, 0
    for rows in matrix.rows():
        yield name, data_offset, rows.data
        data_offset += rows.data.numel()
        if rows.scale is not None:
            yield scale_name(name), scale_offset, rows.scale
            scale_offset += rows.scale.numel()


def _collect_state(model: Any) -> State:
    """Returns packed weights and all other tensors by the names that a loaded model reads.

    A tied output layer is left out, unless it is quantized and the embedding is not. Raises UsageError for a
    parametrized module.
    """
    floats = checkpoint_state(model)
    state: State = {name: value for name, value in floats.items() if not isinstance(value, Dequantized)}
    for path, module in model.named_modules():
        if is_parametrized(module):
            raise UsageError(
                f"save_pretrained: {path} is parametrized, which a file cannot express;"
                " torch.nn.utils.parametrize.remove_parametrizations replaces the parametrization by its values"
            )
        if isinstance(module, Operator):
            prefix = f"{path}." if path else ""
            state |= {checkpoint_name(f"{prefix}{name}"): value for name, value in module.packed_state().items()}
    for name in omitted_names(model, floats):
        head = model.get_submodule(name.rpartition(".")[0]) if name in state else None
        if not isinstance(head, TiedLinear) or all(part.qtype.is_float for part in head.parts):
            state.pop(name, None)  # kept for a quantized head, whose values the float embedding lacks
    return state


def _check_names(model: Any, state: State) -> None:
    """Raises UsageError for tensors that a model loaded from the folder would lack: of adapters or replaced modules.

    Names are compared without layer and expert numbers.
    """
    read_names = {_any_layer(name) for step in model.ktx.plan for name in step.tensors}
    read_names |= {f"{name}{EXPANDED}" for name in read_names}  # MLA's weights for the expanded form
    read_names |= {
        _any_layer(name) for pair in dict(getattr(model, "all_tied_weights_keys", None) or {}).items() for name in pair
    }
    unknown = [name for name in state if _any_layer(name) not in read_names]
    if unknown:
        raise UsageError(
            "save_pretrained: a model loaded from this configuration has no"
            f" {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''};"
            " merge adapters first (merge_and_unload), and undo wrapped or replaced modules"
        )


def _any_layer(name: str) -> str:
    """Returns a name without its layer and expert numbers."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)
