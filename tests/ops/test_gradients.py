"""Gradients through a loaded model are transformers' on the same weights, or an error says that there are none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ktx.cache.batch import BatchMetadata, SequenceSpan
from ktx.cache.kv import KVCache
from ktx.cache.paged import PagedCache
from ktx.errors import NoGradient
from ktx.kernels import fused_steps as steps
from ktx.ops.experts import Experts
from ktx.ops.linear import Linear
from ktx.ops.mla import MLA
from ktx.ops.moe import MoE
from ktx.ops.norm import RMSNorm
from tests.families.test_families import IDS, Pair, mixed, relative
from tests.support.tiny_models import FAMILIES

NEAR = 1e-4  # f32 in another order; the promise is 1e-3
SOME = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]  # what the families differ by


class Frozen(Pair):
    """Both models with their weights frozen, and embeddings of tokens for both."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.reference.requires_grad_(False)

    def embeds(self, ids=IDS[:, :12]):
        with torch.no_grad():
            return self.reference.get_input_embeddings()(ids)

    def apart(self, what, inputs):
        """How far the gradients of what(model, inputs) are from transformers'."""
        return relative(gradient(self.model, what, inputs), gradient(self.reference, what, inputs))


def gradient(model, what, inputs):
    x = inputs.clone().requires_grad_()
    what(model, x).backward()
    assert x.grad is not None and x.grad.any()
    return x.grad


def loss(model, x, **more):
    return model(inputs_embeds=x, labels=IDS[:, : x.shape[1]].expand(len(x), -1), **({"use_cache": False} | more)).loss


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each family one pair, made when it is first asked for."""
    made: dict[str, Frozen] = {}

    def pair(family):
        if family not in made:
            made[family] = Frozen(tmp_path_factory.mktemp(family), family, "F32")
        return made[family]

    return pair


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_of_every_family(pairs, family):
    """A loss, a hidden state and the likeliest token's logit: one token, a few, and some of a whole page and beyond."""
    pair = pairs(family)
    for tokens in (1, 12, 71):
        x = pair.embeds(IDS[:, :tokens])
        assert pair.apart(lambda model, x: model(inputs_embeds=x).logits[0, -1].max(), x) < NEAR
        assert pair.apart(hidden_state, x) < NEAR
        assert tokens == 1 or pair.apart(loss, x) < NEAR


def hidden_state(model, x):
    return model(inputs_embeds=x, output_hidden_states=True, use_cache=False).hidden_states[1].pow(2).sum()


@pytest.mark.parametrize(
    "family,config",
    [
        ("deepseek_v3", {"num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 24, "v_head_dim": 40}),
        ("deepseek_v2", {"hidden_size": 192, "moe_intermediate_size": 40, "n_shared_experts": 2, "q_lora_rank": 64}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 33, "num_experts": 5}),
        ("glm4_moe", {"partial_rotary_factor": 0.5, "n_shared_experts": 2}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 48}),
    ],
)
def test_odd_shapes(tmp_path, family, config):
    pair = Frozen(tmp_path, family, "F32", config)
    assert pair.apart(loss, pair.embeds(IDS[:, :67])) < NEAR


@pytest.mark.parametrize("family", SOME)
def test_rows_of_a_batch_and_padding(pairs, family):
    pair = pairs(family)
    x, mask = pair.embeds(torch.cat([IDS[:, :9], IDS[:, 20:29]])), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0

    def what(model, x):
        logits = model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits
        return logits[0].pow(2).mean() + logits[1, 4:].pow(2).mean()

    assert pair.apart(what, x) < NEAR


@pytest.mark.parametrize("family", SOME)
def test_integrated_gradients(pairs, family):
    """From nothing to the embeddings in steps: attributions as transformers', whose sum is what the output gains."""
    pair, x = pairs(family), pairs(family).embeds(IDS[:, :7])
    target = lambda model, x: model(inputs_embeds=x, use_cache=False).logits[:, -1, 17].sum()  # noqa: E731
    places = ((torch.arange(5) + 0.5) / 5).view(-1, 1, 1)
    attributions = [gradient(model, target, places * x).mean(0) * x[0] for model in (pair.model, pair.reference)]
    assert relative(*attributions) < NEAR


