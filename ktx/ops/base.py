"""Base class and registry of operators: the modules that injection rules substitute for transformers modules."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import nn

from ktx.devices import CPU, Device
from ktx.errors import UsageError, did_you_mean
from ktx.kernels import cpu
from ktx.ops.change_counter import ChangeCounter, CountedParameter
from ktx.ops.float_views import Dequantized, Floats
from ktx.ops.forward_signature import ForwardSignature
from ktx.ops.packed_state import PackedState
from ktx.quant.types import QTYPES, QType
from ktx.utils.deprecation import deprecated_members
from ktx.weights.base import QuantizedTensor, WeightSource

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels compute in


@dataclass(frozen=True)
class Context:
    """Where and for which model `Operator.from_hf` builds an operator.

    Attributes:
        path: The module path of the replaced module.
        config: The transformers configuration of the model.
        device: The device of the operator's tensors.
        dtype: The dtype that the model computes in.
        kv_dtype: The dtype of cached keys and values (ktx.cache.kv); None: the dtype they are computed in.
        gpu: Whether `device` is a GPU, whose kernels are written in Triton (ktx.devices).
    """

    path: str
    config: Any
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype | str | None = None
    gpu: bool = False


@deprecated_members(home="placement")
class Operator(nn.Module):
    """Base class of all operators.

    `from_hf` builds an operator from the module it replaces, on the meta device. It may retain some of that module's
    children; later rules apply to them. Only `tensors` and `load` deal with weights; `load` may run concurrently with
    the loads of other modules. `ready` runs once everything is loaded.

    Attributes:
        consumes: Names of the children whose weights the operator loads itself.
        trains: Whether `trained` turns its packed weights into parameters.
        derived: Attributes that the guards of fast paths (ktx.ops.guard) ignore, because no fast path depends on them.
        reads: Settings and tensors that a rebuilt fast path takes into account.
        accepts_any_device: Whether it accepts hidden states from another device than its own, whatever the device of
            its parent.
        remade: Attributes that `ready` computes from others; a copy drops and recomputes them.
        gpu_form: Dotted path of the class that replaces this one on a GPU; its own path if it supports both.
        path: The module path in the model.
        placement: The device it is placed on, set when the module is inserted into the model, before it is loaded.
        dtype: Dtype of its outputs where nothing else determines it, and of its weights as floats.
        is_ready: Whether `ready` has run.
        call: The signature of the replaced forward; adopted modules have it.
        quant_target: The entry of LOAD_TIME_QUANT that float weights are quantized to; only for operators that set it
            in `__init__`.
    """

    consumes: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False
    derived: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    accepts_any_device: ClassVar[bool] = False
    remade: ClassVar[tuple[str, ...]] = ()
    gpu_form: ClassVar[str] = ""
    path: str = ""
    placement: Device = CPU
    dtype: torch.dtype = torch.float32
    is_ready = False
    call: ForwardSignature
    quant_target: str | None = None

    if TYPE_CHECKING:  # an adopted module also has the attributes of the module it replaces

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        ChangeCounter.count += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        ChangeCounter.count += 1
        super().__delattr__(name)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """As in torch; counts as a change of the module."""
        ChangeCounter.count += 1
        super().register_buffer(name, tensor, persistent)

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, **kwargs: Any) -> Operator:
        """Builds the operator that replaces `old`; subclasses override it.

        Args:
            old: The transformers module to replace, on the meta device.
            ctx: Path, configuration, device and dtypes.
            **kwargs: The options of the rule.

        Raises:
            UsageError: The operator does not support this module.
        """
        raise NotImplementedError(f"{cls.__name__} must implement from_hf, which builds it from a transformers module")

    def tensors(self) -> list[str]:
        """Returns the full parameter paths that `load` reads."""
        return []

    def load(self, source: WeightSource) -> None:
        """Reads `tensors()` from `source` and packs them."""

    def ready(self) -> None:
        """Computes what is derived from the loaded weights.

        Called when the whole model is loaded, children before parents, and again in a copy or an unpickled module.
        """

    def use_live_parameters(self) -> None:
        """Replaces its parameters with CountedParameters, which count writes, before `ready` copies their values."""
        for name, value in self._parameters.items():
            if value is not None and type(value) is nn.Parameter:
                counted = CountedParameter(value.detach(), value.requires_grad)
                counted.__dict__.update(value.__dict__)
                self._parameters[name] = counted

    def floats(self) -> dict[str, Floats]:
        """Returns dequantizing views of its packed weights, under the parameter names of the replaced module.

        Raises:
            UsageError: The operator has packed weights and does not implement this.
        """
        if self.tensors():
            raise UsageError(
                f"{self.path}: {type(self).__name__} does not implement floats(), which returns its packed weights as"
                " floats; the model's state cannot be written"
            )
        return {}

    def call_patched_class(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward of the replaced class, while that class is patched (ktx.ops.class_patches).

        Raises:
            UsageError: The module is on a GPU, where other operators bypass its forward.
        """
        cls = type(self)
        if self.placement.gpu:
            raise UsageError(
                f"{self.path}: a method of its class was replaced, but on a GPU ktx does not call the methods of the"
                " class; replace the method on the modules, or load the model with device='cpu'"
            )
        old: Any = next(base for base in cls.__mro__ if not issubclass(base, Operator))
        return old.forward(self, *args, **kwargs)

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """Returns the packed weights in their quantized types, under the names that `load` reads, without `path`.

        For `save_pretrained(packed=True)`. A matrix is a list of its row-wise parts; a bias is a tensor.

        Raises:
            UsageError: The operator has packed weights and does not implement this.
        """
        if self.tensors():
            raise UsageError(
                f"{self.path}: {type(self).__name__} does not implement packed_state(), which returns its packed"
                " weights in their types; save floats instead: save_pretrained(folder)"
            )
        return {}

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Replaces some of `floats` with other values, which are packed: those of a state dict, or of an assignment.

        Linear layers and experts quantize them to the type of `quantize=`, if the model was loaded with it. Without it,
        and in other operators, values stay floats.

        Args:
            values: Float tensors by the names of `floats`.
        """
        raise UsageError(
            f"{self.path}: {type(self).__name__} does not implement take(), which replaces weights after loading"
        )

    def check_loaded(self) -> None:
        """Raises UsageError if the weights are not loaded yet."""
        if not self.is_ready:
            raise UsageError(f"{self.path} is not loaded: it has no weights yet")

    def trained(self, name: str) -> None:
        """Turns the packed weight `name` into a trainable parameter.

        Raises:
            UsageError: The operator does not support this.
        """
        raise UsageError(
            f"{self.path}.{name} is packed and cannot be trained itself: keep the module in floats with a rule"
        )

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in torch; True also unpacks its packed weights and those of its submodules (`unpack`)."""
        if requires_grad:
            unpack(self)
        return nn.Module.requires_grad_(self, requires_grad)  # unpacking may have turned self into a torch module

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, floats in self.floats().items():  # before super(), so that weights precede biases
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
        """As in torch; then `take` packs the values of packed weights.

        Weights that are loaded back unmodified (views of the packed memory) are skipped.
        """
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        changed: dict[str, torch.Tensor] = {}
        for name, current in self.floats().items():
            key = prefix + name
            values = state_dict.get(key)
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if values is None:
                missing_keys += [key] * strict
            elif tuple(values.shape) != current.shape:
                error_msgs.append(
                    f"size mismatch for {key}: copying a param with shape {tuple(values.shape)} from checkpoint,"
                    f" the shape in current model is {current.shape}."
                )
            elif not (isinstance(values, Dequantized) and values.floats.memory_id == current.memory_id):
                changed[name] = values.detach()
        if changed:
            self.take(changed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Supports copies and pickles: rebuilds the class of an adopted module, and the state that `ready` made.

        That class exists only at run time (`_mixed_class`), so the two classes that it is made of are stored.

        Raises:
            UsageError: The module is on a GPU.
        """
        if self.placement.gpu:
            raise UsageError(
                f"{self.path} is on {self.placement}, where modules cannot be copied or pickled; load the model again"
            )
        made_of = type(self).__dict__.get("made_of")
        return super().__reduce_ex__(protocol) if made_of is None else (uninitialized, made_of, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {name: None for name in self.remade if name in self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rebuild()

    def rebuild(self) -> None:
        """Recomputes what `ready` computed, from the current weights and settings."""
        for name in self.remade:
            if name in self.__dict__:
                self.__dict__[name] = None
        ChangeCounter.count += 1
        if self.is_ready:
            self.use_live_parameters()
            self.ready()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Handles `to`, `half` and the like: sets the output `dtype`; packed weights stay as they are.

        Raises:
            UsageError: `fn` moves tensors to another device, or casts to a dtype that no kernel computes in.
        """
        ChangeCounter.count += 1
        dtype = self.cast_dtype(fn)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.is_ready:
            self.dtype = dtype
            self.rebuild()
        return result

    def cast_dtype(self, fn: Callable[..., Any]) -> torch.dtype:
        """Returns the dtype that `fn` casts tensors to, by trying it: torch passes no dtype to `_apply`, only `fn`.

        Raises:
            UsageError: `fn` moves tensors to a device that packed weights cannot move to, or casts to a dtype that no
                kernel computes in.
        """
        if not self.is_ready:
            return self.dtype
        converted = fn(torch.empty(0, dtype=self.dtype, device=self.placement.torch))
        if converted.device.type != self.placement.torch.type and self.tensors() and not self.accepts_any_device:
            raise UsageError(
                f"{self.path}: its packed weights are on {self.placement} and cannot move to {converted.device}; choose"
                " the device of modules when the model is loaded: ktx.load(..., device=...)"
            )
        if converted.dtype not in COMPUTE_DTYPES:
            raise UsageError(
                f"{self.path} does not compute in {converted.dtype}; give one of {', '.join(map(str, COMPUTE_DTYPES))}"
            )
        dtype: torch.dtype = converted.dtype
        return dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, for real parameters: the view of a packed weight would be stored as one, without its values.

        Raises:
            UsageError: `param` is a packed weight, as torch.nn.utils.prune passes it.
        """
        if isinstance(param, Dequantized):
            raise UsageError(
                f"{self.path}: a packed weight is not a parameter, {name} cannot be registered; change its values in"
                " `with ktx.edit(module) as weight:` or with model.load_state_dict({...}, strict=False), or replace the"
                " module with ktx.dequantize(module)"
            )
        ChangeCounter.count += 1
        super().register_parameter(name, param)

    def weight_bytes(self) -> tuple[int, int]:
        """Returns the bytes of packed weights, and the bytes of them that the kernels read for a single token."""
        return 0, 0


def unpack(owner: nn.Module) -> None:
    """Turns all packed weights of `owner` and its submodules into trainable float parameters.

    Raises:
        UsageError: One of them cannot be trained; nothing has changed then.
    """
    # With each module the name of its packed weight, "" without one; modules that can be trained have just one.
    packed_modules = [
        (m, next(iter(m.floats()), "")) for m in owner.modules() if isinstance(m, Operator) and m.is_ready
    ]
    # Modules that cannot be trained come first, so that their error is raised before any other module has changed.
    for module, name in sorted(((m, name) for m, name in packed_modules if name), key=lambda pair: pair[0].trains):
        if isinstance(module, Operator):  # False once a module tied to it has been unpacked
            module.trained(name)  # makes the weight a trainable parameter


def known_class(old: nn.Module, names: Collection[str], ctx: Context, unknown: str) -> str:
    """Returns the name of the class of `old`, which must be one of `names`: others may compute something else.

    Args:
        old: The transformers module to replace.
        names: The class names that the operator supports.
        ctx: The context of the operator.
        unknown: The error message for other classes, with {} in place of the class name.

    Raises:
        UsageError: The class is not in `names`.
    """
    name = type(old).__name__
    if name not in names:
        raise UsageError(f"{ctx.path}: {unknown.format(name)}{did_you_mean(name, names)}; leave the module as it is")
    return name


# Quantization at load time: name that users give -> types to try; the first whose block size divides a row is taken.
LOAD_TIME_QUANT = {
    "int8": ("INT8_128", "Q8_0"),
    "int4": ("INT4_128", "INT4_64", "Q4_0"),
    "int4g128": ("INT4_128", "INT4_64", "Q4_0"),
    "int4g64": ("INT4_64", "Q4_0"),
    "int4g32": ("Q4_0",),
}


def load_time_type(name: str, option: str) -> str:
    """Returns `name` if it is a key of LOAD_TIME_QUANT; raises a UsageError that names `option` otherwise."""
    if name not in LOAD_TIME_QUANT:
        raise UsageError(
            f"{option} {name!r} is not a type that ktx can quantize to at load time"
            f"{did_you_mean(name, LOAD_TIME_QUANT)}; give auto or one of {' '.join(LOAD_TIME_QUANT)}"
        )
    return name


def target_qtype(spec: Any, target: str | None) -> QType | None:
    """Returns the type to quantize a tensor to at load time; None leaves it as it is.

    Only float tensors whose rows are divisible into blocks are quantized.

    Args:
        spec: A TensorSpec or QuantizedTensor.
        target: A key of LOAD_TIME_QUANT, or None.
    """
    if not target or not spec.qtype.is_float:
        return None
    return next((QTYPES[name] for name in LOAD_TIME_QUANT[target] if spec.shape[-1] % QTYPES[name].block == 0), None)


def pack_as(parts: Any, target: str | None, pack: Callable[..., Any] = cpu.pack) -> Any:
    """Packs weights, or a list of one part per matrix; floats are quantized to `target`, a key of LOAD_TIME_QUANT."""
    return pack(parts, target_qtype(parts if isinstance(parts, QuantizedTensor) else parts[0], target))


def as_weights(values: torch.Tensor) -> QuantizedTensor:
    """Wraps a float tensor as weights: BF16 and F16 stay, every other dtype becomes F32."""
    half = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(values.dtype)
    if half is None:
        return QuantizedTensor.from_float(values)
    return QuantizedTensor(values.contiguous().view(torch.uint8), QTYPES[half], tuple(values.shape))


Layer = TypeVar("Layer", bound=nn.Module)
PACKAGE = __name__.partition(".")[0]
ROTARY = "RotaryEmbedding"  # by this part of its class's name transformers recognizes whose tables it initializes
_MIXED_CLASSES: dict[tuple[type[Operator], type[nn.Module]], type[Operator]] = {}


def _mixed_class(cls: type[Operator], old: Any) -> type[Operator]:
    """Returns the class that inherits from the operator class `cls` and the replaced class `old`, one per pair."""
    names = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "call": ForwardSignature.of_class(old),
        "made_of": (cls, old),
    }
    is_unnamed = ROTARY in old.__name__ and ROTARY not in cls.__name__
    name = cls.__name__ + ROTARY if is_unnamed else cls.__name__
    return _MIXED_CLASSES.setdefault((cls, old), type(name, (cls, old), names))


def uninitialized(cls: type[Operator], old: Any) -> Operator:
    """Returns an uninitialized adopted module, whose state a copy or an unpickler fills in."""
    mixed = _mixed_class(cls, old)
    return mixed.__new__(mixed)


def adopt(cls: type[Operator], old: nn.Module, ctx: Context) -> Any:
    """Returns an instance of `cls` with the attributes, parameters, buffers, children and methods of `old`.

    Its class inherits from both `cls` and the class of `old`. So `super().forward` is the forward of transformers, its
    helper methods are available, and code that checks the class (the weight initializer of transformers, its recorders
    of router logits) still recognizes the module.
    """
    new = nn.Module.__new__(_mixed_class(cls, type(old)))
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)
    new.__dict__["_modules"] = dict(old._modules)
    new.__dict__["_parameters"] = dict(old._parameters)
    new.__dict__["_buffers"] = dict(old._buffers)
    new.path = ctx.path
    return new


def is_ktx_operator(module: Any, *classes: type[Operator]) -> bool:
    """Whether a module is an operator of these classes that ktx defines, and not of a subclass that other code derived.

    Such a subclass may compute something else, so no fused call of another module may bypass its forward. A user's
    operator that inherits from one of ktx is one, and so is the class that a parametrization derives.
    """
    if not isinstance(module, classes):
        return False
    operator_class, *_ = type(module).__dict__.get("made_of", (type(module),))
    return operator_class.__module__.partition(".")[0] == PACKAGE


def is_plain(old: nn.Module, layer: type[Layer]) -> TypeGuard[Layer]:
    """Whether a module computes as the torch layer does.

    A subclass with its own forward (a scaled embedding, a router) computes something else.
    """
    return isinstance(old, layer) and type(old).forward is layer.forward
