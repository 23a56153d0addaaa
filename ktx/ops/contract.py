"""Checks of what operators rely on in the transformers modules that they replace, run when the plan is built.

There are two kinds of checks. `check_arguments` compares the arguments of the replaced forward with those that the
operator handles, because a new argument would be dropped silently. The other functions probe the module itself: they
run its own forward on small random tensors, with stubs for its children, and compare the result with what the operator
computes. So a renamed attribute, a changed order of results, a different formula or a renamed cache argument raises an
error before any weight is read. A check runs once for modules of equal class, settings and children.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ktx.cache.kv import KVCache
from ktx.errors import UsageError
from ktx.kernels import reference
from ktx.ops.activation_probe import KEEP_MODULE_HINT, probe_copy
from ktx.ops.forward_signature import ForwardSignature
from ktx.ops.masks import ranges_of
from ktx.transformers_compat import CACHE_NAMES
from ktx.utils.versions import installed_version, requirement, tested_range

LAYER_ARGS = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", "use_cache", *CACHE_NAMES)
ATTENTION_ARGS = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", *CACHE_NAMES)
ROUTER_ARGS = ("hidden_states", "e_score_correction_bias")
MOE_ARGS = ("hidden_states",)
FEED_FORWARD_ARGS = ("x", "hidden_states", "hidden_state")
EXPERTS_ARGS = (  # by position
    ("hidden_states",),
    ("top_k_index", "router_indices", "selected_experts"),
    ("top_k_weights", "routing_weights"),
)
RECORDING_ATTENTION = "ktx_contract"  # name of the attention function that records its arguments
NUM_TOKENS = 3


def unsupported_module_error(old: nn.Module, path: str, what: str) -> UsageError:
    """Returns the error for a module that an operator does not support, with the versions and the remedy.

    Args:
        old: The transformers module.
        path: Its module path.
        what: The difference, as a predicate of the class name.
    """
    return UsageError(
        f"{path}: {type(old).__name__} {what}. transformers {installed_version('transformers')} is installed, ktx was"
        f" tested with {tested_range('transformers')}: pip install '{requirement('transformers')}', or"
        f" {KEEP_MODULE_HINT}"
    )


def check_arguments(old: nn.Module, path: str, takes: Iterable[str], cache: bool = False) -> None:
    """Checks the arguments of the module's forward: the operator would drop one that it does not know.

    Args:
        old: The transformers module.
        path: Its module path.
        takes: The argument names that the operator handles.
        cache: Whether the forward must have an argument for the cache.

    Raises:
        UsageError: The forward has another argument, or no argument for the cache.
    """
    handled = set(takes)
    for name, parameter in inspect.signature(type(old).forward).parameters.items():
        if name != "self" and name not in handled and parameter.kind is not parameter.VAR_KEYWORD:
            raise unsupported_module_error(
                old, path, f"has an argument {name!r} in its forward, which the operator would drop"
            )
    if cache and not ForwardSignature.of(old).cache:
        raise unsupported_module_error(
            old, path, f"has no argument for a cache in its forward ({', '.join(CACHE_NAMES)})"
        )


def check_attributes(old: nn.Module, path: str, names: Iterable[str]) -> None:
    """Raises UsageError if the module lacks one of the attributes or children that the operator reads."""
    for name in names:
        if not hasattr(old, name):
            raise unsupported_module_error(old, path, f"has no {name!r}, which the operator reads")


def check_experts(old: nn.Module, path: str) -> None:
    """Checks the experts interface of transformers 5: forward(hidden states, expert ids, weights), in this order."""
    check_attributes(old, path, ("down_proj",))
    names = ForwardSignature.of(old).names
    if len(names) != len(EXPERTS_ARGS) or any(
        name not in accepted for name, accepted in zip(names, EXPERTS_ARGS, strict=True)
    ):
        expected = ", ".join("|".join(accepted) for accepted in EXPERTS_ARGS)
        raise unsupported_module_error(
            old,
            path,
            "does not follow the experts contract of transformers 5: its forward takes"
            f" ({', '.join(names)}), not ({expected})",
        )


class Stub(nn.Module):
    """A child module whose forward calls `function`."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function that stands in for the module."""
        return self.function(*args, **kwargs)


