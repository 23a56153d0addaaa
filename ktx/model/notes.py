"""What is worth a line about a loaded model: where it is slow, or computes something else than was asked. `model.ktx.notes`, `/health` and `ktx plan` show them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

import ktx
from ktx.devices import Device
from ktx.hardware import format_bytes
from ktx.injection.inject import Plan
from ktx.injection.rules import FILES, Rules
from ktx.kernels import cpu
from ktx.ops.base import target_qtype

log = logging.getLogger("ktx.model.notes")
CODES = {  # what a note is about
    "generic": "no rule file knows the family",
    "kept": "modules that stay plain torch, in f32",
    "attention": "attention modules that stay transformers' own",
    "serial": "an engine that computes requests one after another",
    "context": "a context that is shorter than the model's",
    "flag": "an option or a variable without effect, or with another one",
    "weights": "how the checkpoint is quantised, and its tensors that no module reads",
    "warning": "what was warned of while the model was planned",
    "training": "packed weights that are not trained, or not counted",
}
WARNED = ("weights", "warning")  # of these users are warned when they are found
SMALL = 0.01  # of all weights: kept modules with less are not worth a line


class Note(NamedTuple):
    """`code` is one of CODES, `text` one line."""

    code: str
    text: str


def tell(notes: list[Note], found: Sequence[Note], instead_of: Sequence[str] = ()) -> None:
    """Adds notes to a model's and logs those that are new, unless they were warned of. Earlier ones of the codes `instead_of` go: they were another engine's."""
    new = [note for note in dict.fromkeys(found) if note not in notes]
    notes[:] = [note for note in notes if note.code not in instead_of or note in found] + new
    for note in new:
        if note.code not in WARNED:
            log.warning("%s", note.text)


@contextmanager
def heard() -> Iterator[list[Note]]:
    """What users are warned of inside, as notes too: all warnings follow when it ends, however it does."""
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
    """Paths of attention modules that stay transformers' own and read no cache of ours."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        and hasattr(module, "layer_idx")
        and not getattr(module, "ours", False)
    ]


def spinning() -> list[Note]:
    """On torch's threads, where ktx came too late to have them wait without spinning."""
    if not ktx._torch_came_first or torch.get_num_threads() < 2:
        return []
    return [
        Note(
            "flag",
            "torch was imported before ktx: its OpenMP threads spin after their work, on the cores where kernels run, and prompts take longer; import ktx first, or set"
            " OMP_WAIT_POLICY=PASSIVE before Python starts",
        )
    ]


def notes_of(
    model: nn.Module, plan: Plan, rules: Rules, targets: Mapping[str, str | None], kv_dtype: object
) -> list[Note]:
    """Notes on a model as its rules have made it; what its options ask for stands beside what they do."""
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    found = []
    if not rules.explicit and kind not in FILES:
        found.append(
            Note(
                "generic",
                f"no rule file knows {kind}: generic.yaml replaces what it can, the rest is transformers' own and slower",
            )
        )
    if foreign := foreign_attention(model):
        found.append(
            Note(
                "attention",
                f"{len(foreign)} attention modules ({foreign[0]}) stay transformers' own: slower, caches keep the model's type, and an engine answers requests one after another",
            )
        )
    found += _kept(plan)
    found += _dropped(plan, targets, kv_dtype)
    found += [Note("weights", text) for text in plan.notes]
    return found


def _kept(plan: Plan) -> Iterator[Note]:
    """Modules with matrices that no operator replaced, one note a class."""
    total = sum(step.memory for step in plan)
    kept: dict[str, list[Any]] = {}
    for step in plan:
        if not step.new and any(len(shape) > 1 for shape in step.shapes.values()):
            kept.setdefault(step.old, []).append(step)
    for name, steps in kept.items():
        nbytes = sum(step.memory for step in steps)
        if nbytes > SMALL * total:
            yield Note(
                "kept",
                f"{len(steps)} {name} ({steps[0].path}) stay plain torch: {format_bytes(nbytes)} in f32, which no kernel of ours computes",
            )


def _dropped(plan: Plan, targets: Mapping[str, str | None], kv_dtype: object) -> Iterator[Note]:
    """Options and variables that do nothing here, or not what they say."""
    for operator, target in targets.items():
        specs = [spec for step in plan if step.target == target for spec in step.specs if len(spec.shape) > 1]
        if target and not any(target_qtype(spec, target) for spec in specs):
            yield Note(
                "flag",
                f"{operator} weights should become {target}, but none is a float that could: they stay as the file has them",
            )
    devices = set(plan.devices.values())
    yield from _caches(devices, kv_dtype)
    isa, wish = cpu.ops.isa(), os.environ.get("KTX_ISA", "")
    if wish and wish != isa:
        yield Note("flag", f"KTX_ISA={wish}: this CPU has no more than {isa}, which is used")
    if os.environ.get("KTX_GEMM") == "fast" and not cpu.ops.fast_gemm():
        yield Note("flag", f"KTX_GEMM=fast: {isa} kernels know no other way than the exact one, which is used")


def _caches(devices: set[Device], kv_dtype: object) -> Iterator[Note]:
    wish = str(kv_dtype)
    if wish == "q8_0" and any(device.gpu for device in devices):
        yield Note("flag", "kv_dtype q8_0: layers on a GPU keep f16")
    if wish == "fp8" and not any(device.gpu for device in devices):
        yield Note("flag", "kv_dtype fp8: layers on the CPU keep q8_0")
