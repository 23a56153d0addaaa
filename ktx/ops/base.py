"""What an operator is: the module that a rule puts in the place of a transformers module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import nn

from ktx.devices import CPU, Device
from ktx.errors import UsageError, did_you_mean
from ktx.kernels import cpu
from ktx.ops.change_counter import Changes, Live
from ktx.ops.float_views import Dequantized, Floats
from ktx.ops.forward_signature import Call
from ktx.ops.packed_state import PackedState
from ktx.quant.types import QTYPES, QType
from ktx.weights.base import QuantizedTensor, WeightSource

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # types that kernels take


@dataclass(frozen=True)
class Context:
    """What an operator is told when it is made. `path` is its module path, `config` the model's own configuration."""

    path: str
    config: Any
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype | str | None = (
        None  # what caches keep keys and values in, see ktx.cache.kv; None: as they come
    )
    gpu: bool = False  # whether `device` is a GPU: its kernels are Triton's, see ktx.devices


class Operator(nn.Module):
    """Base of all operators.

    `from_hf` makes one from the module it replaces (on the meta device) and may keep some of its children; those are subject to
    later rules. `consumes` names the children whose weights it takes itself. `tensors` and `load` are the only places
    that know weights; `load` may run beside other modules' loads. `ready` runs once when everything is loaded.
    """

    consumes: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False  # whether `trained` makes its packed weights parameters
    derived: ClassVar[frozenset[str]] = frozenset()  # attributes that say nothing that a shortcut goes by
    reads: ClassVar[frozenset[str]] = frozenset()  # settings and tensors that a shortcut made anew heeds
    stays: ClassVar[bool] = (
        False  # whether it takes hidden states from another device, wherever those of its parent are
    )
    remade: ClassVar[tuple[str, ...]] = ()  # attributes that `ready` makes of others, and a copy makes anew
    gpu_form: ClassVar[str] = (
        ""  # the dotted path of the class that stands in for this one on a GPU; its own: it serves both
    )
    path: str = ""
    placement: Device = CPU  # where it lies; whoever puts it into the model says so before it is loaded
    dtype: torch.dtype = torch.float32  # of what it makes where nothing else says so, and of its weights as floats
    is_ready = False  # whether `ready` has run
    call: Call  # how the replaced forward is called; adopted modules have it
    quant_target: str | None = (
        None  # for operators that have it in __init__: the entry of MADE that float weights become
    )

    if TYPE_CHECKING:  # an adopted module has whatever the module it replaces had

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        Changes.count += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Changes.count += 1
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        Changes.count += 1
        super().register_buffer(name, tensor, persistent)

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Operator:
        """The operator that replaces `old`; subclasses override it. UsageError when it cannot stand in for this module."""
        raise NotImplementedError(f"{cls.__name__} must say how it is made from a transformers module")

    def tensors(self) -> list[str]:
        """Full parameter paths that `load` reads."""
        return []

    def load(self, source: WeightSource) -> None:
        """Reads `tensors()` from the source and packs them."""

    def ready(self) -> None:
        """Called after the whole model is loaded, children before their parents; and in a copy, or one read from a pickle, again."""

    def enliven(self) -> None:
        """Has its parameters count what is written to them; before `ready`, which copies values."""
        for name, value in self._parameters.items():
            if value is not None and type(value) is nn.Parameter:
                live = Live(value.detach(), value.requires_grad)
                live.__dict__.update(value.__dict__)
                self._parameters[name] = live

    def floats(self) -> dict[str, Floats]:
        """What it holds packed, by the names that the replaced module has for it. UsageError where that cannot be said."""
        if self.tensors():
            raise UsageError(
                f"{self.path}: {type(self).__name__} does not say its packed weights in floats (floats); the model's state cannot be written"
            )
        return {}

    def by_class(self, *args: Any, **kwargs: Any) -> Any:
        """Its forward while the class that it replaces is patched (ktx.ops.class_patches): the patched one. UsageError on a GPU, where other modules do without it."""
        kind = type(self)
        if self.placement.gpu:
            raise UsageError(
                f"{self.path}: a method was put on a class whose work is done otherwise on a GPU; put it on modules, or load the model with device='cpu'"
            )
        old: Any = next(base for base in kind.__mro__ if not issubclass(base, Operator))
        return old.forward(self, *args, **kwargs)

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """What `load` has packed, by the names that `load` asks a file for, without `path`: matrices, row-wise parts of one in a list, and biases. UsageError where that cannot be said."""
        if self.tensors():
            raise UsageError(
                f"{self.path}: {type(self).__name__} does not say its packed weights in their types (packed_state); write floats: save_pretrained(folder)"
            )
        return {}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Other values for some of `floats`, which are packed as the floats they are."""
        raise UsageError(f"{self.path}: {type(self).__name__} does not take weights after loading (take)")

    def check_loaded(self) -> None:
        """UsageError where there are no weights yet."""
        if not self.is_ready:
            raise UsageError(f"{self.path} is not loaded, it has no weights")

    def trained(self, name: str) -> None:
        """Makes a packed weight a parameter that is trained. UsageError where it cannot be one."""
        raise UsageError(f"{self.path}.{name} is packed and is not trained itself: keep the module in floats by a rule")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As torch's, of its packed weights and those of modules inside too, see `unpack`."""
        if requires_grad:
            unpack(self)
        return nn.Module.requires_grad_(self, requires_grad)  # its class may be torch's own now

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, floats in self.floats().items():  # first, as a weight comes before its bias
            destination[prefix + name] = Dequantized(floats, self.dtype)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch's; packed weights that come back as they are change nothing."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        found: dict[str, torch.Tensor] = {}
        for name, own in self.floats().items():
            key = prefix + name
            values = state_dict.get(key)
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if values is None:
                missing_keys += [key] * strict
            elif tuple(values.shape) != own.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {tuple(values.shape)} from checkpoint, the shape in current model is {own.shape}."
                )
            elif not (isinstance(values, Dequantized) and values.floats.place == own.place):
                found[name] = values.detach()
        if found:
            self.take(found)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class of an adopted module is made anew, and so is what `ready` made. UsageError on a GPU."""
        if self.placement.gpu:
            raise UsageError(
                f"{self.path} is on {self.placement}, where modules can neither be copied nor pickled; load the model again"
            )
        made_of = type(self).__dict__.get("made_of")
        return super().__reduce_ex__(protocol) if made_of is None else (bare, made_of, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {name: None for name in self.remade if name in self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.remake()

    def remake(self) -> None:
        """Once more what `ready` made, of what there is now."""
        for name in self.remade:
            if name in self.__dict__:
                self.__dict__[name] = None
        Changes.count += 1
        if self.is_ready:
            self.enliven()
            self.ready()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Of `to`, `half` and their like: packed weights stay as they are, `dtype` is what the module makes from then on. UsageError for another device or type."""
        Changes.count += 1
        dtype = self.cast_by(fn)
        done = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.is_ready:
            self.dtype = dtype
            self.remake()
        return done

    def cast_by(self, fn: Callable[..., Any]) -> torch.dtype:
        """What `dtype` becomes by a function of tensors. UsageError for one that takes them where packed weights cannot follow, or to a type that no kernel takes."""
        if not self.is_ready:
            return self.dtype
        given = fn(torch.empty(0, dtype=self.dtype, device=self.placement.torch))
        if given.device.type != self.placement.torch.type and self.tensors() and not self.stays:
            raise UsageError(
                f"{self.path}: its packed weights are on {self.placement} and do not go to {given.device}; say where modules are when the model is"
                " loaded: ktx.load(..., device=...)"
            )
        if given.dtype not in COMPUTED:
            raise UsageError(
                f"{self.path} does not compute in {given.dtype}; give one of {', '.join(map(str, COMPUTED))}"
            )
        dtype: torch.dtype = given.dtype
        return dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's. UsageError where a packed weight is to become a parameter, as torch.nn.utils.prune does."""
        if isinstance(param, Dequantized):
            raise UsageError(
                f"{self.path}: a packed weight is no parameter, {name} cannot be registered; change its values in"
                " `with ktx.edit(module) as weight:` or by model.load_state_dict({...}, strict=False), or put ktx.dequantize(module) in the module's place"
            )
        Changes.count += 1
        super().register_parameter(name, param)

    def weight_bytes(self) -> tuple[int, int]:
        """Packed bytes held, and bytes a single token makes the kernels read."""
        return 0, 0


