"""What an operator relies on in the transformers module that it replaces, checked when the plan is made.

Two kinds of checks. `parameters` compares the arguments of the replaced forward with those that the operator knows: a new one would be dropped
without a word. The other functions ask the module itself: its own forward runs on a few numbers, with stand-ins for its children, and must give what
the operator computes. So a renamed attribute, a changed order of results, another formula or a cache under another name is an error
before a weight is read. A question is asked once for modules that are alike.
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
from ktx.ops.activation_probe import KEEP, probe_copy
from ktx.ops.forward_signature import Call
from ktx.ops.masks import ranges_of
from ktx.transformers_compat import CACHE_NAMES
from ktx.utils.versions import admitted, installed, tested

LAYER = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", "use_cache", *CACHE_NAMES)
ATTENTION = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", *CACHE_NAMES)
ROUTER = ("hidden_states", "e_score_correction_bias")
MOE = ("hidden_states",)
ONE = ("x", "hidden_states", "hidden_state")
EXPERTS = (  # by position
    ("hidden_states",),
    ("top_k_index", "router_indices", "selected_experts"),
    ("top_k_weights", "routing_weights"),
)
PROBE = "ktx_contract"  # an attention function that records what it is given
TOKENS = 3


def differs(old: nn.Module, path: str, what: str) -> UsageError:
    """The error of a module that is not as an operator expects it: what, the versions, the remedy."""
    return UsageError(
        f"{path}: {type(old).__name__} {what}. transformers {installed('transformers')} is installed, ktx was tested with"
        f" {tested('transformers')}: pip install '{admitted('transformers')}', or keep the module: {KEEP}"
    )


def parameters(old: nn.Module, path: str, takes: Iterable[str], cache: bool = False) -> None:
    """UsageError for an argument of the module's forward that is not in `takes`; `cache`: and for a forward that has none for a cache."""
    known = set(takes)
    for name, parameter in inspect.signature(type(old).forward).parameters.items():
        if name != "self" and name not in known and parameter.kind is not parameter.VAR_KEYWORD:
            raise differs(old, path, f"has an argument {name!r} in its forward, which the operator would drop")
    if cache and not Call.of(old).cache:
        raise differs(old, path, f"has no argument for a cache in its forward ({', '.join(CACHE_NAMES)})")


def attributes(old: nn.Module, path: str, names: Iterable[str]) -> None:
    """UsageError for an attribute or child that the operator reads and the module does not have."""
    for name in names:
        if not hasattr(old, name):
            raise differs(old, path, f"has no {name!r}, which the operator reads")


def experts(old: nn.Module, path: str) -> None:
    """The experts contract of transformers 5: (hidden states, ids, weights), in this order."""
    attributes(old, path, ("down_proj",))
    names = Call.of(old).names
    if len(names) != len(EXPERTS) or any(name not in known for name, known in zip(names, EXPERTS, strict=True)):
        wanted = ", ".join("|".join(known) for known in EXPERTS)
        raise differs(
            old,
            path,
            f"does not keep the experts contract of transformers 5: its forward takes ({', '.join(names)}), not ({wanted})",
        )


