"""/machine: what computes here, what lies where, and what the experts do. Numbers that grow; a page makes speeds of two answers."""

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
from ktx.injection.inject import layer_of
from ktx.kernels import cpu
from ktx.ops.weight_traffic import plain_parameters, sizes
from ktx.server.state import ServerState

FLOATS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class MachineStats:
    """Answers for the engine that is served. What does not change is looked up once."""

    def __init__(self, state: ServerState):
        self.state, self.cpu = state, machine().cpu
        self.known: tuple[Engine, list[dict[str, Any]]] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Plain data; Problem 503 unless the model is loaded. None stands for what is not known."""
        engine, _, _ = self.state.require_ready()
        if self.known is None or self.known[0] is not engine:
            self.known = engine, modules(engine.model)
        done = engine.activity.snapshot()
        return {
            "model": self.state.names[0],
            "cpu": self.cpu,
            "isa": cpu.ops.isa(),
            "threads": cpu.ops.threads(),
            "nodes": cpu.ops.nodes(),
            "uptime_seconds": round(time.monotonic() - self.state.progress.started, 3),
            "modules": self.known[1],
            "memory": _memory(engine),
            "cache": _cache(engine),
            "experts": _experts(engine, done) if done.layers else None,
            "bandwidth": {
                "measured_gbps": self.state.bandwidth,
                "bytes": done.nbytes,
                "seconds": done.seconds,
                "expert_bytes": done.expert_bytes,
                "expert_seconds": done.expert_seconds,
            },
            "requests": {
                "running": len(engine.scheduler.running),
                "waiting": len(engine.scheduler.waiting),
                "prompt_tokens": done.prompt_tokens,
                "answer_tokens": done.answer_tokens,
            },
        }


def modules(model: Any) -> list[dict[str, Any]]:
    """Operators, and what has weights of its own and was left as it is; none of a model that is none."""
    if not isinstance(model, nn.Module):
        return []
    return [
        {
            "name": size.path,
            "layer": layer_of(size.path),
            "operator": type(size.module).__name__,
            "device": _device(size.module),
            "types": _types(size.module),
            "bytes": size.held,
        }
        for size in sizes(model)
    ]


def _device(module: nn.Module) -> str:
    """Where a module's own parameters are; packed weights are the CPU's."""
    return next((str(parameter.device) for parameter in plain_parameters(module)), "cpu")


def _types(module: nn.Module) -> str:
    """Of what a module itself holds, packed or not."""
    groups = [value.values() if isinstance(value, dict) else value for value in vars(module).values()]
    held = [one for group in groups for one in (group if isinstance(group, Iterable) else [group])]
    packed = [one.qtype.name for one in held if isinstance(one, cpu.Packed)]
    plain = [str(parameter.dtype) for parameter in plain_parameters(module)]
    return "/".join(dict.fromkeys([*packed, *(FLOATS.get(name, name) for name in plain)]))


def _memory(engine: Engine) -> dict[str, Any]:
    handle = getattr(engine.model, "ktx", None)
    total, free = memory()
    return {
        "weights_bytes": None if handle is None else handle.nbytes,
        "cache_bytes": engine.runner.nbytes(),
        "rss_bytes": resident(),
        "total_bytes": total,
        "free_bytes": free,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cache(engine: Engine) -> dict[str, Any]:
    scheduler, pages = engine.scheduler, engine.scheduler.pages
    return {
        "pages": pages.count,
        "used": pages.used,
        "idle": len(pages.idle),
        "page_tokens": PAGE_TOKENS,
        "queries": scheduler.prefix_queries,
        "hits": scheduler.prefix_hits,
    }


def _experts(engine: Engine, done: StatsSnapshot) -> dict[str, Any]:
    return {
        "layers": list(done.layers),
        "count": max(map(len, done.layers.values())),
        "top": max(module.top for _, module in engine.activity.experts),
        "activations": list(done.layers.values()),
        "seconds": done.node_seconds,
    }
