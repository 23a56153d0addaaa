"""Whether a shortcut still stands for what it was made of.

A shortcut is one kernel call in place of several modules: a block, a group of layers, a captured graph. It has copied what the modules said when it was
made, and does not call them. So it may run only while nobody has patched, exchanged or edited one, and nobody listens to one.

Asking costs little, for it is asked at every call, when the weights have just driven everything else out of the caches. Operators count what is set on them
(`Changes`), torch counts handles of hooks, tensors count what is written to them in place; modules are looked at again when a count has moved. Modules that
are no operators (activations, mostly) count nothing, so each call looks at these, but no closer than at which objects they have (`Uncounted`).
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

from ktx.kernels.gradients import recorded
from ktx.ops import class_patches
from ktx.ops.base import Operator
from ktx.ops.change_counter import Changes, edits
from ktx.transformers_compat import is_recorder, records

GLOBAL = _global_backward_hooks, _global_backward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks
SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype)
IGNORED = frozenset(  # torch's own, of which parameters, buffers, children and hooks are looked at by themselves
    {*nn.Module().__dict__, "training", "path", "home", "is_ready"}
)


class State:
    """What a module was: its class, its settings, which tensors and which children it has."""

    def __init__(self, module: nn.Module):
        self.module = module
        class_patches.watch(module)
        self.said = self._said()

    def _said(self) -> dict[Any, Any]:
        module = self.module
        derived = {*module.derived, *module.remade} if isinstance(module, Operator) else ()
        said: dict[Any, Any] = {type: type(module)}
        for name, value in module.__dict__.items():
            if name not in IGNORED and name not in derived:
                said[name] = value
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                said[name] = None if tensor is None else (tensor, tensor.data_ptr(), tensor.dtype)
        return said | module._modules

    def same(self) -> bool:
        now = self._said()
        return now.keys() == self.said.keys() and all(_same(value, self.said[name]) for name, value in now.items())

    def allows(self) -> bool:
        """Whether a shortcut made anew heeds all that has changed: what the operator says that it reads, and operators in the place of operators."""
        module, now = self.module, self._said()
        reads = module.reads if isinstance(module, Operator) else frozenset()
        for name in now.keys() | self.said.keys():
            mine, before = now.get(name), self.said.get(name)
            exchanged = isinstance(mine, Operator) and isinstance(before, Operator)
            if name not in reads and not exchanged and not _same(mine, before):
                return False
        return True

    def patched(self) -> bool:
        """Whether a method was put on the module itself, as `module.forward = ...` does."""
        module, kind = self.module, type(self.module)
        return any(callable(value) and hasattr(kind, name) for name, value in module.__dict__.items())


def _same(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return isinstance(mine, SCALARS) and type(mine) is type(theirs) and mine == theirs


class Uncounted:
    """Modules that do not count what is set on them: their classes, and the objects that they have, as they were.

    One pass of C functions over flat tuples: the check runs at each token, and layers have several such modules each.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()):
        self.modules = tuple(modules)
        self.kinds, self.own = tuple(map(type, self.modules)), tuple(m.__dict__ for m in self.modules)
        self.sizes = tuple(map(len, self.own))
        had = [
            (place, name, value)
            for m in self.modules
            for place in (m._parameters, m._buffers, m.__dict__)
            for name, value in place.items()
            if name not in IGNORED
        ]
        self.places = tuple(place for place, _, _ in had)
        self.names = tuple(name for _, name, _ in had)
        self.values = tuple(value for _, _, value in had)

    def __add__(self, other: Uncounted) -> Uncounted:
        """Both, as they were."""
        both = Uncounted()
        for name, mine in self.__dict__.items():
            both.__dict__[name] = mine + other.__dict__[name]
        return both

    def moved(self) -> bool:
        return not (
            tuple(map(type, self.modules)) == self.kinds
            and tuple(map(len, self.own)) == self.sizes
            and all(map(is_, map(dict.get, self.places, self.names), self.values))
        )


