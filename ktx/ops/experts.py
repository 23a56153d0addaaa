"""Computes all experts of a layer in one kernel call, on packed weights in CPU memory.

Shapes: T tokens, D columns of hidden states, K selected experts per token; a packed matrix has n rows and k columns. A
*stacked parameter* of transformers holds one projection of all experts, or two: gate_up_proj holds gate and up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import contract
from ktx.ops import packed_state as stored
from ktx.ops.activation_probe import (
    ACTIVATIONS,
    KEEP_MODULE_HINT,
    Activation,
    is_gated,
    is_interleaved,
    is_unmodified,
    probe_experts,
)
from ktx.ops.base import Context, as_weights, pack_as
from ktx.ops.class_patches import patched
from ktx.ops.edit import checked_values, quantize_edited
from ktx.ops.float_views import Dequantized, Floats, unreadable, view_experts, view_tensor
from ktx.ops.guard import ChildrenGuard, children_observed, torch_mode_active
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import PARAMETRIZATIONS, Parametrizable, ParametrizedProduct, VisibleParameters
from ktx.ops.protocols import AdapterRows, ExpertsAdapters
from ktx.weights.base import QuantizedTensor, WeightSource, concat_rows

# Attributes of transformers' modules with the number of experts.
COUNT_ATTRIBUTES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Attributes of transformers' modules -> fields of a clamped activation.
CLAMP_FIELDS = {"alpha": "alpha", "swiglu_alpha": "alpha", "limit": "limit", "swiglu_limit": "limit"}
NOT_SETTINGS = ("training", "num_experts")  # scalar attributes that are not settings of the replaced module
ACTIVATION = "act_fn"  # transformers' name of the activation module


class Experts(Parametrizable):
    """Packed experts with the contract of transformers' experts modules.

    It computes (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D]. The weights stay on the CPU even if `.to()` moves
    the model, which is the purpose of the operator. If the replaced module had an activation as a child, `act_fn`, this
    one has it too; a hook on it, or a replacement, makes the experts run one by one around it.

    It holds `num_experts` of the layer's experts, from id `first_expert` on, and skips the others. With a GPU, the
    first experts may be there: `on_gpu` holds them, and the MoE block calls both operators.

    Attributes:
        total_experts: number of experts of the layer.
        first_expert: id of the first expert here.
        num_experts: number of experts here.
        counts: expert statistics of the kernels, see cpu.ExpertStats.
        wait_s: seconds spent waiting for hidden states from another device.
        on_gpu: the operator with the layer's experts on a GPU, or None.
        gpu_counts: int64 [total_experts] on the device: how often each expert was selected there, or None.
        weights: packed matrices by projection.
        biases: by projection; None for a projection without bias.
        gate: the activation between the projections.
    """

    remade = ("inside",)
    derived = frozenset({"wait_s", "gpu_counts", "on_gpu"})
    reads = frozenset({"weights", "biases", "gate", "settings"})
    settings: Mapping[str, Any] = MappingProxyType({})  # scalar attributes of the replaced module, see __setattr__
    accepts_any_device = True
    on_gpu: Experts | None
    gpu_counts: torch.Tensor | None
    inside: ChildrenGuard | None
    lora: ExpertsAdapters | None = None  # set while adapters of the forward apply to it, see ktx.ops.lora
    replaced_class: type | None  # the class of the replaced module

    def __init__(self, path: str, experts: int, gate: Activation, bias: bool):
        """Creates the operator of all experts of a layer, without weights.

        Args:
            path: its module path.
            experts: number of experts of the layer.
            gate: the activation between the projections.
            bias: whether the projections have biases.
        """
        super().__init__()
        self.path, self.gate, self.has_bias = path, gate, bias
        self.replaced_class = None
        self.total_experts, self.on_gpu, self.gpu_counts, self.inside = experts, None, None, None
        self.hidden_size, self.intermediate_size, self.top_k = 0, 0, 1
        self.weights: dict[str, cpu.Packed] = {}
        self.quant_target: str | None = None
        self.transposed, self.interleaved = False, False  # layout of the replaced module's matrices
        self.biases: dict[str, torch.Tensor | None] = dict.fromkeys(PROJECTIONS)
        self.wait_s, self.gpu_experts = 0.0, 0
        # The projections in the weight file. Without a gate, up_proj serves as gate_proj too.
        self.projections: tuple[str, ...] = PROJECTIONS
        self.assign(0, experts)

    def assign(self, first: int, count: int) -> None:
        """Sets which of the layer's experts are here; call it before weights are loaded."""
        self.first_expert, self.num_experts = first, count
        self.counts = cpu.new_stats(count)

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, gpu_experts: int = 0, **kwargs: Any) -> Experts:
        """Creates the operator that replaces a transformers experts module.

        Args:
            old: the module, on the meta device.
            ctx: the operator's path, configuration, device and dtype.
            gpu_experts: number of experts to place on the layer's GPU, if the others are on the CPU.
            **kwargs: not used.

        Raises:
            UsageError: `old` is not an experts module of transformers 5, no kernel has its activation, or the layer has
                fewer than `gpu_experts` experts.
        """
        count = next((int(getattr(old, name)) for name in COUNT_ATTRIBUTES if hasattr(old, name)), 0)
        if not count:
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, which is not an experts module of transformers 5;"
                f" {KEEP_MODULE_HINT}"
            )
        contract.check_experts(old, ctx.path)
        activation = probe_experts(old, ctx.path)
        has_bias = hasattr(old, "gate_up_proj_bias") or hasattr(old, "down_proj_bias")
        new = cls(ctx.path, count, activation, has_bias)
        rows, columns = old.down_proj.shape[1:]
        new.hidden_size, new.intermediate_size = (
            (columns, rows) if getattr(old, "is_transposed", False) else (rows, columns)
        )
        new.replaced_class = type(old)
        new.transposed, new.dtype = bool(getattr(old, "is_transposed", False)), ctx.dtype
        new.interleaved = is_interleaved(old, activation)
        new.projections = PROJECTIONS if is_gated(old) else PROJECTIONS[1:]
        new.top_k = int(getattr(ctx.config, "num_experts_per_tok", 1) or 1)
        new.gpu_experts = new.splittable(gpu_experts or 0)
        # The activation stays a child, so that hooks on it run; experts on a GPU do not call it.
        if cls is Experts and isinstance(getattr(old, ACTIVATION, None), nn.Module) and activation.act in ACTIVATIONS:
            new.add_module(ACTIVATION, old.act_fn)
        scalars = (bool, int, float, str)
        new.settings = {
            n: v for n, v in vars(old).items() if isinstance(v, scalars) and n[0] != "_" and n not in NOT_SETTINGS
        }
        return new

    def ready(self) -> None:
        """Builds the guard of the activation function's module, if there is one."""
        self.inside = ChildrenGuard.of(self) if ACTIVATION in self._modules and self.weights else None

    def splittable(self, count: int) -> int:
        """Returns `count` if it is a valid number of the layer's experts on a GPU; else UsageError."""
        if not 0 <= count <= self.total_experts:
            raise UsageError(
                f"gpu_experts={count}: {self.path} has {self.total_experts} experts, it must be 0 to"
                f" {self.total_experts}"
            )
        return count

    def split_to_gpu(self, gpu_experts: Experts, count: int) -> None:
        """Assigns the first `count` experts to `gpu_experts`, an operator on a GPU. UsageError: invalid number."""
        gpu_experts.assign(0, self.splittable(count))
        self.assign(count, self.total_experts - count)
        self.on_gpu = gpu_experts
        self._modules.pop(ACTIVATION, None)  # the operator on a GPU does not call it

    def tensors(self) -> list[str]:
        """Returns the paths of the stacked projections and of their biases."""
        names = [f"{self.path}.{name}" for name in self.projections] if self.num_experts else []
        return names + [f"{name}_bias" for name in names] if self.has_bias else names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes [experts, rows, columns] of the projections by path."""
        up_shape, down_shape = (
            (self.total_experts, self.intermediate_size, self.hidden_size),
            (self.total_experts, self.hidden_size, self.intermediate_size),
        )
        return {f"{self.path}.{name}": down_shape if name == "down_proj" else up_shape for name in self.projections}

    def load(self, source: WeightSource) -> None:
        """Reads and packs the projections one by one, and releases each in the source to bound the peak of memory."""
        for name in self.projections if self.num_experts else ():
            path = f"{self.path}.{name}"
            (self.weights[name],) = cached_pack(lambda path=path: [self._pack(source, path)])  # type: ignore[misc]
            source.release([path])
            if self.has_bias:
                self.biases[name] = self._read_bias(source, path)
        self._share_up_as_gate()

    def _share_up_as_gate(self) -> None:
        """Completes the weights after loading: without a gate projection, up_proj serves as both (shared memory)."""
        if self.weights and len(self.projections) < len(PROJECTIONS):
            shared = {"gate_proj": self.weights["up_proj"]}
            self.weights = shared | self.weights | shared

    def _pack(self, source: WeightSource, path: str) -> Any:
        return pack_as(self._select(source.get_parts(path)), self.quant_target, cpu.pack_experts)

    def _select(self, parts: list[QuantizedTensor]) -> list[QuantizedTensor]:
        """Selects the experts held here from a layer's stacked experts, or from one part per expert.

        Parts are dequantized if their weight types differ, because packed experts have one type.
        """
        end, types_differ = self.first_expert + self.num_experts, len({part.qtype.name for part in parts}) > 1
        if len(parts) == self.total_experts and len(parts[0].shape) == 2:
            selected = parts[self.first_expert : end]
        else:
            stacked = parts[0] if len(parts) == 1 else concat_rows(parts, (self.total_experts, *parts[0].shape[-2:]))
            selected = [stacked if self.num_experts == self.total_experts else stacked.matrices(self.first_expert, end)]
        return [QuantizedTensor.from_float(part.dequantize()) for part in selected] if types_differ else selected

    def _read_bias(self, source: WeightSource, path: str) -> torch.Tensor:
        """Reads the biases [num_experts, n] of a projection, in f32."""
        return (
            source.get(f"{path}_bias")
            .dequantize()[self.first_expert : self.first_expert + self.num_experts]
            .contiguous()
        )

    def check_class(self) -> None:
        """UsageError where the replaced class was patched, because its methods expect unpacked weights."""
        if self.replaced_class in patched:
            raise UsageError(
                f"{self.path}: a method of {self.replaced_class.__name__} was patched,"  # type: ignore[union-attr]
                " which packed experts do not call; patch the forward of the module itself"
            )

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes the selected experts that are held here.

        Args:
            hidden: hidden states [T, D]; on another device they are copied to the CPU, and the result back.
            ids: expert ids of the layer [T, K].
            weights: routing weights [T, K].

        Returns:
            [T, D], the weighted sum over the K experts.
        """
        self.check_class()
        device = hidden.device
        if device.type != "cpu":
            start = time.perf_counter()
            hidden, ids, weights = hidden.to("cpu"), ids.to("cpu"), weights.to("cpu")
            self.wait_s += time.perf_counter() - start
        packed, biases = self.weights, self.biases
        ids = ids.to(torch.int64)
        if self.lora is not None or PARAMETRIZATIONS in self._modules or children_observed(self):
            out_one_by_one = self._compute_one_by_one(hidden, ids - self.first_expert, weights)
            if out_one_by_one is not None:  # None: the fused kernel computes the same
                return out_one_by_one.to(device)
        out = cpu.experts(
            hidden.contiguous(),
            (ids - self.first_expert if self.first_expert else ids).contiguous(),
            weights.to(torch.float32).contiguous(),
            packed["gate_proj"],
            packed["up_proj"],
            packed["down_proj"],
            biases["gate_proj"],
            biases["up_proj"],
            biases["down_proj"],
            *self.gate,
            self.counts,
        )
        return out.to(device)

    def dequantized_matrix(self, name: str, expert: int | None) -> torch.Tensor:
        """For ktx.edit: returns one expert's projection, f32 [n, k]."""
        packed = self._get_projection(name, expert)
        assert expert is not None
        return packed.matrix(expert - self.first_expert).rows(torch.arange(packed.n, device="cpu"))

    def repack(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """For ktx.edit: packs one expert's projection, in the weight type that all experts of it share.

        All experts of a projection are one block of memory, so the block is copied with the new matrix in it.
        """
        packed = self._get_projection(name, expert)
        assert expert is not None
        if dtype not in (None, packed.qtype.name):
            raise UsageError(
                f"{self.path}.{name} is {packed.qtype.name} for all experts, a single expert cannot become {dtype}"
            )
        values = checked_values(f"{self.path}.{name}", values, (packed.n, packed.k))
        repacked = cpu.pack(quantize_edited(values, [packed.qtype], self.path, packed.qtype.name))
        gate_is_up = self.weights["gate_proj"] is self.weights["up_proj"]  # without a gate
        changed = dict.fromkeys(("gate_proj", "up_proj") if gate_is_up and name != "down_proj" else (name,))
        merged = cpu.with_expert(packed, expert - self.first_expert, repacked)
        self.weights = {
            projection: merged if projection in changed else current for projection, current in self.weights.items()
        }

    def _get_projection(self, name: str, expert: int | None) -> cpu.Packed:
        """Returns a packed projection; UsageError for an unknown projection or an expert that is not here."""
        if name not in self.weights:
            raise UsageError(
                f"{self.path}: experts have {' '.join(PROJECTIONS)}, not {name!r}: ktx.edit(experts, name, expert=N)"
            )
        if expert is None or not self.first_expert <= expert < self.first_expert + self.num_experts:
            last = self.first_expert + self.num_experts - 1
            raise UsageError(f"{self.path}: expert={expert}, this module has experts {self.first_expert} to {last}")
        return self.weights[name]

    def _compute_one_by_one(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Computes the experts one by one, with parametrizations and LoRA adapters.

        If the activation is a module, it is called once for the rows [rows, width] of all selected experts, sorted by
        expert, as in transformers.

        Returns:
            [T, D]; None if there are neither parametrizations nor adapters and the activation module returned what the
            fused kernel computes.
        """
        # One row for each token and each of its experts that is here, sorted by expert.
        expert_ids, order = ids.flatten().sort(stable=True)
        is_here = (expert_ids >= 0) & (expert_ids < self.num_experts)
        expert_ids, order = expert_ids[is_here], order[is_here]
        tokens = order // ids.shape[1]
        rows_per_expert = torch.bincount(expert_ids, minlength=self.num_experts)
        up_param, down_param = self.stacked_parameters().items()
        row_counts = rows_per_expert.tolist()
        lora = self.lora  # read once: another thread's step may set it to None
        adapters = None if lora is None else lora.adapters_by_expert(tokens, len(hidden), row_counts)
        products, gated = (
            self._multiply_stacked(*up_param, hidden[tokens], row_counts, lora, adapters),
            len(up_param[1]) > 1,
        )
        if ACTIVATION in self._modules:
            activated = self.act_fn(products[0])
            is_plain = is_unmodified(activated, products[0], self.gate.act, None if gated else products[0])
            if is_plain and PARAMETRIZATIONS not in self._modules and adapters is None and not torch_mode_active():
                return None
            inner = activated * products[1] if gated else activated
        else:
            inner = reference.activate(products[0], products[-1], *self.gate)
        self.counts[: self.num_experts] += rows_per_expert
        (y,) = self._multiply_stacked(*down_param, inner, row_counts, lora, adapters)
        return torch.zeros_like(hidden).index_add_(0, tokens, y * weights.flatten()[order, None].to(hidden.dtype))

    def _multiply_stacked(
        self,
        name: str,
        projections: tuple[str, ...],
        rows: torch.Tensor,
        per_expert: list[int],
        lora: ExpertsAdapters | None,
        adapters: Sequence[Sequence[AdapterRows]] | None,
    ) -> list[torch.Tensor]:
        """Multiplies rows by a stacked parameter, expert by expert.

        Args:
            name: of the stacked parameter.
            projections: the projections in it.
            rows: [rows, k], sorted by expert.
            per_expert: number of rows of each expert.
            lora: the module's LoRA adapters.
            adapters: per expert, the adapters of its rows; None: none.

        Returns:
            [rows, n] for each projection.
        """
        biases = {projection: self.biases[projection] for projection in projections}
        if self.has_parametrization(f"{name}_bias"):
            split = self._split_stacked(getattr(self, f"{name}_bias"), len(projections), -1)
            biases = dict(zip(projections, split, strict=True))
        parametrized = ParametrizedProduct.of(self, name, self.transposed) if self.has_parametrization(name) else None
        outputs: list[list[torch.Tensor]] = [[] for _ in projections]
        for i, expert_rows in enumerate(rows.split(per_expert)):
            if not len(expert_rows):
                continue
            extra = (
                None
                if parametrized is None
                else self._split_stacked(parametrized.product(expert_rows, i), len(projections), -1)
            )
            for j, projection in enumerate(projections):
                bias = None if (expert_biases := biases[projection]) is None else expert_biases[i]
                if parametrized is None or parametrized.is_added:
                    y = cpu.linear(
                        expert_rows, self.weights[projection].matrix(i), None if bias is None else bias.float()
                    )
                    outputs[j].append(y if extra is None else y + extra[j])
                elif extra is not None:
                    outputs[j].append(extra[j] if bias is None else extra[j] + bias.to(expert_rows.dtype))
                if lora is not None and adapters is not None and adapters[i]:
                    outputs[j][-1] = lora.add_output(projection, expert_rows, i, adapters[i], outputs[j][-1])
        return [
            torch.cat(parts) if parts else rows.new_empty(0, self.weights[projection].n)
            for projection, parts in zip(projections, outputs, strict=True)
        ]

    def lora_shapes(self) -> dict[Any, tuple[str, ...]]:
        """Returns which projections a LoRA adapter is for, by the adapter's shape; empty if no adapter is supported.

        That is the case with experts on a GPU. An adapter of a stacked parameter is recognized by its shape
        [experts, out, in] alone; one of a single projection has the key (projection, shape).
        """
        if self.placement.gpu or self.on_gpu is not None:
            return {}
        shapes: dict[Any, tuple[str, ...]] = {}
        for projections in self.stacked_parameters().values():
            rows, columns = (
                (self.hidden_size, self.intermediate_size)
                if projections == ("down_proj",)
                else (self.intermediate_size, self.hidden_size)
            )
            shapes[(self.total_experts, rows * len(projections), columns)] = projections
            shapes |= {(name, (self.total_experts, rows, columns)): (name,) for name in projections}
        return shapes

    def split_projections(self, stacked: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Splits a stacked parameter [experts, out, ...] into its projections."""
        return self._split_stacked(stacked, count, 1)

    @property
    def is_transposed(self) -> bool:
        """Transformers' attribute, which PEFT reads."""
        return self.transposed

    def visible_names(self) -> frozenset[str]:
        """Returns the names of stacked parameters and biases; none if another operator has some of the experts."""
        if self.num_experts < self.total_experts:  # part of the layer
            return frozenset()
        return frozenset(
            f"{name}{end}" for name in self.stacked_parameters() for end in ("", "_bias")[: 1 + self.has_bias]
        )

    def __getattr__(self, name: str) -> Any:
        """Returns a packed weight or a scalar setting under its name in the replaced module."""
        buffers = self.__dict__.get("_buffers")
        if isinstance(buffers, VisibleParameters) and name in buffers.names:
            return self.visible_parameter(name, self.floats()[name])
        if name in self.settings:
            return self.settings[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's, but packs a tensor that is assigned to a packed parameter.

        A scalar setting of the replaced module can be changed if it is a parameter of the kernel's activation; for any
        other, a different value is a UsageError.
        """
        if (
            self.is_ready
            and not isinstance(value, Dequantized)
            and name.removesuffix("_bias") in self.stacked_parameters()
        ):
            self._assign_packed(name, value)
        elif name not in self.settings:
            super().__setattr__(name, value)
        elif value != self.settings[name]:
            if name not in CLAMP_FIELDS or self.gate.act in ACTIVATIONS:
                raise UsageError(
                    f"{self.path}.{name} is {self.settings[name]!r}: packed experts depend on it and cannot change to"
                    f" {value!r}; load the model with another configuration (ktx.load(..., config=...)), or replace"
                    " them with a module of your own"
                )
            field: Any = {CLAMP_FIELDS[name]: float(value)}
            self.gate = self.gate._replace(**field)
            self.settings = {**self.settings, name: value}

    def _assign_packed(self, name: str, value: Any) -> None:
        """Packs a tensor assigned to a packed parameter."""
        current = self.floats().get(name)
        if current is None or self.has_parametrization(name):
            raise UsageError(
                f"{self.path}.{name} cannot be assigned: it does not exist, is partly on a GPU, or is parametrized"
            )
        self.take({name: checked_values(f"{self.path}.{name}", value, current.shape)})

    def floats(self) -> dict[str, Floats]:
        """Returns views of stacked parameters and biases, for state dicts; unreadable ones with experts on a GPU."""
        self.check_loaded()
        if self.placement.gpu and self.num_experts < self.total_experts:  # the operator on the CPU lists the layer
            return {}
        floats: dict[str, Floats] = {}
        for name, projections in self.stacked_parameters().items():
            if self.placement.gpu or self.on_gpu is not None:
                floats |= self._unreadable_floats(name, len(projections))
                continue
            floats[name] = view_experts(
                [self.weights[projection] for projection in projections], self.interleaved, self.transposed
            )
            biases = [bias for projection in projections if (bias := self.biases[projection]) is not None]
            if biases:
                floats[f"{name}_bias"] = view_tensor(self._join_biases(biases))
        return floats

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        """Returns packed projections and biases of the full layer, also those on its GPU, to save them as they are."""
        self.check_loaded()
        if self.placement.gpu and self.num_experts < self.total_experts:  # the operator on the CPU lists the layer
            return {}
        parts = [part for part in (self.on_gpu, self) if part is not None and part.num_experts]
        states: dict[str, list[PackedState] | torch.Tensor] = {}
        for name in self.projections:
            states[name] = [stored.stack_state([part.weights[name] for part in parts])]
            biases = [bias.cpu() for part in parts if (bias := part.biases[name]) is not None]
            if biases:
                states[f"{name}_bias"] = torch.cat(biases)
        return states

    def _unreadable_floats(self, name: str, num_projections: int) -> dict[str, Floats]:
        """Returns the entries of `floats` for a stacked parameter with experts on a GPU, and for its bias.

        A state dict lists their names and shapes, but reading their values raises UsageError.
        """
        message = (
            f"{self.path}.{name} is on a GPU, at least in part, and packed experts cannot be read back from there;"
            " load the model on the CPU (device='cpu')"
        )
        rows, columns = (
            (self.hidden_size, self.intermediate_size)
            if name == "down_proj"
            else (num_projections * self.intermediate_size, self.hidden_size)
        )
        shape = (self.total_experts, *((columns, rows) if self.transposed else (rows, columns)))
        bias = (
            {f"{name}_bias": unreadable((self.total_experts, rows), message, hash((id(self), name, "bias")))}
            if self.has_bias
            else {}
        )
        return {name: unreadable(shape, message, hash((id(self), name)))} | bias

    def stacked_parameters(self) -> dict[str, tuple[str, ...]]:
        """Returns the replaced module's parameter names, each with the projections that it contains."""
        first, last = self.projections[:-1], self.projections[-1]
        return {"gate_up_proj" if len(first) > 1 else first[0]: first, last: (last,)}

    def _join_biases(self, biases: list[torch.Tensor]) -> torch.Tensor:
        """Joins the biases of gate and up as in the replaced module."""
        if len(biases) == 1:
            return biases[0]
        return torch.stack(biases, -1).flatten(-2) if self.interleaved else torch.cat(biases, -1)

    def _split_stacked(self, stacked: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
        """Splits a stacked parameter along `dim` into `count` (1 or 2) projections, in the module's row order."""
        if count == 1:
            return [stacked]
        if self.interleaved:
            return [stacked.index_select(dim, torch.arange(i, stacked.shape[dim], 2)) for i in range(2)]
        return list(stacked.chunk(2, dim))

    def take(self, values: dict[str, torch.Tensor]) -> None:
        """Packs other values of stacked parameters, quantized to `quant_target` if that is set; UsageError on a GPU.

        The values have the replaced module's layout.
        """
        if self.placement.gpu or self.on_gpu is not None:
            raise UsageError(
                f"{self.path}: the weights of experts on a GPU cannot be replaced; load the model on the CPU"
            )
        self.pack(values, lambda matrices: pack_as(as_weights(matrices), self.quant_target, cpu.pack_experts))

    def pack(self, values: dict[str, torch.Tensor], pack_matrices: Callable[[torch.Tensor], cpu.Packed]) -> None:
        """Replaces stacked weights and biases by new values, which are split into projections and packed.

        Args:
            values: some of the parameters, by the replaced module's names and in its layout: gate and up stacked,
                perhaps transposed.
            pack_matrices: packs the values [experts, n, k] of one projection.
        """
        weights, biases = dict(self.weights), dict(self.biases)
        for name, projections in self.stacked_parameters().items():
            if name in values:
                stacked = values[name].transpose(1, 2) if self.transposed else values[name]
                matrices = self._split_stacked(stacked, len(projections), 1)
                weights |= {
                    projection: pack_matrices(matrix) for projection, matrix in zip(projections, matrices, strict=True)
                }
            if f"{name}_bias" in values:
                split = self._split_stacked(values[f"{name}_bias"].float(), len(projections), -1)
                biases |= {projection: bias.contiguous() for projection, bias in zip(projections, split, strict=True)}
        self.weights, self.biases = weights, biases  # new dicts, so that fast paths notice the change
        self._share_up_as_gate()  # if there is no gate projection

    def weight_bytes(self) -> tuple[int, int]:
        """Returns the bytes of all experts, and those of the experts of one token."""
        total_bytes = sum(self.weights[name].nbytes for name in self.projections if name in self.weights)
        return total_bytes, total_bytes * min(self.top_k, self.total_experts) // self.total_experts

    def weights_per_token(self) -> int:
        """Returns the number of weights that a token is multiplied with here, on average over the layer's experts."""
        num_weights = sum(w.n * w.k for w in self.weights.values())
        return num_weights * min(self.top_k, self.total_experts) * self.num_experts // self.total_experts

    def total_counts(self) -> torch.Tensor:
        """Returns `counts` for all experts of the layer, with selections that were counted on a device.

        Behind the selections per expert, `counts` has bytes and times (`cpu.new_stats`), which are copied.
        """
        counts, merged = self.counts, self.counts.new_zeros(self.total_experts + len(self.counts) - self.num_experts)
        merged[self.first_expert : self.first_expert + self.num_experts] = counts[: self.num_experts]
        merged[self.total_experts :] = counts[self.num_experts :]
        gpu_counts = self.gpu_counts if self.on_gpu is None else self.on_gpu.gpu_counts
        if gpu_counts is not None:
            merged[: self.total_experts] += gpu_counts.cpu()
        return merged

    def extra_repr(self) -> str:
        """Describes the experts in the module's repr."""
        types = "/".join(w.qtype.name for w in self.weights.values()) or "not loaded"
        return f"{self.num_experts} experts, {types}, {self.gate.act}"


def experts_by_path(model: Any) -> list[tuple[str, Experts]]:
    """Returns the experts operators by module path, one per layer."""
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    gpu_parts = {id(module.on_gpu) for _, module in modules}
    return [(path, module) for path, module in modules if id(module) not in gpu_parts]
