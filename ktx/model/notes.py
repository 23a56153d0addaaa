"""Notes on a loaded model: slow parts, and options that take no effect.

`model.ktx.notes`, `/health` and `ktx plan` list them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ktx.devices import Device
from ktx.families import RULE_FILES
from ktx.hardware import format_bytes
from ktx.injection.inject import InjectOptions, Plan
from ktx.kernels import cpu
from ktx.ops.base import target_qtype
from ktx.utils import openmp

log = logging.getLogger("ktx.model.notes")
CODES = {  # subject of a note by its code
    "generic": "no rule file for the model family",
    "kept": "modules that stay plain torch modules in f32",
    "attention": "attention modules that stay transformers' own",
    "serial": "an engine that runs requests sequentially",
    "context": "a context that is shorter than the model's max context",
    "flag": "an option or variable that has no effect, or another one",
    "weights": "the checkpoint's quantization, and tensors that no module reads",
    "warning": "warnings issued while the model was planned",
    "training": "packed weights that are not trained, or not counted as parameters",
}
WARNED = ("weights", "warning")  # issued as warnings when found, so not logged again
MIN_PLAIN_FRACTION = 0.01  # of all weights: no note on plain torch modules with less


class Note(NamedTuple):
    """`code` is one of CODES, `text` one line."""

    code: str
    text: str


def add_notes(notes: list[Note], found: Sequence[Note], replaced_codes: Sequence[str] = ()) -> None:
    """Adds notes to a model's and logs the new ones, except those that were already issued as warnings.

    Args:
        notes: the model's notes, changed in place.
        found: the notes to add.
        replaced_codes: codes whose earlier notes are removed, for example those of a previous engine.
    """
    unseen = [note for note in dict.fromkeys(found) if note not in notes]
    notes[:] = [note for note in notes if note.code not in replaced_codes or note in found] + unseen
    for note in unseen:
        if note.code not in WARNED:
            log.warning("%s", note.text)


@contextmanager
def capture_warnings() -> Iterator[list[Note]]:
    """Collects the UserWarnings issued inside as notes, for `model.ktx.notes`; all warnings are issued on exit."""
    notes: list[Note] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                notes.append(Note("warning", str(warning.message)))
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def foreign_attention(model: nn.Module) -> list[str]:
    """Returns the paths of attention modules that stay transformers' own and cannot read ktx's KV caches."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        and hasattr(module, "layer_idx")
        and not getattr(module, "uses_ktx_kernel", False)
    ]


def openmp_notes() -> list[Note]:
    """A note if torch was imported before ktx, so that its OpenMP threads spin while they wait.

    ktx sets the waiting policy on import, which OpenMP reads when torch loads it.
    """
    if not openmp.TORCH_CAME_FIRST or torch.get_num_threads() < 2:
        return []
    return [
        Note(
            "flag",
            "torch was imported before ktx: its OpenMP threads spin while idle, on the cores that run the kernels,"
            " and prefill takes longer; import ktx first, or set OMP_WAIT_POLICY=PASSIVE before Python starts",
        )
    ]


def collect_notes(model: nn.Module, plan: Plan, options: InjectOptions) -> list[Note]:
    """Returns notes on a planned model: parts that will be slow, and options that take no effect.

    Args:
        model: the meta-device model after injection.
        plan: its plan, with the rules that were applied.
        options: the requested types.
    """
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    notes = []
    if not plan.rules.explicit and model_type not in RULE_FILES:
        notes.append(
            Note(
                "generic",
                f"no rule file for {model_type}: generic.yaml replaces what it can,"
                " the remaining modules stay transformers' own and are slower",
            )
        )
    if paths := foreign_attention(model):
        notes.append(
            Note(
                "attention",
                f"{len(paths)} attention modules ({paths[0]}) stay transformers' own: they are slower,"
                " caches use the model's type, and an engine runs requests sequentially",
            )
        )
    notes += _plain_modules(plan)
    notes += _ignored_options(plan, options.targets, options.kv_dtype)
    notes += [Note("weights", text) for text in plan.notes]
    return notes


def _plain_modules(plan: Plan) -> Iterator[Note]:
    """Yields a note per class of modules with matrices that no operator replaced, if these are much of the memory."""
    total = sum(step.memory_bytes for step in plan)
    steps_by_class: dict[str, list[Any]] = {}
    for step in plan:
        if not step.operator and any(len(shape) > 1 for shape in step.shapes.values()):
            steps_by_class.setdefault(step.old_class, []).append(step)
    for name, steps in steps_by_class.items():
        nbytes = sum(step.memory_bytes for step in steps)
        if nbytes > MIN_PLAIN_FRACTION * total:
            yield Note(
                "kept",
                f"{len(steps)} {name} ({steps[0].path}) stay plain torch: {format_bytes(nbytes)} in f32,"
                " for which no ktx kernel is used",
            )


def _ignored_options(plan: Plan, targets: Mapping[str, str | None], kv_dtype: object) -> Iterator[Note]:
    """Yields a note per option or variable that has no effect on this model or CPU, or another one than requested."""
    for operator, target in targets.items():
        specs = [spec for step in plan if step.quant_target == target for spec in step.specs if len(spec.shape) > 1]
        if target and not any(target_qtype(spec, target) for spec in specs):
            yield Note(
                "flag",
                f"{operator} weights should become {target}, but none of them is a float matrix of suitable shape:"
                " they stay as in the file",
            )
    devices = set(plan.devices.values())
    yield from _ignored_kv_dtype(devices, kv_dtype)
    isa, requested = cpu.ops.isa(), os.environ.get("KTX_ISA", "")
    if requested and requested != isa:
        yield Note("flag", f"KTX_ISA={requested}: this CPU supports at most {isa}, which is used")


def _ignored_kv_dtype(devices: set[Device], kv_dtype: object) -> Iterator[Note]:
    """Yields a note if some layers cannot use the requested type of the KV cache."""
    requested = str(kv_dtype)
    if requested == "q8_0" and any(device.gpu for device in devices):
        yield Note("flag", "kv_dtype q8_0: layers on a GPU use f16")
    if requested == "fp8" and not any(device.gpu for device in devices):
        yield Note("flag", "kv_dtype fp8: layers on the CPU use q8_0")
