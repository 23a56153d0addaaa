"""The first tokens prove a model: two tokens in one forward, then the second one again through the cache.

Both forwards attend to keys and values as the same cache stores them, so its rounding is on both sides, and what is left of the difference is small
enough for a single wrong layer to show. Hooks look at the first forward, which therefore goes child by child; the second goes the way that answers go.
A token is too little to tell a broken model from a router that was undecided between two experts, so a difference has to show in most of several
pairs of tokens before it counts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from ktx.cache.kv import KVCache
from ktx.errors import KtxError, SelfTestFailed, UsageError
from ktx.injection.rules import FILES
from ktx.ops.base import Operator
from ktx.ops.experts import Experts
from ktx.ops.gpu import offload
from ktx.ops.mla import Expansion
from ktx.ops.rope import RotaryEmbedding
from ktx.transformers_compat import cache_argument, cache_of, keeps_own_cache
from ktx.utils.torch_defaults import torch_defaults

log = logging.getLogger("ktx.engine")

TRIES = 5  # pairs of tokens; the first one that shows nothing wrong ends the test
NEAR, NEAR_HALF = 1e-3, 5e-2  # of a row's length, what it may be away: computed in f32, and in half precision
NOISY, MOST = (
    3,
    0.3,
)  # times what a rounding error does to a token, which in many layers may be more; and the most that is let pass for it
ALIKE = 1e-4  # the same, from where on rows of different tokens are no longer the same
LEAST = 4  # columns of a module's result: fewer may be alike by chance
Forward = Callable[
    [list[int], int], torch.Tensor
]  # (ids, past) -> logits [len(ids) - past, V] on the CPU of the tokens behind the first `past`, which were computed before

SelfTest = bool | Literal["engine"]  # whether a loaded model is tested; "engine": by the engine that is made of it


def asked(self_test: SelfTest) -> None:
    """UsageError for what is no SelfTest."""
    if not (isinstance(self_test, bool) or self_test == "engine"):
        raise UsageError(f"self_test={self_test!r}: takes True, False or 'engine'")


@dataclass(frozen=True)
class Fault:
    """What one pair of tokens showed, in words. `certain`: no other pair need be asked. Of a difference `far` is its size, `noise` what a rounding error makes."""

    text: str
    certain: bool = False
    far: float = math.inf
    noise: float = 0.0


@torch_defaults()
def check(model: Any, forward: Forward | None = None) -> None:
    """Raises SelfTestFailed when `forward` (default: with a KVCache) computes what cannot be right. Leaves no trace in counts, caches or random states."""
    if reason := fault(model, forward or Cached(model)):
        raise SelfTestFailed(
            f"self-test of this {model.config.model_type}: {reason} ({versions()}); run `ktx verify` with the same model and weights to compare each layer with transformers; --no-self-test (self_test=False) uses it as it is"
        )


@torch.inference_mode()
def fault(model: Any, forward: Forward) -> str:
    """What is wrong with the logits of a few tokens, in words; empty if nothing is."""
    with undisturbed(model):
        return judged(lambda number: _tried(model, forward, _pair(model.config.vocab_size, number)))


def judged(attempt: Callable[[int], Fault | None]) -> str:
    """The first fault that counts among those of attempts 0, 1, ...: a certain one, or one of those that most of TRIES show. Empty if the first attempt shows none."""
    faults: list[Fault] = []
    for number in range(TRIES):
        found = attempt(number)
        if found is None and not number:
            return ""
        if found is not None:
            faults.append(found)
            if found.certain:
                return found.text
    if 2 * len(faults) <= TRIES:
        return ""
    far, noise = (median(getattr(fault, name) for fault in faults) for name in ("far", "noise"))
    return "" if far <= min(NOISY * noise, MOST) else faults[0].text


def tolerance(model: Any, logits: torch.Tensor) -> float:
    """How far equal computations may be apart, relative to their length. A cache that quantises may be read before or behind it."""
    exact = logits.dtype == model.dtype == torch.float32 and not isinstance(model.ktx.kv_dtype, str)
    return NEAR if exact else NEAR_HALF


def away(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """Length of the difference of two rows over the second one's."""
    return float((mine.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def versions() -> str:
    """What computed it."""
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


class Cached:
    """Forwards with a KVCache, one sequence at a time, as scripts and benchmarks make them.

    A family that nobody here has read may take no such cache: it is given none and makes its own. Where its output has no cache either, tokens
    behind others are computed with them.
    """

    def __init__(self, model: Any):
        self.model, self.length = model, 0
        self.cache: Any = None
        self.own, self.known = keeps_own_cache(model), model.config.model_type in FILES
        self.goes_on = True

    def __call__(self, ids: list[int], past: int) -> torch.Tensor:
        if not self.goes_on:
            return self._forward(ids, 0)[past:]
        if past < self.length:
            self._rewind(ids, past)
        return self._forward(ids[past:], past)

    def _rewind(self, ids: list[int], past: int) -> None:
        if past and getattr(self.cache, "can_crop", False):
            self.cache.truncate(past)
            return
        self.cache, self.length = None, 0
        if past:
            self._forward(ids[:past], 0)

    def _forward(self, ids: list[int], past: int) -> torch.Tensor:
        if past or self.own:
            return self._computed(ids, past)
        self.cache = KVCache(self.model.config, self.model.ktx.kv_dtype)
        try:
            return self._computed(ids, past)
        except Exception as error:
            if self.known or isinstance(error, KtxError):
                raise
            reason = str(error).partition("\n")[0]
            log.warning("this %s takes no KVCache (%s)", self.model.config.model_type, reason)
            self.own, self.cache = True, None
            return self._computed(ids, past)

    def _computed(self, ids: list[int], past: int) -> torch.Tensor:
        out = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(past, past + len(ids))[None],
            **cache_argument(self.model, self.cache),
            use_cache=True,
        )
        offload.check(self.model)
        self.cache, self.length = cache_of(out), past + len(ids)
        self.goes_on = self.known or self.cache is not None
        logits: torch.Tensor = out.logits[0].cpu()
        return logits


def _pair(size: int, number: int) -> list[int]:
    """Two ids from where a vocabulary has ordinary tokens, other ones for each number."""
    first, second = size * (30 + 7 * number) // 100, size * (61 - 11 * number) // 100
    return [first, second if second != first else (first + 1) % size]


def _tried(model: Any, forward: Forward, ids: list[int]) -> Fault | None:
    alike: list[str] = []
    try:
        with _looking(_telling(model), 2, lambda path, rows: alike.append(path) if torch.equal(*rows) else None):
            whole = forward(ids, 0)
        step = forward(ids, 1)
    except KtxError:
        raise
    except Exception as error:  # modeling code that is given what it does not expect
        return Fault(f"a forward with a cache raises {type(error).__name__}: {str(error).partition(chr(10))[0]}", True)
    rows = whole.float()
    if not (rows.isfinite().all() and step.isfinite().all()):
        made = _rows(model, lambda: forward(ids, 0), 2)
        where = next((path for path, found in made.items() if not found.isfinite().all()), "")
        return Fault(f"logits are not finite{where and f', from {where} on'}", True)
    if not alike or not _zeros(model, alike[0]):
        if bool((rows.amax(-1) - rows.amin(-1) <= ALIKE * rows.abs().amax(-1)).any()):
            return Fault("all logits of a token are alike")
        if away(rows[0], rows[1]) < ALIKE:
            return Fault("logits of different tokens are alike")
        if alike:
            return Fault(f"{alike[0]} gives the same for different tokens, as weights of zero would")
    far, bound = away(step[-1], rows[-1]), tolerance(model, whole)
    if far <= bound:
        return None
    noise = 0.0 if _exact(model) else _noise(model, lambda: forward(ids, 0), rows[-1])
    place = _place(model, forward, ids, bound)
    return Fault(
        f"a token that is computed through the cache is {far:.1%} away from the same token computed with the one before it (at most {bound:.1%}), {place}",
        far=far,
        noise=noise,
    )


def _zeros(model: Any, path: str) -> bool:
    """Whether the file itself has a matrix of zeros below a path inside the model, as models made by hand do: that their results are alike is no fault."""
    plan = model.ktx.plan
    if model.get_submodule(path) is model.get_output_embeddings():
        return False
    names = [name for step in plan if step.path == path or step.path.startswith(f"{path}.") for name in step.tensors]
    matrices = [name for name in names if (spec := plan.source.spec(name)) is not None and len(spec.shape) > 1]
    found = next((name for name in matrices if not plan.source.get(name).dequantize().any()), None)
    if found is not None:
        log.warning("%s holds nothing but zeros in the file: the self-test does not ask whether results differ", found)
    return found is not None


def _exact(model: Any) -> bool:
    """Whether a token is the same bits whatever is computed with it, as our operators have it on a CPU: none is transformers' own or goes on from a state."""
    if model.dtype != torch.float32 or isinstance(model.ktx.kv_dtype, str) or keeps_own_cache(model):
        return False
    attends = [m for m in model.modules() if "attention" in type(m).__name__.lower() and hasattr(m, "layer_idx")]
    return KVCache(model.config).can_crop and all(getattr(module, "ours", False) for module in attends)


def _noise(model: Any, forward: Callable[[], torch.Tensor], row: torch.Tensor) -> float:
    """How far the last token's logits move from `row` when embeddings change by a rounding error: such a change turns roundings to eight bits, and these a router."""
    moved = []
    for sign in (1, -1):

        def change(module: Any, given: Any, made: torch.Tensor, sign: int = sign) -> torch.Tensor:
            pattern = torch.ones(made.shape[-1], device=made.device)
            pattern[::2] = -1
            return made * (1 + sign * 2 * torch.finfo(made.dtype).eps * pattern).to(made.dtype)

        hook = model.get_input_embeddings().register_forward_hook(change)
        try:
            moved.append(away(forward()[-1], row))
        finally:
            hook.remove()
    return max(moved)


def _place(model: Any, forward: Forward, ids: list[int], bound: float) -> str:
    """Where the two ways part, in words."""
    whole = _rows(model, lambda: forward(ids, 0), 2)
    step = _rows(model, lambda: forward(ids, 1), 1)
    for path, row in step.items():
        if path in whole and not away(row[-1], whole[path][-1]) <= bound:
            return f"from {path} on"
    return "though module by module they agree: where several are one call (ktx.ops.fusion.fused, ktx.ops.fusion.layer)"


def _rows(model: nn.Module, forward: Callable[[], Any], tokens: int) -> dict[str, torch.Tensor]:
    """What every module makes of each of the last `tokens` tokens, in the order of their ends."""
    made: dict[str, torch.Tensor] = {}
    modules = {path: m for path, m in model.named_modules() if path and not isinstance(m, Expansion)}  # pages have none
    with _looking(modules, tokens, lambda path, rows: made.update({path: rows.cpu().float()})):
        forward()
    return made


@contextmanager
def _looking(modules: Mapping[str, nn.Module], tokens: int, look: Callable[[str, torch.Tensor], Any]) -> Iterator[None]:
    """While it is entered, `look` is given what each of the modules makes, if that is floats [tokens, D]."""

    def hook(path: str) -> Callable[[Any, Any, Any], None]:
        def hear(module: Any, given: Any, made: Any) -> None:
            rows = made[0] if isinstance(made, tuple) and made else made
            if isinstance(rows, torch.Tensor) and rows.is_floating_point() and rows.dim() > 1:
                columns = rows.shape[-1]
                if columns >= LEAST and rows.numel() == tokens * columns:
                    look(path, rows.reshape(tokens, columns))

        return hear

    hooks = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for made in hooks:
            made.remove()


def _telling(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose results differ from token to token wherever their weights are not zero: those with matrices, and the parts of layers."""
    parts: set[nn.Module] = set()
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            parts.update(part for layer in module for part in layer.children())
        shared = (
            isinstance(module, Experts) and module.num_experts < module.total
        )  # it may have been chosen by no token
        if (module in parts or isinstance(module, nn.Linear | Operator)) and not shared:
            found[path] = module
    return {path: module for path, module in found.items() if not isinstance(module, RotaryEmbedding)}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Counts of experts and rotary tables are what they were before, behind it."""
    kept, tables = [], [(m, m.table) for m in model.modules() if isinstance(m, RotaryEmbedding)]
    for module in model.modules():
        if isinstance(module, Experts):
            chosen = module.chosen
            kept.append((module, module.counts.clone(), None if chosen is None else chosen.clone(), module.waited))
    try:
        yield
    finally:
        for module, counts, chosen, waited in kept:
            module.counts.copy_(counts)
            if chosen is not None and module.chosen is not None:
                module.chosen.copy_(chosen)
            module.waited = waited
        for rotary, table in tables:
            rotary.table = table