@pytest.mark.parametrize("family", SOME)
def test_a_soft_prompt_learns_what_it_learns_in_transformers(pairs, family):
    pair, x = pairs(family), pairs(family).embeds()
    curves = []
    for model in (pair.model, pair.reference):
        prompt = torch.randn(1, 3, x.shape[2], generator=torch.Generator().manual_seed(1)).requires_grad_()
        curve, optimizer = [], torch.optim.Adam([prompt], lr=0.05)
        labels = torch.cat([torch.full((1, 3), -100), IDS[:, :12]], 1)
        for _ in range(4):
            optimizer.zero_grad()
            found = model(inputs_embeds=torch.cat([prompt, x], 1), labels=labels).loss
            found.backward()
            optimizer.step()
            curve.append(found.item())
        curves.append(torch.tensor(curve))
    assert relative(*curves) < NEAR and curves[0][-1] < curves[0][0]


def listening(model, hook):
    """A hook on the first decoder layer."""
    return model.get_decoder().layers[0].register_forward_hook(hook)


def states_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", SOME)
def test_gradients_of_hidden_states_that_a_hook_asks_for(pairs, family):
    """Token ids go in, so nothing requires grad until a hook says so; and a steering vector is added that does."""
    pair = pairs(family)
    for tokens in (1, 12, 40):
        ids, found = IDS[:, :tokens], []
        steer = torch.randn(pair.model.config.hidden_size) / 10
        for model in (pair.model, pair.reference):
            seen: list[torch.Tensor] = []
            handle = listening(model, lambda m, i, output, seen=seen: seen.append(states_of(output).requires_grad_()))
            model(input_ids=ids, use_cache=False).logits.pow(2).mean().backward()
            handle.remove()
            vector = steer.clone().requires_grad_()

            def add(module, inputs, output, vector=vector):
                more = states_of(output) + vector
                return (more, *output[1:]) if isinstance(output, tuple) else more

            handle = listening(model, add)
            model(input_ids=ids, use_cache=False).logits.pow(2).mean().backward()
            handle.remove()
            found.append((seen[0].grad, vector.grad))
        (mine, steered), (right, expected) = found
        assert relative(mine, right) < NEAR and relative(steered, expected) < NEAR


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_hidden_states_that_require_grad_after_layers_were_computed_ahead(pairs, family):
    """On a cache one call computes all layers; then a hook on the first one's result wants to know what the others make
    of it.
    """
    pair, found = pairs(family), []
    for model in (pair.model, pair.reference):
        cache, seen = prefix(model, DynamicCache(config=model.config), 3), []
        model(input_ids=IDS[:, 30:31], past_key_values=cache)
        handle = listening(model, lambda m, i, output, seen=seen: seen.append(states_of(output).requires_grad_()))
        model(input_ids=IDS[:, 31:32], past_key_values=cache).logits.pow(2).mean().backward()
        handle.remove()
        found.append(seen[0].grad)
    assert relative(*found) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_layers_called_by_hand(pairs, family):
    pair, found = pairs(family), []
    for model in (pair.model, pair.reference):
        body = model.get_decoder()
        x = body.embed_tokens(IDS[:, :5])
        tables = body.rotary_emb(x, torch.arange(5)[None])
        causal = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
        about = {"position_embeddings": tables, "attention_mask": causal, "position_ids": torch.arange(5)[None]}
        between = states_of(body.layers[0](x, **about)).detach().requires_grad_()
        states_of(body.layers[1](between, **about)).pow(2).sum().backward()
        found.append(between.grad)
    assert relative(*found) < NEAR


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_gradient_through_the_router(pairs, family):
    """Of the router's logits, and of what balances the experts where the family has it."""
    pair = pairs(family)

    def what(model, x):
        scores = []
        for module in model.modules():
            if "Router" in type(module).__name__:
                scores.append(module.register_forward_hook(lambda m, i, out, s=scores: s.append(out[0].pow(2).mean())))
        model(inputs_embeds=x, use_cache=False)
        [hook.remove() for hook in scores if not isinstance(hook, torch.Tensor)]
        return torch.stack([score for score in scores if isinstance(score, torch.Tensor)]).sum()

    assert pair.apart(what, pair.embeds()) < NEAR
    if family != "deepseek_v3":
        balanced = lambda model, x: loss(model, x, output_router_logits=True)  # noqa: E731
        assert pair.apart(balanced, pair.embeds()) < NEAR