class Guard:
    """Of a shortcut in `owners`, which call it, for the modules `inside`, which it does not call. It has copied the values of `copied`."""

    def __init__(
        self,
        owners: Iterable[nn.Module],
        inside: Iterable[nn.Module] = (),
        copied: Iterable[torch.Tensor | None] = (),
    ):
        class_patches.follow()  # what states say is of now
        self.inside = [State(module) for module in inside]
        self.states = [*map(State, owners), *self.inside]
        modules = [state.module for state in self.states]
        self.children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        self.parameters = [m._parameters for m in modules if any(p is not None for p in m._parameters.values())]
        self.uncounted = Uncounted(module for module in modules if not isinstance(module, Operator))
        self.hooks = [hooks for state in self.inside for hooks in _hooks(state.module)]
        self.copied = [(tensor, edits(tensor)) for tensor in copied if tensor is not None]
        self.handles, self.changes, self.recorders = -1, -1, False
        self.tried: tuple[int, ...] = ()

    @classmethod
    def over(cls, guards: Iterable[Guard]) -> Guard:
        """One that holds when all of them do."""
        made = cls(())
        for guard in guards:
            made.inside += guard.inside
            made.states += guard.states
            made.children += guard.children
            made.parameters += guard.parameters
            made.uncounted += guard.uncounted
            made.hooks += guard.hooks
            made.copied += guard.copied
        return made

    def holds(self) -> bool:
        for modules, children in self.children:
            if tuple(modules.values()) != children:
                return False
        for tensor, before in self.copied:
            if edits(tensor) != before:
                return False
        if torch.is_grad_enabled() and any(recorded(*own.values()) for own in self.parameters):
            return False  # a parameter is trained
        handles, changes = RemovableHandle.next_id, Changes.count
        if handles != self.handles or changes != self.changes or self.uncounted.moved():
            if self._listened() or not all(state.same() for state in self.states):
                return False
            if any(state.patched() for state in self.inside) or any(
                class_patches.is_patched(s.module) for s in self.states
            ):
                return False
            self.handles, self.changes, self.recorders = handles, changes, any(self.hooks)
        return not (self.recorders and records())

    def _listened(self) -> bool:
        """Hooks by which transformers collects outputs stay on modules once a forward has wanted some: they count while a forward does."""
        heard = (hook for hooks in self.hooks for hook in hooks.values())
        return any(GLOBAL) or not all(map(is_recorder, heard))

    def worth_another(self) -> bool:
        """Whether a shortcut made anew might hold, once for each time that something was changed."""
        now = (Changes.count, RemovableHandle.next_id, *(edits(tensor) for tensor, _ in self.copied))
        if now == self.tried or self._listened():
            return False
        self.tried = now
        return all(state.allows() for state in self.states)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class Shortcut(Protocol):
    """What an operator keeps in an attribute and asks before the long way."""

    guard: Guard

    @classmethod
    def of(cls, owner: Any) -> Any:
        """Made of what the owner and its children are now; None where no kernel does that."""


def watched() -> bool:
    """Whether a mode of torch's sees all operations (FlopCounterMode, FakeTensorMode, torch.jit.trace): then each module does its own."""
    return bool(torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def current(owner: nn.Module, name: str = "block") -> Any:
    """The shortcut in an attribute of its owner if it stands for what its modules are now, made anew where settings or weights have changed; else None."""
    made = owner.__dict__.get(name)
    if made is None or torch.compiler.is_compiling():  # a graph holds the kernels that children call
        return None
    if name != "inside" and watched():
        return None
    if made.guard.holds():
        return made
    if not made.guard.worth_another():
        return None
    again = type(made).of(owner)
    if again is None or not again.guard.holds():
        return None
    owner.__dict__[name] = again  # not by setattr, which counts as a change
    return again


class Inside:
    """That nobody listens to a module inside another, or has patched or exchanged one: for an operator whose own way does not call them all."""

    def __init__(self, owner: nn.Module):
        self.guard = Guard([owner], below(owner))

    @classmethod
    def of(cls, owner: nn.Module) -> Inside:
        return cls(owner)


def listened(owner: nn.Module) -> bool:
    """Whether that is not so (its attribute `inside`); in a graph nobody listens."""
    if owner.__dict__.get("inside") is None or torch.compiler.is_compiling():
        return False
    return current(owner, "inside") is None


def below(owner: nn.Module) -> list[nn.Module]:
    """All modules inside one."""
    return [module for module in owner.modules() if module is not owner]
