"""Modules of given bytes, and tiny models on the meta device with the operators of their rules."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from ktx.injection.inject import InjectOptions, Plan, inject
from ktx.injection.rules import load_rules
from ktx.loader.meta_model import build_meta_model
from ktx.placement.memory_model import Footprint, KVMemory, ModuleMemory, WeightBytes
from tests.support.tiny_models import COMMON, FAMILIES


def part(group: str, layer: int | None, cpu: int, gpu: int | None = None, path: str = "", **more: Any) -> ModuleMemory:
    """A module of so many bytes on the CPU and on a GPU (as many), all of which a token reads."""
    sizes = WeightBytes(cpu, cpu), WeightBytes(cpu if gpu is None else gpu, cpu if gpu is None else gpu)
    values = {"num_weights": 1, "max_matrix_weights": 0, "activation_columns": 0} | more
    return ModuleMemory(path or f"{group} {layer}", group, layer, *sizes, **values)


def experts(layer: int, cpu: int, gpu: int | None = None, count: int = 8, **more: Any) -> ModuleMemory:
    """The routed experts of a layer, of which a token reads one."""
    return part("routed experts", layer, cpu, gpu, **({"num_experts": count, "top_k": 1} | more))


def footprint(*modules: ModuleMemory, kv: tuple[KVMemory, ...] = (), hidden: int = 0, vocab: int = 0) -> Footprint:
    """A model whose forwards need no memory but for `hidden` and `vocab`."""
    return Footprint(list(modules), list(kv), hidden, vocab)


def planned(family: str, *entries: Any, rules: Any = None, **config: Any) -> tuple[Any, Plan]:
    """A tiny model on the meta device, after injection, and its plan."""
    values = COMMON | FAMILIES.get(family, {}) | config
    model = build_meta_model(AutoConfig.for_model(family, **values), torch.float32)
    options = InjectOptions(dtype=torch.float32, entries=entries, warn_unmatched=False)
    return model, inject(model, load_rules(rules, family), model.config, options)