@pytest.mark.parametrize("family", SOME)
def test_after_a_model_has_generated(pairs, family):
    """Fused calls and tables of an inference leave nothing behind that autograd trips over."""
    pair = pairs(family)
    with torch.inference_mode():
        pair.model(input_ids=IDS)
    pair.model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert pair.apart(loss, pair.embeds()) < NEAR


@pytest.mark.parametrize("family", SOME)
def test_gradient_checkpointing(tmp_path, family):
    pair = Frozen(tmp_path, family, "F32")
    x = pair.embeds()
    right = gradient(pair.reference, loss, x)
    for reentrant in (False, True):
        pair.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pair.model.train()
        assert relative(gradient(pair.model, loss, x), right) < NEAR


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_autograd_saves_less_than_in_transformers(pairs, family):
    """Inputs of kernels; of weights what there is, packed."""
    pair, x, sizes = pairs(family), pairs(family).embeds(IDS), []
    for model in (pair.model, pair.reference):
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor, held=held, seen=seen):
            memory = tensor.untyped_storage()
            if tensor.dtype is not torch.uint8 and memory.data_ptr() not in held:
                seen[memory.data_ptr()] = memory.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = loss(model, x.clone().requires_grad_())
        sizes.append(sum(seen.values()))
        del kept
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_under_autocast(pairs, family):
    """Backward inside or outside: no worse than transformers' own halves are."""
    pair, x = pairs(family), pairs(family).embeds()
    right = gradient(pair.reference, loss, x)
    for inside in (False, True):
        found = []
        for model in (pair.model, pair.reference):
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                lost = loss(model, given)
                if inside:
                    lost.backward()
            if not inside:
                lost.backward()
            found.append(relative(given.grad, right))
        assert found[0] < 1.2 * found[1] + 1e-3


@pytest.mark.parametrize("family", SOME)
def test_backward_hooks_are_called(pairs, family):
    """Of every module that computes with weights, the same as in transformers."""
    pair, called = pairs(family), []
    for model in (pair.model, pair.reference):
        seen: set[str] = set()
        named = [
            (path, m)
            for path, m in model.named_modules()
            if path.endswith(("_proj", "layernorm", "mlp", "self_attn", "gate", "norm"))
        ]
        handles = [
            m.register_full_backward_hook(lambda m, i, o, path=path, seen=seen: seen.add(path)) for path, m in named
        ]
        gradient(model, loss, pair.embeds())
        for handle in handles:
            handle.remove()
        called.append({path for path in seen if "kv_b_proj" not in path})  # which MLA takes itself
    assert called[0] == called[1] and len(called[0]) > 8


