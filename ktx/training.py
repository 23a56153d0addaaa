"""What training leaves out of a loaded model, said in a line: packed weights are frozen, and torch does not list them among a model's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ktx.notes import Note, tell
from ktx.ops.base import Operator

TRAINING = "training"  # the notes' code
REMEDY = (
    "train an adapter (peft.get_peft_model), or have modules trained by module.requires_grad_(True), which puts linear layers and embeddings in floats;"
    " experts stay packed"
)


def packed_in(model: nn.Module) -> int:
    """How many numbers are packed."""
    return int(model.num_parameters()) - sum(parameter.numel() for parameter in model.parameters())  # type: ignore[operator]


def counted(model: Any) -> None:
    """When PEFT has put adapters on a model, whose parameters it counts by torch's list."""
    if (packed := packed_in(model)) and model.__dict__.get("ktx") is not None:
        text = (
            f"{packed:,} packed numbers are not among torch's parameters: PEFT's print_trainable_parameters() leaves them out of all params,"
            " model.num_parameters() counts them"
        )
        tell(model.ktx.notes, [Note(TRAINING, text)], (TRAINING,))


def look(model: Any, out: Any) -> None:
    """After a forward in training, whose result is `out`. What adapters leave frozen is meant so."""
    if model.__dict__.get("ktx") is None or getattr(model, "peft_config", None):
        return
    made = next((value for value in _values(out) if isinstance(value, torch.Tensor)), None)
    text = ""
    if made is not None and not made.requires_grad:
        text = f"nothing that this model computed has a gradient: its weights are packed and frozen; {REMEDY}"
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
    return isinstance(module, Operator) and module.is_ready and bool(module.floats())


def _values(out: Any) -> Any:
    return out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else (out,)