def unpack(owner: nn.Module) -> None:
    """Makes the packed weights in a module parameters in floats, which are trained. UsageError, before anything has changed, where one of them cannot be."""
    holders = [(m, next(iter(m.floats()), "")) for m in owner.modules() if isinstance(m, Operator) and m.is_ready]
    for module, name in sorted(((m, name) for m, name in holders if name), key=lambda held: held[0].trains):
        if isinstance(module, Operator):  # tied ones change together
            module.trained(name)


def known_class(old: nn.Module, names: Collection[str], ctx: Context, unknown: str) -> str:
    """The name of a module's class, which an operator must know; `unknown` says with {} what is not known of another. UsageError then."""
    name = type(old).__name__
    if name not in names:
        raise UsageError(f"{ctx.path}: {unknown.format(name)}{did_you_mean(name, names)}; leave the module as it is")
    return name


LOAD_TIME_QUANT = {  # weight types made on loading: what users call them, and the types to try, the first whose blocks fit a row
    "int8": ("INT8_128", "Q8_0"),
    "int4": ("INT4_128", "INT4_64", "Q4_0"),
    "int4g128": ("INT4_128", "INT4_64", "Q4_0"),
    "int4g64": ("INT4_64", "Q4_0"),
    "int4g32": ("Q4_0",),
}


