"""LoRA adapters of a loaded model: loads them, matches them to modules, and activates them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from collections.abc import Mapping as Matrices
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ktx.cache.forward_context import AdapterStep
from ktx.devices import Device
from ktx.errors import BadFile, DoesNotFit, UsageError, did_you_mean
from ktx.hardware import format_bytes, memory
from ktx.ops.base import Operator
from ktx.ops.expert_lora import ExpertsLora
from ktx.ops.experts import PROJECTIONS, Experts
from ktx.ops.latent_lora import LatentLora
from ktx.ops.lora import AdapterMapping, Lora, device_of
from ktx.ops.mla import MLA
from ktx.transformers_compat import checkpoint_renaming
from ktx.utils.fork_handlers import ForkSafeLock
from ktx.weights import gguf_lora
from ktx.weights import lora as peft_lora
from ktx.weights.gguf_files import is_gguf
from ktx.weights.gguf_lora import GGUFAdapter
from ktx.weights.lora import (
    MERGE_REMEDY,
    WEIGHTS_FILE,
    Adapter,
    AdapterFile,
    AdapterSpec,
    AdapterUse,
    AdapterUses,
    LowRank,
    Spans,
)

RETIRED = "\0"  # separator in the name of a retired adapter; no user-given name contains it
AdapterArgument = str | Path | AdapterSpec
MatchedModules = list[tuple[Any, list[LowRank]]]  # modules with the low-rank matrices for their weights
PackedModules = list[tuple[Any, Lora, Any]]  # modules with their packed low-rank matrices
_attach_lock = ForkSafeLock()


@dataclass
class Adapters:
    """The adapters of a model by name.

    Those `in_use` apply to every forward outside an engine, and to an engine's requests that name no adapter.
    """

    known: dict[str, Adapter] = field(default_factory=dict)
    mapping: AdapterMapping = field(default_factory=AdapterMapping)
    # By module; an operator refers to it by its attribute `lora`.
    loras: dict[nn.Module, Lora] = field(default_factory=dict)
    hooks: dict[nn.Module, RemovableHandle] = field(default_factory=dict)  # forward hooks on torch's own modules
    # Parent, name and module of each module with an adapter; None until it is looked up.
    attached_modules: list[tuple[nn.Module, str, nn.Module]] | None = None
    num_retired: int = 0  # number of retired adapters, for their names
    step_adapters: frozenset[AdapterUse] = frozenset()  # adapters of the engine's latest step

    @property
    def in_use(self) -> AdapterUses:
        """Adapters that apply to forwards outside an engine."""
        return self.mapping.default_uses

    def add(self, adapter: Adapter, modules: MatchedModules) -> None:
        """Packs and attaches an adapter to the modules of `match_modules`. Raises UsageError if its name is taken."""
        self.attach(adapter, self.pack(modules))

    def pack(self, modules: MatchedModules) -> PackedModules:
        """Packs an adapter for `attach`. May run on any thread, also while an engine computes."""
        result: PackedModules = []
        for module, matrices in modules:
            lora = lora_class(module)(self.mapping, module)
            result.append((module, lora, lora.pack(matrices)))
        return result

    def attach(self, adapter: Adapter, modules: PackedModules) -> None:
        """Attaches a packed adapter to its modules. Raises UsageError if its name is taken.

        `modules` has for each module the Lora that applies adapters to it, and the packed low-rank matrices (`pack`).
        """
        if adapter.name in self.known:
            raise UsageError(
                f"adapter {adapter.path}: an adapter named {adapter.name!r} is loaded already; use another name"
            )
        for module, lora, factors in modules:
            self.loras.setdefault(module, lora).factors[adapter.name] = factors
        self.attached_modules = None  # `check` looks them up again
        self.known[adapter.name] = adapter

    def drop(self, name: str) -> None:
        """Detaches and frees an adapter. Raises UsageError if no adapter has this name."""
        self.resolve([name])  # raises for an unknown name
        self.use([used for used in self.in_use if used.name != name])
        for module, lora in list(self.loras.items()):
            lora.factors.pop(name, None)
            if not lora.factors:
                self._disable(module)
                del self.loras[module]
        self.attached_modules = None  # `check` looks them up again
        del self.known[name]

    def retire(self, name: str) -> str:
        """Renames an adapter that is unloaded while requests use it; returns its new name, which only these get.

        The old name is then free for another adapter. Raises UsageError if no adapter has this name.
        """
        self.resolve([name])  # raises for an unknown name
        self.use([used for used in self.in_use if used.name != name])
        self.num_retired += 1
        retired_name = f"{name}{RETIRED}{self.num_retired}"
        for lora in self.loras.values():
            if name in lora.factors:
                lora.factors[retired_name] = lora.factors.pop(name)
        self.known[retired_name] = self.known.pop(name)
        return retired_name

    @property
    def named(self) -> dict[str, Adapter]:
        """The adapters that a request can name."""
        return {name: adapter for name, adapter in self.known.items() if RETIRED not in name}

    def resolve(self, names: Sequence[str | AdapterUse]) -> AdapterUses:
        """Returns adapters with their factors, without duplicates. Raises UsageError for an unknown name."""
        uses = tuple(dict.fromkeys(AdapterUse(item) if isinstance(item, str) else item for item in names))
        for name, _ in uses:
            if name not in self.known:
                loaded = f"; loaded are {', '.join(self.named)}" if self.named else "; none is loaded"
                raise UsageError(f"there is no LoRA adapter named {name!r}{did_you_mean(name, self.named)}{loaded}")
        return uses

    def digest(self, uses: AdapterUses) -> bytes:
        """Returns a digest that differs for adapters that compute different results; empty for none."""
        digests = [
            self.known[name].digest + (b"" if factor == 1 else repr(float(factor)).encode()) for name, factor in uses
        ]
        return hashlib.sha256(b"".join(digests)).digest()[:16] if uses else b""

    def use(self, names: Sequence[str | AdapterUse]) -> None:
        """Activates adapters for forwards outside an engine, and for requests that name none."""
        self.mapping.default_uses = self.resolve(names)
        self._activate(self.step_adapters)

    def activate_step(self, tokens: Spans, logits: Spans) -> AdapterStep | None:
        """Activates the adapters of an engine's step and returns what its `ForwardContext` applies to each token.

        Fast paths that adapters disable stay disabled until a step has other adapters, because switching them visits
        all modules.

        Args:
            tokens: numbers of tokens with their adapters, in the order of the batch.
            logits: the same for the tokens whose logits are computed.

        Returns:
            None for a model without adapters.
        """
        if not self.known:
            return None
        self._activate(frozenset(use for _, uses in tokens for use in uses))
        return AdapterStep(self.mapping, tokens, logits)

    def check(self, model: nn.Module) -> None:
        """Checks before a forward that the modules with active adapters are still in the model.

        Raises:
            UsageError: a module was replaced or became a plain torch module, so its adapter would have no effect.
        """
        names = {use.name for use in (*self.step_adapters, *self.in_use)}
        if not names:
            return
        if self.attached_modules is None:
            self.attached_modules = [
                (parent, name, child)
                for parent in model.modules()
                for name, child in parent._modules.items()
                if child is not None and child in self.loras
            ]
        present = {child for parent, name, child in self.attached_modules if parent._modules.get(name) is child}
        for module, lora in list(self.loras.items()):  # a copy: an engine may attach an adapter meanwhile
            is_same = module in present and isinstance(module, Operator) == lora.of_operator
            if is_same or not names.intersection(lora.factors):
                continue
            path = getattr(module, "path", None) or next(
                (name for _, name, child in self.attached_modules if child is module), "a module"
            )
            raise UsageError(
                f"{path} was replaced, or converted to floats, after adapter"
                f" {min(names.intersection(lora.factors))!r} was loaded, so the adapter would"
                " have no effect there: call model.ktx.unload_lora(name) and"
                " model.ktx.load_lora(path) to attach it to the current module"
            )

    def end_steps(self) -> None:
        """Detaches the adapters of the engine's steps. Called after an engine's last step."""
        self._activate(frozenset())

    def _activate(self, step_uses: frozenset[AdapterUse]) -> None:
        """Attaches adapters to modules: those of an engine's step (`step_uses`) and those in use; detaches all others.

        An operator with an adapter attached leaves its fast paths, so one that no current request uses must not stay
        attached. Locked, because forwards of other threads may run during a step.
        """
        with _attach_lock:
            self.step_adapters = step_uses
            names = {use.name for use in (*step_uses, *self.in_use)}
            for module, lora in list(self.loras.items()):
                if any(name in lora.factors for name in names):
                    self._enable(module, lora)
                else:
                    self._disable(module)

    def _enable(self, module: nn.Module, lora: Lora) -> None:
        """Attaches an adapter: to an operator as its attribute `lora`, to torch's own module as a forward hook."""
        if not isinstance(module, Operator):
            if module not in self.hooks:
                self.hooks[module] = module.register_forward_hook(lora.forward_hook)
        elif "lora" not in module.__dict__:
            module.lora = lora  # type: ignore[assignment]

    def _disable(self, module: nn.Module) -> None:
        """Detaches a module's adapter, which restores the operator's fast paths."""
        if module in self.hooks:
            self.hooks.pop(module).remove()
        elif "lora" in module.__dict__:
            del module.lora


