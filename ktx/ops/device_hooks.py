"""Tensors on their way between modules on different devices: moved once, where a module begins that lies elsewhere than what reaches it.

What the model's body calls in turn (embedding, rotary tables, decoder layers, last norm, output layer) takes what it is given to its own
device and leaves its result there. A module inside one of these that lies elsewhere than its parent gives its result back. Everything else has no hook.
Beside a GPU the model computes in bf16, but layers on the CPU go on in f32, which the CPU's kernels want; types change where devices do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktx.devices import CPU, Device
from ktx.ops.base import Operator
from ktx.ops.experts import Experts
from ktx.ops.masks import Intervals
from ktx.ops.moe import MoE

Devices = Mapping[nn.Module, Device]


@dataclass(frozen=True)
class DevicePlacement:
    """Where a module computes, and in which type."""

    device: Device
    dtype: torch.dtype


Homes = Mapping[nn.Module, DevicePlacement]


def install(model: Any, devices: Devices, dtype: torch.dtype) -> None:
    """Hooks for a model in `dtype` whose modules lie where `devices` says (by default on the CPU); none for one that is on the CPU as a whole."""
    if not any(device.gpu for device in devices.values()):
        return
    homes = _homes(model, devices, dtype)
    region: TransferScope | None = None
    stations = list(_device_boundaries(model, homes))
    for module, before in stations:
        own = homes[module]
        begins = region is None or region.home != own
        region = TransferScope(own) if region is None or begins else region
        if any(home != own for home in before):
            module.register_forward_pre_hook(ToDevice(region, begins, is_rotary(module)), with_kwargs=True)
    called = {module for module, _ in stations}
    for module in called:
        for parent in module.modules():
            for child in parent.children():
                if child not in called:
                    _install_inside(child, homes[child], parent, homes[parent])


def _install_inside(child: nn.Module, own: DevicePlacement, parent: nn.Module, around: DevicePlacement) -> None:
    handed_over = isinstance(child, Experts) and isinstance(parent, MoE) and around.device.gpu and not own.device.gpu
    shared = isinstance(child, Experts) and isinstance(parent, Experts)  # called by the block
    if own.device == around.device or handed_over or shared:
        return
    child.register_forward_pre_hook(ToDevice(TransferScope(own)), with_kwargs=True)
    child.register_forward_hook(FromDevice(around))


def _homes(model: Any, devices: Devices, dtype: torch.dtype) -> dict[nn.Module, DevicePlacement]:
    """Of every module. One that takes hidden states is in f32 on the CPU if all in it can be, and so is all in it."""
    body = model.get_decoder()
    found: dict[nn.Module, DevicePlacement] = {}

    def visit(module: nn.Module, around: DevicePlacement | None) -> None:
        if module in found:
            return
        device = devices.get(module, CPU)
        if device.gpu:
            found[module] = DevicePlacement(device, dtype)
        elif around is not None and not around.device.gpu:
            found[module] = around
        else:
            found[module] = DevicePlacement(device, torch.float32 if _takes_f32(module, devices) else dtype)
        for child in module.children():
            visit(child, found[module])

    for module in model.modules():
        if module in (model, body, body.layers, model.get_input_embeddings()) or is_rotary(module):
            found[module] = DevicePlacement(devices.get(module, CPU), dtype)
        else:
            visit(module, None)
    return found


def _takes_f32(module: nn.Module, devices: Devices) -> bool:
    """Whether nothing in a module multiplies by parameters of its own in another type. Operators compute in what they are given."""
    foreign = [m for m in module.modules() if not isinstance(m, Operator) and not devices.get(m, CPU).gpu]
    own = [p for m in foreign for p in m.parameters(recurse=False)]
    return all(p.dtype is torch.float32 for p in own if p.is_floating_point())


def _device_boundaries(model: Any, homes: Homes) -> Iterator[tuple[nn.Module, list[DevicePlacement]]]:
    """What the body calls in turn, and the output layer, each with the homes that its tensors may come from."""
    body, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    others = [child for child in body.children() if child is not embedding and child is not body.layers]
    tables = [child for child in others if is_rotary(child)]
    first = homes[embedding]
    turned = [homes[table] for table in tables]
    indices = DevicePlacement(CPU, first.dtype)  # tokens and positions
    foreign = _has_foreign_attention(model)
    yield embedding, [indices]
    for table in tables:
        yield table, [indices, first]
    last = first
    for layer in body.layers:
        yield layer, [last, *turned, *([indices, first] if foreign else [])]
        last = homes[layer]
    for child in others:
        if child not in tables:
            yield child, [last]
            last = homes[child]
    if head is not None:
        yield head, [last, *([homes[model.mtp]] if hasattr(model, "mtp") else [])]
    if hasattr(model, "mtp"):
        yield model.mtp, [indices, first, last, *turned]


def is_rotary(module: nn.Module) -> bool:
    """Whether a module makes rotary tables: of what it is given it reads the positions, and the type of the rest."""
    return "RotaryEmbedding" in type(module).__name__


def _has_foreign_attention(model: Any) -> bool:
    """Whether attention of transformers' own may read masks that are matrices, and positions; ours reads intervals, on the CPU."""
    return any(
        "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
        for module in model.modules()
        if not getattr(module, "ours", False)
    )


class TransferScope:
    """Modules that are called one after another on a device, and what of their common arguments has been moved there in this forward."""

    def __init__(self, home: DevicePlacement):
        self.home = home
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_device(self, value: Any, keep: bool = False) -> Any:
        """A value with its tensors at home; `keep`: others will be given the same."""
        if isinstance(value, tuple | list):
            return type(value)(self.to_device(part, keep) for part in value)
        if not isinstance(value, torch.Tensor) or not keep:
            return moved(value, self.home) if isinstance(value, torch.Tensor) else value
        source, copy = self.known.get(id(value), (None, None))
        if source is not value:
            copy = moved(value, self.home)
            if copy is not value:
                self.known[id(value)] = value, copy
        return copy


def moved(tensor: torch.Tensor, home: DevicePlacement) -> torch.Tensor:
    """The tensor on a device, floats in its type. Masks that are intervals stay on the CPU, where the operators read them."""
    if isinstance(tensor, Intervals) or (tensor.dtype == torch.int32 and tensor.dim() == 4):
        return tensor
    there = tensor.to(home.device.torch, home.dtype if tensor.is_floating_point() else tensor.dtype)
    if there is not tensor and hasattr(tensor, "ktx_counts"):
        there.ktx_counts = tensor.ktx_counts  # type: ignore[attr-defined]
    return there


class ToDevice:
    """A pre-hook: what the module is given comes to its region's device. `begins`: the region's first module."""

    def __init__(self, region: TransferScope, begins: bool = True, rotary: bool = False):
        self.region, self.begins, self.rotary = region, begins, rotary

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _make_current(self.region.home.device)
        if self.begins:
            self.region.known.clear()
        if self.rotary and args and isinstance(args[0], torch.Tensor):  # the states are not worth the way
            args = (args[0].new_empty(0, device=self.region.home.device.torch), *args[1:])
        return self.region.to_device(args), {
            name: self.region.to_device(value, keep=True) for name, value in kwargs.items()
        }


class FromDevice:
    """A hook: what the module gives goes to the home around it."""

    def __init__(self, home: DevicePlacement):
        self.region = TransferScope(home)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        _make_current(self.region.home.device)
        return self.region.to_device(output)


def _make_current(device: Device) -> None:
    """Triton launches on the current device."""
    if device.gpu and not device.pretended:
        torch.cuda.set_device(device.torch)
