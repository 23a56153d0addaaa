"""Statistics of the machine for /machine: hardware, placement of the modules, memory, cache and experts.

Most values are counters; the web page computes rates from two responses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ktx.cache.page_pool import PAGE_TOKENS
from ktx.engine.engine import Engine
from ktx.engine.stats import StatsSnapshot
from ktx.hardware import machine, memory
from ktx.injection.inject import layer_number
from ktx.kernels import cpu
from ktx.ops.weight_traffic import module_bytes, plain_parameters
from ktx.server.state import ServerState

DTYPE_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class MachineStats:
    """Collects the statistics of the server's engine. Values that do not change are computed once.

    Args:
        state: the server's state.
    """

    def __init__(self, state: ServerState):
        self.state, self.cpu = state, machine().cpu
        self.cached_modules: tuple[Engine, list[dict[str, Any]]] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Returns the statistics as plain data; None means unknown.

        Raises:
            APIError: 503, the model is not loaded.
        """
        engine = self.state.require_model().engine
        if self.cached_modules is None or self.cached_modules[0] is not engine:
            self.cached_modules = engine, list_modules(engine.model)
        stats = engine.stats.snapshot()
        return {
            "model": self.state.names.first,
            "cpu": self.cpu,
            "isa": cpu.ops.isa(),
            "threads": cpu.ops.threads(),
            "nodes": cpu.ops.nodes(),
            "uptime_seconds": round(time.monotonic() - self.state.progress.started, 3),
            "modules": self.cached_modules[1],
            "memory": _memory_stats(engine),
            "cache": _cache_stats(engine),
            "experts": _expert_stats(engine, stats) if stats.layers else None,
            "bandwidth": {
                "measured_gbps": self.state.bandwidth,
                "bytes": stats.nbytes,
                "seconds": stats.seconds,
                "expert_bytes": stats.expert_bytes,
                "expert_seconds": stats.expert_seconds,
            },
            "requests": {
                "running": len(engine.scheduler.running),
                "waiting": len(engine.scheduler.waiting),
                "prompt_tokens": stats.prompt_tokens,
                "answer_tokens": stats.answer_tokens,
            },
        }


def list_modules(model: nn.Module) -> list[dict[str, Any]]:
    """Lists the modules that hold weights, operators and unreplaced ones, whose placement the page shows."""
    return [
        {
            "name": entry.path,
            "layer": layer_number(entry.path),
            "operator": type(entry.module).__name__,
            "device": _device_name(entry.module),
            "types": _dtype_names(entry.module),
            "bytes": entry.held_bytes,
        }
        for entry in module_bytes(model)
    ]


def _device_name(module: nn.Module) -> str:
    """Returns the device of a module's own parameters. Packed weights are on the CPU."""
    return next((str(parameter.device) for parameter in plain_parameters(module)), "cpu")


def _dtype_names(module: nn.Module) -> str:
    """Returns the names of the data types of a module's own weights, packed or not, joined with "/"."""
    # weights are attributes of the module, single or in lists or dicts
    groups = [value.values() if isinstance(value, dict) else value for value in vars(module).values()]
    tensors = [tensor for group in groups for tensor in (group if isinstance(group, Iterable) else [group])]
    packed = [tensor.qtype.name for tensor in tensors if isinstance(tensor, cpu.Packed)]
    unpacked = [str(parameter.dtype) for parameter in plain_parameters(module)]
    return "/".join(dict.fromkeys([*packed, *(DTYPE_NAMES.get(name, name) for name in unpacked)]))


def _memory_stats(engine: Engine) -> dict[str, Any]:
    """Returns the bytes of the weights, the KV cache, this process and the machine."""
    total, free = memory()
    return {
        "weights_bytes": engine.model.ktx.nbytes,
        "cache_bytes": engine.runner.nbytes(),
        "rss_bytes": resident_bytes(),
        "total_bytes": total,
        "free_bytes": free,
    }


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cache_stats(engine: Engine) -> dict[str, Any]:
    """Returns the pages of the KV cache by state, and the prefix cache's counters in tokens."""
    scheduler, pages = engine.scheduler, engine.scheduler.pages
    return {
        "pages": pages.count,
        "used": pages.used,
        "idle": len(pages.evictable),
        "page_tokens": PAGE_TOKENS,
        "queries": scheduler.prefix_queries,
        "hits": scheduler.prefix_hits,
    }


def _expert_stats(engine: Engine, stats: StatsSnapshot) -> dict[str, Any]:
    """Returns the activations of the experts per layer and the time that each NUMA node spent in them."""
    return {
        "layers": list(stats.layers),
        "count": max(map(len, stats.layers.values())),
        "top": max(module.top_k for _, module in engine.stats.experts),
        "activations": list(stats.layers.values()),
        "seconds": stats.node_seconds,
    }
