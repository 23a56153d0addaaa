"""All experts of a layer in one kernel call, on packed weights in CPU memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.errors import UsageError
from ktx.kernels import cpu, reference
from ktx.kernels.packed_cache import cached_pack
from ktx.ops import contract
from ktx.ops import packed_state as stored
from ktx.ops.activation_probe import KEEP, PLAIN, Activation, as_usual, gate_of_experts, is_gated, is_interleaved
from ktx.ops.base import Context, as_weights, packed_as
from ktx.ops.class_patches import patched
from ktx.ops.edit import fitting, quantized
from ktx.ops.float_views import Dequantized, Floats, experts, out_of_reach, plain
from ktx.ops.guard import Inside, listened, watched
from ktx.ops.packed_state import PackedState
from ktx.ops.parameters import PARAMETRIZATIONS, OfferedParameters, Parametrizable, ParametrizedProduct
from ktx.weights.base import QuantizedTensor, WeightSource, concat_rows

if TYPE_CHECKING:
    from ktx.ops.expert_lora import ExpertsLora, Some

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
CLAMPED = {"alpha": "alpha", "swiglu_alpha": "alpha", "limit": "limit", "swiglu_limit": "limit"}  # transformers' names
OWN = ("training", "num_experts")  # attributes that are set on loading
ACTIVATION = "act_fn"  # transformers' name for the module


class Experts(Parametrizable):
    """The contract of transformers' experts modules: (hidden [T, D], ids [T, K], weights [T, K]) -> [T, D].

    Weights stay on the CPU whatever `.to()` says: that is what they are here for. `counts` is what kernels count of them, see cpu.Counted;
    `waited` are the seconds that they waited for hidden states from another device. Where the replaced module had an activation as a child, `act_fn`, it is here too:
    one who listens to it, or exchanges it, has the experts computed one by one around it.

    Of a layer's `total` experts it holds `num_experts`, from number `first` on, and skips the others. Where it lies in the CPU's memory beside a GPU, the
    first ones may be on that: `on_gpu` holds them, and the MoE block calls both. `chosen` counts choices there, int64 [total] on the device.
    """

    remade = ("inside",)
    derived = frozenset({"waited", "chosen", "on_gpu"})
    reads = frozenset({"weights", "biases", "gate", "settings"})
    settings: dict[str, Any] = {}  # scalars of the replaced module, see __setattr__
    stays = True
    on_gpu: Experts | None
    chosen: torch.Tensor | None
    inside: Inside | None
    lora: ExpertsLora | None = None  # while adapters of the forward are meant for it, see ktx.ops.lora
    replaces: type | None  # the class in whose place it is

    def __init__(self, path: str, experts: int, gate: Activation, bias: bool):
        super().__init__()
        self.path, self.gate, self.has_bias = path, gate, bias
        self.replaces = None
        self.total, self.on_gpu, self.chosen, self.inside = experts, None, None, None
        self.hidden, self.width, self.top = 0, 0, 1
        self.weights: dict[str, cpu.Packed] = {}
        self.quant_target: str | None = None
        self.transposed, self.interleaved = False, False  # how the replaced module keeps its matrices
        self.biases: dict[str, torch.Tensor | None] = dict.fromkeys(PROJECTIONS)
        self.waited, self.gpu_experts = 0.0, 0
        self.projections: tuple[str, ...] = (
            PROJECTIONS  # that the file has: without a gate, the other one is taken twice
        )
        self.assign(0, experts)

    def assign(self, first: int, count: int) -> None:
        """Before weights are loaded: which of the layer's experts are here."""
        self.first, self.num_experts = first, count
        self.counts = cpu.new_stats(count)

    @classmethod
    def from_hf(cls, old: Any, ctx: Context, gpu_experts: int = 0, **kwargs: Any) -> Experts:
        count = next((int(getattr(old, name)) for name in COUNTS if hasattr(old, name)), 0)
        if not count:
            raise UsageError(
                f"{ctx.path} is a {type(old).__name__}, which is no experts module of transformers 5; {KEEP}"
            )
        contract.experts(old, ctx.path)
        gate = gate_of_experts(old, ctx.path)
        bias = hasattr(old, "gate_up_proj_bias") or hasattr(old, "down_proj_bias")
        new = cls(ctx.path, count, gate, bias)
        rows, columns = old.down_proj.shape[1:]
        new.hidden, new.width = (columns, rows) if getattr(old, "is_transposed", False) else (rows, columns)
        new.replaces = type(old)
        new.transposed, new.dtype = bool(getattr(old, "is_transposed", False)), ctx.dtype
        new.interleaved = is_interleaved(old, gate)
        new.projections = PROJECTIONS if is_gated(old) else PROJECTIONS[1:]
        new.top = int(getattr(ctx.config, "num_experts_per_tok", 1) or 1)
        new.gpu_experts = new.splittable(gpu_experts or 0)
        if cls is Experts and isinstance(getattr(old, ACTIVATION, None), nn.Module) and gate.act in PLAIN:
            new.add_module(ACTIVATION, old.act_fn)
        scalars = (bool, int, float, str)
        new.settings = {n: v for n, v in vars(old).items() if isinstance(v, scalars) and n[0] != "_" and n not in OWN}
        return new

    def ready(self) -> None:
        self.inside = Inside.of(self) if ACTIVATION in self._modules and self.weights else None

    def splittable(self, count: int) -> int:
        """The number, if a GPU can have so many of the layer's experts; else UsageError."""
        if not 0 <= count <= self.total:
            raise UsageError(f"gpu_experts={count}: {self.path} has {self.total} experts, it must be 0 to {self.total}")
        return count

    def split_to_gpu(self, beside: Experts, count: int) -> None:
        """Leaves the first `count` experts to `beside`, a twin on a GPU. UsageError for a number that there are not."""
        beside.assign(0, self.splittable(count))
        self.assign(count, self.total - count)
        self.on_gpu = beside
        self._modules.pop(ACTIVATION, None)  # those on a GPU would not call it

    def tensors(self) -> list[str]:
        names = [f"{self.path}.{name}" for name in self.projections] if self.num_experts else []
        return names + [f"{name}_bias" for name in names] if self.has_bias else names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        wide, narrow = (self.total, self.width, self.hidden), (self.total, self.hidden, self.width)
        return {f"{self.path}.{name}": narrow if name == "down_proj" else wide for name in self.projections}

    def load(self, source: WeightSource) -> None:
        for name in self.projections if self.num_experts else ():
            full = f"{self.path}.{name}"
            (self.weights[name],) = cached_pack(lambda full=full: [self._pack(source, full)])  # type: ignore[misc]
            source.release([full])
            if self.has_bias:
                self.biases[name] = self._bias(source, full)
        self._complete()

    def _complete(self) -> None:
        """After loading: without a gate, the other projection stands for it too, in the same memory."""
        if self.weights and len(self.projections) < len(PROJECTIONS):
            twice = {"gate_proj": self.weights["up_proj"]}
            self.weights = twice | self.weights | twice

    def _pack(self, source: WeightSource, full: str) -> Any:
        return packed_as(self._held(source.parts(full)), self.quant_target, cpu.pack_experts)

    def _held(self, parts: list[QuantizedTensor]) -> list[QuantizedTensor]:
        """Of a layer's stacked experts, or of a part for each, those that are held here; floats where types differ."""
        last, mixed = self.first + self.num_experts, len({part.qtype.name for part in parts}) > 1
        if len(parts) == self.total and len(parts[0].shape) == 2:
            held = parts[self.first : last]
        else:
            whole = parts[0] if len(parts) == 1 else concat_rows(parts, (self.total, *parts[0].shape[-2:]))
            held = [whole if self.num_experts == self.total else whole.matrices(self.first, last)]
        return [QuantizedTensor.of(part.dequantize()) for part in held] if mixed else held

    def _bias(self, source: WeightSource, full: str) -> torch.Tensor:
        return source.get(f"{full}_bias").dequantize()[self.first : self.first + self.num_experts].contiguous()

    def check_class(self) -> None:
        """UsageError where the class that it replaces was patched: its methods know other weights."""
        if self.replaces in patched:
            raise UsageError(
                f"{self.path}: a method was put on {self.replaces.__name__}, which packed experts do not call; put a forward on the module itself"  # type: ignore[union-attr]
            )

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.check_class()
        device = hidden.device
        if device.type != "cpu":
            start = time.perf_counter()
            hidden, ids, weights = hidden.to("cpu"), ids.to("cpu"), weights.to("cpu")
            self.waited += time.perf_counter() - start
        w, b = self.weights, self.biases
        ids = ids.to(torch.int64)
        if self.lora is not None or PARAMETRIZATIONS in self._modules or listened(self):
            changed = self._one_by_one(hidden, ids - self.first, weights)
            if changed is not None:
                return changed.to(device)
        out = cpu.experts(
            hidden.contiguous(),
            (ids - self.first if self.first else ids).contiguous(),
            weights.to(torch.float32).contiguous(),
            w["gate_proj"],
            w["up_proj"],
            w["down_proj"],
            b["gate_proj"],
            b["up_proj"],
            b["down_proj"],
            *self.gate,
            self.counts,
        )
        return out.to(device)

    def matrix_of(self, name: str, expert: int | None) -> torch.Tensor:
        """For ktx.edit: f32 [n, k] of one expert's projection."""
        w = self._packed(name, expert)
        assert expert is not None
        return w.matrix(expert - self.first).rows(torch.arange(w.n, device="cpu"))

    def pack_again(self, values: torch.Tensor, name: str, expert: int | None, dtype: str | None) -> None:
        """For ktx.edit: all experts of a projection are of one type, so this one is packed as what they are."""
        w = self._packed(name, expert)
        assert expert is not None
        if dtype not in (None, w.qtype.name):
            raise UsageError(f"{self.path}.{name} is {w.qtype.name} for all experts, one of them cannot be {dtype}")
        values = fitting(f"{self.path}.{name}", values, (w.n, w.k))
        one = cpu.pack(quantized(values, [w.qtype], self.path, w.qtype.name))
        twice = self.weights["gate_proj"] is self.weights["up_proj"]  # without a gate
        changed = dict.fromkeys(("gate_proj", "up_proj") if twice and name != "down_proj" else (name,))
        made = cpu.with_expert(w, expert - self.first, one)
        self.weights = {each: made if each in changed else held for each, held in self.weights.items()}

    def _packed(self, name: str, expert: int | None) -> cpu.Packed:
        if name not in self.weights:
            raise UsageError(
                f"{self.path}: experts have {' '.join(PROJECTIONS)}, not {name!r}: ktx.edit(experts, name, expert=N)"
            )
        if expert is None or not self.first <= expert < self.first + self.num_experts:
            last = self.first + self.num_experts - 1
            raise UsageError(f"{self.path}: expert={expert}, here are {self.first} to {last}")
        return self.weights[name]

    def _one_by_one(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The same, with the activation called as a module, if it is one: once, for all choices [choices, width] in the order of their experts, as transformers does. Heeds parametrizations.

        None where there are none and the activation gave what it always gives.
        """
        chosen, order = ids.flatten().sort(stable=True)
        mine = (chosen >= 0) & (chosen < self.num_experts)
        chosen, order = chosen[mine], order[mine]
        tokens = order // ids.shape[1]
        per_expert = torch.bincount(chosen, minlength=self.num_experts)
        into, back = self.stacked().items()
        counts = per_expert.tolist()
        lora = self.lora  # another thread's step may take it away
        adapters = None if lora is None else lora.chosen(tokens, len(hidden), counts)
        made, gated = self._products(*into, hidden[tokens], counts, lora, adapters), len(into[1]) > 1
        if ACTIVATION in self._modules:
            seen = self.act_fn(made[0])
            usual = as_usual(seen, made[0], self.gate.act, None if gated else made[0])
            if usual and PARAMETRIZATIONS not in self._modules and adapters is None and not watched():
                return None
            middle = seen * made[1] if gated else seen
        else:
            middle = reference.activate(made[0], made[-1], *self.gate)
        self.counts[: self.num_experts] += per_expert
        (y,) = self._products(*back, middle, counts, lora, adapters)
        return torch.zeros_like(hidden).index_add_(0, tokens, y * weights.flatten()[order, None].to(hidden.dtype))

    def _products(
        self,
        name: str,
        halves: tuple[str, ...],
        rows: torch.Tensor,
        per_expert: list[int],
        lora: ExpertsLora | None,
        adapters: Sequence[Sequence[Some]] | None,
    ) -> list[torch.Tensor]:
        """Of rows [choices, k] in the order of their experts with a stacked parameter: [choices, n] of each of its halves. `adapters`: of LoRA, by expert."""
        biases = {half: self.biases[half] for half in halves}
        if self.parametrized(f"{name}_bias"):
            whole = self._halves(getattr(self, f"{name}_bias"), len(halves), -1)
            biases = dict(zip(halves, whole, strict=True))
        changed = ParametrizedProduct.of(self, name, self.transposed) if self.parametrized(name) else None
        found: list[list[torch.Tensor]] = [[] for _ in halves]
        for i, some in enumerate(rows.split(per_expert)):
            if not len(some):
                continue
            more = None if changed is None else self._halves(changed.product(some, i), len(halves), -1)
            for j, half in enumerate(halves):
                bias = None if (own := biases[half]) is None else own[i]
                if changed is None or changed.added:
                    y = cpu.linear(some, self.weights[half].matrix(i), None if bias is None else bias.float())
                    found[j].append(y if more is None else y + more[j])
                elif more is not None:
                    found[j].append(more[j] if bias is None else more[j] + bias.to(some.dtype))
                if lora is not None and adapters is not None and adapters[i]:
                    found[j][-1] = lora.added(half, some, i, adapters[i], found[j][-1])
        return [
            torch.cat(made) if made else rows.new_empty(0, self.weights[half].n)
            for half, made in zip(halves, found, strict=True)
        ]

    def adapted_shapes(self) -> dict[Any, tuple[str, ...]]:
        """What LoRA adapters can be added to, by shape [experts, out, in] of a parameter, and by name and shape of a projection: the projections there. Nothing on a GPU."""
        if self.placement.gpu or self.on_gpu is not None:
            return {}
        found: dict[Any, tuple[str, ...]] = {}
        for halves in self.stacked().values():
            rows, columns = (self.hidden, self.width) if halves == ("down_proj",) else (self.width, self.hidden)
            found[(self.total, rows * len(halves), columns)] = halves
            found |= {(half, (self.total, rows, columns)): (half,) for half in halves}
        return found

    def halved(self, both: torch.Tensor, count: int) -> list[torch.Tensor]:
        """The rows [experts, out, ...] of each of a parameter's projections."""
        return self._halves(both, count, 1)

    @property
    def is_transposed(self) -> bool:
        """As transformers' modules say it, which PEFT asks."""
        return self.transposed

    def offered(self) -> frozenset[str]:
        if self.num_experts < self.total:  # a share
            return frozenset()
        return frozenset(f"{name}{end}" for name in self.stacked() for end in ("", "_bias")[: 1 + self.has_bias])

    def __getattr__(self, name: str) -> Any:
        """A packed weight, by the name that the replaced module has for it."""
        buffers = self.__dict__.get("_buffers")
        if isinstance(buffers, OfferedParameters) and name in buffers.names:
            return self.visible_parameters(name, self.floats()[name])
        if name in self.settings:
            return self.settings[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's; a tensor that takes a packed parameter's place is packed. A scalar that the replaced module has counts where the kernel takes it, else UsageError for another value."""
        if self.is_ready and not isinstance(value, Dequantized) and name.removesuffix("_bias") in self.stacked():
            self._assigned(name, value)
        elif name not in self.settings:
            super().__setattr__(name, value)
        elif value != self.settings[name]:
            if name not in CLAMPED or self.gate.act in PLAIN:
                raise UsageError(
                    f"{self.path}.{name} is {self.settings[name]!r}: packed experts go by that and cannot have {value!r}; load the model with another"
                    " configuration (ktx.load(..., config=...)), or put a module of your own in their place"
                )
            changed: Any = {CLAMPED[name]: float(value)}
            self.gate = self.gate._replace(**changed)
            self.settings = self.settings | {name: value}

    def _assigned(self, name: str, value: Any) -> None:
        known = self.floats().get(name)
        if known is None or self.parametrized(name):
            raise UsageError(
                f"{self.path}.{name} cannot be assigned: it is not there, on a GPU in part, or parametrized"
            )
        self.take({name: fitting(f"{self.path}.{name}", value, known.shape)})

    def floats(self) -> dict[str, Floats]:
        self.check_loaded()
        if self.placement.gpu and self.num_experts < self.total:  # a share, of which the others speak
            return {}
        found: dict[str, Floats] = {}
        for name, halves in self.stacked().items():
            if self.placement.gpu or self.on_gpu is not None:
                found |= self._out_of_reach(name, len(halves))
                continue
            found[name] = experts([self.weights[half] for half in halves], self.interleaved, self.transposed)
            biases = [bias for half in halves if (bias := self.biases[half]) is not None]
            if biases:
                found[f"{name}_bias"] = plain(self._both(biases))
        return found

    def packed_state(self) -> dict[str, list[PackedState] | torch.Tensor]:
        self.check_loaded()
        if self.placement.gpu and self.num_experts < self.total:  # a share, of which the others speak
            return {}
        shares = [share for share in (self.on_gpu, self) if share is not None and share.num_experts]
        found: dict[str, list[PackedState] | torch.Tensor] = {}
        for name in self.projections:
            found[name] = [stored.stack([share.weights[name] for share in shares])]
            biases = [bias.cpu() for share in shares if (bias := share.biases[name]) is not None]
            if biases:
                found[f"{name}_bias"] = torch.cat(biases)
        return found

    def _out_of_reach(self, name: str, halves: int) -> dict[str, Floats]:
        """What `floats` says of a parameter, where experts are on a GPU."""
        about = f"{self.path}.{name} is on a GPU, at least in part, from where packed experts are not read back; load the model on the CPU for it (device='cpu')"
        rows, columns = (self.hidden, self.width) if name == "down_proj" else (halves * self.width, self.hidden)
        shape = (self.total, *((columns, rows) if self.transposed else (rows, columns)))
        bias = (
            {f"{name}_bias": out_of_reach((self.total, rows), about, hash((id(self), name, "bias")))}
            if self.has_bias
            else {}
        )
        return {name: out_of_reach(shape, about, hash((id(self), name)))} | bias

    def stacked(self) -> dict[str, tuple[str, ...]]:
        """What the replaced module calls its parameters, and the projections that are in each."""
        first, last = self.projections[:-1], self.projections[-1]
        return {"gate_up_proj" if len(first) > 1 else first[0]: first, last: (last,)}

    def _both(self, halves: list[torch.Tensor]) -> torch.Tensor:
        """Biases of gate and up in one, as the replaced module has them."""
        if len(halves) == 1:
            return halves[0]
        return torch.stack(halves, -1).flatten(-2) if self.interleaved else torch.cat(halves, -1)

    def _halves(self, both: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
        if count == 1:
            return [both]
        if self.interleaved:
            return [both.index_select(dim, torch.arange(i, both.shape[dim], 2)) for i in range(2)]
        return list(both.chunk(2, dim))

    def take(self, values: dict[str, torch.Tensor]) -> None:
        if self.placement.gpu or self.on_gpu is not None:
            raise UsageError(f"{self.path}: experts on a GPU take no other weights; load the model on the CPU for it")
        self.pack(values, lambda own: packed_as(as_weights(own), self.quant_target, cpu.pack_experts))

    def pack(self, values: dict[str, torch.Tensor], packed: Callable[[torch.Tensor], cpu.Packed]) -> None:
        """Packs parameters as the replaced module has them; `packed` makes it of matrices [experts, n, k]."""
        weights, biases = dict(self.weights), dict(self.biases)
        for name, halves in self.stacked().items():
            if name in values:
                whole = values[name].transpose(1, 2) if self.transposed else values[name]
                for half, own in zip(halves, self._halves(whole, len(halves), 1), strict=True):
                    weights[half] = packed(own)
            if f"{name}_bias" in values:
                bias = self._halves(values[f"{name}_bias"].float(), len(halves), -1)
                biases |= {half: own.contiguous() for half, own in zip(halves, bias, strict=True)}
        self.weights, self.biases = weights, biases  # others, which shortcuts see
        self._complete()

    def weight_bytes(self) -> tuple[int, int]:
        held = sum(self.weights[name].nbytes for name in self.projections if name in self.weights)
        return held, held * min(self.top, self.total) // self.total

    def weights_per_token(self) -> int:
        """Weights that a token is multiplied with here, of experts as many as its choices' share is."""
        one = sum(w.n * w.k for w in self.weights.values())
        return one * min(self.top, self.total) * self.num_experts // self.total

    def counted(self) -> torch.Tensor:
        """As `counts` of all the layer's experts, with those that were counted on a device."""
        own, numbers = self.counts, self.counts.new_zeros(self.total + len(self.counts) - self.num_experts)
        numbers[self.first : self.first + self.num_experts] = own[: self.num_experts]
        numbers[self.total :] = own[self.num_experts :]
        chosen = self.chosen if self.on_gpu is None else self.on_gpu.chosen
        if chosen is not None:
            numbers[: self.total] += chosen.cpu()
        return numbers

    def extra_repr(self) -> str:
        types = "/".join(w.qtype.name for w in self.weights.values()) or "not loaded"
        return f"{self.num_experts} experts, {types}, {self.gate.act}"


def of_layers(model: Any) -> list[tuple[str, Experts]]:
    """Experts by module path, a layer's once."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    shares = {id(module.on_gpu) for _, module in found}
    return [(path, module) for path, module in found if id(module) not in shares]
