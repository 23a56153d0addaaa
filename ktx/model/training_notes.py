"""What training leaves out of a loaded model, said in a line: packed weights are frozen, and torch does not list them among a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ktx.errors import UsageError
from ktx.model.notes import Note, tell
from ktx.ops.base import Operator

TRAINING = "training"  # the notes' code
REMEDY = (
    "train an adapter (peft.get_peft_model), or have modules trained by module.requires_grad_(True), which puts linear layers and embeddings in floats;"
    " experts stay packed"
)


def counted(model: Any) -> None:
    """When PEFT has put adapters on a model, whose parameters it counts by torch's list."""
    if model.__dict__.get("ktx") is None or not any(map(_holds, model.modules())):
        return
    try:
        packed = f"{model.num_parameters() - sum(parameter.numel() for parameter in model.parameters()):,}"
    except UsageError:  # an operator of somebody's own that does not say its weights in floats
        packed = "all"
    text = (
        f"{packed} packed numbers are not among torch's parameters: PEFT's print_trainable_parameters() leaves them out of all params,"
        " model.num_parameters() counts them"
    )
    tell(model.ktx.notes, [Note(TRAINING, text)], (TRAINING,))


def look(model: Any, given: Mapping[Any, Any]) -> None:
    """Before a forward in training, of what is `given`. What adapters leave frozen is meant so, and so is a prompt that is trained."""
    if model.__dict__.get("ktx") is None or getattr(model, "peft_config", None):
        return
    text = ""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if not any(_is_trained(value) for value in given.values()):
            text = f"nothing of this model is trained: its weights are packed and frozen; {REMEDY}"
    elif parts := left_out(model):
        names = ", ".join(parts[:3]) + " ..." * (len(parts) > 3)
        text = f"all parameters that torch lists of {names} are trained, the packed weights there are not: {REMEDY}"
    tell(model.ktx.notes, [Note(TRAINING, text)] if text else [], (TRAINING,))


def left_out(model: nn.Module) -> list[str]:
    """The outermost modules of which torch lists parameters that are all trained, and that hold packed weights besides."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(not above or path.startswith(f"{above}.") for above in found):
            continue
        listed = list(module.parameters())
        if listed and all(parameter.requires_grad for parameter in listed) and any(map(_holds, module.modules())):
            found.append(path)
    return [path or "the model" for path in found]


def _holds(module: nn.Module) -> bool:
    return isinstance(module, Operator) and bool(module.tensors())


def _is_trained(value: Any) -> bool:
    """Whether an argument of a forward has a gradient, or may hold what has one, as caches of a learned prefix do."""
    return value.requires_grad if isinstance(value, torch.Tensor) else isinstance(value, Cache)
