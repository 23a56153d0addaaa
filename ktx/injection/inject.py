"""Rules on a model: each module that a rule names is replaced, and the plan says what happened and what will be read."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ktx.devices import CPU, Device, device_of, gpus
from ktx.errors import BadFile, UsageError, did_you_mean
from ktx.hardware import format_bytes
from ktx.injection.device_map import PlacementEntry, spans
from ktx.injection.rules import Rule, Rules
from ktx.ops.base import Context, Operator, on_gpu, resolve, target_qtype
from ktx.ops.experts import Experts
from ktx.ops.moe import MoE
from ktx.weights.accounting import Reads, Unread, line, unread
from ktx.weights.base import TensorSpec, WeightSource

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass
class Step:
    """One module of the new tree that reads weights or was replaced."""

    path: str
    old: str
    new: str  # operator, or "" when the module is kept
    rule: Rule | None
    device: str
    tensors: list[str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    specs: list[TensorSpec] = field(default_factory=list)
    target: str | None = None  # the type that float weights become on loading (ktx.ops.base.MADE)
    share: Fraction = Fraction(1)  # of the tensors' bytes: experts of a layer may lie on two devices

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.share * sum(spec.nbytes for spec in self.specs))

    @property
    def memory(self) -> int:
        """Bytes in memory: an operator keeps the file's form, a kept module has f32 parameters."""
        return (
            int(self.share * sum(self.packed(spec) for spec in self.specs))
            if self.new
            else sum(4 * prod(spec.shape) for spec in self.specs)
        )

    def packed(self, spec: TensorSpec) -> int:
        """Bytes of a tensor once an operator has packed it."""
        made = target_qtype(spec, self.target) if len(spec.shape) > 1 else None
        return spec.nbytes if made is None else prod(spec.shape) // made.block * made.nbytes

    @property
    def types(self) -> str:
        """Names of the types, the one with the most bytes first."""
        nbytes: Counter[str] = Counter()
        for spec in self.specs:
            made = target_qtype(spec, self.target) if len(spec.shape) > 1 else None
            nbytes[spec.qtype.name + (f">{made.name}" if made else "")] += spec.nbytes
        return "+".join(name for name, _ in nbytes.most_common())


