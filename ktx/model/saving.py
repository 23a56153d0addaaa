"""Saves a loaded model as a float checkpoint for transformers and ktx.load.

Weights are dequantized in pieces, which are written directly to their offsets in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model.checkpoint_folder import (
    CheckpointContent,
    CheckpointFolder,
    TensorSlot,
    checkpoint_state,
    config_of,
    omitted_names,
)
from ktx.ops.float_views import Dequantized, Floats
from ktx.transformers_compat import dtype_plan, to_checkpoint_form

WRITABLE = (torch.float32, torch.float16, torch.bfloat16)
EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
Form = Callable[[dict[str, Any]], dict[str, Any]]


def save(
    model: Any,
    folder: CheckpointFolder,
    *,
    dtype: torch.dtype | None,
    save_original_format: bool,
    progress: bool | ProgressSink,
) -> None:
    """Writes weights, configuration, generation configuration, and the tokenizer unless the folder has one.

    At most 64 Mi weights are dequantized at once, or one expert's matrix, or one matrix of MLA.

    Args:
        model: a loaded model.
        folder: the target folder.
        dtype: type of the written floats, except for those that the family keeps in f32; None: the compute type.
        save_original_format: as in transformers' save_pretrained.
        progress: as in ktx.load.

    Raises:
        UsageError: an argument is invalid, or a module cannot return its weights as floats.
        DoesNotFit: the disk has too little space; the folder is unchanged.
    """
    dtype = dtype or model.dtype
    if dtype not in WRITABLE:
        raise UsageError(f"save_pretrained: dtype {dtype} is not supported; use one of {', '.join(map(str, WRITABLE))}")
    state = checkpoint_state(model)
    for name in omitted_names(model, state):
        del state[name]
    form: Form = to_checkpoint_form(model) if save_original_format else dict
    own_types = dtype_plan(model, dtype)
    written = form(
        {
            name: torch.empty(value.shape, dtype=_written_dtype(own_types, name, value, dtype), device="meta")
            for name, value in state.items()
        }
    )
    places = {name: TensorSlot(tuple(value.shape), value.dtype) for name, value in written.items()}
    pieces = (
        (name, first * prod(places[name].shape[1:]), values)
        for name, first, values in _yield_pieces(places, state, form)
    )
    content = CheckpointContent(config_of(model, dtype), places, pieces, lambda names: {"format": "pt"})
    folder.write(model, content, "use dtype=torch.bfloat16, packed=True, or another disk", progress)


def _written_dtype(
    own_types: dict[str, torch.dtype], name: str, value: torch.Tensor, dtype: torch.dtype
) -> torch.dtype:
    """Returns the type that a tensor is written in."""
    if not value.is_floating_point():
        return value.dtype
    return next((override for pattern, override in own_types.items() if re.search(pattern, name)), dtype)


def _yield_pieces(
    places: dict[str, TensorSlot], state: dict[str, torch.Tensor], form: Form
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yields a checkpoint's tensors in pieces: name, index in the first dimension, values.

    Pieces are dequantized, converted and written one after another, so that saving needs the memory of one piece, not
    of the floats of the model. `form` converts a loaded model's names and shapes to those of the checkpoint.
    """
    written_forms = _describe_written(places, state, form)
    if written_forms is None:  # a written tensor combines several parameters: convert all at once
        for name, values in form({name: _values(value) for name, value in state.items()}).items():
            yield name, 0, values
        return
    for name, value in state.items():
        unchanged_name, written_shapes = written_forms[name]
        floats = value.floats if isinstance(value, Dequantized) else None
        if unchanged_name is not None and floats is not None:  # some rows at a time
            for first, last in floats.ranges():
                yield unchanged_name, first, floats.read(first, last)
        elif floats is not None and _by_expert(written_shapes, floats):  # some experts at a time
            for first, last in floats.ranges():
                for written_name, values in form({name: floats.read(first, last)}).items():
                    yield _shift_expert(written_name, first), 0, values
        else:  # one parameter at a time
            for written_name, values in form({name: _values(value)}).items():
                yield written_name, 0, values


def _describe_written(
    places: dict[str, TensorSlot], state: dict[str, torch.Tensor], form: Form
) -> dict[str, tuple[str | None, dict[str, tuple[int, ...]]]] | None:
    """Finds out how `form`, which converts a state dict to a checkpoint's names and shapes, changes each parameter.

    Returns by parameter its written name if the values stay unchanged (else None), and the written shapes by name; for
    this, each parameter is converted alone, on the meta device. `_yield_pieces` needs it to write pieces of parameters.
    Returns None if the shapes differ from `places`, because a written tensor then combines several parameters.
    """
    result = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        meta_tensor = torch.empty(value.shape, device="meta")
        written = form({name: meta_tensor})
        own_shapes = {key: tuple(values.shape) for key, values in written.items()}
        unchanged_name = next((key for key, values in written.items() if values is meta_tensor), None)
        result[name] = unchanged_name, own_shapes
        shapes |= own_shapes
    return result if shapes == {name: place.shape for name, place in places.items()} else None


def _by_expert(written_shapes: dict[str, tuple[int, ...]], floats: Floats) -> bool:
    """Whether a parameter with all experts is written as one tensor per expert, named by its number."""
    numbers = [int(match[2]) for name in written_shapes if (match := EXPERT.search(name))]
    return len(numbers) == len(written_shapes) and set(numbers) == set(range(floats.shape[0]))


def _shift_expert(name: str, count: int) -> str:
    """Returns a tensor's name with its expert's number increased by `count`."""
    return EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + count}{match[3]}", name)


def _values(value: torch.Tensor) -> torch.Tensor:
    return value.dequantized() if isinstance(value, Dequantized) else value.detach()