def made_type(name: str, option: str) -> str:
    """The entry of MADE that a user's word names; UsageError otherwise."""
    if name not in LOAD_TIME_QUANT:
        raise UsageError(
            f"{option} {name!r} is no type that can be made on loading{did_you_mean(name, LOAD_TIME_QUANT)}; give auto or one of {' '.join(LOAD_TIME_QUANT)}"
        )
    return name


def target_qtype(spec: Any, wish: str | None) -> QType | None:
    """The type that a tensor (spec or weights) becomes on loading: only floats of whole blocks change, what is quantised stays as it is."""
    if not wish or not spec.qtype.is_float:
        return None
    return next((QTYPES[name] for name in LOAD_TIME_QUANT[wish] if spec.shape[-1] % QTYPES[name].block == 0), None)


def packed_as(parts: Any, wish: str | None, pack: Callable[..., Any] = cpu.pack) -> Any:
    """Weights (or one part a matrix) packed, floats as the type that was wished for."""
    return pack(parts, target_qtype(parts if isinstance(parts, QuantizedTensor) else parts[0], wish))


def as_weights(values: torch.Tensor) -> QuantizedTensor:
    """A tensor's floats as weights: half precision as it is, everything else in f32."""
    half = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(values.dtype)
    if half is None:
        return QuantizedTensor.of(values)
    return QuantizedTensor(values.contiguous().view(torch.uint8), QTYPES[half], tuple(values.shape))


Layer = TypeVar("Layer", bound=nn.Module)
_HEIRS: dict[tuple[type[Operator], type[nn.Module]], type[Operator]] = {}


def _mixed_class(cls: type[Operator], old: Any) -> type[Operator]:
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "call": Call.of_class(old), "made_of": (cls, old)}
    return _HEIRS.setdefault((cls, old), type(cls.__name__, (cls, old), names))


def bare(cls: type[Operator], old: Any) -> Operator:
    """An adopted module without anything in it, for one that is copied or read from a pickle."""
    made = _mixed_class(cls, old)
    return made.__new__(made)


