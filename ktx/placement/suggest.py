"""Fits a model into a memory budget, or reports what is missing and the smallest changes that would make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ktx.cache.kv import Q8_0
from ktx.cache.page_pool import PAGE_TOKENS
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes
from ktx.placement.memory_model import Footprint
from ktx.placement.solver import CPU, RESERVE_FRACTION, Budget, Placement, solve

BUDGET_STEP_BYTES = 100_000_000  # suggested budgets are multiples of it
MIN_QUANT_RATIO = 0.2  # of a model's bytes: smaller quants are not suggested


def fit(model: Footprint, budget: Budget) -> Placement:
    """Returns the placement for a budget.

    Raises:
        DoesNotFit: states the missing bytes per device, and the changes that would make the model fit.
    """
    placement = solve(model, budget)
    if placement.exceeded():
        raise DoesNotFit(f"{_describe_shortfall(placement)}. It would fit with {', or '.join(suggestions(placement))}")
    return placement


def _describe_shortfall(placement: Placement) -> str:
    """Describes for each exceeded device the needed, given and missing bytes, with the four largest groups."""
    lines = []
    for device, missing in placement.exceeded().items():
        sizes = sorted(
            ((by_device.get(device, 0), group) for group, by_device in placement.bytes.items()), reverse=True
        )
        largest = ", ".join(f"{group} {format_bytes(size)}" for size, group in sizes[:4] if size)
        budget = format_bytes(placement.budget.bytes_of(device))
        lines.append(
            f"{device} needs {format_bytes(placement.total_bytes(device))} ({largest}),"
            f" {budget} are given, {format_bytes(missing)} are missing"
        )
    return "; ".join(lines)


def suggestions(placement: Placement) -> Iterator[str]:
    """Yields options, each of which makes the model fit by itself.

    The budget that suffices always exists. The others (more GPU memory, a shorter context, a smaller batch, a quantized
    KV cache, a smaller quant) are yielded only if the solver finds that they suffice.
    """
    model, budget, exceeded = placement.model, placement.budget, placement.exceeded()
    yield " ".join(_options(budget, _find_sufficient_budget(placement)))
    if CPU in exceeded and budget.vram and len(exceeded) == 1 and (vram_budget := _find_sufficient_vram(placement)):
        yield " ".join(_options(budget, vram_budget))
    if context := _find_max_context(placement):
        yield f"--ctx {context}"
    if budget.batch > 1 and not solve(model, replace(budget, batch=1)).exceeded():
        yield "--batch 1"
    if budget.kv_dtype != Q8_0 and not solve(model, replace(budget, kv_dtype=Q8_0)).exceeded():
        yield f"--kv-dtype {Q8_0}"
    if len(exceeded) == 1 and (quant := _describe_smaller_quant(placement, next(iter(exceeded)))):
        yield quant


def _options(old: Budget, new: Budget) -> Iterator[str]:
    """Yields the command-line options that turn the budget `old` into `new`."""
    if new.vram != old.vram:
        yield f"--vram {','.join(map(_option_bytes, new.vram))}"
    if new.ram != old.ram:
        yield f"--ram {_option_bytes(new.ram)}"


def _option_bytes(nbytes: int) -> str:
    """Formats bytes for an option."""
    return f"{nbytes / 1e9:.1f}G"


def _round_up(nbytes: int) -> int:
    return math.ceil(nbytes / BUDGET_STEP_BYTES) * BUDGET_STEP_BYTES


def _find_sufficient_budget(placement: Placement) -> Budget:
    """Returns a budget that suffices: each exceeded one grows by the missing bytes until the solver's placement fits.

    One increase is not enough, because layers move to other devices when a budget changes.
    """
    budget = placement.budget
    while exceeded := placement.exceeded():
        vram = tuple(
            _round_up(size + exceeded.get(name, 0)) if name in exceeded else size
            for name, size in zip(budget.gpus, budget.vram, strict=True)
        )
        ram = budget.ram if vram != budget.vram or CPU not in exceeded else _round_up(budget.ram + exceeded[CPU])
        budget = replace(budget, vram=vram, ram=ram)
        placement = solve(placement.model, budget)
    return budget


def _find_sufficient_vram(placement: Placement) -> Budget | None:
    """Returns the budget with the smallest memory per GPU that takes enough experts off the CPU; None if none does.

    All GPUs get at least the same memory, found by bisection between 0 and twice the bytes of the model.
    """
    low, high = 0, sum(module.gpu.held_bytes for module in placement.model.modules) * 2 + sum(placement.budget.vram)

    def with_vram(size: int) -> Budget:
        return replace(placement.budget, vram=tuple(max(size, current) for current in placement.budget.vram))

    if solve(placement.model, with_vram(high)).exceeded():
        return None
    while high - low > BUDGET_STEP_BYTES:
        middle = (low + high) // 2
        low, high = (low, middle) if not solve(placement.model, with_vram(middle)).exceeded() else (middle, high)
    rounded = with_vram(_round_up(high))
    return None if solve(placement.model, rounded).exceeded() else rounded


def _find_max_context(placement: Placement) -> int:
    """Returns the longest context that fits, in full pages; 0 if none fits."""
    low, high = 0, placement.budget.context // PAGE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        exceeded = solve(placement.model, replace(placement.budget, context=middle * PAGE_TOKENS)).exceeded()
        low, high = (low, middle - 1) if exceeded else (middle, high)
    return low * PAGE_TOKENS


def _describe_smaller_quant(placement: Placement, device: str) -> str:
    """Describes the bits per weight that would fit on a device; empty if no quant is that small.

    It is an estimate: all weights of the device shrink by the same ratio, and the reserve on the CPU shrinks with them.
    """
    modules = [module for module in placement.model.modules if placement.device(module) == device]
    weight_bytes = sum(module.weight_bytes(device != CPU).held_bytes for module in modules)
    num_weights = sum(module.num_weights for module in modules)
    missing = placement.exceeded()[device] / (1 + RESERVE_FRACTION if device == CPU else 1)
    ratio = 1 - missing / weight_bytes if weight_bytes else 0.0
    if ratio < MIN_QUANT_RATIO:
        return ""
    bits = 8 * weight_bytes / num_weights
    return f"a quant of {bits * ratio:.1f} bits per weight on {device} (these have {bits:.1f})"
