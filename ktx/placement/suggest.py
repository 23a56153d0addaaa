"""The placement that a budget allows, or what it lacks and the smallest changes that would do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ktx.cache.kv import Q8_0
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes
from ktx.placement.memory_model import Footprint
from ktx.placement.solver import CPU, SLACK, Budget, Placement, solve

STEP = 100_000_000  # bytes to which a budget is rounded up
LEAST_SHARE = 0.2  # of its bytes below which no quant of a model is worth naming


def fit(model: Footprint, budget: Budget) -> Placement:
    """The placement that a budget allows. DoesNotFit with the numbers, and the changes that would do."""
    made = solve(model, budget)
    if made.exceeded():
        raise DoesNotFit(f"{_lacking(made)}. It would fit with {', or '.join(changes(made))}")
    return made


def _lacking(made: Placement) -> str:
    lines = []
    for device, lack in made.exceeded().items():
        parts = sorted(((of.get(device, 0), group) for group, of in made.bytes.items()), reverse=True)
        most = ", ".join(f"{group} {format_bytes(size)}" for size, group in parts[:4] if size)
        given = format_bytes(made.budget.of(device))
        lines.append(
            f"{device} needs {format_bytes(made.total(device))} ({most}), {given} are given, {format_bytes(lack)} too few"
        )
    return "; ".join(lines)


def changes(made: Placement) -> Iterator[str]:
    """Options, each of which alone would do."""
    model, budget, over = made.model, made.budget, made.exceeded()
    yield " ".join(_words(budget, _enough(made)))
    if CPU in over and budget.vram and len(over) == 1 and (more := _more_vram(made)):
        yield " ".join(_words(budget, more))
    if context := _longest(made):
        yield f"--ctx {context}"
    if budget.batch > 1 and not solve(model, replace(budget, batch=1)).exceeded():
        yield "--batch 1"
    if budget.kv != Q8_0 and not solve(model, replace(budget, kv=Q8_0)).exceeded():
        yield f"--kv-dtype {Q8_0}"
    if len(over) == 1 and (quant := _smaller(made, next(iter(over)))):
        yield quant


def _words(old: Budget, new: Budget) -> Iterator[str]:
    if new.vram != old.vram:
        yield f"--vram {','.join(map(_size, new.vram))}"
    if new.ram != old.ram:
        yield f"--ram {_size(new.ram)}"


def _size(nbytes: int) -> str:
    """As an option takes it."""
    return f"{nbytes / 1e9:.1f}G"


def _rounded(nbytes: int) -> int:
    return math.ceil(nbytes / STEP) * STEP


def _enough(made: Placement) -> Budget:
    """A budget that is as much larger as it has to be. Layers move when it changes, so it is tried."""
    budget = made.budget
    while over := made.exceeded():
        vram = tuple(
            _rounded(size + over.get(name, 0)) if name in over else size
            for name, size in zip(budget.gpus, budget.vram, strict=True)
        )
        ram = budget.ram if vram != budget.vram or CPU not in over else _rounded(budget.ram + over[CPU])
        budget = replace(budget, vram=vram, ram=ram)
        made = solve(made.model, budget)
    return budget


def _more_vram(made: Placement) -> Budget | None:
    """The least memory of each GPU that takes enough experts from the CPU; None where none does."""
    low, high = 0, sum(part.gpu.held for part in made.model.parts) * 2 + sum(made.budget.vram)

    def budget(size: int) -> Budget:
        return replace(made.budget, vram=tuple(max(size, old) for old in made.budget.vram))

    if solve(made.model, budget(high)).exceeded():
        return None
    while high - low > STEP:
        middle = (low + high) // 2
        low, high = (low, middle) if not solve(made.model, budget(middle)).exceeded() else (middle, high)
    found = budget(_rounded(high))
    return None if solve(made.model, found).exceeded() else found


def _longest(made: Placement) -> int:
    """The longest context, in whole pages, that would fit; 0 if none would."""
    low, high = 0, made.budget.context // PAGE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        over = solve(made.model, replace(made.budget, context=middle * PAGE_TOKENS)).exceeded()
        low, high = (low, middle - 1) if over else (middle, high)
    return low * PAGE_TOKENS


def _smaller(made: Placement, device: str) -> str:
    """Bits a weight that the device's weights may have; empty where no quant is that small."""
    parts = [part for part in made.model.parts if made.device(part) == device]
    weights, numbers = sum(part.on(device != CPU).held for part in parts), sum(part.weights for part in parts)
    lack = made.exceeded()[device] / (1 + SLACK if device == CPU else 1)
    share = 1 - lack / weights if weights else 0.0
    if share < LEAST_SHARE:
        return ""
    bits = 8 * weights / numbers
    return f"a quant of {bits * share:.1f} bits a weight on {device} (these have {bits:.1f})"