def adopt(cls: type[Operator], old: nn.Module, ctx: Context) -> Any:
    """An instance of `cls` with everything `old` had: its attributes, parameters, children and methods.

    Its class inherits from both. So `super().forward` is transformers' own, its helpers are there, and code that asks for
    the class (transformers' initialiser, its recorders of router logits) still knows the module.
    """
    new = nn.Module.__new__(_mixed_class(cls, type(old)))
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)
    new.__dict__["_modules"] = dict(old._modules)
    new.__dict__["_parameters"] = dict(old._parameters)
    new.__dict__["_buffers"] = dict(old._buffers)
    new.path = ctx.path
    return new


def is_ours(module: Any, cls: type[Operator]) -> bool:
    """Whether a module is an operator of this class as rules make it: not a subclass that somebody else made, as parametrizations do."""
    kind = type(module)
    return kind is cls or (isinstance(module, cls) and kind in _HEIRS.values())


def is_plain(old: nn.Module, layer: type[Layer]) -> TypeGuard[Layer]:
    """Whether a module is torch's own layer: a subclass with a forward of its own (a scaled embedding, a router) computes something else."""
    return isinstance(old, layer) and type(old).forward is layer.forward


SHIPPED = {
    "Linear": "ktx.ops.linear",
    "Experts": "ktx.ops.experts",
    "Layer": "ktx.ops.fusion.layer",
    "MoE": "ktx.ops.moe",
    "Recurrent": "ktx.ops.recurrent",
    "Router": "ktx.ops.router",
    "MLA": "ktx.ops.mla",
    "Attention": "ktx.ops.attention",
    "RMSNorm": "ktx.ops.norm",
    "RotaryEmbedding": "ktx.ops.rope",
    "Embedding": "ktx.ops.embed",
    "MLP": "ktx.ops.mlp",
}
ON_GPU = {  # operator -> module and class of its form on a GPU; users' own say `gpu_form`
    name: home.replace("ktx.ops.", "ktx.ops.gpu.") + f".{name}" for name, home in SHIPPED.items() if name != "Recurrent"
}
_REGISTERED: dict[str, type[Operator]] = {}


def register(name: str) -> Callable[[type[Operator]], type[Operator]]:
    """Class decorator: makes an operator known to rule files under a short name."""

    def keep(cls: type[Operator]) -> type[Operator]:
        if name in SHIPPED or name == "default":
            raise UsageError(f"the operator name {name!r} is taken by ktx; choose another")
        _REGISTERED[name] = cls
        return cls

    return keep


def resolve(name: str, where: str = "") -> type[Operator]:
    """The class a rule names: short name of a shipped or registered operator, or a dotted path. UsageError otherwise."""
    at = f"{where}: " if where else ""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, attribute = (f"{SHIPPED[name]}.{name}" if name in SHIPPED else name).rpartition(".")
    if not module:
        raise UsageError(
            f"{at}no operator is called {name!r}{did_you_mean(name, [*SHIPPED, *_REGISTERED])}; give one of {' '.join(SHIPPED)} or a dotted path"
        )
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything while it is imported
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UsageError(f"{at}cannot import {name}: {kind}{str(error).partition(chr(10))[0]}") from error
    cls = getattr(home, attribute, None)
    if cls is None:
        raise UsageError(f"{at}module {module} has no class {attribute}{did_you_mean(attribute, dir(home))}")
    if not (isinstance(cls, type) and issubclass(cls, Operator)):
        raise UsageError(f"{at}{name} is no ktx.Operator")
    return cls


def on_gpu(cls: type[Operator], where: str = "") -> type[Operator]:
    """The class that does an operator's work on a GPU. UsageError when there is none."""
    name = cls.gpu_form or ON_GPU.get(cls.__name__, "")
    if not name:
        at = f"{where}: " if where else ""
        raise UsageError(f"{at}{cls.__name__} has no form for a GPU; put the module on the CPU (device: cpu)")
    return cls if name == f"{cls.__module__}.{cls.__name__}" else resolve(name, where)