@pytest.mark.parametrize("family", [*SOME, "qwen2_moe", "phi3"])
@pytest.mark.parametrize("how", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("tokens", [12, 1])
def test_backward_hooks_of_activations_change_gradients(pairs, family, how, tokens):
    """Of an MLP's, of shared experts' and of experts' act_fn: each is called, and what it returns counts."""
    pair, found = pairs(family), []

    def squares(model, x):
        return model(inputs_embeds=x, use_cache=False).logits.square().mean()

    for model in (pair.model, pair.reference):
        called = {}

        def hook(module, *given, path="", called=called):
            called[path] = given[-1][0].shape[-1]
            return tuple(None if g is None else 3 * g for g in given[0])

        named = [(path, m) for path, m in model.named_modules() if path.endswith(("act_fn", "activation_fn"))]
        handles = [getattr(m, how)(partial(hook, path=path)) for path, m in named]
        embeds = pair.embeds()[:, :tokens]
        found.append((gradient(model, squares, embeds), called))
        for handle in handles:
            handle.remove()
        assert relative(gradient(model, squares, embeds), found[-1][0]) > 0.01 or not called
    assert found[0][1] == found[1][1] and relative(found[0][0], found[1][0]) < 1e-3
    assert found[0][1] or family == "gpt_oss"  # which has no such module


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_token_ids_whose_embeddings_are_made_to_require_grad(tmp_path, family):
    """As training libraries do where only adapters are trained."""
    pair, found = Frozen(tmp_path, family, "F32"), []
    for model in (pair.model, pair.reference):
        states: list[torch.Tensor] = []
        model.enable_input_require_grads()
        handle = model.get_input_embeddings().register_forward_hook(lambda m, i, out, s=states: s.append(out))
        model(input_ids=IDS[:, :12], labels=IDS[:, :12], use_cache=False).loss.backward()
        handle.remove()
        found.append(states[0].grad)
    assert relative(*found) < NEAR


def prefix(model, cache, steps):
    """A prompt and some tokens of an answer, which nobody records."""
    with torch.no_grad():
        model(input_ids=IDS[:, :6], past_key_values=cache)
        for i in range(steps):
            model(input_ids=IDS[:, 6 + i : 7 + i], past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("answered", [0, 3])
def test_a_stock_cache_has_gradients(pairs, family, answered):
    """What was computed before without gradients is in it, also after tokens for which its layers grew in place."""
    pair = pairs(family)

    def what(model, x):
        return (
            model(inputs_embeds=x, past_key_values=prefix(model, DynamicCache(config=model.config), answered))
            .logits.pow(2)
            .mean()
        )

    for tokens in (1, 5):
        assert pair.apart(what, pair.embeds(IDS[:, 40 : 40 + tokens])) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_caches_of_transformers_that_a_recorded_forward_fills(pairs, family, pieces):
    """The stock one in one piece or two, and one of a fixed size."""
    pair = pairs(family)
    kinds = [lambda config: DynamicCache(config=config), lambda config: StaticCache(config=config, max_cache_len=64)]
    for kind in kinds[
        : 3 - pieces
    ]:  # transformers' own static cache is written in place: autograd refuses a second piece

        def what(model, x, kind=kind):
            cache = kind(model.config)
            return [
                model(inputs_embeds=part, past_key_values=cache).logits.pow(2).mean() for part in x.chunk(pieces, 1)
            ][-1]

        assert pair.apart(what, pair.embeds()) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_keys_of_an_earlier_forward_have_gradients(pairs, family):
    """The first forward is recorded; the second one's tokens are ids, and its result depends on the first's input."""
    pair = pairs(family)

    def what(model, x):
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=x, past_key_values=cache)
        for i in range(2):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=cache)
        return out.logits.pow(2).mean()

    assert pair.apart(what, pair.embeds()) < NEAR


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("kind", [None, "f16", "q8_0"])
def test_a_cache_that_grows_in_place_has_none_and_says_so(pairs, family, kind):
    pair = pairs(family)
    cache = KVCache(pair.model.config, kind)
    with pytest.raises(NoGradient, match="a cache that grows in place.*use_cache=False"):
        loss(pair.model, pair.embeds().requires_grad_(), use_cache=True, past_key_values=cache)
    with torch.no_grad():
        loss(
            pair.model, pair.embeds().requires_grad_(), use_cache=True, past_key_values=KVCache(pair.model.config, kind)
        )


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_pages_have_none_and_say_so(pairs, family):
    model, x = pairs(family).model, pairs(family).embeds().requires_grad_()
    cache = PagedCache(model.config, 4, torch.float32)
    batch = BatchMetadata([SequenceSpan(0, 0, 12, [1, 2], 0)])
    with pytest.raises(NoGradient, match="a cache of pages.*use_cache=False"), cache.forward(batch):
        model(inputs_embeds=x, position_ids=batch.position_ids, past_key_values=cache)


def trained(model, kind):
    """Parameters that operators hold: of norms, of routers, and what heads attend to instead of tokens."""
    ends = {"norms": "norm.weight", "routers": ("gate.weight", "router.weight", "router.bias"), "sinks": "sinks"}[kind]
    return [p for name, p in model.named_parameters() if name.endswith(ends)]


@pytest.mark.parametrize(
    "family,kind",
    [
        ("llama", "norms"),
        ("qwen3_moe", "norms"),
        ("deepseek_v3", "norms"),
        ("qwen3_moe", "routers"),
        ("gpt_oss", "routers"),
        ("gpt_oss", "sinks"),
    ],
)
def test_parameters_of_their_own_can_be_trained(pairs, family, kind):
    """Token ids go in and nothing else requires grad: fused calls have to ask for the parameters too."""
    pair = pairs(family)
    for tokens, past in ((1, False), (12, False), (1, True)):
        found = []
        for model in (pair.model, pair.reference):
            cache = (
                {"past_key_values": prefix(model, DynamicCache(config=model.config), 3)}
                if past
                else {"use_cache": False}
            )
            chosen = trained(model, kind)
            assert chosen
            for p in chosen:
                p.requires_grad_()
            model(input_ids=IDS[:, :tokens], **cache).logits.pow(2).mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in chosen]))
            for p in chosen:
                p.requires_grad_(False).grad = None
        assert relative(*found) < NEAR and found[0].any()