class Stub(nn.Module):
    """A child that computes a given function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def once(check: Callable[..., None]) -> Callable[..., None]:
    """Decorator: a check is made once for modules of one class with the same numbers and children."""
    seen: set[Any] = set()

    @functools.wraps(check)
    def checked(old: nn.Module, path: str, *more: Any) -> None:
        plain = {name: value for name, value in vars(old).items() if isinstance(value, bool | int | float | str)}
        plain.pop("layer_idx", None)
        children = [(name, type(child), getattr(child, "out_features", 0)) for name, child in old._modules.items()]
        also = [type(given) if isinstance(given, nn.Module) else given for given in more]
        key = type(old), tuple(sorted(plain.items())), tuple(children), tuple(also)
        if key not in seen:
            try:
                with torch.no_grad(), torch.device("cpu"):
                    check(old, path, *more)
            except AttributeError as error:
                raise differs(old, path, f"has not all that the operator reads ({error})") from error
            seen.add(key)

    return checked


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


HIDDEN = numbers(1, TOKENS, 8)  # hidden states, where stand-ins make the width free


def twin_of(old: nn.Module, children: dict[str, nn.Module]) -> Any:
    """The module with random parameters and buffers, and with other children where `children` has them; it is evaluated, not trained."""
    own = {
        what: {
            name: None if tensor is None else numbers(*tensor.shape, seed=i)
            for i, (name, tensor) in enumerate(getattr(old, f"_{what}").items())
        }
        for what in ("parameters", "buffers")
    }
    twin = probe_copy(old, modules=dict(old._modules) | children, **own)
    twin.__dict__["training"] = False
    return twin


def answer_of(old: nn.Module, path: str, ask: Callable[[], Any]) -> Any:
    """What a module answers; UsageError when it cannot be asked."""
    try:
        return ask()
    except UsageError:
        raise
    except Exception as error:  # a family's own code
        first = str(error).partition("\n")[0]
        raise differs(
            old, path, f"does not compute as the operator expects ({type(error).__name__}: {first})"
        ) from error


def same(old: nn.Module, path: str, what: str, found: Any, expected: torch.Tensor) -> None:
    """UsageError where tensors differ by more than rounding."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise differs(old, path, f"gives {what} as {shape}, the operator expects {tuple(expected.shape)}")
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-4):
        raise differs(old, path, f"computes {what} in another way than the operator")