class Plan(list[Step]):
    """What will be where. str() is the table, `totals()` the bytes by device, `check` names what is missing, `notes` what is left out."""

    unmatched: list[Rule]
    source: WeightSource

    def __init__(self, steps: Iterable[Step] = ()):
        super().__init__(steps)
        self.devices: dict[str, Device] = {}  # of every module
        self.rules = Rules()  # that made it
        self.stream_experts: int | str | None = (
            None  # what the rule file says of it (ktx.injection.device_map.streaming)
        )
        self.scheme = ""  # how the checkpoint says its weights are quantised (ktx.weights.quantization)
        self.ignored: Sequence[str] = ()  # patterns of tensors that the modeling code leaves out
        self.said: list[Any] = []  # ktx.model.notes on it
        self.adapters: dict[str, dict[Device, int]] = {}  # LoRA adapters by name: bytes of memory by device

    def fill(self, source: WeightSource) -> None:
        """Looks every tensor up in the headers."""
        self.source = source
        for step in self:
            step.specs = [spec for spec in map(source.spec, step.tensors) if spec is not None]

    def check(self, source: WeightSource | None = None) -> None:
        """BadFile naming every tensor that the file lacks or has in another shape; alike layers are one entry."""
        source = source or self.source
        wrong: dict[tuple[str, str], list[int]] = {}
        for step in self:
            for name in step.tensors:
                what = _misfit(source.spec(name), step.shapes.get(name)) or source.flaw(name)
                if what:
                    generic, number = _generic(name)
                    wrong.setdefault((generic, what), []).extend(number)
        lines = [f"{_named(generic, numbers)} {what}" for (generic, what), numbers in wrong.items()]
        lines += [f"no module reads {left}" for left in self.unread if left.refused]
        if lines:
            raise BadFile(f"{source.path}: does not fit this model: {'; '.join(lines)}")

    @cached_property
    def unread(self) -> list[Unread]:
        """Tensors of the file that no module reads, by pattern; none before `fill` has named a file."""
        if not hasattr(self, "source"):
            return []
        read = {key for step in self for name in step.tensors for key in self.source.behind(name)}
        modules = {step.path for step in self if step.tensors} | {key.rpartition(".")[0] for key in read}
        return unread(self.source, Reads(read, modules), self.ignored)

    def log(self) -> None:
        """Warns of tensors that are left out."""
        if left := line(self.unread):
            warnings.warn(f"{self.source.path}: {left}", stacklevel=3)

    @property
    def notes(self) -> list[str]:
        """A line on the checkpoint's quantisation and one on tensors that are left out, where there are any."""
        return [note for note in (self.scheme, line(self.unread)) if note]

    def totals(self) -> dict[str, int]:
        """Bytes of weights by device."""
        total: Counter[str] = Counter()
        for step in self:
            total[step.device] += step.nbytes
        return dict(total)

    def table(self, fold: bool = True) -> str:
        """The table; `fold` writes layers that are alike as one row."""
        head = ("module", "class", "operator", "device", "type", "bytes", "rule")
        rows = [
            (
                path,
                step.old,
                step.new or "(kept)",
                step.device,
                step.types,
                format_bytes(step.nbytes) if step.nbytes else "",
                _short(step.rule),
            )
            for path, step in (_folded(self) if fold else ((step.path, step) for step in self))
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(w) if i == 5 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *rows]
        ]
        totals = [f"total {device}: {format_bytes(nbytes)}" for device, nbytes in sorted(self.totals().items())]
        totals += [
            f"adapter {name} on {device}: {format_bytes(nbytes)}"
            for name, sizes in self.adapters.items()
            for device, nbytes in sizes.items()
        ]
        return "\n".join([*lines, *totals, *self.notes])

    def __str__(self) -> str:
        return self.table()


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _misfit(spec: TensorSpec | None, shape: tuple[int, ...] | None) -> str:
    """What is wrong with a tensor of the file, or nothing. [1, n] and [n] are the same weights."""
    if spec is None:
        return "is missing"
    if not shape or spec.shape == shape or (prod(spec.shape) == prod(shape) and len(spec.shape) != len(shape)):
        return ""
    return f"is {_shape(spec.shape)}, the model needs {_shape(shape)}"


def _short(rule: Rule | None) -> str:
    """file:line without its folder."""
    return rule.where.rpartition("/")[2] if rule else "default"


def _generic(path: str) -> tuple[str, list[int]]:
    """A path with its first number taken out, and that number."""
    number = NUMBER.search(path)
    return (path, []) if number is None else (f"{path[: number.start()]}.{{}}{path[number.end() :]}", [int(number[1])])


def layer_of(path: str) -> int | None:
    """The first number in a module's path."""
    number = NUMBER.search(path)
    return None if number is None else int(number[1])


def _named(generic: str, numbers: Sequence[int]) -> str:
    return generic.replace("{}", f"[{spans(numbers)}]" if len(numbers) > 1 else "".join(map(str, numbers)))