@pytest.mark.parametrize("family", SOME)
def test_fused_calls_are_for_what_autograd_does_not_record(pairs, family, monkeypatch):
    model, x, called = pairs(family).model, pairs(family).embeds(), []
    monkeypatch.setattr(steps.ops, "run_steps", lambda *args, run=steps.ops.run_steps: called.append(1) or run(*args))
    gradient(model, loss, x)
    assert not called
    with pytest.raises(NoGradient, match="one by one"):
        steps.run_steps(x.requires_grad_(), [], [torch.empty_like(x)])


@pytest.mark.parametrize("quant", ["Q8_0", mixed], ids=["Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_quantised_weights(tmp_path, family, quant):
    """Each operator's gradient is transformers' on the dequantised weights. A model's differs by what eight bits of
    activations do to its forward.
    """
    pair = Frozen(tmp_path, family, quant)
    theirs, checked = dict(pair.reference.named_modules()), set()
    for path, module in pair.model.named_modules():
        twin = theirs.get(path)
        if type(module) is Linear and type(twin) is torch.nn.Linear:
            x = torch.randn(5, module.in_features)
            grad = torch.randn(5, module.out_features)
            assert relative(along(module, grad, x), along(twin, grad, x)) < NEAR
        elif isinstance(module, Experts):
            x, grad = torch.randn(2, 9, module.hidden_size).unbind()
            ids = torch.randint(0, module.num_experts, (9, 2))
            for given in ((x, ids, torch.rand(9, 2).requires_grad_()), (x.requires_grad_(), ids, torch.rand(9, 2))):
                own = next(part for part in given if part.requires_grad)
                pairs = [torch.autograd.grad(m(*given), own, grad)[0] for m in (module, twin)]
                assert relative(*pairs) < NEAR
        else:
            continue
        checked.add(type(module).__name__)
    assert checked >= ({"Linear", "Experts"} if family != "llama" else {"Linear"})
    away = pair.apart(loss, pair.embeds(IDS[:, :70]))
    assert 1e-6 < away < 0.35, away  # a routing that is nearly even tips over


def along(module, grad, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x), x, grad)[0]


def test_each_operator_by_itself(pairs):
    """Norm, MoE with shared experts and MLA of a model, on states of their own."""
    pair = pairs("deepseek_v3")
    theirs, checked = dict(pair.reference.named_modules()), set()
    rotary = pair.reference.model.rotary_emb
    for path, module in pair.model.named_modules():
        for tokens in (1, 6, 70):
            x = torch.randn(1, tokens, 256)
            if isinstance(module, MLA):
                about = (
                    rotary(x, torch.arange(tokens)[None]),
                    torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1),
                )
                found = [
                    gradient(
                        m,
                        lambda m, x, about=about: (
                            m(hidden_states=x, position_embeddings=about[0], attention_mask=about[1])[0].pow(2).sum()
                        ),
                        x,
                    )
                    for m in (module, theirs[path])
                ]
            elif isinstance(module, MoE) or (isinstance(module, RMSNorm) and module.weight.numel() == 256):
                found = [gradient(m, lambda m, x: m(x).pow(2).sum(), x) for m in (module, theirs[path])]
            else:
                continue
            assert relative(*found) < NEAR, path
            checked.add(type(module).__name__)
    assert checked == {"MLA", "MoE", "RMSNorm"}


def test_a_whole_model_refuses_what_it_cannot_differentiate(pairs):
    pair, x = pairs("qwen3_moe"), pairs("qwen3_moe").embeds()
    for given in (x, x[:, :1]):  # one token is a fused call
        with pytest.raises(NoGradient, match="differentiated backwards only"):
            torch.func.jvp(lambda x: pair.model(inputs_embeds=x, use_cache=False).logits, (given,), (given,))
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(pair.model, y), y, create_graph=True)
    with pytest.raises(NoGradient, match="a second derivative"):
        first.pow(2).sum().backward()
