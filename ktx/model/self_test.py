"""Self-test of a loaded model: computes two tokens in one forward, then the second one again through the cache.

Both forwards attend to keys and values as the same cache stores them, so its rounding affects both sides, and the
remaining difference is small enough to reveal a single wrong layer. Hooks observe the first forward, which therefore
runs child by child; the second forward takes the path that decoding takes. A single token cannot distinguish a broken
model from a router with two nearly equal experts, so a difference counts only if it shows in most of several token
pairs.
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
from ktx.families import RULE_FILES
from ktx.ops.base import Operator
from ktx.ops.experts import Experts
from ktx.ops.gpu import offload
from ktx.ops.mla import KVExpansion
from ktx.ops.rope import RotaryEmbedding
from ktx.transformers_compat import cache_argument, cache_of, keeps_own_cache
from ktx.utils.torch_defaults import torch_defaults

log = logging.getLogger("ktx.engine")

MAX_PAIRS = 5  # token pairs; the test ends if the first one shows no fault
# Max distance of two rows relative to their length: computed in f32, and in half precision.
MAX_DISTANCE_F32, MAX_DISTANCE_HALF = 1e-3, 5e-2
# A difference passes up to this multiple of a rounding error's effect, which grows over many layers, and up to this
# distance at most.
MAX_NOISE_FACTOR, MAX_NOISE_DISTANCE = 3, 0.3
MIN_DISTANCE = 1e-4  # min distance of rows of different tokens; closer rows count as equal
MIN_COLUMNS = 4  # of a module's output: fewer may be equal by chance
# (ids, past) -> logits [len(ids) - past, V] on the CPU, of the tokens after the first `past`, which are in the cache.
Forward = Callable[[list[int], int], torch.Tensor]

SelfTest = bool | Literal["engine"]  # whether a loaded model is tested; "engine": only by its engine


def check_option(self_test: SelfTest) -> None:
    """Raises UsageError if the value is not a SelfTest."""
    if not (isinstance(self_test, bool) or self_test == "engine"):
        raise UsageError(f"self_test={self_test!r}: must be True, False or 'engine'")


@dataclass(frozen=True)
class Fault:
    """The fault that one token pair showed.

    `certain` faults need no other pair. Of a difference, `distance` is the relative distance of the two results, and
    `noise` the distance that a rounding error causes.
    """

    text: str
    certain: bool = False
    distance: float = math.inf
    noise: float = 0.0


@torch_defaults()
def check(model: Any, forward: Forward | None = None) -> None:
    """Tests a model with a few tokens. Expert statistics, caches and random states are unchanged afterwards.

    Args:
        model: a loaded model.
        forward: computes the logits. Default: the model with a KVCache.

    Raises:
        SelfTestFailed: the logits are wrong; the message names the first module that differs.
    """
    if reason := find_fault(model, forward or CachedForward(model)):
        raise SelfTestFailed(
            f"self-test of this {model.config.model_type}: {reason} ({versions()});"
            " run `ktx verify` with the same model and weights to compare each layer with transformers;"
            " --no-self-test (self_test=False) uses the model as it is"
        )


@torch.inference_mode()
def find_fault(model: Any, forward: Forward) -> str:
    """Returns what is wrong with the logits of a few tokens; empty if nothing is."""
    with restore_state(model):
        return judge(lambda number: _test_pair(model, forward, _token_pair(model.config.vocab_size, number)))


def judge(attempt: Callable[[int], Fault | None]) -> str:
    """Decides whether the model fails the self-test: returns the text of the fault that counts, else "".

    `attempt(i)` tests the model with the i-th pair of tokens; if the first shows no fault, no other is tested. A
    certain fault counts at once. Another one counts if most of MAX_PAIRS attempts show one, and if their median
    distance exceeds MAX_NOISE_FACTOR times the effect of a rounding error or MAX_NOISE_DISTANCE.
    """
    faults: list[Fault] = []
    for index in range(MAX_PAIRS):
        attempt_fault = attempt(index)
        if attempt_fault is None and not index:
            return ""
        if attempt_fault is not None:
            faults.append(attempt_fault)
            if attempt_fault.certain:
                return attempt_fault.text
    if 2 * len(faults) <= MAX_PAIRS:
        return ""
    distance, noise = (median(getattr(fault, name) for fault in faults) for name in ("distance", "noise"))
    return "" if distance <= min(MAX_NOISE_FACTOR * noise, MAX_NOISE_DISTANCE) else faults[0].text


def tolerance(model: Any, logits: torch.Tensor) -> float:
    """Max relative distance of equal computations. A quantized cache may be read before or after quantization."""
    exact = logits.dtype == model.dtype == torch.float32 and not isinstance(model.ktx.kv_dtype, str)
    return MAX_DISTANCE_F32 if exact else MAX_DISTANCE_HALF


def relative_distance(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance of two rows relative to the length of the second one."""
    return float((mine.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def versions() -> str:
    """Versions of transformers and torch."""
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


class CachedForward:
    """Runs forwards with a KVCache, one sequence at a time, as scripts and benchmarks do.

    A family without a rule file may not accept a KVCache; it then creates its own cache. If its output has no cache
    either, all tokens are computed in every forward.
    """

    def __init__(self, model: Any):
        self.model, self.length = model, 0
        self.cache: Any = None
        self.uses_own_cache, self.has_rules = keeps_own_cache(model), model.config.model_type in RULE_FILES
        self.has_cache = True

    def __call__(self, ids: list[int], past: int) -> torch.Tensor:
        """Returns the logits of `ids` after the first `past`, which are in the cache (see `Forward`)."""
        if not self.has_cache:
            return self._forward(ids, 0)[past:]
        if past < self.length:
            self._rewind(ids, past)
        return self._forward(ids[past:], past)

    def _rewind(self, ids: list[int], past: int) -> None:
        """Shortens the cache to `past` tokens; one that cannot be cropped is filled again from the start."""
        if past and getattr(self.cache, "can_crop", False):
            self.cache.truncate(past)
            return
        self.cache, self.length = None, 0
        if past:
            self._forward(ids[:past], 0)

    def _forward(self, ids: list[int], past: int) -> torch.Tensor:
        """Computes the logits of `ids` after `past` cached tokens.

        Without cached tokens it creates the cache: a KVCache, or the model's own after the model has rejected that.
        """
        if past or self.uses_own_cache:
            return self._call(ids, past)
        self.cache = KVCache(self.model.config, self.model.ktx.kv_dtype)
        try:
            return self._call(ids, past)
        except Exception as error:
            if self.has_rules or isinstance(error, KtxError):
                raise
            reason = str(error).partition("\n")[0]
            log.warning("this %s does not accept a KVCache (%s)", self.model.config.model_type, reason)
            self.uses_own_cache, self.cache = True, None
            return self._call(ids, past)

    def _call(self, ids: list[int], past: int) -> torch.Tensor:
        """Calls the model and stores the cache of its output. Returns the logits [len(ids), V] on the CPU."""
        out = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(past, past + len(ids))[None],
            **cache_argument(self.model, self.cache),
            use_cache=True,
        )
        offload.raise_offload_errors(self.model)  # those of experts that the CPU computes for a GPU layer
        self.cache, self.length = cache_of(out), past + len(ids)
        # Operators of a family with rules always use the KVCache.
        self.has_cache = self.has_rules or self.cache is not None
        logits: torch.Tensor = out.logits[0].cpu()
        return logits


def _token_pair(size: int, number: int) -> list[int]:
    """Returns two ids from a part of the vocabulary with ordinary tokens; each number gives another pair."""
    first, second = size * (30 + 7 * number) // 100, size * (61 - 11 * number) // 100
    return [first, second if second != first else (first + 1) % size]


def _test_pair(model: Any, forward: Forward, ids: list[int]) -> Fault | None:
    """Returns the fault that a token pair shows, or None.

    Computes both tokens in one forward, then the second one again through the cache. Checked in this order: exceptions,
    finite logits, outputs that differ between the tokens, and equal logits of the second token in both forwards.
    """
    equal_modules: list[str] = []
    try:
        with _hooked(
            _distinguishing_modules(model),
            2,
            lambda path, rows: equal_modules.append(path) if torch.equal(*rows) else None,
        ):
            both_logits = forward(ids, 0)
        second_logits = forward(ids, 1)
    except KtxError:
        raise
    except Exception as error:  # modeling code may raise any type
        return Fault(f"a forward with a cache raises {type(error).__name__}: {str(error).partition(chr(10))[0]}", True)
    rows = both_logits.float()
    if not (rows.isfinite().all() and second_logits.isfinite().all()):
        outputs = _module_outputs(model, lambda: forward(ids, 0), 2)
        first_bad = next((path for path, output in outputs.items() if not output.isfinite().all()), "")
        return Fault(f"logits are not finite{first_bad and f', from {first_bad} on'}", True)
    if not equal_modules or not _has_zero_matrix(model, equal_modules[0]):
        if bool((rows.amax(-1) - rows.amin(-1) <= MIN_DISTANCE * rows.abs().amax(-1)).any()):
            return Fault("all logits of a token are equal")
        if relative_distance(rows[0], rows[1]) < MIN_DISTANCE:
            return Fault("logits of different tokens are equal")
        if equal_modules:
            return Fault(f"{equal_modules[0]} returns the same output for different tokens, as with zero weights")
    distance, bound = relative_distance(second_logits[-1], rows[-1]), tolerance(model, both_logits)
    if distance <= bound:
        return None
    noise = 0.0 if _is_batch_invariant(model) else _measure_noise(model, lambda: forward(ids, 0), rows[-1])
    location = _first_difference(model, forward, ids, bound)
    return Fault(
        f"a token computed through the cache differs by {distance:.1%} from the same token computed in one forward with"
        f" the one before it (at most {bound:.1%}), {location}",
        distance=distance,
        noise=noise,
    )


def _has_zero_matrix(model: Any, path: str) -> bool:
    """Whether the file itself has a matrix of zeros below a module, as hand-made models do.

    Equal outputs of such a module are not a fault.
    """
    plan = model.ktx.plan
    if model.get_submodule(path) is model.get_output_embeddings():  # its outputs are the logits, which must differ
        return False
    names = [name for step in plan if step.path == path or step.path.startswith(f"{path}.") for name in step.tensors]
    matrices = [name for name in names if (spec := plan.source.spec(name)) is not None and len(spec.shape) > 1]
    zero_name = next((name for name in matrices if not plan.source.get(name).dequantize().any()), None)
    if zero_name is not None:
        log.warning("%s is all zeros in the file: the self-test does not check whether outputs differ", zero_name)
    return zero_name is not None


def _is_batch_invariant(model: Any) -> bool:
    """Whether a token's result has the same bits in any batch, as with ktx's operators on a CPU.

    If so, rounding cannot explain a difference. Not so if an attention module is transformers' own or a layer continues
    from a state.
    """
    if model.dtype != torch.float32 or isinstance(model.ktx.kv_dtype, str) or keeps_own_cache(model):
        return False
    attention_modules = [
        module
        for module in model.modules()
        if "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
    ]
    return KVCache(model.config).can_crop and all(
        getattr(module, "uses_ktx_kernel", False) for module in attention_modules
    )


def _measure_noise(model: Any, forward: Callable[[], torch.Tensor], row: torch.Tensor) -> float:
    """Returns how far the last token's logits move from `row` if embeddings change by a rounding error.

    Such a change alters roundings to 8 bits, and these the router's choice. A difference that is not much larger than
    this is no fault.
    """
    distances = []
    for sign in (1, -1):

        def perturb(module: Any, args: Any, embeddings: torch.Tensor, sign: int = sign) -> torch.Tensor:
            pattern = torch.ones(embeddings.shape[-1], device=embeddings.device)
            pattern[::2] = -1
            return embeddings * (1 + sign * 2 * torch.finfo(embeddings.dtype).eps * pattern).to(embeddings.dtype)

        hook = model.get_input_embeddings().register_forward_hook(perturb)
        try:
            distances.append(relative_distance(forward()[-1], row))
        finally:
            hook.remove()
    return max(distances)


def _first_difference(model: Any, forward: Forward, ids: list[int], bound: float) -> str:
    """Describes for the message the first module whose outputs for the second token differ between the two forwards.

    One computes both tokens of `ids`, the other the second alone through the cache; `bound` is the accepted distance.
    """
    both_rows = _module_outputs(model, lambda: forward(ids, 0), 2)
    second_rows = _module_outputs(model, lambda: forward(ids, 1), 1)
    for path, row in second_rows.items():
        if path in both_rows and not relative_distance(row[-1], both_rows[path][-1]) <= bound:
            return f"from {path} on"
    return (
        "though each module agrees by itself: the difference is in fused calls"
        " (ktx.ops.fusion.fused, ktx.ops.fusion.layer)"
    )


def _module_outputs(model: nn.Module, forward: Callable[[], Any], tokens: int) -> dict[str, torch.Tensor]:
    """Returns the output [tokens, D] of every module for the last `tokens` tokens, in order of completion."""
    outputs: dict[str, torch.Tensor] = {}
    # Without Expansion, which forwards with a paged cache do not call.
    modules = {path: module for path, module in model.named_modules() if path and not isinstance(module, KVExpansion)}
    with _hooked(modules, tokens, lambda path, rows: outputs.update({path: rows.cpu().float()})):
        forward()
    return outputs


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], tokens: int, on_rows: Callable[[str, torch.Tensor], Any]
) -> Iterator[None]:
    """While entered, passes the path and the output of each module to `on_rows`, as float rows [tokens, columns]."""

    def make_output_hook(path: str) -> Callable[[Any, Any, Any], None]:
        """Returns a forward hook that passes the output of the module at `path` to `on_rows` as [tokens, columns].

        The hook ignores outputs that do not hold one float row per token.
        """

        def on_output(module: Any, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) and output else output
            if isinstance(rows, torch.Tensor) and rows.is_floating_point() and rows.dim() > 1:
                num_columns = rows.shape[-1]
                if num_columns >= MIN_COLUMNS and rows.numel() == tokens * num_columns:
                    on_rows(path, rows.reshape(tokens, num_columns))

        return on_output

    handles = [module.register_forward_hook(make_output_hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distinguishing_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules whose outputs differ between tokens unless weights are zero: with matrices, or parts of layers.

    Equal outputs of one of these are a fault. Rotary embeddings depend on positions only, and of split experts none may
    have been selected; both are left out.
    """
    parts: set[nn.Module] = set()
    candidates: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            parts.update(part for layer in module for part in layer.children())
        is_split = isinstance(module, Experts) and module.num_experts < module.total_experts
        if (module in parts or isinstance(module, nn.Linear | Operator)) and not is_split:
            candidates[path] = module
    return {path: module for path, module in candidates.items() if not isinstance(module, RotaryEmbedding)}


@contextmanager
def restore_state(model: nn.Module) -> Iterator[None]:
    """Restores expert statistics and rotary tables on exit, so that a test leaves no trace in them."""
    saved, tables = [], [(module, module.table) for module in model.modules() if isinstance(module, RotaryEmbedding)]
    for module in model.modules():
        if isinstance(module, Experts):
            gpu_counts = module.gpu_counts
            saved.append(
                (module, module.counts.clone(), None if gpu_counts is None else gpu_counts.clone(), module.wait_s)
            )
    try:
        yield
    finally:
        for module, counts, gpu_counts, wait_s in saved:
            module.counts.copy_(counts)
            if gpu_counts is not None and module.gpu_counts is not None:
                module.gpu_counts.copy_(gpu_counts)
            module.wait_s = wait_s
        for rotary, table in tables:
            rotary.table = table
