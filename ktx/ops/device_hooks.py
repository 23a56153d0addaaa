"""Hooks that move tensors between modules on different devices, once per device boundary.

The modules that the model's decoder calls in sequence (embedding, rotary tables, decoder layers, last norm, output
layer) move their inputs to their own device and leave their output there. A module inside one of these that is on
another device than its parent also moves its output back. All other modules have no hook. With a GPU the model computes
in bf16, but layers on the CPU compute in f32, the dtype of the CPU kernels; the dtype changes where the device does.
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
    """The device and dtype in which a module computes."""

    device: Device
    dtype: torch.dtype


Placements = Mapping[nn.Module, DevicePlacement]


def install_transfer_hooks(model: Any, devices: Devices, dtype: torch.dtype) -> None:
    """Installs the hooks of a model that is partly or entirely on GPUs; a model on the CPU needs none.

    Modules of the decoder's call sequence that follow one another on the same device share a `TransferScope`, so
    arguments that all layers get (masks, rotary tables) are moved there once.

    Args:
        model: the loaded model.
        devices: the devices of modules; those that are not listed are on the CPU.
        dtype: the model's dtype.
    """
    if not any(device.gpu for device in devices.values()):
        return
    placements = _assign_placements(model, devices, dtype)
    scope: TransferScope | None = None
    boundaries = list(_iter_call_sequence(model, placements))
    for module, input_placements in boundaries:
        placement = placements[module]
        is_first = scope is None or scope.placement != placement
        scope = TransferScope(placement) if scope is None or is_first else scope
        if any(source != placement for source in input_placements):
            module.register_forward_pre_hook(ToDevice(scope, is_first, is_rotary(module)), with_kwargs=True)
    boundary_modules = {module for module, _ in boundaries}
    for boundary_module in boundary_modules:
        for parent in boundary_module.modules():
            for child in parent.children():
                if child not in boundary_modules:
                    _install_inside(child, placements[child], parent, placements[parent])


def _install_inside(
    child: nn.Module, placement: DevicePlacement, parent: nn.Module, parent_placement: DevicePlacement
) -> None:
    """Installs hooks on `child`, a module inside a decoder module, if it is on another device than its parent.

    They move its inputs to its device and its output back. Experts that a MoE block offloads or calls on a GPU
    (`on_gpu`) get no hooks, because the block transfers their tensors itself.
    """
    is_offloaded = (
        isinstance(child, Experts)
        and isinstance(parent, MoE)
        and parent_placement.device.gpu
        and not placement.device.gpu
    )
    is_gpu_part = isinstance(child, Experts) and isinstance(parent, Experts)  # `on_gpu`, which the MoE block calls
    if placement.device == parent_placement.device or is_offloaded or is_gpu_part:
        return
    child.register_forward_pre_hook(ToDevice(TransferScope(placement)), with_kwargs=True)
    child.register_forward_hook(FromDevice(parent_placement))


def _assign_placements(model: Any, devices: Devices, dtype: torch.dtype) -> dict[nn.Module, DevicePlacement]:
    """Returns the device and dtype of every module.

    On a GPU the dtype is the model's. On the CPU it is f32, the dtype of the CPU kernels, for a module with all modules
    in it, unless parameters that torch computes with have another dtype.
    """
    body = model.get_decoder()
    placements: dict[nn.Module, DevicePlacement] = {}

    def visit(module: nn.Module, parent_placement: DevicePlacement | None) -> None:
        """Gives a module its placement, then its children; on the CPU they share the dtype of their parent."""
        if module in placements:  # visited with its parent, or a container
            return
        device = devices.get(module, CPU)
        if device.gpu:
            placements[module] = DevicePlacement(device, dtype)
        elif parent_placement is not None and not parent_placement.device.gpu:
            placements[module] = parent_placement
        else:
            placements[module] = DevicePlacement(device, torch.float32 if _takes_f32(module, devices) else dtype)
        for child in module.children():
            visit(child, placements[module])

    for module in model.modules():
        # containers, and modules that take no hidden states, keep the model's dtype
        if module in (model, body, body.layers, model.get_input_embeddings()) or is_rotary(module):
            placements[module] = DevicePlacement(devices.get(module, CPU), dtype)
        else:
            visit(module, None)
    return placements


def _takes_f32(module: nn.Module, devices: Devices) -> bool:
    """Whether a module's CPU parameters are all f32, without operators', which compute in their input's dtype."""
    torch_modules = [m for m in module.modules() if not isinstance(m, Operator) and not devices.get(m, CPU).gpu]
    parameters = [p for m in torch_modules for p in m.parameters(recurse=False)]
    return all(p.dtype is torch.float32 for p in parameters if p.is_floating_point())


