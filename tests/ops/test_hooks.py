"""Hooks on every module inside attention, MLPs, routers and experts: the calls, shapes and numbers that they see in
transformers, and what they change counts as it does there.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from ktx.cache.kv import KVCache
from ktx.transformers_compat import cache_argument
from tests.families.test_families import IDS, Pair, relative

FAMILIES = (
    "llama",
    "qwen3_moe",
    "glm4_moe",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "phi3",  # gate and up in one matrix, and queries, keys and values in one
    "ernie4_5_moe",
)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp(request.param), request.param, "F32")
    if any(path.endswith(".experts") for path, _ in made.reference.named_modules()):
        made.reference.set_experts_implementation(
            "grouped_mm"
        )  # the default: one call of the activation for all experts
    return made


def answered(model):
    """Logits of a prompt, of a token, and of two at once."""
    cache = DynamicCache(config=model.config)
    pieces = [IDS[:, at:end] for at, end in ((0, 36), (36, 37), (37, 39))]
    return torch.cat([model(ids, **cache_argument(model, cache)).logits for ids in pieces], 1)


def inner(pair):
    """Paths of the modules inside the last layer, and inside the first where that has a state. Both models have all
    modules.
    """
    mine, theirs = (dict(model.named_modules()) for model in (pair.model, pair.reference))
    last = pair.model.config.num_hidden_layers - 1
    inside = [
        f"model.layers.{i}." for i in ([0, last] if "linear_attn" in pair.model.model.layers[0]._modules else [last])
    ]
    missing = [path for path in theirs if path not in mine]
    assert not missing, missing
    return [path for path in theirs if path.startswith(tuple(inside))]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def floats_in(args, out):
    """The numbers that a hook sees of a module's call."""
    return [tensor.float() for tensor in (*tensors_in(args), *tensors_in(out)) if tensor.is_floating_point()]


def heard(model, paths):
    """Of each module, the shapes and sums of what its hooks were given and gave, call by call."""
    calls = {path: [] for path in paths}

    def listen(path):
        def hook(module, args, kwargs, out):
            seen = [*args, *(kwargs[name] for name in ("hidden_states", "x") if name in kwargs)]
            if path.endswith("self_attn"):  # gpt-oss's has weights too by default in transformers
                out = out[0]
            calls[path].append(floats_in(seen, out))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(listen(path), with_kwargs=True) for path in paths]
    try:
        logits = answered(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


@torch.no_grad()
def test_all_hooks_at_once_see_what_they_see_in_transformers(pair):
    paths, plain = inner(pair), answered(pair.model)
    assert (
        any(path.endswith("act_fn") or path.endswith("activation_fn") for path in paths)
        or "gpt" in type(pair.model).__name__.lower()
    )
    (mine, found), (theirs, wanted) = heard(pair.model, paths), heard(pair.reference, paths)
    assert relative(found, wanted) < 1e-4 and relative(found, plain) < 1e-5
    for path in paths:
        assert len(mine[path]) == len(theirs[path]), path
        for own, other in zip(mine[path], theirs[path], strict=True):
            assert [x.shape for x in own] == [x.shape for x in other], path
            for x, y in zip(own, other, strict=True):
                if path.endswith(".experts.act_fn"):  # rows of one expert come in any order
                    x, y = (rows[rows[:, 0].argsort()] for rows in (x, y))
                if x.shape[-1] != getattr(
                    pair.model.config, "num_experts_per_tok", 0
                ):  # chosen experts come in any order
                    assert relative(x, y) < 1e-4, path
    assert relative(answered(pair.model), plain) == 0  # the fused steps are back


def halved(out):
    """A module's result with its first tensor of floats halved."""
    if isinstance(out, tuple):
        return (halved(out[0]), *out[1:])
    return out * 0.5 if isinstance(out, torch.Tensor) and out.is_floating_point() else out


@torch.no_grad()
def test_one_hook_at_a_time_is_called_and_what_it_makes_of_a_result_counts(pair):
    """A hook alone, which must not depend on another one that makes the model go the long way."""
    for path in inner(pair):
        results, calls = [], []
        for model in (pair.model, pair.reference):
            seen = []

            def hook(module, args, out, seen=seen):
                seen.append(1)
                return halved(out)

            handle = model.get_submodule(path).register_forward_hook(hook)
            results.append(answered(model))
            handle.remove()
            calls.append(len(seen))
        assert calls[0] == calls[1], path
        assert relative(*results) < 1e-4, path


@torch.no_grad()
def test_what_a_hook_makes_of_arguments_counts(pair):
    def pushed(module, args, kwargs):
        if args and isinstance(args[0], torch.Tensor):
            return (args[0] * 0.9, *args[1:]), kwargs
        return args, kwargs | {name: kwargs[name] * 0.9 for name in ("hidden_states", "x") if name in kwargs}

    for path in inner(pair):
        results = []
        for model in (pair.model, pair.reference):
            handle = model.get_submodule(path).register_forward_pre_hook(pushed, with_kwargs=True)
            results.append(answered(model))
            handle.remove()
        assert relative(*results) < 1e-4, path


@torch.no_grad()
@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_a_hook_on_all_modules_of_the_process(pair, register):
    paths = set(inner(pair))
    calls = []
    for model in (pair.model, pair.reference):
        names = {module: path for path, module in model.named_modules() if path in paths}
        called = []
        handle = register(lambda module, *_, names=names, called=called: called.append(names.get(module)))
        answered(model)
        handle.remove()
        calls.append([path for path in called if path])
    assert calls[0] == calls[1]  # the same modules in the same order


@torch.no_grad()
def test_an_activation_that_was_exchanged_or_patched_counts(pair):
    """Of an MLP, shared experts or experts, wherever transformers has it as a module."""
    names = ("act_fn", "activation_fn")
    for path in [path for path in inner(pair) if path.endswith(names)]:
        where, _, name = path.rpartition(".")
        owners = [model.get_submodule(where) for model in (pair.model, pair.reference)]
        before = [getattr(owner, name) for owner in owners]
        for owner in owners:
            setattr(owner, name, torch.nn.GELU())
        exchanged = [answered(model) for model in (pair.model, pair.reference)]
        for owner in owners:
            getattr(owner, name).forward = lambda x: x * 0.3
        patched = [answered(model) for model in (pair.model, pair.reference)]
        for owner, activation in zip(owners, before, strict=True):
            setattr(owner, name, activation)
        assert relative(*exchanged) < 1e-4 and relative(*patched) < 1e-4, path
        assert relative(exchanged[0], patched[0]) > 1e-5, path


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "glm4_moe", "phi3"])
def test_who_only_listens_changes_no_bit(tmp_path, family):
    """Of integer weights, whose activations are rounded: another way to the same numbers would show."""
    model = Pair(tmp_path, family, "Q8_0").model
    plain = answered(model)
    for path, module in model.named_modules():
        if path.startswith("model.layers.1.mlp."):
            handle = module.register_forward_hook(lambda *_: None)
            assert relative(answered(model), plain) < 1e-6, path
            handle.remove()


