"""A loaded model written as a checkpoint of packed weights, each in the type that it has in memory, as ktx.weights.packed reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model.checkpoint_folder import Folder, Pieces, Place, config_of, in_checkpoint, left_out, state_of
from ktx.ops.base import Operator
from ktx.ops.float_views import Dequantized
from ktx.ops.packed_state import PackedState
from ktx.ops.tied import Tied
from ktx.quant.types import FP8_BLOCK
from ktx.weights.base import EXPANDED
from ktx.weights.gguf_files import ggufs_in
from ktx.weights.packed import about, part_of, quantization_config
from ktx.weights.safetensors import scale_of

State = dict[str, list[PackedState] | torch.Tensor]


def save_packed(
    model: Any,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    progress: bool | ProgressSink = True,
) -> None:
    """Weights, configuration, generation settings, and the tokenizer unless the folder has one; ktx.load of the folder computes the same bits.

    A matrix is written as rows of blocks of its type, some rows at a time; everything else in the floats that it is. UsageError for a module that cannot say
    its packed weights, and for tensors that a model loaded from there would not have; DoesNotFit where the disk has too little space. The folder is then as it was.
    """
    target = Folder.of(folder, max_shard_size, variant)
    if target.path.is_dir() and (others := ggufs_in(target.path)):
        raise UsageError(
            f"save_pretrained: {target.path} holds {others[0].name}, beside which ktx.load would not know what to load; give another folder"
        )
    state = _state(model)
    _check(model, state)
    stored: dict[str, PackedState] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            plain[name] = value
        else:
            stored |= {part_of(name, i, len(value)): part for i, part in enumerate(value)}
    places = {name: Place(tuple(value.shape), value.dtype) for name, value in plain.items()}
    for name, matrix in stored.items():
        *before, rows, columns = matrix.shape
        places[name] = Place((*before, rows, matrix.qtype.row_bytes(columns)), torch.uint8)
        if matrix.qtype.name == "F8_E4M3":
            scales = (*before, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
            places[scale_of(name)] = Place(scales, torch.float32)

    def metadata(names: Iterable[str]) -> dict[str, str]:
        return about({name: stored[name].qtype.name for name in names if name in stored})

    config = config_of(model, model.dtype, quantization_config())
    target.write(model, config, places, _pieces(plain, stored), metadata, "give another disk", progress)


def _pieces(plain: dict[str, torch.Tensor], stored: dict[str, PackedState]) -> Pieces:
    for name, value in plain.items():
        yield name, 0, value
    for name, matrix in stored.items():
        yield from _rows(name, matrix)


def _rows(name: str, matrix: PackedState) -> Iterator[tuple[str, int, torch.Tensor]]:
    at, scales = 0, 0
    for some in matrix.rows():
        yield name, at, some.data
        at += some.data.numel()
        if some.scale is not None:
            yield scale_of(name), scales, some.scale
            scales += some.scale.numel()


def _state(model: Any) -> State:
    """Packed weights and all other tensors by the names that a model that is loaded asks for."""
    floats = state_of(model)
    found: State = {name: value for name, value in floats.items() if not isinstance(value, Dequantized)}
    for path, module in model.named_modules():
        if is_parametrized(module):
            raise UsageError(
                f"save_pretrained: {path} is parametrized, a file has nothing for that; torch.nn.utils.parametrize.remove_parametrizations puts values in its place"
            )
        if isinstance(module, Operator):
            prefix = f"{path}." if path else ""
            found |= {in_checkpoint(f"{prefix}{name}"): value for name, value in module.packed_state().items()}
    for name in left_out(model, floats):
        head = model.get_submodule(name.rpartition(".")[0]) if name in found else None
        if not isinstance(head, Tied) or all(part.qtype.is_float for part in head.parts):
            found.pop(name, None)  # of one that is quantised the embedding, in floats, says too little
    return found


def _check(model: Any, state: State) -> None:
    """UsageError for tensors that no module would ask for, whatever layer they are of: of adapters, or of modules in another's place."""
    asked = {_alike(name) for step in model.ktx.plan for name in step.tensors}
    asked |= {f"{name}{EXPANDED}" for name in asked}
    asked |= {
        _alike(name) for pair in dict(getattr(model, "all_tied_weights_keys", None) or {}).items() for name in pair
    }
    unknown = [name for name in state if _alike(name) not in asked]
    if unknown:
        raise UsageError(
            f"save_pretrained: a model loaded from this configuration has no {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}; merge adapters first"
            " (merge_and_unload), and take back modules that were put around others or in their place"
        )


def _alike(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)
