"""Checks whether a fast path is still valid for the modules that it bypasses.

A fast path (`FastPath`) is one kernel call in place of several modules: a block, a group of layers, a captured graph.
It has copied the modules' settings and does not call them. So it may run only while none of these modules has been
patched, replaced or edited, and none has a hook.

The check is cheap, because it runs at every call, when the weights have just evicted everything else from the caches.
Operators count attribute changes (`ChangeCounter`), torch counts the handles of hooks, and tensors count in-place
writes; modules are inspected again only when a count has changed. Modules that are not operators (activations, mostly)
count nothing, so each call checks these, but only whether they have the same objects (`UncountedModules`).
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.hooks import RemovableHandle

from ktx.kernels.gradients import is_recorded
from ktx.ops import class_patches
from ktx.ops.base import Operator
from ktx.ops.change_counter import ChangeCounter, edits
from ktx.transformers_compat import collects_any_output, is_output_hook

GLOBAL_HOOKS = _global_backward_hooks, _global_backward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks
SCALAR_TYPES = (bool, int, float, str, bytes, type(None), torch.dtype)
# Attributes that `ModuleState` skips. Of torch's own, parameters, buffers, children and hooks are checked separately.
IGNORED_ATTRIBUTES = frozenset({*nn.Module().__dict__, "training", "path", "placement", "is_ready"})


class ModuleState:
    """A snapshot of a module: its class, its settings, its tensors and its children."""

    def __init__(self, module: nn.Module):
        self.module = module
        class_patches.watch(module)
        self.snapshot = self._take_snapshot()

    def _take_snapshot(self) -> dict[Any, Any]:
        """Returns what is compared: class, attributes, children, tensors with their addresses and dtypes.

        Attributes that the operator lists as `derived` or `remade` are skipped, because no fast path depends on them.
        """
        module = self.module
        derived = {*module.derived, *module.remade} if isinstance(module, Operator) else ()
        snapshot: dict[Any, Any] = {type: type(module)}
        for name, value in module.__dict__.items():
            if name not in IGNORED_ATTRIBUTES and name not in derived:
                snapshot[name] = value
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                snapshot[name] = None if tensor is None else (tensor, tensor.data_ptr(), tensor.dtype)
        return snapshot | module._modules

    def unchanged(self) -> bool:
        """Whether the module is unchanged since the snapshot."""
        now = self._take_snapshot()
        return now.keys() == self.snapshot.keys() and all(
            _same(value, self.snapshot[name]) for name, value in now.items()
        )

    def rebuild_suffices(self) -> bool:
        """Whether a rebuilt fast path would reflect all changes.

        That is the case for attributes that the operator lists in `reads`, and for operators replaced by operators.
        """
        module, now = self.module, self._take_snapshot()
        reads = module.reads if isinstance(module, Operator) else frozenset()
        for name in now.keys() | self.snapshot.keys():
            current, previous = now.get(name), self.snapshot.get(name)
            operator_replaced = isinstance(current, Operator) and isinstance(previous, Operator)
            if name not in reads and not operator_replaced and not _same(current, previous):
                return False
        return True

    def patched(self) -> bool:
        """Whether a method was assigned to the module itself, as `module.forward = ...` does."""
        module, cls = self.module, type(self.module)
        return any(callable(value) and hasattr(cls, name) for name, value in module.__dict__.items())


def _same(current: Any, previous: Any) -> bool:
    """Whether two values of a snapshot are the same object, or equal scalars, or tuples of such values."""
    if current is previous:
        return True
    if isinstance(current, tuple) and isinstance(previous, tuple):
        return len(current) == len(previous) and all(map(_same, current, previous))
    return isinstance(current, SCALAR_TYPES) and type(current) is type(previous) and current == previous


class UncountedModules:
    """A snapshot of modules that do not count changes: their classes, and the identities of their objects.

    `changed` is one pass of C functions over flat tuples, because it runs at each token, and a layer has several such
    modules.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()):
        """Stores the attributes, parameters and buffers as flat tuples: each one's dict, its name and its value.

        `changed` then compares them in one pass.
        """
        self.modules = tuple(modules)
        self.classes = tuple(map(type, self.modules))
        self.attributes = tuple(module.__dict__ for module in self.modules)
        self.num_attributes = tuple(map(len, self.attributes))
        objects = [
            (mapping, name, value)
            for module in self.modules
            for mapping in (module._parameters, module._buffers, module.__dict__)
            for name, value in mapping.items()
            if name not in IGNORED_ATTRIBUTES
        ]
        self.dicts = tuple(mapping for mapping, _, _ in objects)
        self.names = tuple(name for _, name, _ in objects)
        self.values = tuple(value for _, _, value in objects)

    def __add__(self, other: UncountedModules) -> UncountedModules:
        """Returns the snapshot of the modules of both."""
        both = UncountedModules()
        for name, mine in self.__dict__.items():
            both.__dict__[name] = mine + other.__dict__[name]
        return both

    def changed(self) -> bool:
        """Whether a class or one of the objects has changed."""
        return not (
            tuple(map(type, self.modules)) == self.classes
            and tuple(map(len, self.attributes)) == self.num_attributes
            and all(map(is_, map(dict.get, self.dicts, self.names), self.values))
        )