@torch.no_grad()
def test_a_mask_that_a_hook_edits_counts(pair):
    """Attention knocked out by a hook that writes to the mask, in place or to a copy: any code finds the mask that
    transformers makes.
    """
    pair.reference.set_attn_implementation("eager")  # sdpa leaves masks out where it can

    def knocked_out(mask):
        mask[..., 2:4] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask

    def in_place(module, args, kwargs):
        knocked_out(kwargs["attention_mask"])

    def copied(module, args, kwargs):
        return args, kwargs | {"attention_mask": knocked_out(kwargs["attention_mask"].clone())}

    layers = [path for path, module in pair.reference.named_modules() if path.endswith("self_attn")]
    for path in (layers[-1], layers[-1].rpartition(".")[0]):
        for hook in (in_place, copied):
            results = []
            for model in (pair.model, pair.reference):
                handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                results.append(answered(model))
                handle.remove()
            assert relative(*results) < 1e-4, (path, hook.__name__)


@torch.no_grad()
@pytest.mark.parametrize("pair", ["llama", "qwen3_moe"], indirect=True)
def test_attention_is_rebuilt_from_its_parts(pair):
    """As tools do that show every step of it: projections called by themselves, heads of the sizes that transformers
    has, and the mask.
    """

    def rebuilt(attention):
        def forward(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
            q, k, v = (getattr(attention, f"{name}_proj")(hidden_states).view(shape) for name in "qkv")
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
            if cache is not None:
                k, v = cache.update(k, v, attention.layer_idx)
            k, v = (repeat_kv(x, attention.num_key_value_groups) for x in (k, v))
            scores = q @ k.transpose(2, 3) * attention.scaling
            if attention_mask is not None:
                assert attention_mask.shape == (*hidden_states.shape[:1], 1, q.shape[2], k.shape[2])
                scores = scores.masked_fill(~attention_mask, -1e30)
            return attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None

        return forward

    wanted = answered(pair.reference)
    attention = pair.model.model.layers[1].self_attn
    own = pair.reference.model.layers[1].self_attn
    x = torch.randn(2, 3, pair.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert relative(getattr(attention, name)(x), getattr(own, name)(x)) < 1e-5
    for name in ("num_key_value_groups", "head_dim", "scaling", "layer_idx"):
        assert getattr(attention, name) == getattr(own, name)
    layer = pair.model.model.layers[1]

    class Rebuilt(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.forward = attention, rebuilt(attention)

    layer._modules["self_attn"] = Rebuilt()
    try:
        assert relative(answered(pair.model), wanted) < 1e-4
    finally:
        layer._modules["self_attn"] = attention


@torch.no_grad()
@pytest.mark.parametrize("pair", ["deepseek_v2", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_the_expansion_of_latents_is_listened_to_whatever_a_cache_stores(pair, kind):
    def run(cache):
        pieces = [IDS[:, :70], IDS[:, 70:71], IDS[:, 71:74]]
        return torch.cat([pair.model(ids, **cache_argument(pair.model, cache)).logits for ids in pieces], 1)

    expected, shapes = run(KVCache(pair.model.config, kind)), []
    expansion = pair.model.model.layers[1].self_attn.kv_b_proj
    handle = expansion.register_forward_hook(lambda module, args, out: shapes.append((*args[0].shape, out.shape[-1])))
    found = run(KVCache(pair.model.config, kind))
    handle.remove()
    assert shapes == [(1, 1, keys, expansion.in_features, expansion.out_features) for keys in (70, 71, 74)]
    assert relative(found, expected) < {"f32": 1e-5, "f16": 2e-3, "q8_0": 5e-2}[kind]
