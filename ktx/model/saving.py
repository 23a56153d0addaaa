"""A loaded model written as a checkpoint of floats that transformers and ktx.load read: dequantised a span at a time, straight to its place in a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch

from ktx.errors import UsageError
from ktx.loader.load_weights import ProgressSink
from ktx.model.checkpoint_folder import Folder, Place, config_of, left_out, state_of
from ktx.ops.float_views import Dequantized, Floats
from ktx.transformers_compat import dtype_plan, written_form

WRITABLE = (torch.float32, torch.float16, torch.bfloat16)
EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
Form = Callable[[dict[str, Any]], dict[str, Any]]


def save(
    model: Any,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
    progress: bool | ProgressSink = True,
) -> None:
    """Weights, configuration, generation settings, and the tokenizer unless the folder has one.

    `dtype` is of the floats that are written (default: what the model computes in), but for those that the family keeps in f32. What is dequantised at once is
    at most 64 Mi numbers, or one expert's matrix or one of MLA's. UsageError for a module that cannot say its weights in floats, DoesNotFit where the disk
    has too little space; the folder is then as it was.
    """
    dtype = dtype or model.dtype
    if dtype not in WRITABLE:
        raise UsageError(f"save_pretrained: dtype {dtype} is not written; give one of {', '.join(map(str, WRITABLE))}")
    target, state = Folder.of(folder, max_shard_size, variant), state_of(model)
    for name in left_out(model, state):
        del state[name]
    form: Form = written_form(model) if save_original_format else dict
    own_types = dtype_plan(model, dtype)
    whole = form(
        {
            name: torch.empty(value.shape, dtype=_type(own_types, name, value, dtype), device="meta")
            for name, value in state.items()
        }
    )
    places = {name: Place(tuple(value.shape), value.dtype) for name, value in whole.items()}
    pieces = (
        (name, first * prod(places[name].shape[1:]), values) for name, first, values in _pieces(places, state, form)
    )
    remedy = "give dtype=torch.bfloat16, packed=True, or another disk"
    target.write(model, config_of(model, dtype), places, pieces, lambda names: {"format": "pt"}, remedy, progress)


def _type(own_types: dict[str, torch.dtype], name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is written as."""
    if not value.is_floating_point():
        return value.dtype
    return next((own for pattern, own in own_types.items() if re.search(pattern, name)), dtype)


def _pieces(
    places: dict[str, Place], state: dict[str, torch.Tensor], form: Form
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """A checkpoint's tensors in pieces: name, index in the first dimension, values."""
    alone = _alone(places, state, form)
    if alone is None:  # some are made of several: all at once
        for name, values in form({name: _values(value) for name, value in state.items()}).items():
            yield name, 0, values
        return
    for name, value in state.items():
        same, own = alone[name]
        floats = value.floats if isinstance(value, Dequantized) else None
        if same is not None and floats is not None:
            for first, last in floats.spans():
                yield same, first, floats.read(first, last)
        elif floats is not None and _by_expert(own, floats):
            for first, last in floats.spans():
                for made, values in form({name: floats.read(first, last)}).items():
                    yield _later(made, first), 0, values
        else:
            for made, values in form({name: _values(value)}).items():
                yield made, 0, values


def _alone(
    places: dict[str, Place], state: dict[str, torch.Tensor], form: Form
) -> dict[str, tuple[str | None, dict[str, tuple[int, ...]]]] | None:
    """Of each parameter what is made of it: its name where it stays as it is, and all names with their shapes; None where a tensor is made of several."""
    found = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        given = torch.empty(value.shape, device="meta")
        made = form({name: given})
        own = {key: tuple(values.shape) for key, values in made.items()}
        same = next((key for key, values in made.items() if values is given), None)
        found[name] = same, own
        shapes |= own
    return found if shapes == {name: place.shape for name, place in places.items()} else None


def _by_expert(own: dict[str, tuple[int, ...]], floats: Floats) -> bool:
    """Whether a parameter of all experts becomes tensors of each, by its number."""
    numbers = [int(found[2]) for name in own if (found := EXPERT.search(name))]
    return len(numbers) == len(own) and set(numbers) == set(range(floats.shape[0]))


def _later(name: str, count: int) -> str:
    """The name of a tensor of an expert that comes so many after."""
    return EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + count}{found[3]}", name)


def _values(value: torch.Tensor) -> torch.Tensor:
    return value.dequantized() if isinstance(value, Dequantized) else value.detach()