def lora_class(module: nn.Module) -> type[Lora]:
    """Returns the class of a module's adapter."""
    classes: tuple[tuple[type[nn.Module], type[Lora]], ...] = ((MLA, LatentLora), (Experts, ExpertsLora))
    return next((lora for module_class, lora in classes if isinstance(module, module_class)), Lora)


def adapter_bytes(modules: MatchedModules) -> dict[Device, int]:
    """Bytes of an adapter by device."""
    result: dict[Device, int] = {}
    for module, matrices in modules:
        device = device_of(module)
        result[device] = result.get(device, 0) + lora_class(module).nbytes(module, matrices)
    return result


def check_memory(modules: MatchedModules) -> None:
    """Raises DoesNotFit if an adapter needs more memory than is free."""
    for device, needed in adapter_bytes(modules).items():
        available = (device.memory if device.gpu else memory())[1]
        if needed > available:
            raise DoesNotFit(
                f"the adapter needs {format_bytes(needed)} of memory on {device}, {format_bytes(available)} are free"
            )


def parse_adapters(lora: AdapterArgument | Sequence[AdapterArgument] | None) -> list[AdapterSpec]:
    """Parses the adapters of an argument or an option.

    Args:
        lora: one or several of: the text [NAME=]PATH[=SCALE], a path, or an AdapterSpec.

    Raises:
        UsageError: two adapters have the same name.
    """
    items = [] if lora is None else [lora] if isinstance(lora, str | Path | AdapterSpec) else list(lora)
    result = [AdapterSpec.parse(item) for item in items]
    names = [adapter.name for adapter in result]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two LoRA adapters are named {duplicate!r}; give them names: NAME=PATH")
    return result


