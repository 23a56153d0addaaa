"""Applies rules to a model: replaces the matched modules and returns the plan of modules, devices and tensors."""

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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.devices import CPU, Device, gpus, parse_device
from ktx.errors import BadFile, UsageError, did_you_mean
from ktx.hardware import format_bytes
from ktx.injection.device_map import PlacementEntry, format_ranges
from ktx.injection.rule import Rule
from ktx.injection.rules import Rules, is_shipped
from ktx.ops.base import Context, Operator, target_qtype
from ktx.ops.experts import Experts
from ktx.ops.moe import MoE
from ktx.ops.registry import on_gpu, resolve
from ktx.utils.deprecation import deprecated_members
from ktx.weights.accounting import UnreadTensors, summary_line, unread_tensors
from ktx.weights.base import TensorSpec, WeightSource
from ktx.weights.verdict import Reads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@deprecated_members(
    old="old_class",
    new="operator",
    target="quant_target",
    share="fraction",
    memory="memory_bytes",
    packed="packed_bytes",
)
@dataclass
class Step:
    """A module of the new tree that was replaced or has weights of its own."""

    path: str
    old_class: str
    operator: str  # operator class, or "" if the module is not replaced
    rule: Rule | None
    device: str
    tensors: list[str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    specs: list[TensorSpec] = field(default_factory=list)
    quant_target: str | None = None  # quantized type of float weights (ktx.ops.base.LOAD_TIME_QUANT)
    fraction: Fraction = Fraction(1)  # of the tensors' bytes: a layer's experts may be split between devices

    @property
    def nbytes(self) -> int:
        """Bytes in the weight file."""
        return int(self.fraction * sum(spec.nbytes for spec in self.specs))

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory: an operator stores the file's format, any other module has f32 parameters."""
        return (
            int(self.fraction * sum(self.packed_bytes(spec) for spec in self.specs))
            if self.operator
            else sum(4 * prod(spec.shape) for spec in self.specs)
        )

    def packed_bytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor after an operator has packed it."""
        qtype = target_qtype(spec, self.quant_target) if len(spec.shape) > 1 else None
        return spec.nbytes if qtype is None else prod(spec.shape) // qtype.block * qtype.nbytes

    @property
    def types(self) -> str:
        """Names of the weight types, in descending order of their bytes."""
        nbytes: Counter[str] = Counter()
        for spec in self.specs:
            qtype = target_qtype(spec, self.quant_target) if len(spec.shape) > 1 else None
            nbytes[spec.qtype.name + (f">{qtype.name}" if qtype else "")] += spec.nbytes
        return "+".join(name for name, _ in nbytes.most_common())


@deprecated_members(tell="warn_unread")
class Plan(list[Step]):
    """Modules with their operators, devices and tensors.

    str() returns a table, `totals()` the bytes by device; `check` raises for missing tensors, `notes` lists unread
    ones.
    """

    unmatched: list[Rule]
    source: WeightSource

    def __init__(self, steps: Iterable[Step] = ()):
        """Creates a plan of `steps`; `inject` and ktx.loader set the other fields."""
        super().__init__(steps)
        self.devices: dict[str, Device] = {}  # by module path, for all modules
        self.pinned_paths: list[str] = []  # of modules whose rule names a device
        self.rules = Rules()  # the rules that were applied
        self.stream_experts_min_tokens: int | str | None = (
            None  # the rule file's (ktx.injection.device_map.parse_stream_experts)
        )
        self.scheme = ""  # the checkpoint's quantization scheme (ktx.weights.quantization)
        self.ignored_patterns: Sequence[str] = ()  # patterns of tensors that the modeling code ignores
        self.model_notes: list[Any] = []  # notes on the planned model (ktx.model.notes)
        self.adapters: dict[str, dict[Device, int]] = {}  # bytes by device of each LoRA adapter

    def fill(self, source: WeightSource) -> None:
        """Looks up every tensor in the headers of `source`."""
        self.source = source
        for step in self:
            step.specs = [spec for spec in map(source.spec, step.tensors) if spec is not None]

    def check(self, source: WeightSource | None = None) -> None:
        """Checks, before weights are read, that the file fits the model.

        A tensor that is missing, or that the computation needs but no module reads, would otherwise give a model that
        runs and returns wrong results.

        Raises:
            BadFile: names all tensors that are missing, have another shape or type, or must not stay unread;
                layers with the same problem are one entry.
        """
        source = source or self.source
        problems: dict[tuple[str, str], list[int]] = {}
        for step in self:
            for name in step.tensors:
                problem = _shape_error(source.spec(name), step.shapes.get(name)) or source.unreadable_reason(name)
                if problem:
                    pattern, numbers = _without_layer(name)
                    problems.setdefault((pattern, problem), []).extend(numbers)
        lines = [f"{_with_layers(pattern, layers)} {problem}" for (pattern, problem), layers in problems.items()]
        lines += [f"no module reads {tensors}" for tensors in self.unread if tensors.rejected]
        lines += self._rules_for_kept_experts(source)
        if lines:
            raise BadFile(f"{source.path}: does not fit this model: {'; '.join(lines)}")

    def _rules_for_kept_experts(self, source: WeightSource) -> list[str]:
        """Returns messages with the rule to add, for experts that no rule replaces and that `source` has in parts.

        transformers' experts have gate and up in one tensor, a GGUF file in two, which only an operator reads.
        """
        kept: dict[tuple[str, str], list[int]] = {}
        for step in self:
            is_missing = any(source.spec(name) is None for name in step.tensors)
            if not step.operator and is_missing and source.spec(f"{step.path}.gate_proj") is not None:
                pattern, numbers = _without_layer(step.path)
                kept.setdefault((pattern, step.old_class), []).extend(numbers)
        if self.rules.base:
            text = r"- {match: {name: '\.experts$'}, replace: {class: Experts}, recursive: false}"
            remedy = f"add as the first rule of {self.rules.base}: {text}"
        else:
            remedy = r"add as the first rule: ktx.Rule(name=r'\.experts$', replace='Experts', recursive=False)"
        return [
            f"no rule replaces {_with_layers(pattern, layers)} ({old_class}), which cannot read this file's experts;"
            f" {remedy}"
            for (pattern, old_class), layers in kept.items()
        ]

    @cached_property
    def unread(self) -> list[UnreadTensors]:
        """Tensors of the file that no module reads, by pattern; empty before `fill`."""
        if not hasattr(self, "source"):
            return []
        read = {key for step in self for name in step.tensors for key in self.source.source_tensors(name)}
        modules = {step.path for step in self if step.tensors} | {key.rpartition(".")[0] for key in read}
        return unread_tensors(self.source, Reads(read, modules), self.ignored_patterns)

    def warn_unread(self) -> None:
        """Warns of tensors in the file that no module reads."""
        if text := summary_line(self.unread):
            warnings.warn(f"{self.source.path}: {text}", stacklevel=3)

    @property
    def notes(self) -> list[str]:
        """Lines on the checkpoint's quantization and on tensors that no module reads."""
        return [note for note in (self.scheme, summary_line(self.unread)) if note]

    def totals(self) -> dict[str, int]:
        """Bytes of weights by device."""
        total: Counter[str] = Counter()
        for step in self:
            total[step.device] += step.nbytes
        return dict(total)

    def table(self, fold: bool = True) -> str:
        """Returns the plan as text, as `ktx plan` prints it; `fold` merges layers with equal modules into one row."""
        head = ("module", "class", "operator", "device", "type", "bytes", "rule")
        rows = [
            (
                path,
                step.old_class,
                step.operator or "(kept)",
                step.device,
                step.types,
                format_bytes(step.nbytes) if step.nbytes else "",
                _rule_location(step.rule),
            )
            for path, step in (_fold_layers(self) if fold else ((step.path, step) for step in self))
        ]
        # Column 5, the bytes, is right-aligned.
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if i == 5 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
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


def _shape_error(spec: TensorSpec | None, shape: tuple[int, ...] | None) -> str:
    """Returns why a tensor of the file does not fit, or an empty string. [1, n] and [n] are the same shape."""
    if spec is None:
        return "is missing"
    if not shape or spec.shape == shape or (prod(spec.shape) == prod(shape) and len(spec.shape) != len(shape)):
        return ""
    return f"is {_shape(spec.shape)}, the model needs {_shape(shape)}"


def _rule_location(rule: Rule | None) -> str:
    """file:line of a rule, without the folder."""
    return rule.where.rpartition("/")[2] if rule else "default"


def _without_layer(path: str) -> tuple[str, list[int]]:
    """Returns a path with its first number replaced by a placeholder, and that number; groups equal layers."""
    number = NUMBER.search(path)
    return (path, []) if number is None else (f"{path[: number.start()]}.{{}}{path[number.end() :]}", [int(number[1])])


def layer_number(path: str) -> int | None:
    """The first number in a module's path."""
    number = NUMBER.search(path)
    return None if number is None else int(number[1])


def _with_layers(pattern: str, layers: Sequence[int]) -> str:
    """Inverse of `_without_layer` for several layers, written as a range."""
    return pattern.replace("{}", f"[{format_ranges(layers)}]" if len(layers) > 1 else "".join(map(str, layers)))


def _fold_layers(plan: Plan) -> Iterator[tuple[str, Step]]:
    """Yields steps that differ only in layer number and types as one, in order of first appearance.

    Layers of a model are nearly all equal; without this, the table of a large model has hundreds of rows.
    """
    groups: dict[tuple[Any, ...], list[Step]] = {}
    for step in plan:
        key = (
            _without_layer(step.path)[0],
            step.old_class,
            step.operator,
            step.device,
            step.rule.where if step.rule else "",
            step.fraction,
        )
        groups.setdefault(key, []).append(step)
    for (pattern, *_), steps in groups.items():
        layers = [layer for step in steps for layer in _without_layer(step.path)[1]]
        yield _with_layers(pattern, layers), replace(steps[0], specs=[spec for step in steps for spec in step.specs])


@dataclass(frozen=True, kw_only=True)
class InjectOptions:
    """How `inject` builds and places operators.

    Attributes:
        dtype: compute type.
        kv_dtype: type of the KV cache; None: the type that keys and values are computed in.
        targets: quantized type of float weights by operator class.
        entries: device map for modules whose rule names no device, one GPU per entry.
        warn_unmatched: whether to warn of rules that match no module, except shipped ones; false for default rules.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype | str | None = None
    targets: Mapping[str, str | None] = field(default_factory=dict)
    entries: Sequence[PlacementEntry] = ()
    warn_unmatched: bool = True


def inject(model: nn.Module, rules: Sequence[Rule], config: PreTrainedConfig, options: InjectOptions) -> Plan:
    """Replaces modules of a meta-device model, top down in the new tree, and returns the plan.

    Args:
        model: the transformers model.
        rules: the first rule that matches a module applies.
        config: the model's configuration.
        options: types, device map and warnings.

    Raises:
        UsageError: a rule or an entry of the device map is invalid for this model.
    """
    injector = _Injector(model, rules, config, options)
    injector.visit("", model, CPU)
    if options.warn_unmatched or options.entries:
        injector.warn_unsplit()
    for i, entry in enumerate(injector.entries):
        if i not in injector.matched_entries and not entry.implied:
            warnings.warn(f"{entry.where}: {entry.key!r} matched no module", stacklevel=2)
    injector.plan.unmatched = [rule for i, rule in enumerate(rules) if i not in injector.matched_rules]
    for rule in (rule for rule in injector.plan.unmatched if options.warn_unmatched and not is_shipped(rule)):
        pattern = rule.name.pattern if rule.name else rule.cls
        unknown = rule.cls.rpartition(".")[2] if rule.cls else ""
        hint = did_you_mean(unknown, sorted(injector.classes)) if unknown and unknown not in injector.classes else ""
        warnings.warn(f"{rule.where}: the rule for {pattern!r} matched no module{hint}", stacklevel=2)
    return injector.plan


class _Injector:
    """Walks the module tree once, from the top, replaces what rules match, and collects the plan.

    `matched_rules` and `matched_entries` are indices, for the warnings about those that matched nothing.
    """

    def __init__(self, model: nn.Module, rules: Sequence[Rule], config: PreTrainedConfig, options: InjectOptions):
        """Stores arguments of `inject`; a device map's entries with a number of GPU experts apply to experts only."""
        self.model, self.rules, self.config, self.options = model, rules, config, options
        self.plan, self.matched_rules = Plan(), set[int]()
        self.entries = [entry for entry in options.entries if entry.num_gpu_experts is None]
        self.gpu_expert_entries = [entry for entry in options.entries if entry.num_gpu_experts is not None]
        self.unsplit: dict[str, int] = {}  # by origin: experts requested on a GPU, 0 once placed
        self.matched_entries, self.warned = set[int](), set[str]()
        self.classes = {type(module).__name__ for module in model.modules()}
        self.tied = set(getattr(model, "all_tied_weights_keys", None) or {})

    def visit(self, path: str, module: nn.Module, device: Device) -> None:
        """Places and replaces a module, then visits the children of the new module. `device` is the parent's.

        The new module's children are visited, not the old one's, so that rules also reach modules that an operator
        contains. If some experts go to a GPU, both halves are recorded with the same tensors.
        """
        index = next((i for i, rule in enumerate(self.rules) if path and rule.matches(path, type(module))), None)
        rule = None if index is None else self.rules[index]
        parent_device, device = device, self.device_for(path, rule, device)
        if index is not None:
            self.matched_rules.add(index)
        if rule is not None and rule.device:
            self.plan.pinned_paths.append(path)
        old_class, original = type(module).__name__, module
        if rule is not None and rule.replace:
            module = self.build_operator(path, module, rule, device)
            self.model.set_submodule(path, module)
            if isinstance(module, Experts):
                self.split_experts(original, module, rule, parent_device)
        self.record(path, module, device, old_class=old_class, rule=rule)
        if isinstance(module, Experts) and module.on_gpu is not None:  # same class and tensors
            self.record(f"{path}.on_gpu", module.on_gpu, parent_device, old_class=old_class, rule=rule)
        elif rule is None or rule.recursive:
            for name, child in list(module.named_children()):
                self.visit(f"{path}.{name}" if path else name, child, device)
        else:
            self.record_below(path, module, device)

    def split_experts(self, old: nn.Module, new: Experts, rule: Rule, parent_device: Device) -> None:
        """Assigns some of a layer's CPU experts to the enclosing block's GPU, as the rule or the map requests.

        Nothing changes unless the experts are on the CPU and the enclosing MoE block is on a GPU; `unsplit` records
        requests that no layer could follow, for `warn_unsplit`.
        """
        entry = next((entry for entry in self.gpu_expert_entries if entry.pattern.search(new.path)), None)
        num_gpu_experts, where = new.gpu_experts, f"{rule.where}: gpu_experts"
        if not num_gpu_experts and entry is not None:
            num_gpu_experts, where = entry.num_gpu_experts or 0, entry.where
        if not num_gpu_experts:
            return
        self.unsplit.setdefault(where, num_gpu_experts)
        if (
            new.placement.gpu
            or not parent_device.gpu
            or not isinstance(self.model.get_submodule(new.path.rpartition(".")[0]), MoE)
        ):
            return
        self.unsplit[where] = 0
        kwargs = {key: value for key, value in rule.kwargs.items() if key != "gpu_experts"}
        gpu_experts = self.build_operator(new.path, old, replace(rule, kwargs=kwargs), parent_device)
        assert isinstance(gpu_experts, Experts)
        try:
            new.split_to_gpu(gpu_experts, num_gpu_experts)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def warn_unsplit(self) -> None:
        """Warns of each request for experts on a GPU that no layer could follow, because it has no effect."""
        reason = (
            "no layer has its experts on the CPU and its MoE block on a GPU"
            if gpus()
            else "this machine has no GPU that torch can use"
        )
        for where, count in self.unsplit.items():
            if count:
                warnings.warn(
                    f"{where}: {count} experts per layer on a GPU: {reason}; no experts are placed on one", stacklevel=4
                )

    def device_for(self, path: str, rule: Rule | None, parent_device: Device) -> Device:
        """Returns a module's device: its rule's, else the first matching entry's, else the parent's.

        A GPU that this machine lacks is an error if an option names it, and a warning if a file does.
        """
        matches = [i for i, entry in enumerate(self.entries) if entry.pattern.search(path)]
        self.matched_entries.update(matches)
        if rule is not None and rule.device:
            return self.find_device(rule.device.strip(), rule.where)
        if not matches:
            return parent_device
        entry = self.entries[matches[0]]
        if entry.device == "cuda" and parent_device.gpu:
            return parent_device
        return (
            parse_device(entry.device, entry.where) if entry.explicit else self.find_device(entry.device, entry.where)
        )

    def find_device(self, name: str, where: str) -> Device:
        """Returns the device that a file names; without any GPU the CPU, with a warning once per rule or entry.

        So a rule file that is written for a GPU also works on a machine without one.
        """
        if re.match("cuda", name) and not gpus():
            if where not in self.warned:
                self.warned.add(where)
                warnings.warn(
                    f"{where}: {name}: this machine has no GPU that torch can use; the module stays on the CPU",
                    stacklevel=3,
                )
            return CPU
        return parse_device(name, where)

    def build_operator(self, path: str, old: nn.Module, rule: Rule, device: Device) -> Operator:
        """Returns the operator that a rule puts in place of `old`; on a GPU, the class that `on_gpu` has for it.

        Raises UsageError, with the rule's file and line, if the operator does not support the module or an option.
        """
        assert rule.replace
        cls = resolve(rule.replace, rule.where)
        if device.gpu:
            cls = on_gpu(cls, rule.where)
        check_kwargs(cls, rule)
        options = self.options
        context = Context(path, self.config, device.torch, options.dtype, options.kv_dtype, device.gpu)
        try:
            new = cls.from_hf(old, context, **rule.kwargs)
        except (UsageError, NotImplementedError) as error:
            raise UsageError(f"{rule.where}: {error}") from error
        new.path, new.placement = path, device  # set here, so that custom operators need not do it
        if cls.__name__ in options.targets:
            new.quant_target = options.targets[cls.__name__]
        return new

    def record(self, path: str, module: nn.Module, device: Device, *, old_class: str, rule: Rule | None = None) -> None:
        """Records a module's device, and a step if the module was replaced or has weights of its own.

        The step lists the tensors that the module reads, its own parameters and those of its operator; output layers
        that share the embedding's matrix are added later (`_tie`).
        """
        self.plan.devices[path] = device
        tensors, shapes = [], {}
        own_tensors = [
            *module.named_parameters(recurse=False),
            *(
                (buffer_name, buffer)
                for buffer_name, buffer in module.named_buffers(recurse=False)
                if buffer_name not in module._non_persistent_buffers_set
            ),
        ]
        for name, tensor in own_tensors:
            full_name = f"{path}.{name}"
            if tensor is not None and full_name not in self.tied:
                tensors.append(full_name)
                shapes[full_name] = tuple(tensor.shape)
        if isinstance(module, Operator):
            tensors += [name for name in module.tensors() if name not in self.tied and name not in tensors]
            shapes |= getattr(module, "shapes", dict)()
        if tensors or isinstance(module, Operator):
            operator = type(module).__name__ if rule is not None and rule.replace else ""
            target = module.quant_target if isinstance(module, Operator) else None
            step = Step(path, old_class, operator, rule, str(device), tensors, shapes, quant_target=target)
            if isinstance(module, Experts):
                step.fraction = Fraction(module.num_experts, module.total_experts)
            self.plan.append(step)

    def record_below(self, path: str, module: nn.Module, device: Device) -> None:
        """Records the submodules of a module whose rule is not recursive."""
        for name, child in module.named_modules():
            if name:
                self.record(f"{path}.{name}", child, device, old_class=type(child).__name__)


def check_kwargs(cls: type[Operator], rule: Rule) -> None:
    """Raises UsageError for an option that is missing, unknown to the operator's `from_hf`, or of the wrong type.

    Checked against the signature, so that a custom operator's options need no other declaration.
    """
    parameters = [
        param
        for param in inspect.signature(cls.from_hf).parameters.values()
        if param.kind not in (param.VAR_KEYWORD, param.VAR_POSITIONAL)
    ]
    options = {param.name: param for param in parameters[2:]}  # after the old module and the context
    for key, value in rule.kwargs.items():
        if key not in options:
            option_names = " ".join(options) or "none"
            raise UsageError(
                f"{rule.where}: {cls.__name__} has no option {key!r}{did_you_mean(key, options)};"
                f" its options: {option_names}"
            )
        default = options[key].default
        if isinstance(default, (bool, int, float, str)) and not _same_kind(value, default):
            kind = type(default).__name__
            raise UsageError(
                f"{rule.where}: {cls.__name__}'s option {key} must be of type {kind}, as its default {default!r} is;"
                f" found {value!r}"
            )
    missing = [name for name, param in options.items() if param.default is param.empty and name not in rule.kwargs]
    if missing:
        raise UsageError(f"{rule.where}: {cls.__name__} needs the option {missing[0]!r}: write it under replace.kwargs")


def _same_kind(value: object, default: object) -> bool:
    """Whether a value has the default's type; an int also fits a float, None fits everything, no number fits a bool."""
    if value is None or type(value) is type(default):
        return True
    return isinstance(default, float) and type(value) is int
