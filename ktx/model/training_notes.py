"""Notes on training: reports packed weights that are not trained or not counted.

Packed weights are frozen, and torch does not list them among a model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ktx.errors import UsageError
from ktx.model.notes import Note, add_notes
from ktx.ops.base import Operator

TRAINING = "training"  # code of these notes
REMEDY = (
    "train an adapter (peft.get_peft_model), or call module.requires_grad_(True), which converts linear layers and"
    " embeddings to floats; experts stay packed"
)


def note_uncounted_weights(model: Any) -> None:
    """Adds a note after PEFT has put adapters on a model, because PEFT counts only torch's parameters."""
    if model.__dict__.get("ktx") is None or not any(map(_has_packed_weights, model.modules())):
        return
    try:
        packed = f"{model.num_parameters() - sum(parameter.numel() for parameter in model.parameters()):,}"
    except UsageError:  # a custom operator that cannot return its weights as floats
        packed = "all"
    text = (
        f"{packed} packed weights are not among torch's parameters: PEFT's print_trainable_parameters() leaves them out"
        " of all params, model.num_parameters() counts them"
    )
    add_notes(model.ktx.notes, [Note(TRAINING, text)], (TRAINING,))


def note_frozen_weights(model: Any, call_args: Mapping[Any, Any]) -> None:
    """Adds a note before a forward in training if weights that look trained are frozen.

    `call_args` are the forward's arguments. Weights that adapters freeze on purpose, and trained prompts, cause no
    note.
    """
    if model.__dict__.get("ktx") is None or getattr(model, "peft_config", None):
        return
    text = ""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if not any(_is_trained(value) for value in call_args.values()):
            text = f"no weights of this model are trained: they are packed and frozen; {REMEDY}"
    elif paths := partly_trained_modules(model):
        names = ", ".join(paths[:3]) + " ..." * (len(paths) > 3)
        text = f"all parameters that torch lists of {names} are trained, but their packed weights are not: {REMEDY}"
    add_notes(model.ktx.notes, [Note(TRAINING, text)] if text else [], (TRAINING,))


def partly_trained_modules(model: nn.Module) -> list[str]:
    """Returns the paths of the outermost modules with packed weights whose torch parameters are all trained.

    A user who sets these parameters to be trained may believe that the modules are trained completely.
    """
    paths: list[str] = []
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in paths):
            continue
        parameters = list(module.parameters())
        if (
            parameters
            and all(parameter.requires_grad for parameter in parameters)
            and any(map(_has_packed_weights, module.modules()))
        ):
            paths.append(path)
    return [path or "the model" for path in paths]


def _has_packed_weights(module: nn.Module) -> bool:
    return isinstance(module, Operator) and bool(module.tensors())


def _is_trained(value: Any) -> bool:
    """Whether a forward's argument requires a gradient, or is a cache, which may hold a learned prefix."""
    return value.requires_grad if isinstance(value, torch.Tensor) else isinstance(value, Cache)