@once
def layer(old: Any, path: str) -> None:
    """x + attention(norm(x)), then x + mlp(norm(x)); mask, tables and cache reach the attention."""
    parameters(old, path, LAYER, cache=True)
    attributes(old, path, ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
    heard: dict[str, Any] = {}

    def attention(*args: Any, **kwargs: Any) -> Any:
        given, heard["cache"] = Call.of(old.self_attn).split(args, kwargs)
        heard.update(given)
        return given["hidden_states"].roll(1, -1) * 2, None

    children: dict[str, nn.Module] = {
        "input_layernorm": Stub(lambda x: x * 1.5),
        "self_attn": Stub(attention),
        "post_attention_layernorm": Stub(lambda x: x * x),
        "mlp": Stub(lambda x: x.flip(-1)),
    }
    x, cache = numbers(1, TOKENS, 8), object()
    given = {
        "hidden_states": x,
        "attention_mask": torch.zeros(1),
        "position_embeddings": (torch.ones(1), torch.zeros(1)),
    }
    call = Call.of(old)
    out = answer_of(old, path, lambda: twin_of(old, children)(**call.joined(dict(given), cache)))
    between = x + (x * 1.5).roll(1, -1) * 2
    same(old, path, "a layer", out, between + (between * between).flip(-1))
    for name, value in {**given, "cache": cache}.items():
        if name != "hidden_states" and heard.get(name) is not value:
            raise differs(old, path, f"does not hand its {name} to its attention")


class Recorder:
    """A cache that gives back what it is given; `index` is the layer that was named."""

    index: Any = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
        self.index = index
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return 0


def _asked(old: Any, path: str, children: dict[str, nn.Module], embeddings: Any) -> tuple[Any, ...]:
    """An attention module's forward -> query, key, value, scale and options that its attention function was given, what came back and what the module made of it."""
    from transformers import AttentionInterface

    heard: list[Any] = []

    def record(
        module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, scaling: Any = None, **options: Any
    ) -> Any:
        back = numbers(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        heard.extend((query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, options, back))
        return back, None

    AttentionInterface.register(PROBE, record)
    twin, cache = twin_of(old, children), Recorder()
    twin.__dict__["config"] = copy.copy(old.config)
    twin.config._attn_implementation = PROBE
    given = {"hidden_states": HIDDEN, "position_embeddings": embeddings, "attention_mask": None}
    out = answer_of(old, path, lambda: twin(**Call.of(old).joined(given, cache)))
    if not heard:
        raise differs(old, path, "does not ask transformers' attention registry by config._attn_implementation")
    if cache.index != old.layer_idx:
        raise differs(old, path, "does not store its keys and values by cache.update(keys, values, layer_idx)")
    if not isinstance(out, tuple) or len(out) < 2:
        raise differs(old, path, "does not return its result and its attention weights")
    return (*heard, out[0])


def _tables(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angles [1, TOKENS, width / 2], and cosines and sines for both halves."""
    angles = numbers(1, TOKENS, width // 2, seed=seed)
    twice = torch.cat([angles, angles], -1)
    return angles, twice.cos(), twice.sin()


@once
def attention(old: Any, path: str, half_tables: bool, window: int) -> None:
    """Project, norm q and k if there are norms, turn halves, store, attend, project."""
    parameters(old, path, ATTENTION, cache=True)
    attributes(old, path, ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "layer_idx", "config"))
    width = old.head_dim
    rows = {name: numbers(1, TOKENS, getattr(old, f"{name}_proj").out_features, seed=ord(name)) for name in "qkv"}
    children: dict[str, nn.Module] = {f"{name}_proj": Stub(lambda x, y=y: y.clone()) for name, y in rows.items()}
    children["o_proj"] = nn.Identity()
    factors = {"q_norm": 1.5, "k_norm": 0.5}
    normed = [name for name in factors if old._modules.get(name) is not None]
    children |= {name: Stub(lambda x, by=factors[name]: x * by) for name in normed}
    _, cos, sin = _tables(width, 5)
    tables = (cos[..., : width // 2], sin[..., : width // 2]) if half_tables else (cos, sin)
    query, key, value, scale, options, back, out = _asked(old, path, children, tables)
    heads = {name: y.view(1, TOKENS, -1, width).transpose(1, 2) for name, y in rows.items()}
    for name, found in (("q", query), ("k", key)):
        by = factors[f"{name}_norm"] if f"{name}_norm" in normed else 1.0
        same(old, path, {"q": "queries", "k": "keys"}[name], found, reference.rope(heads[name] * by, cos, sin))
    same(old, path, "values", value, heads["v"])
    same(old, path, "its scale", torch.tensor(scale), torch.tensor(float(old.scaling)))
    same(old, path, "its output", out, back.reshape(1, TOKENS, -1))
    sinks, told = getattr(old, "sinks", None), options.get("s_aux")
    if (sinks is None) != (told is None):
        raise differs(old, path, "hands other sinks to its attention than the operator reads (sinks)")
    if "sliding_window" in options and (options["sliding_window"] or 0) != window:
        raise differs(
            old,
            path,
            f"attends to {options['sliding_window'] or 'all'} positions, the operator finds {window or 'all'} in its configuration",
        )


@once
def latent_attention(old: Any, path: str, interleaved: bool) -> None:
    """MLA: scores of queries and expanded keys, expanded values, and the output, by DeepSeek-V2's formulas."""
    parameters(old, path, ATTENTION, cache=True)
    sizes = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank")
    attributes(old, path, (*sizes, "scaling", "layer_idx", "config", "kv_a_layernorm", "kv_b_proj", "o_proj"))
    heads, nope, turned, wide, rank, low = (getattr(old, name) for name in sizes)
    q, kv = numbers(1, TOKENS, heads * (nope + turned)), numbers(1, TOKENS, rank + turned, seed=2)
    width = heads * (nope + wide)

    def expand(latent: torch.Tensor) -> torch.Tensor:
        """A linear function of the latent that costs no matrix."""
        copies = latent.repeat(*[1] * (latent.dim() - 1), -(-width // rank))[..., :width]
        return copies * torch.linspace(0.5, 1.5, width)

    children: dict[str, nn.Module] = {
        "kv_a_proj_with_mqa": Stub(lambda x: kv.clone()),
        "kv_a_layernorm": Stub(lambda x: x * 1.5),
        "kv_b_proj": Stub(expand),
        "o_proj": nn.Identity(),
    }
    if low is None:
        children["q_proj"] = Stub(lambda x: q.clone())
    else:
        attributes(old, path, ("q_a_proj", "q_a_layernorm", "q_b_proj"))
        fed = (HIDDEN * 3 + 1).mean(-1, keepdim=True)
        children["q_a_proj"] = Stub(lambda x: x * 3)
        children["q_a_layernorm"] = Stub(lambda x: x + 1)
        children["q_b_proj"] = Stub(lambda x: q / fed * x.mean(-1, keepdim=True))
    angles, cos, sin = _tables(turned, 5)
    complex_table = type(old).__name__ == "DeepseekV2Attention"
    embeddings: Any = torch.polar(torch.ones_like(angles), angles) if complex_table else (cos, sin)
    query, key, value, scale, _, back, out = _asked(old, path, children, embeddings)
    by_head = q.view(1, TOKENS, heads, -1).transpose(1, 2)
    q_nope, q_rope = by_head.split([nope, turned], -1)
    q_rope = reference.rope(q_rope, cos, sin, interleaved)
    k_rope = reference.rope(kv[:, None, :, rank:], cos, sin, interleaved)
    expanded = expand(kv[..., :rank] * 1.5).view(1, TOKENS, heads, -1).transpose(1, 2)
    k_nope, values = expanded.split([nope, wide], -1)
    scores = q_nope @ k_nope.transpose(-1, -2) + q_rope @ k_rope.transpose(-1, -2)
    unit = scores.abs().amax() * old.scaling  # sums of hundreds of numbers
    same(old, path, "its scores", query @ key.transpose(-1, -2) * scale / unit, scores * old.scaling / unit)
    same(old, path, "its values", value[..., :wide], values)
    same(old, path, "its output", out, back[..., :wide].reshape(1, TOKENS, -1))


@once
def router(old: Any, path: str, mine: Any) -> None:
    """(logits, weights, ids) of a few random tokens, as the operator `mine` gives them for the same parameters."""
    parameters(old, path, ROUTER)
    attributes(old, path, ("weight",))
    children = {
        name: twin_of(child, {})
        for name, child in old._modules.items()
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
    }
    count, columns = old.weight.shape
    theirs, ours = twin_of(old, children), twin_of(mine, children)
    tensors = [*theirs._parameters.items(), *theirs._buffers.items()]
    for _, tensor in tensors:
        if tensor is not None:
            tensor.mul_(0.5)
    for what in ("_parameters", "_buffers"):
        ours.__dict__[what] = dict(theirs.__dict__[what])
    x = numbers(8, columns, seed=3) / columns**0.5
    more = {"e_score_correction_bias": numbers(count, seed=4) * 0.1} if ROUTER[1] in Call.of(old).names else {}
    found = answer_of(old, path, lambda: theirs(x, **more))
    if not isinstance(found, tuple) or len(found) != 3:
        raise differs(old, path, "does not return (logits, weights, ids)")

    def asked() -> Any:
        ours.ready()
        return ours(x, **more)

    expected = answer_of(old, path, asked)
    orders = [answer[2].argsort(-1) if answer[2].dtype is torch.int64 else None for answer in (found, expected)]
    if orders[0] is None:
        raise differs(old, path, "does not return (logits, weights, ids)")
    for what, index in (("its choice of experts", 2), ("the weights of experts", 1)):
        pair = [answer[index].gather(-1, order) for answer, order in zip((found, expected), orders, strict=True)]
        same(old, path, what, pair[0], pair[1])


@once
def moe(old: Any, path: str, mine: Any) -> None:
    """The block's result for given choices, of stand-ins for its router and its experts, as the operator `mine` gives it."""
    parameters(old, path, MOE)
    attributes(old.experts, f"{path}.experts", ("down_proj",))
    count, width, chosen = 4, old.experts.down_proj.shape[-2], 2
    if getattr(old.experts, "is_transposed", False):
        width = old.experts.down_proj.shape[-1]
    ids = torch.tensor([[0, 3], [2, 1], [1, 3]])
    scores, weights = numbers(TOKENS, count), numbers(TOKENS, chosen, seed=2)

    def route(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        extra = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        return scores, weights + sum((value.float().mean() for value in extra), torch.zeros(())), ids

    def run(x: torch.Tensor, index: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        if index.is_floating_point() or not by.is_floating_point():
            raise TypeError("experts are given ids and weights in another order")
        return x * (by * (index + 1)).sum(-1, keepdim=True)

    known: dict[str, Callable[..., Any]] = {
        "gate": route,
        "router": route,
        "experts": run,
        "shared_experts": lambda x: x * 0.3,
        "shared_expert": lambda x: x * 0.3,
        "shared_expert_gate": lambda x: x[..., :1],
    }

    def stranger(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            raise differs(old, path, f"has a child {name!r}, which the operator does not know")

        return called

    children: dict[str, nn.Module] = {
        name: Stub(known.get(name) or stranger(name)) for name, child in old._modules.items() if child is not None
    }
    theirs, ours = twin_of(old, children), twin_of(mine, children)
    x = numbers(1, TOKENS, width, seed=5)
    found = answer_of(old, path, lambda: theirs(x.clone()))
    expected = answer_of(old, path, lambda: ours(x.clone()))
    if isinstance(found, tuple) != isinstance(expected, tuple):
        raise differs(
            old, path, f"returns a {type(found).__name__} where the operator returns a {type(expected).__name__}"
        )
    same(
        old,
        path,
        "the sum of its experts",
        *(answer[0] if isinstance(answer, tuple) else answer for answer in (found, expected)),
    )


PAST, WINDOW, PADDING = 5, 4, 2
SEEN = {  # what three tokens see after PAST others: first and last key but one
    "causal": [[0, 6], [0, 7], [0, 8]],
    "padded": [[2, 6], [2, 7], [2, 8]],
    "sliding": [[2, 6], [3, 7], [4, 8]],
}


@functools.cache
def masks(name: str) -> None:
    """transformers asks the mask function `name` with the past's length, a padding and a window, as the function knows them; a cache counts its positions."""
    from transformers import MistralConfig, masking_utils

    config = MistralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, sliding_window=WINDOW)
    config._attn_implementation = name
    embeds, cache = torch.zeros(1, TOKENS, 8), KVCache(config, None)
    padded = torch.ones(1, PAST + TOKENS, dtype=torch.int64)
    padded[:, :PADDING] = 0

    def asked(kind: str) -> Any:
        make = masking_utils.create_causal_mask
        if kind == "sliding":
            make = masking_utils.create_sliding_window_causal_mask
        return make(config, embeds, padded if kind == "padded" else None, cache)

    try:
        with torch.no_grad(), torch.device("cpu"):
            cache.update(torch.zeros(1, 1, PAST, 8), torch.zeros(1, 1, PAST, 8), 0)
            found = {kind: asked(kind) for kind in SEEN}
            wrong = [
                kind
                for kind, mask in found.items()
                if (own := ranges_of(mask)) is None or own[0].tolist() != SEEN[kind]
            ]
    except Exception as error:  # transformers' own code
        wrong = [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if wrong:
        raise UsageError(
            f"transformers {installed('transformers')} makes its masks in another way than ktx knows ({', '.join(wrong)}); ktx was tested with"
            f" {tested('transformers')}: pip install '{admitted('transformers')}'"
        )