def cached_check(check: Callable[..., None]) -> Callable[..., None]:
    """Decorator that runs a check once for modules that are alike, because a model has the same modules in each layer.

    Modules are alike if class, scalar settings (without `layer_idx`), children and further arguments are equal.
    """
    passed: set[Any] = set()

    @functools.wraps(check)
    def checked(old: nn.Module, path: str, *args: Any) -> None:
        """Runs the check on the CPU unless it passed for such a module; an AttributeError becomes a UsageError."""
        settings = {name: value for name, value in vars(old).items() if isinstance(value, bool | int | float | str)}
        settings.pop("layer_idx", None)
        children = [(name, type(child), getattr(child, "out_features", 0)) for name, child in old._modules.items()]
        arg_keys = [type(arg) if isinstance(arg, nn.Module) else arg for arg in args]
        key = type(old), tuple(sorted(settings.items())), tuple(children), tuple(arg_keys)
        if key not in passed:
            try:
                with torch.no_grad(), torch.device("cpu"):
                    check(old, path, *args)
            except AttributeError as error:
                raise unsupported_module_error(
                    old, path, f"lacks an attribute that the operator reads ({error})"
                ) from error
            passed.add(key)

    return checked


def random_tensor(*shape: int, seed: int = 1) -> torch.Tensor:
    """Returns a random f32 tensor on the CPU, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


HIDDEN = random_tensor(1, NUM_TOKENS, 8)  # hidden states for modules whose stubs accept any width


def randomized_copy(old: nn.Module, children: dict[str, nn.Module]) -> Any:
    """Returns a copy of a module to probe, in eval mode, with random parameters and buffers, and `children` replaced.

    The module itself is on the meta device, without values. Random values make two formulas differ in the result.
    """
    tensors = {
        kind: {
            name: None if tensor is None else random_tensor(*tensor.shape, seed=i)
            for i, (name, tensor) in enumerate(getattr(old, f"_{kind}").items())
        }
        for kind in ("parameters", "buffers")
    }
    probe = probe_copy(old, modules=dict(old._modules) | children, **tensors)
    probe.__dict__["training"] = False
    return probe


def run_probe(old: nn.Module, path: str, call: Callable[[], Any]) -> Any:
    """Returns the result of `call`, which runs a probed module; raises UsageError if the module's code fails."""
    try:
        return call()
    except UsageError:
        raise
    except Exception as error:  # code of a model family
        first_line = str(error).partition("\n")[0]
        raise unsupported_module_error(
            old, path, f"does not compute as the operator expects ({type(error).__name__}: {first_line})"
        ) from error


def check_equal(old: nn.Module, path: str, what: str, found: Any, expected: torch.Tensor) -> None:
    """Raises UsageError if `found`, the module's `what`, differs from `expected` by more than rounding errors."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise unsupported_module_error(
            old, path, f"returns {what} as {shape}, the operator expects {tuple(expected.shape)}"
        )
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4):
        raise unsupported_module_error(old, path, f"computes {what} in another way than the operator does")


@cached_check
def check_layer(old: Any, path: str) -> None:
    """Checks a decoder layer: x = x + attention(norm(x)), x = x + mlp(norm(x)).

    Each child is a stub with another function, so a child that is left out, or called in another order, changes the
    result. The attention must receive the mask, the rotary tables and the cache.
    """
    check_arguments(old, path, LAYER_ARGS, cache=True)
    check_attributes(old, path, ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
    received: dict[str, Any] = {}

    def attention(*args: Any, **kwargs: Any) -> Any:
        arguments, received["cache"] = ForwardSignature.of(old.self_attn).split(args, kwargs)
        received.update(arguments)
        return arguments["hidden_states"].roll(1, -1) * 2, None

    children: dict[str, nn.Module] = {
        "input_layernorm": Stub(lambda x: x * 1.5),
        "self_attn": Stub(attention),
        "post_attention_layernorm": Stub(lambda x: x * x),
        "mlp": Stub(lambda x: x.flip(-1)),
    }
    x, cache = random_tensor(1, NUM_TOKENS, 8), object()
    inputs = {
        "hidden_states": x,
        "attention_mask": torch.zeros(1),
        "position_embeddings": (torch.ones(1), torch.zeros(1)),
    }
    call = ForwardSignature.of(old)
    out = run_probe(old, path, lambda: randomized_copy(old, children)(**call.join(dict(inputs), cache)))
    after_attention = x + (x * 1.5).roll(1, -1) * 2
    check_equal(old, path, "a layer", out, after_attention + (after_attention * after_attention).flip(-1))
    for name, value in {**inputs, "cache": cache}.items():
        if name != "hidden_states" and received.get(name) is not value:
            raise unsupported_module_error(old, path, f"does not pass its {name} to its attention")


class Recorder:
    """A cache that returns keys and values unchanged, and records in `index` for which layer they were stored."""

    index: Any = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
        """Records the layer's index and returns keys and values as they are."""
        self.index = index
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        """Returns 0: nothing is cached."""
        return 0


