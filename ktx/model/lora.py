"""The LoRA adapters of a loaded model: which there are, and which of them count now."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Mapping as Matrices
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ktx.devices import Device
from ktx.errors import BadFile, DoesNotFit, UsageError, did_you_mean
from ktx.hardware import format_bytes, memory
from ktx.ops.base import Operator
from ktx.ops.expert_lora import ExpertsLora
from ktx.ops.experts import PROJECTIONS, Experts
from ktx.ops.latent_lora import LatentLora
from ktx.ops.lora import Lora, Mapping, Use, Uses, home_of
from ktx.ops.mla import MLA
from ktx.transformers_compat import checkpoint_renaming
from ktx.utils.fork_handlers import Lock
from ktx.weights import gguf_lora
from ktx.weights import lora as peft_lora
from ktx.weights.gguf_files import is_gguf
from ktx.weights.gguf_lora import GGUFAdapter
from ktx.weights.lora import MERGED, WEIGHTS, Adapter, AdapterFile, LowRank, Wish

RETIRED = "\0"  # in no name that is given to an adapter
Adapted = str | Path | Wish
Fitted = list[tuple[Any, list[LowRank]]]  # modules, and what is added to their weights
Packed = list[tuple[Any, Lora, Any]]  # the same, packed
Step = list[tuple[int, Uses]]  # counts of tokens, and the adapters that they are computed with
_showing = Lock()


@dataclass
class Adapters:
    """By name. Those `in_use` count in every forward that no engine makes, and for an engine's requests that name none."""

    known: dict[str, Adapter] = field(default_factory=dict)
    mapping: Mapping = field(default_factory=Mapping)
    loras: dict[nn.Module, Lora] = field(default_factory=dict)  # by the module that has the attribute
    hooks: dict[nn.Module, RemovableHandle] = field(default_factory=dict)  # on modules that are torch's own
    # Parents, names and modules of them, once they were looked for.
    places: list[tuple[nn.Module, str, nn.Module]] | None = None
    retired: int = 0  # how many adapters have lost their name
    stepping: frozenset[Use] = frozenset()  # what an engine's latest step was computed with

    @property
    def in_use(self) -> Uses:
        return self.mapping.everywhere

    def add(self, adapter: Adapter, modules: Fitted) -> None:
        """Hangs an adapter on modules of the model, as `fitted` names them. UsageError for a name that another one has."""
        self.hang(adapter, self.packed(modules))

    def packed(self, modules: Fitted) -> Packed:
        """What `hang` takes; on any thread, also while an engine computes."""
        found: Packed = []
        for module, matrices in modules:
            lora = kind_of(module)(self.mapping, module)
            found.append((module, lora, lora.made(matrices)))
        return found

    def hang(self, adapter: Adapter, modules: Packed) -> None:
        """Hangs an adapter on modules of the model. UsageError for a name that another one has."""
        if adapter.name in self.known:
            raise UsageError(f"adapter {adapter.path}: there is one called {adapter.name!r} already; give another name")
        for module, lora, factors in modules:
            self.loras.setdefault(module, lora).factors[adapter.name] = factors
        self.places = None
        self.known[adapter.name] = adapter

    def drop(self, name: str) -> None:
        """UsageError for a name that there is not."""
        self.checked([name])
        self.use([used for used in self.in_use if used.name != name])
        for module, lora in list(self.loras.items()):
            lora.factors.pop(name, None)
            if not lora.factors:
                self._hide(module)
                del self.loras[module]
        self.places = None
        del self.known[name]

    def retire(self, name: str) -> str:
        """Leaves an adapter to those who have it: the name by which they find it from now on, and nobody else. UsageError for a name that there is not."""
        self.checked([name])
        self.use([used for used in self.in_use if used.name != name])
        self.retired += 1
        other = f"{name}{RETIRED}{self.retired}"
        for lora in self.loras.values():
            if name in lora.factors:
                lora.factors[other] = lora.factors.pop(name)
        self.known[other] = self.known.pop(name)
        return other

    @property
    def named(self) -> dict[str, Adapter]:
        """Those that can be asked for."""
        return {name: adapter for name, adapter in self.known.items() if RETIRED not in name}

    def checked(self, names: Sequence[str | Use]) -> Uses:
        """Adapters by name, or with a factor. UsageError for a name that there is not."""
        uses = tuple(dict.fromkeys(Use(one) if isinstance(one, str) else one for one in names))
        for name, _ in uses:
            if name not in self.known:
                there = f"; there are {', '.join(self.named)}" if self.named else "; none is loaded"
                raise UsageError(f"no LoRA adapter is called {name!r}{did_you_mean(name, self.named)}{there}")
        return uses

    def digest(self, uses: Uses) -> bytes:
        """Different for adapters that compute different things; empty for none."""
        each = [
            self.known[name].digest + (b"" if factor == 1 else repr(float(factor)).encode()) for name, factor in uses
        ]
        return hashlib.sha256(b"".join(each)).digest()[:16] if uses else b""

    def use(self, names: Sequence[str | Use]) -> None:
        self.mapping.everywhere = self.checked(names)
        self._show(self.stepping)

    @contextmanager
    def step(self, tokens: Step, kept: Step) -> Iterator[None]:
        """While an engine computes a step: whose its tokens are, and those whose logits are wanted. Shortcuts that stand aside for adapters do so until another step has others, because changing that costs a look at all modules."""
        if not self.known:
            yield
            return
        self._show(frozenset(use for _, uses in tokens for use in uses))
        with self.mapping.step(tokens, kept):
            yield

    def check(self, model: nn.Module) -> None:
        """UsageError, before a forward, where a module that an adapter of it hangs in was exchanged or has become torch's own: nothing would be added to its products."""
        names = {use.name for use in (*self.stepping, *self.in_use)}
        if not names:
            return
        if self.places is None:
            self.places = [
                (parent, name, own)
                for parent in model.modules()
                for name, own in parent._modules.items()
                if own is not None and own in self.loras
            ]
        there = {own for parent, name, own in self.places if parent._modules.get(name) is own}
        for module, lora in list(self.loras.items()):  # an engine may hang another one meanwhile
            is_same = module in there and isinstance(module, Operator) == lora.of_operator
            if is_same or not names.intersection(lora.factors):
                continue
            at = getattr(module, "path", None) or next(
                (name for _, name, own in self.places if own is module), "a module"
            )
            raise UsageError(
                f"{at} was exchanged, or put in floats, since adapter {min(names.intersection(lora.factors))!r} was loaded, which would not count there:"
                " call model.ktx.unload_lora(name), and model.ktx.load_lora(path) to have it on what is there now"
            )

    def rest(self) -> None:
        """After an engine's last step."""
        self._show(frozenset())

    def _show(self, stepping: frozenset[Use]) -> None:
        """Has the modules that adapters of an engine's steps, or those in use, hang in heed them: forwards of other threads may be under way beside a step."""
        with _showing:
            self.stepping = stepping
            names = {use.name for use in (*stepping, *self.in_use)}
            for module, lora in list(self.loras.items()):
                if any(name in lora.factors for name in names):
                    self._unhide(module, lora)
                else:
                    self._hide(module)

    def _unhide(self, module: nn.Module, lora: Lora) -> None:
        if not isinstance(module, Operator):
            if module not in self.hooks:
                self.hooks[module] = module.register_forward_hook(lora.listened)
        elif "lora" not in module.__dict__:
            module.lora = lora  # type: ignore[assignment]

    def _hide(self, module: nn.Module) -> None:
        if module in self.hooks:
            self.hooks.pop(module).remove()
        elif "lora" in module.__dict__:
            del module.lora


