"""What loading a plan needs: memory on each device, and the packed cache on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ktx.devices import CPU, Device
from ktx.errors import DoesNotFit
from ktx.hardware import format_bytes, memory
from ktx.injection.inject import Plan
from ktx.kernels.packed_cache import PackedCache, open_cache
from ktx.placement.solver import RESERVE_BYTES, RESERVE_FRACTION
from ktx.weights.base import WeightSource


def memory_needed(plan: Plan, device: Device = CPU) -> int:
    """Bytes of packed weights and adapters on a device, plus a reserve."""
    num_bytes = sum(step.memory_bytes for step in plan if step.device == device.name)
    num_bytes += sum(adapter.get(device, 0) for adapter in plan.adapters.values())
    return int(num_bytes * (1 + RESERVE_FRACTION)) + RESERVE_BYTES


def check_memory(plan: Plan) -> None:
    """Raises DoesNotFit if packed weights and a reserve exceed the free memory of the machine or of a GPU.

    Checked before loading, because the system ends a process that runs out of memory without a message.
    """
    needed, (total, available) = memory_needed(plan), memory()
    if needed > available:
        raise DoesNotFit(
            f"the weights need {format_bytes(needed)} of memory,"
            f" {format_bytes(available)} of {format_bytes(total)} are free; close programs or use a smaller quant"
        )
    for device in sorted({device for device in plan.devices.values() if device.gpu}, key=str):
        needed, (total, available) = memory_needed(plan, device), device.memory
        if needed > available:
            raise DoesNotFit(
                f"{device}: the weights need {format_bytes(needed)} of memory,"
                f" {format_bytes(available)} of {format_bytes(total)} are free; put less on it or use a smaller quant"
            )


def open_packed_cache(folder: str | Path, plan: Plan, source: WeightSource) -> PackedCache:
    """Opens the packed cache of this plan in `folder`: an existing one, or a new one to be written."""
    path = Path(source.path)
    name = path.stem if path.is_file() else path.name
    return open_cache(folder, name, plan_identity(plan), sum(step.memory_bytes for step in plan))


def plan_identity(plan: Plan) -> list[Any]:
    """Key of the packed cache: the files with size and time, and how each of their tensors is packed.

    Whatever changes the packed bytes must be in the key; otherwise an outdated cache would be loaded.
    """
    files = sorted({spec.file for step in plan for spec in step.specs})
    stats = [(str(Path(file).resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]]
    plan_key = [
        (
            step.path,
            step.operator,
            step.device,
            step.quant_target,
            str(step.fraction),
            step.rule.kwargs if step.rule else {},
            [(spec.name, spec.offset) for spec in step.specs],
        )
        for step in plan
    ]
    return [stats, plan_key]