def _record_attention(old: Any, path: str, children: dict[str, nn.Module], embeddings: Any) -> tuple[Any, ...]:
    """Runs the forward of an attention module and captures what its attention function receives.

    Args:
        old: The transformers module.
        path: Its module path.
        children: Stubs that replace children.
        embeddings: The rotary tables.

    Returns:
        The query, key, value, scale and options passed to the attention function, the tensor that the function
        returned, and the output of the module.
    """
    from transformers import AttentionInterface

    recorded: list[Any] = []

    def record(
        module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, scaling: Any = None, **options: Any
    ) -> Any:
        """The attention function that the module calls: stores its arguments and returns a random output."""
        # A random output shows whether the module returns it unchanged but for the output projection.
        attended = random_tensor(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        recorded.extend((query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, options, attended))
        return attended, None

    AttentionInterface.register(RECORDING_ATTENTION, record)
    probe, cache = randomized_copy(old, children), Recorder()
    probe.__dict__["config"] = copy.copy(old.config)
    probe.config._attn_implementation = RECORDING_ATTENTION
    inputs = {"hidden_states": HIDDEN, "position_embeddings": embeddings, "attention_mask": None}
    out = run_probe(old, path, lambda: probe(**ForwardSignature.of(old).join(inputs, cache)))
    if not recorded:
        raise unsupported_module_error(
            old, path, "does not look up config._attn_implementation in the attention registry of transformers"
        )
    if cache.index != old.layer_idx:
        raise unsupported_module_error(
            old, path, "does not store its keys and values with cache.update(keys, values, layer_idx)"
        )
    if not isinstance(out, tuple) or len(out) < 2:
        raise unsupported_module_error(old, path, "does not return (output, attention weights)")
    return (*recorded, out[0])


def _random_rotary_tables(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns random angles [1, NUM_TOKENS, width / 2], and their cosines and sines [1, NUM_TOKENS, width]."""
    angles = random_tensor(1, NUM_TOKENS, width // 2, seed=seed)
    both_halves = torch.cat([angles, angles], -1)
    return angles, both_halves.cos(), both_halves.sin()


@cached_check
def check_attention(old: Any, path: str, half_tables: bool, window: int) -> None:
    """Checks attention: project, normalize q and k if there are norms, apply RoPE to halves, cache, attend, project.

    Args:
        old: The transformers module.
        path: Its module path.
        half_tables: Whether rotary tables lack their second half, which equals the first.
        window: The sliding window in tokens that the operator reads from the configuration; 0: none.
    """
    check_arguments(old, path, ATTENTION_ARGS, cache=True)
    check_attributes(old, path, ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx", "config"))
    width = old.head_dim
    projected = {
        name: random_tensor(1, NUM_TOKENS, getattr(old, f"{name}_proj").out_features, seed=ord(name)) for name in "qkv"
    }
    children: dict[str, nn.Module] = {f"{name}_proj": Stub(lambda x, y=y: y.clone()) for name, y in projected.items()}
    children["o_proj"] = nn.Identity()
    factors = {"q_norm": 1.5, "k_norm": 0.5}
    norms = [name for name in factors if old._modules.get(name) is not None]
    children |= {name: Stub(lambda x, factor=factors[name]: x * factor) for name in norms}
    _, cos, sin = _random_rotary_tables(width, 5)
    tables = (cos[..., : width // 2], sin[..., : width // 2]) if half_tables else (cos, sin)
    query, key, value, scale, options, attended, out = _record_attention(old, path, children, tables)
    heads = {name: y.view(1, NUM_TOKENS, -1, width).transpose(1, 2) for name, y in projected.items()}
    for name, result in (("q", query), ("k", key)):
        factor = factors[f"{name}_norm"] if f"{name}_norm" in norms else 1.0
        check_equal(
            old, path, {"q": "queries", "k": "keys"}[name], result, reference.rope(heads[name] * factor, cos, sin)
        )
    check_equal(old, path, "values", value, heads["v"])
    check_equal(old, path, "its scale", torch.tensor(scale), torch.tensor(float(old.scaling)))
    check_equal(old, path, "its output", out, attended.reshape(1, NUM_TOKENS, -1))
    sinks, passed_sinks = getattr(old, "sinks", None), options.get("s_aux")
    if (sinks is None) != (passed_sinks is None):
        raise unsupported_module_error(
            old, path, "passes other attention sinks to its attention than the operator reads (sinks)"
        )
    if "sliding_window" in options and (options["sliding_window"] or 0) != window:
        raise unsupported_module_error(
            old,
            path,
            f"attends to {options['sliding_window'] or 'all'} positions, the operator reads {window or 'all'} from its"
            " configuration",
        )


@cached_check
def check_latent_attention(old: Any, path: str, interleaved: bool) -> None:
    """Checks MLA: the scores of queries and expanded keys, the expanded values and the output, as in DeepSeek-V2.

    Scores are compared, not queries and keys, because the order of a head's columns has no effect on the operator.

    Args:
        old: The transformers module.
        path: Its module path.
        interleaved: Whether RoPE rotates neighboring columns as pairs; else column i and i + width / 2.
    """
    check_arguments(old, path, ATTENTION_ARGS, cache=True)
    dims = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
    check_attributes(old, path, (*dims, "scaling", "layer_idx", "config", "kv_a_layernorm", "kv_b_proj", "o_proj"))
    heads, nope_dim, rope_dim, v_dim, rank, q_rank = (getattr(old, name) for name in dims)
    q, kv = (
        random_tensor(1, NUM_TOKENS, heads * (nope_dim + rope_dim)),
        random_tensor(1, NUM_TOKENS, rank + rope_dim, seed=2),
    )
    width = heads * (nope_dim + v_dim)

    def expand(latent: torch.Tensor) -> torch.Tensor:
        """A linear function of the latent that needs no weight matrix: repeat it and scale the columns."""
        copies = latent.repeat(*[1] * (latent.dim() - 1), -(-width // rank))[..., :width]
        return copies * torch.linspace(0.5, 1.5, width)

    children: dict[str, nn.Module] = {
        "kv_a_proj_with_mqa": Stub(lambda x: kv.clone()),
        "kv_a_layernorm": Stub(lambda x: x * 1.5),
        "kv_b_proj": Stub(expand),
        "o_proj": nn.Identity(),
    }
    if q_rank is None:
        children["q_proj"] = Stub(lambda x: q.clone())
    else:
        check_attributes(old, path, ("q_a_proj", "q_a_layernorm", "q_b_proj"))
        # q_b_proj returns q only if it gets the output of projection (times 3) and norm (plus 1).
        normed = (HIDDEN * 3 + 1).mean(-1, keepdim=True)
        children["q_a_proj"] = Stub(lambda x: x * 3)
        children["q_a_layernorm"] = Stub(lambda x: x + 1)
        children["q_b_proj"] = Stub(lambda x: q / normed * x.mean(-1, keepdim=True))
    angles, cos, sin = _random_rotary_tables(rope_dim, 5)
    complex_table = type(old).__name__ == "DeepseekV2Attention"
    embeddings: Any = torch.polar(torch.ones_like(angles), angles) if complex_table else (cos, sin)
    query, key, value, scale, _, attended, out = _record_attention(old, path, children, embeddings)
    q_heads = q.view(1, NUM_TOKENS, heads, -1).transpose(1, 2)
    q_nope, q_rope = q_heads.split([nope_dim, rope_dim], -1)
    q_rope = reference.rope(q_rope, cos, sin, interleaved)
    k_rope = reference.rope(kv[:, None, :, rank:], cos, sin, interleaved)
    expanded = expand(kv[..., :rank] * 1.5).view(1, NUM_TOKENS, heads, -1).transpose(1, 2)
    k_nope, values = expanded.split([nope_dim, v_dim], -1)
    scores = q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope.transpose(-1, -2)
    max_score = scores.abs().amax() * old.scaling  # normalizes sums over hundreds of columns for the tolerances
    check_equal(
        old, path, "its scores", query @ key.transpose(-1, -2) * scale / max_score, scores * old.scaling / max_score
    )
    check_equal(old, path, "its values", value[..., :v_dim], values)
    check_equal(old, path, "its output", out, attended[..., :v_dim].reshape(1, NUM_TOKENS, -1))


@cached_check
def check_router(old: Any, path: str, operator: Any) -> None:
    """Checks that a router returns (logits, weights, ids) as `operator` does with the same parameters and inputs.

    So a family that scores, groups, corrects or normalizes in a new way is rejected.
    """
    check_arguments(old, path, ROUTER_ARGS)
    check_attributes(old, path, ("weight",))
    children = {
        name: randomized_copy(child, {})
        for name, child in old._modules.items()
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
    }
    count, width = old.weight.shape
    probe, operator_probe = randomized_copy(old, children), randomized_copy(operator, children)
    tensors = [*probe._parameters.items(), *probe._buffers.items()]
    for _, tensor in tensors:
        if tensor is not None:
            tensor.mul_(0.5)
    for label in ("_parameters", "_buffers"):
        operator_probe.__dict__[label] = dict(probe.__dict__[label])
    x = random_tensor(8, width, seed=3) / width**0.5
    correction = (
        {"e_score_correction_bias": random_tensor(count, seed=4) * 0.1}
        if ROUTER_ARGS[1] in ForwardSignature.of(old).names
        else {}
    )
    found = run_probe(old, path, lambda: probe(x, **correction))
    if not isinstance(found, tuple) or len(found) != 3:
        raise unsupported_module_error(old, path, "does not return (logits, weights, ids)")

    def call_operator() -> Any:
        operator_probe.ready()
        return operator_probe(x, **correction)

    expected = run_probe(old, path, call_operator)
    # Experts may be returned in any order, so both results are sorted by id.
    orders = [result[2].argsort(-1) if result[2].dtype is torch.int64 else None for result in (found, expected)]
    if orders[0] is None:
        raise unsupported_module_error(old, path, "does not return (logits, weights, ids)")
    for label, index in (("its choice of experts", 2), ("the weights of experts", 1)):
        sorted_results = [
            result[index].gather(-1, order) for result, order in zip((found, expected), orders, strict=True)
        ]
        check_equal(old, path, label, sorted_results[0], sorted_results[1])


@cached_check
def check_moe(old: Any, path: str, operator: Any) -> None:
    """Checks that an MoE block, with stubs for its router and experts, returns what `operator` returns.

    So it must call them with the same arguments, add the shared experts with the same gate, and have no other children.
    """
    check_arguments(old, path, MOE_ARGS)
    check_attributes(old.experts, f"{path}.experts", ("down_proj",))
    count, width, top_k = 4, old.experts.down_proj.shape[-2], 2
    if getattr(old.experts, "is_transposed", False):
        width = old.experts.down_proj.shape[-1]
    ids = torch.tensor([[0, 3], [2, 1], [1, 3]])
    scores, weights = random_tensor(NUM_TOKENS, count), random_tensor(NUM_TOKENS, top_k, seed=2)

    # A router stub whose weights depend on all further tensors, so that one that is not passed shows in the result.
    def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        extra = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return scores, weights + sum((value.float().mean() for value in extra), torch.zeros(())), ids

    def run_experts(x: torch.Tensor, index: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        if index.is_floating_point() or not expert_weights.is_floating_point():
            raise TypeError("experts get ids and weights in another order")
        return x * (expert_weights * (index + 1)).sum(-1, keepdim=True)

    stubs: dict[str, Callable[..., Any]] = {
        "gate": route,
        "router": route,
        "experts": run_experts,
        "shared_experts": lambda x: x * 0.3,
        "shared_expert": lambda x: x * 0.3,
        "shared_expert_gate": lambda x: x[..., :1],
    }

    def unknown_child(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            raise unsupported_module_error(old, path, f"has a child {name!r}, which the operator does not support")

        return called

    children: dict[str, nn.Module] = {
        name: Stub(stubs.get(name) or unknown_child(name)) for name, child in old._modules.items() if child is not None
    }
    probe, operator_probe = randomized_copy(old, children), randomized_copy(operator, children)
    x = random_tensor(1, NUM_TOKENS, width, seed=5)
    found = run_probe(old, path, lambda: probe(x.clone()))
    expected = run_probe(old, path, lambda: operator_probe(x.clone()))
    if isinstance(found, tuple) != isinstance(expected, tuple):
        raise unsupported_module_error(
            old, path, f"returns a {type(found).__name__} where the operator returns a {type(expected).__name__}"
        )
    check_equal(
        old,
        path,
        "the sum of its experts",  # routed and shared
        *(result[0] if isinstance(result, tuple) else result for result in (found, expected)),
    )


PAST_TOKENS, WINDOW_TOKENS, PADDING_TOKENS = 5, 4, 2
VISIBLE_KEYS = {  # first visible key, and the one after the last, of NUM_TOKENS tokens after PAST_TOKENS others
    "causal": [[0, 6], [0, 7], [0, 8]],
    "padded": [[2, 6], [2, 7], [2, 8]],
    "sliding": [[2, 6], [3, 7], [4, 8]],
}


@functools.cache
def check_masks(name: str) -> None:
    """Checks that transformers calls the mask function `name` with the past length, padding and window that it expects.

    Also checks that the length of a KVCache reaches it. The check runs once per name.

    Args:
        name: A name in transformers' registry of mask functions.

    Raises:
        UsageError: A causal, left-padded or sliding-window mask differs from the expected intervals.
    """
    from transformers import MistralConfig, masking_utils

    config = MistralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, sliding_window=WINDOW_TOKENS)
    config._attn_implementation = name
    embeds, cache = torch.zeros(1, NUM_TOKENS, 8), KVCache(config, None)
    padded = torch.ones(1, PAST_TOKENS + NUM_TOKENS, dtype=torch.int64)
    padded[:, :PADDING_TOKENS] = 0

    def build_mask(kind: str) -> Any:
        create_mask = masking_utils.create_causal_mask
        if kind == "sliding":
            create_mask = masking_utils.create_sliding_window_causal_mask
        return create_mask(config, embeds, padded if kind == "padded" else None, cache)

    try:
        with torch.no_grad(), torch.device("cpu"):
            cache.update(torch.zeros(1, 1, PAST_TOKENS, 8), torch.zeros(1, 1, PAST_TOKENS, 8), 0)
            found = {kind: build_mask(kind) for kind in VISIBLE_KEYS}
            mismatches = [
                kind
                for kind, mask in found.items()
                if (ranges := ranges_of(mask)) is None or ranges[0].tolist() != VISIBLE_KEYS[kind]
            ]
    except Exception as error:  # code of transformers
        mismatches = [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if mismatches:
        raise UsageError(
            f"transformers {installed_version('transformers')} builds its masks in another way than ktx expects"
            f" ({', '.join(mismatches)}); ktx was tested with {tested_range('transformers')}: pip install"
            f" '{requirement('transformers')}'"
        )