def _folded(plan: Plan) -> Iterator[tuple[str, Step]]:
    """Steps that differ only in the layer number and in their types as one, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in plan:
        alike = (
            _generic(step.path)[0],
            step.old,
            step.new,
            step.device,
            step.rule.where if step.rule else "",
            step.share,
        )
        groups.setdefault(alike, []).append(step)
    for (generic, *_), steps in groups.items():
        numbers = [number for step in steps for number in _generic(step.path)[1]]
        yield _named(generic, numbers), replace(steps[0], specs=[spec for step in steps for spec in step.specs])


def inject(
    model: nn.Module,
    rules: Sequence[Rule],
    config: Any,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | str | None = None,
    tell_unmatched: bool = True,
    targets: Mapping[str, str | None] = MappingProxyType({}),
    places: Sequence[PlacementEntry] = (),
) -> Plan:
    """Replaces modules of a model on the meta device, top down on the new tree, and returns the plan.

    A rule that matches nothing is told by a warning, unless nobody asked for these rules. `targets`: by operator, what float weights become.
    `places`: where modules are whose rule says nothing of it, one GPU in each.
    """
    walk = _Injector(model, rules, config, dtype, kv_dtype)
    walk.targets, walk.places = targets, [entry for entry in places if entry.experts is None]
    walk.shares = [entry for entry in places if entry.experts is not None]
    walk.visit("", model, CPU)
    if tell_unmatched or places:
        walk.tell_unshared()
    for i, entry in enumerate(walk.places):
        if i not in walk.found and not entry.implied:
            warnings.warn(f"{entry.where}: {entry.key!r} matched no module", stacklevel=2)
    walk.plan.unmatched = [rule for i, rule in enumerate(rules) if i not in walk.hits]
    for rule in walk.plan.unmatched if tell_unmatched else ():
        pattern = rule.name.pattern if rule.name else rule.cls
        unknown = rule.cls.rpartition(".")[2] if rule.cls else ""
        hint = did_you_mean(unknown, sorted(walk.classes)) if unknown and unknown not in walk.classes else ""
        warnings.warn(f"{rule.where}: the rule for {pattern!r} matched no module{hint}", stacklevel=2)
    return walk.plan


class _Injector:
    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Rule],
        config: Any,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | str | None,
    ):
        self.model, self.rules, self.config, self.dtype, self.kv_dtype = model, rules, config, dtype, kv_dtype
        self.plan, self.hits = Plan(), set[int]()
        self.targets: Mapping[str, str | None] = {}
        self.places: Sequence[PlacementEntry] = ()
        self.shares: Sequence[PlacementEntry] = ()
        self.unshared: dict[str, int] = {}  # who asked for experts on a GPU: how many, 0 when there are some
        self.found, self.told = set[int](), set[str]()
        self.classes = {type(module).__name__ for module in model.modules()}
        self.tied = set(getattr(model, "all_tied_weights_keys", None) or {})

    def visit(self, path: str, module: nn.Module, device: Device) -> None:
        index = next((i for i, rule in enumerate(self.rules) if path and rule.matches(path, type(module))), None)
        rule = None if index is None else self.rules[index]
        around, device = device, self.placed(path, rule, device)
        if index is not None:
            self.hits.add(index)
        old, original = type(module).__name__, module
        if rule is not None and rule.replace:
            module = self.replaced(path, module, rule, device)
            self.model.set_submodule(path, module)
            if isinstance(module, Experts):
                self.shared(path, original, module, rule, around)
        self.step(path, old, module, rule, device)
        if isinstance(module, Experts) and module.on_gpu is not None:
            self.step(f"{path}.on_gpu", old, module.on_gpu, rule, around)  # the same class and tensors
        elif rule is None or rule.recursive:
            for name, child in list(module.named_children()):
                self.visit(f"{path}.{name}" if path else name, child, device)
        else:
            self.keep_below(path, module, device)

    def shared(self, path: str, old: nn.Module, new: Experts, rule: Rule, around: Device) -> None:
        """Leaves some of the experts that lie on the CPU to the GPU of the block around them, as the rule or the map says."""
        entry = next((entry for entry in self.shares if entry.pattern.search(path)), None)
        count, where = new.gpu_experts, f"{rule.where}: gpu_experts"
        if not count and entry is not None:
            count, where = entry.experts or 0, entry.where
        if not count:
            return
        self.unshared.setdefault(where, count)
        if (
            new.placement.gpu
            or not around.gpu
            or not isinstance(self.model.get_submodule(path.rpartition(".")[0]), MoE)
        ):
            return
        self.unshared[where] = 0
        kwargs = {key: value for key, value in rule.kwargs.items() if key != "gpu_experts"}
        beside = self.replaced(path, old, replace(rule, kwargs=kwargs), around)
        assert isinstance(beside, Experts)
        try:
            new.split_to_gpu(beside, count)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def tell_unshared(self) -> None:
        """Warns of what was asked of experts that found no layer beside a GPU."""
        why = (
            "no layer has its experts on the CPU and its MoE block on a GPU"
            if gpus()
            else "this machine has no GPU that torch can use"
        )
        for where, count in self.unshared.items():
            if count:
                warnings.warn(f"{where}: {count} experts beside a GPU: {why}; nothing is shared", stacklevel=4)

    def placed(self, path: str, rule: Rule | None, around: Device) -> Device:
        """By the rule, or the map's first entry that finds the path, or as the module around it."""
        found = [i for i, entry in enumerate(self.places) if entry.pattern.search(path)]
        self.found.update(found)
        if rule is not None and rule.device:
            return self.device(rule.device.strip(), rule.where)
        if not found:
            return around
        entry = self.places[found[0]]
        if entry.device == "cuda" and around.gpu:
            return around
        return device_of(entry.device, entry.where) if entry.asked else self.device(entry.device, entry.where)

    def device(self, name: str, where: str) -> Device:
        """A device that a file names; a machine without any GPU does on its CPU what is meant for one, and says so once a rule."""
        if re.match("cuda", name) and not gpus():
            if where not in self.told:
                self.told.add(where)
                warnings.warn(
                    f"{where}: {name}: this machine has no GPU that torch can use; the module stays on the CPU",
                    stacklevel=3,
                )
            return CPU
        return device_of(name, where)

    def replaced(self, path: str, old: nn.Module, rule: Rule, device: Device) -> Operator:
        assert rule.replace
        cls = resolve(rule.replace, rule.where)
        if device.gpu:
            cls = on_gpu(cls, rule.where)
        check_kwargs(cls, rule)
        try:
            new = cls.from_hf(
                old, Context(path, self.config, device.torch, self.dtype, self.kv_dtype, device.gpu), **rule.kwargs
            )
        except (UsageError, NotImplementedError) as error:
            raise UsageError(f"{rule.where}: {error}") from error
        new.path, new.placement = path, device  # an operator written in ten lines need not remember it
        if cls.__name__ in self.targets:
            new.quant_target = self.targets[cls.__name__]
        return new

    def step(self, path: str, old: str, module: nn.Module, rule: Rule | None, device: Device) -> None:
        """Records where a module is, and one that was replaced or holds weights of its own."""
        self.plan.devices[path] = device
        tensors, shapes = [], {}
        own = [
            *module.named_parameters(recurse=False),
            *((n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set),
        ]
        for name, tensor in own:
            full = f"{path}.{name}"
            if tensor is not None and full not in self.tied:
                tensors.append(full)
                shapes[full] = tuple(tensor.shape)
        if isinstance(module, Operator):
            tensors += [name for name in module.tensors() if name not in self.tied and name not in tensors]
            shapes |= getattr(module, "shapes", dict)()
        if tensors or isinstance(module, Operator):
            new = type(module).__name__ if rule is not None and rule.replace else ""
            target = module.quant_target if isinstance(module, Operator) else None
            share = Fraction(module.num_experts, module.total) if isinstance(module, Experts) else Fraction(1)
            self.plan.append(Step(path, old, new, rule, str(device), tensors, shapes, target=target, share=share))

    def keep_below(self, path: str, module: nn.Module, device: Device) -> None:
        for name, child in module.named_modules():
            if name:
                self.step(f"{path}.{name}", type(child).__name__, child, None, device)


def check_kwargs(cls: type[Operator], rule: Rule) -> None:
    """UsageError for an option that the operator's from_hf does not name, lacks, or takes in another type."""
    named = [
        p for p in inspect.signature(cls.from_hf).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    options = {p.name: p for p in named[2:]}  # after the old module and the context
    for key, value in rule.kwargs.items():
        if key not in options:
            known = " ".join(options) or "none"
            raise UsageError(
                f"{rule.where}: {cls.__name__} has no option {key!r}{did_you_mean(key, options)}; its options: {known}"
            )
        default = options[key].default
        if isinstance(default, (bool, int, float, str)) and not _same_kind(value, default):
            kind = type(default).__name__
            raise UsageError(
                f"{rule.where}: {cls.__name__}'s option {key} must be of type {kind}, as its default {default!r}; found {value!r}"
            )
    lacking = [name for name, p in options.items() if p.default is p.empty and name not in rule.kwargs]
    if lacking:
        raise UsageError(f"{rule.where}: {cls.__name__} needs the option {lacking[0]!r}: write it under replace.kwargs")


def _same_kind(value: object, default: object) -> bool:
    """True for what can stand where the default stands: an int for a float, None for anything, but no number for a bool."""
    if value is None or type(value) is type(default):
        return True
    return isinstance(default, float) and type(value) is int