def kind_of(module: nn.Module) -> type[Lora]:
    kinds: tuple[tuple[type[nn.Module], type[Lora]], ...] = ((MLA, LatentLora), (Experts, ExpertsLora))
    return next((lora for of, lora in kinds if isinstance(module, of)), Lora)


def sizes(modules: Fitted) -> dict[Device, int]:
    """Bytes of memory that an adapter takes, by device."""
    found: dict[Device, int] = {}
    for module, several in modules:
        home = home_of(module)
        found[home] = found.get(home, 0) + kind_of(module).nbytes(module, several)
    return found


def check_memory(modules: Fitted) -> None:
    """DoesNotFit, with the numbers, for an adapter that needs more memory than is free."""
    for device, need in sizes(modules).items():
        free = (device.memory if device.gpu else memory())[1]
        if need > free:
            raise DoesNotFit(
                f"the adapter needs {format_bytes(need)} of memory on {device}, {format_bytes(free)} are free"
            )


def wishes(lora: Adapted | Sequence[Adapted] | None) -> list[Wish]:
    """What was asked for, with different names."""
    several = [] if lora is None else [lora] if isinstance(lora, str | Path | Wish) else list(lora)
    found = [Wish.of(one) for one in several]
    names = [wish.name for wish in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two LoRA adapters are called {twice!r}; name them: NAME=PATH")
    return found


def read(wish: Wish) -> AdapterFile | GGUFAdapter:
    """Reads an adapter of PEFT's or llama.cpp's. BadFile for a file that is missing or broken, UsageError for an adapter that is no plain LoRA."""
    path = wish.path
    if not path.exists():
        raise BadFile(f"adapter {path}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS).exists():
        path = gguf_lora.found_in(path) or path
    return gguf_lora.read(replace(wish, path=path)) if is_gguf(path) else peft_lora.read(wish)


def fitted(model: Any, file: AdapterFile | GGUFAdapter) -> Fitted:
    """The modules that get an adapter's matrices. UsageError or BadFile for one that there is not, that is of another kind, or whose weight has another shape."""
    if isinstance(file, GGUFAdapter):
        file = file.named(model.config, _weights(model))
    where, found = file.adapter.path, []
    rename, _ = checkpoint_renaming(model.config)
    here = {
        path if _at(model, path) else rename(f"{path}.weight").removesuffix(".weight"): several
        for path, several in file.matrices.items()
    }
    if len(here) < len(file.matrices):
        raise BadFile(f"adapter {where}: it names a module twice, by an old and by a new name")
    for path, matrices in stacked(here, model).items():
        module = _at(model, path)
        if module is None:
            raise BadFile(f"adapter {where}: the model has no module {path}; it was trained on another one")
        shapes, lookup = _shapes(module)
        if not shapes:
            home = " on a GPU" if isinstance(module, Operator) and module.placement.gpu else ""
            raise UsageError(f"adapter {where}: {path} ({type(module).__name__}{home}) takes no LoRA adapter; {MERGED}")
        known = [one.shape if not one.projection else (one.projection, one.shape) for one in matrices]
        if len(set(known)) < len(known) or any(
            key not in shapes or one.embedding is not lookup for key, one in zip(known, matrices, strict=True)
        ):
            there = " and ".join(f"{'a lookup of ' * one.embedding}{list(one.shape)}" for one in matrices)
            own = " and ".join(f"{'a lookup of ' * lookup}{list(key)}" for key in shapes if not isinstance(key[0], str))
            raise BadFile(f"adapter {where}: {path} is {there} there, the model's is {own}")
        if not all(bool(half.isfinite().all()) for one in matrices for half in (one.a, one.b)):
            raise BadFile(f"adapter {where}: its matrices of {path} hold NaN or infinity, or do at this scale")
        found.append((module, matrices))
    for path, shape in file.copies.items():
        module = _at(model, path)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        right = _shapes(module)[0] if module is embeddings or module is head else []
        if not right:
            raise UsageError(
                f"adapter {where}: it holds the whole weight of {path}, which is none of the model's embeddings; {MERGED}"
            )
        expected = next(iter(right))[::-1] if module is embeddings else next(iter(right))
        if expected != shape:
            raise BadFile(
                f"adapter {where}: it was trained with {path} of {list(shape)}, the model's is {list(expected)}: other tokens; {MERGED}"
            )
    return found


def _weights(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Of each matrix of the model, as files are asked for it: its module's path, of stacked experts the projection too."""
    found: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            found |= {f"{path}.{name}": (path, name) for name in module.projections}
        else:
            found[f"{path}.weight"] = path, ""
        if isinstance(module, MLA):
            found[f"{path}.kv_b_proj.weight"] = f"{path}.kv_b_proj", ""
    return found


ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def stacked(matrices: Matrices[str, list[LowRank]], model: nn.Module) -> dict[str, list[LowRank]]:
    """The same with experts that were adapted one by one together, as their layer has them: those that were not are zeros."""
    found: dict[str, list[LowRank]] = {}
    apart: dict[tuple[str, str], dict[int, LowRank]] = {}
    for path, several in matrices.items():
        hit = ONE_EXPERT.fullmatch(path)
        if hit is None or not isinstance(_at(model, hit["experts"]), Experts):
            found[path] = several
        else:
            name = MIXTRAL.get(hit["projection"], hit["projection"])
            apart.setdefault((hit["experts"], name), {})[int(hit["number"])] = several[0]
    for (path, name), ones in apart.items():
        owner = _at(model, path)
        assert isinstance(owner, Experts)
        found.setdefault(path, []).append(_together(ones, name, owner.total, path))
    return found


def _together(ones: dict[int, LowRank], projection: str, total: int, path: str) -> LowRank:
    first, rank = next(iter(ones.values())), max(one.a.shape[0] for one in ones.values())
    if projection not in PROJECTIONS or max(ones) >= total or len({one.shape for one in ones.values()}) > 1:
        raise BadFile(
            f"{path}: an adapter of {projection} of experts {min(ones)} to {max(ones)}; there are {total}, with {' '.join(PROJECTIONS)}"
        )
    a, b = first.a.new_zeros(total, rank, first.a.shape[-1]), first.b.new_zeros(total, first.b.shape[0], rank)
    for number, one in ones.items():
        a[number, : one.a.shape[0]], b[number, :, : one.b.shape[1]] = one.a, one.b
    return LowRank(a, b, projection=projection)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a path, of an MLA's kv_b_proj the MLA; None where there is none."""
    above, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(above)
        return owner if name == "kv_b_proj" and isinstance(owner, MLA) else owner.get_submodule(name)
    except AttributeError:
        return None


def _shapes(module: Any) -> tuple[Collection[Any], bool]:
    """Of the weights that adapters can be added to here, and whether that is a lookup of tokens; none where they cannot."""
    if isinstance(module, MLA):
        rows = module.num_heads * (module.qk_nope_head_dim + module.v_head_dim)
        return ([] if module.placement.gpu else [(rows, module.kv_lora_rank)]), False
    if isinstance(module, Experts):
        return module.adapted_shapes(), False
    if isinstance(module, nn.Embedding):
        return [(module.embedding_dim, module.num_embeddings)], True
    return ([(module.out_features, module.in_features)] if isinstance(module, nn.Linear) else []), False