def _iter_call_sequence(model: Any, placements: Placements) -> Iterator[tuple[nn.Module, list[DevicePlacement]]]:
    """Yields the decoder's modules in the order of calls, then the output layer, each with its inputs' placements.

    A module needs a hook if one of these placements differs from its own. Token ids and positions are on the CPU.
    """
    body, embedding, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    other_children = [child for child in body.children() if child is not embedding and child is not body.layers]
    rotary_modules = [child for child in other_children if is_rotary(child)]
    embedding_placement = placements[embedding]
    rotary_placements = [placements[rotary_module] for rotary_module in rotary_modules]
    ids_placement = DevicePlacement(CPU, embedding_placement.dtype)
    needs_masks = _has_foreign_attention(model)
    yield embedding, [ids_placement]
    for rotary_module in rotary_modules:
        yield rotary_module, [ids_placement, embedding_placement]
    previous = embedding_placement
    for layer in body.layers:
        yield layer, [previous, *rotary_placements, *([ids_placement, embedding_placement] if needs_masks else [])]
        previous = placements[layer]
    for child in other_children:
        if child not in rotary_modules:
            yield child, [previous]
            previous = placements[child]
    if head is not None:
        # the output of the MTP layer is another input of the output layer
        yield head, [previous, *([placements[model.mtp]] if hasattr(model, "mtp") else [])]
    if hasattr(model, "mtp"):
        yield model.mtp, [ids_placement, embedding_placement, previous, *rotary_placements]


def is_rotary(module: nn.Module) -> bool:
    """Whether a module computes rotary tables; it reads the positions, but only the dtype of its other inputs."""
    return "RotaryEmbedding" in type(module).__name__


def _has_foreign_attention(model: Any) -> bool:
    """Whether the model has transformers' attention, which may read mask matrices and positions.

    Then masks and positions are moved to its device. ktx's attention reads mask intervals, on the CPU.
    """
    return any(
        "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
        for module in model.modules()
        if not getattr(module, "uses_ktx_kernel", False)
    )


class TransferScope:
    """A run of modules on one device; caches the common arguments that were moved there in this forward."""

    def __init__(self, placement: DevicePlacement):
        self.placement = placement
        self.moved_tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_device(self, value: Any, keep: bool = False) -> Any:
        """Moves the tensors of a value; `keep` caches them, because later modules get the same arguments."""
        if isinstance(value, tuple | list):
            return type(value)(self.to_device(item, keep) for item in value)
        if not isinstance(value, torch.Tensor) or not keep:
            return move_to(value, self.placement) if isinstance(value, torch.Tensor) else value
        cached, moved = self.moved_tensors.get(id(value), (None, None))
        if cached is not value:
            moved = move_to(value, self.placement)
            if moved is not value:
                self.moved_tensors[id(value)] = value, moved
        return moved


def move_to(tensor: torch.Tensor, placement: DevicePlacement) -> torch.Tensor:
    """Moves a tensor to a placement, floats in its dtype. Mask intervals stay on the CPU, where operators read them."""
    if isinstance(tensor, Intervals) or (tensor.dtype == torch.int32 and tensor.dim() == 4):
        return tensor
    return tensor.to(placement.device.torch, placement.dtype if tensor.is_floating_point() else tensor.dtype)


class ToDevice:
    """A forward pre-hook that moves a module's inputs to its scope's device.

    Args:
        scope: the scope.
        is_first: whether the module is the scope's first, which clears the cache.
        rotary: whether the module computes rotary tables, see `is_rotary`.
    """

    def __init__(self, scope: TransferScope, is_first: bool = True, rotary: bool = False):
        self.scope, self.is_first, self.rotary = scope, is_first, rotary

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Moves the inputs of a module and makes its device current, because Triton launches kernels on that one.

        Keyword arguments (masks, rotary tables) are the same for all modules of the scope, so their copies are cached.
        """
        _make_current(self.scope.placement.device)
        if self.is_first:  # the cached arguments are those of the last forward
            self.scope.moved_tensors.clear()
        if self.rotary and args and isinstance(args[0], torch.Tensor):  # only the states' dtype is read: no copy
            args = (args[0].new_empty(0, device=self.scope.placement.device.torch), *args[1:])
        return self.scope.to_device(args), {
            name: self.scope.to_device(value, keep=True) for name, value in kwargs.items()
        }


class FromDevice:
    """A forward hook that moves a module's output to the placement of its parent."""

    def __init__(self, placement: DevicePlacement):
        self.scope = TransferScope(placement)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Moves a module's output to the device of the enclosing module."""
        _make_current(self.scope.placement.device)
        return self.scope.to_device(output)


def _make_current(device: Device) -> None:
    """Sets the current CUDA device, on which Triton launches."""
    if device.gpu and not device.fake:
        torch.cuda.set_device(device.torch)