def read_adapter(spec: AdapterSpec) -> AdapterFile | GGUFAdapter:
    """Reads an adapter's file, PEFT's or llama.cpp's.

    Raises:
        BadFile: the file is missing or broken.
        UsageError: the adapter is not a plain LoRA adapter.
    """
    path = spec.path
    if not path.exists():
        raise BadFile(f"adapter {path}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS_FILE).exists():
        path = gguf_lora.find_gguf_adapter(path) or path
    return gguf_lora.read_gguf_adapter(replace(spec, path=path)) if is_gguf(path) else peft_lora.read_peft_adapter(spec)


def match_modules(model: Any, file: AdapterFile | GGUFAdapter) -> MatchedModules:
    """Matches an adapter's matrices to the model's modules.

    Raises:
        BadFile: the model has no such module, or its weight has another shape.
        UsageError: a module does not support adapters.
    """
    if isinstance(file, GGUFAdapter):
        file = file.by_module(model.config, _weight_owners(model))
    adapter_path, result = file.adapter.path, []
    rename, _ = checkpoint_renaming(model.config)
    by_path = {
        path if _find_module(model, path) else rename(f"{path}.weight").removesuffix(".weight"): low_rank
        for path, low_rank in file.matrices.items()
    }
    if len(by_path) < len(file.matrices):
        raise BadFile(f"adapter {adapter_path}: it names a module twice, by its old and its new name")
    for path, matrices in stack_experts(by_path, model).items():
        module = _find_module(model, path)
        if module is None:
            raise BadFile(f"adapter {adapter_path}: the model has no module {path}; it was trained on another one")
        shapes, is_lookup = _adaptable_shapes(module)
        if not shapes:
            location = " on a GPU" if isinstance(module, Operator) and module.placement.gpu else ""
            raise UsageError(
                f"adapter {adapter_path}: {path} ({type(module).__name__}{location}) does not support LoRA adapters;"
                f" {MERGE_REMEDY}"
            )
        keys = [matrix.shape if not matrix.projection else (matrix.projection, matrix.shape) for matrix in matrices]
        if len(set(keys)) < len(keys) or any(
            key not in shapes or matrix.embedding is not is_lookup for key, matrix in zip(keys, matrices, strict=True)
        ):
            file_shapes = " and ".join(
                f"{'a lookup of ' * matrix.embedding}{list(matrix.shape)}" for matrix in matrices
            )
            model_shapes = " and ".join(
                f"{'a lookup of ' * is_lookup}{list(key)}" for key in shapes if not isinstance(key[0], str)
            )
            raise BadFile(
                f"adapter {adapter_path}: {path} is {file_shapes} in the adapter, but {model_shapes} in the model"
            )
        if not all(bool(factor.isfinite().all()) for matrix in matrices for factor in (matrix.a, matrix.b)):
            raise BadFile(
                f"adapter {adapter_path}: its matrices of {path} contain NaN or infinity, or do so at this scale"
            )
        result.append((module, matrices))
    for path, shape in file.base_shapes.items():
        module = _find_module(model, path)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        head_shapes = _adaptable_shapes(module)[0] if module is embeddings or module is head else []
        if not head_shapes:
            raise UsageError(
                f"adapter {adapter_path}: it contains the full weight of {path},"
                f" which is not an embedding of the model; {MERGE_REMEDY}"
            )
        expected = next(iter(head_shapes))[::-1] if module is embeddings else next(iter(head_shapes))
        if expected != shape:
            raise BadFile(
                f"adapter {adapter_path}: it was trained with {path} of {list(shape)}, the model's is {list(expected)}:"
                f" the vocabularies differ; {MERGE_REMEDY}"
            )
    return result


def _weight_owners(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Returns the module of each matrix, by the matrix's name in files, because adapters are attached to modules.

    A value is the module's path, and which projection of stacked experts the matrix is ("" for other modules). GGUF
    adapters need this mapping: they name matrices.
    """
    result: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            result |= {f"{path}.{name}": (path, name) for name in module.projections}
        else:
            result[f"{path}.weight"] = path, ""
        if isinstance(module, MLA):
            result[f"{path}.kv_b_proj.weight"] = f"{path}.kv_b_proj", ""
    return result


ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def stack_experts(matrices: Matrices[str, list[LowRank]], model: nn.Module) -> dict[str, list[LowRank]]:
    """Combines adapters of single experts into one per layer's projection, because ktx stacks the experts of a layer.

    Experts without an adapter get zeros. Other matrices are returned unchanged.
    """
    result: dict[str, list[LowRank]] = {}
    by_expert: dict[tuple[str, str], dict[int, LowRank]] = {}
    for path, low_rank in matrices.items():
        match = ONE_EXPERT.fullmatch(path)
        if match is None or not isinstance(_find_module(model, match["experts"]), Experts):
            result[path] = low_rank
        else:
            name = MIXTRAL.get(match["projection"], match["projection"])  # w1, w2, w3 under their current names
            by_expert.setdefault((match["experts"], name), {})[int(match["number"])] = low_rank[0]
    for (path, name), experts in by_expert.items():
        owner = _find_module(model, path)
        assert isinstance(owner, Experts)
        result.setdefault(path, []).append(_stack_projection(experts, name, owner.total_experts, path))
    return result


def _stack_projection(experts: dict[int, LowRank], projection: str, total: int, path: str) -> LowRank:
    """Stacks the low-rank matrices of single experts into one pair for all `total` experts of a layer.

    Lower ranks are padded with zeros. Raises BadFile if the model does not have these experts.
    """
    first, rank = next(iter(experts.values())), max(matrix.a.shape[0] for matrix in experts.values())
    if projection not in PROJECTIONS or max(experts) >= total or len({matrix.shape for matrix in experts.values()}) > 1:
        raise BadFile(
            f"{path}: the adapter has {projection} of experts {min(experts)} to {max(experts)};"
            f" the model has {total} experts with {' '.join(PROJECTIONS)}"
        )
    # [experts, rank, columns] and [experts, rows, rank]
    a, b = first.a.new_zeros(total, rank, first.a.shape[-1]), first.b.new_zeros(total, first.b.shape[0], rank)
    for number, matrix in experts.items():
        a[number, : matrix.a.shape[0]], b[number, :, : matrix.b.shape[1]] = matrix.a, matrix.b
    return LowRank(a, b, projection=projection)


def _find_module(model: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a path, or None. MLA contains kv_b_proj, so for that path the MLA module."""
    parent_path, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(parent_path)
        return owner if name == "kv_b_proj" and isinstance(owner, MLA) else owner.get_submodule(name)
    except AttributeError:
        return None


def _adaptable_shapes(module: Any) -> tuple[Collection[Any], bool]:
    """Returns the shapes that a LoRA adapter of this module may have, and whether the module is an embedding.

    There are none for a module without support for adapters, such as MLA on a GPU; the caller rejects any other shape.
    A shape is that of the product of the adapter's two matrices, which for an embedding is the transposed weight's.
    """
    if isinstance(module, MLA):
        rows = module.num_heads * (module.qk_nope_head_dim + module.v_head_dim)
        return ([] if module.placement.gpu else [(rows, module.kv_lora_rank)]), False
    if isinstance(module, Experts):
        return module.lora_shapes(), False
    if isinstance(module, nn.Embedding):
        return [(module.embedding_dim, module.num_embeddings)], True
    return ([(module.out_features, module.in_features)] if isinstance(module, nn.Linear) else []), False