class Guard:
    """Validity check of a fast path.

    Args:
        owners: the modules that call the fast path.
        inside: the modules that it bypasses.
        copied: tensors whose values it has copied.
    """

    def __init__(
        self,
        owners: Iterable[nn.Module],
        inside: Iterable[nn.Module] = (),
        copied: Iterable[torch.Tensor | None] = (),
    ):
        """Takes the snapshots of callers, bypassed modules and copied tensors that `holds` compares with."""
        class_patches.update()  # before the snapshots
        self.inside = [ModuleState(module) for module in inside]
        self.states = [*map(ModuleState, owners), *self.inside]
        modules = [state.module for state in self.states]
        self.children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        self.parameters = [m._parameters for m in modules if any(p is not None for p in m._parameters.values())]
        self.uncounted_modules = UncountedModules(module for module in modules if not isinstance(module, Operator))
        self.hooks = [hooks for state in self.inside for hooks in _hooks(state.module)]
        self.copied = [(tensor, edits(tensor)) for tensor in copied if tensor is not None]
        # Counters at the last full inspection that passed; -1: none did, so the first `holds` inspects all modules.
        self.handles, self.changes, self.has_recorders = -1, -1, False
        self.last_rebuild_key: tuple[int, ...] = ()  # the counters at the last `may_rebuild`

    @classmethod
    def merge(cls, guards: Iterable[Guard]) -> Guard:
        """Merges guards into one that holds when all of them do, so that a group of layers is checked in one pass."""
        merged = cls(())
        for guard in guards:
            merged.inside += guard.inside
            merged.states += guard.states
            merged.children += guard.children
            merged.parameters += guard.parameters
            merged.uncounted_modules += guard.uncounted_modules
            merged.hooks += guard.hooks
            merged.copied += guard.copied
        return merged

    def holds(self) -> bool:
        """Whether the fast path is valid for this call.

        Children, copied tensors and gradients are compared at each call. Snapshots are compared only if a counter of
        changes or hooks differs from the last inspection that passed, or an uncounted module has changed.
        """
        for modules, children in self.children:
            if tuple(modules.values()) != children:
                return False
        for tensor, copied_edits in self.copied:
            if edits(tensor) != copied_edits:
                return False
        if torch.is_grad_enabled() and any(is_recorded(*parameters.values()) for parameters in self.parameters):
            return False  # a parameter requires a gradient
        handles, changes = RemovableHandle.next_id, ChangeCounter.count
        if handles != self.handles or changes != self.changes or self.uncounted_modules.changed():
            if self._has_hooks() or not all(state.unchanged() for state in self.states):
                return False
            if any(state.patched() for state in self.inside) or any(
                class_patches.is_patched(s.module) for s in self.states
            ):
                return False
            self.handles, self.changes, self.has_recorders = handles, changes, any(self.hooks)
        return not (self.has_recorders and collects_any_output())

    def _has_hooks(self) -> bool:
        """Whether a hook is registered, other than transformers' output recorders.

        Recorders stay on modules after the first forward that collects outputs; `holds` counts them only while a
        forward collects outputs.
        """
        registered = (hook for hooks in self.hooks for hook in hooks.values())
        return any(GLOBAL_HOOKS) or not all(map(is_output_hook, registered))

    def may_rebuild(self) -> bool:
        """Whether a rebuilt fast path might hold; True at most once after each change, because rebuilding is slow."""
        rebuild_key = (ChangeCounter.count, RemovableHandle.next_id, *(edits(tensor) for tensor, _ in self.copied))
        if rebuild_key == self.last_rebuild_key or self._has_hooks():
            return False
        self.last_rebuild_key = rebuild_key
        return all(state.rebuild_suffices() for state in self.states)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Returns the four hook dictionaries of a module; torch updates them in place, so they stay current."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class FastPath(Protocol):
    """A fast path, stored in an attribute of an operator and tried before the module-by-module forward."""

    guard: Guard

    @classmethod
    def of(cls, owner: Any) -> Any:
        """Builds the fast path of an owner and its children; None where no kernel supports them."""


def torch_mode_active() -> bool:
    """Whether a torch mode intercepts all operations (FlopCounterMode, FakeTensorMode, torch.jit.trace).

    Then no fast path is used, so that the mode sees each module's operations.
    """
    return bool(torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def valid_fast_path(owner: nn.Module, name: str = "block") -> Any:
    """Returns the fast path in the attribute `name` of its owner, rebuilt if settings or weights have changed.

    None if it is not valid for this call: the caller then computes module by module.
    """
    fast_path = owner.__dict__.get(name)
    if fast_path is None or torch.compiler.is_compiling():  # a compiled graph contains the children's kernels
        return None
    if name != "inside" and torch_mode_active():  # `inside` is only a guard of the children and hides no operation
        return None
    if fast_path.guard.holds():
        return fast_path
    if not fast_path.guard.may_rebuild():
        return None
    rebuilt = type(fast_path).of(owner)
    if rebuilt is None or not rebuilt.guard.holds():
        return None
    owner.__dict__[name] = rebuilt  # not by setattr, which counts as a change
    return rebuilt


class ChildrenGuard:
    """Validity check without a kernel call, for an operator whose forward bypasses modules inside.

    It holds while none of them has a hook, is patched or replaced.
    """

    def __init__(self, owner: nn.Module):
        self.guard = Guard([owner], descendants(owner))

    @classmethod
    def of(cls, owner: nn.Module) -> ChildrenGuard:
        """Returns a guard of the children of `owner`."""
        return cls(owner)


def children_observed(owner: nn.Module) -> bool:
    """Whether a module inside `owner` has a hook, is patched or replaced; always False in torch.compile."""
    if owner.__dict__.get("inside") is None or torch.compiler.is_compiling():
        return False
    return valid_fast_path(owner, "inside") is None


def descendants(owner: nn.Module) -> list[nn.Module]:
    """Returns all modules inside `owner`, without itself."""
    return [module for module in owner.modules() if module is not owner]
