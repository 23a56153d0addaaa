"""Training a loaded model: biases, modules that are put in floats for it, what stays packed and says so, and
transformers' Trainer: all as on transformers' own.
"""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ktx.errors import UsageError
from ktx.ops.experts import Experts
from ktx.ops.linear import Linear
from tests.families.test_families import IDS, load, relative
from tests.model.test_peft import answer
from tests.model.test_peft_methods import USUAL, check_gradients, computed, lora, rows, together
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import tiny

NEAR, PROMPT = 2e-5, IDS[:, :20]
BIASED = {
    "qwen2": ("qwen2", {}),
    "glm4_moe": ("glm4_moe", {}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt_oss": ("gpt_oss", {}),
}


def pair(folder, family, dtype=torch.float32, **more):
    """transformers' model and ours."""
    more = {"tie_word_embeddings": False} | more
    tiny(family, **more).save_pretrained(folder)
    return tiny(family, **more).to(dtype), load(folder, None, kv_dtype="f32", dtype=dtype)


def said(model):
    return [note.text for note in model.ktx.notes if note.code == "training"]


def trained(model, steps=3, train=True, **more):
    """Losses of plain steps on whatever is to be trained."""
    steps_of = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train(train)
    found = []
    for at in range(0, 16 * steps, 16):
        ids = IDS[:, at : at + 16]
        loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
        loss.backward(), steps_of.step(), steps_of.zero_grad()
        found.append(loss.item())
    model.eval()
    return torch.tensor(found)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", BIASED)
def test_biases_are_trained_beside_an_adapter(tmp_path, name, bias):
    family, more = BIASED[name]
    two, names = pair(tmp_path / "base", family, **more), []
    made, before = [], computed(two[0])
    for model in two:
        torch.manual_seed(5)
        made.append(get_peft_model(model, lora(["q_proj", "o_proj"], bias=bias)))
        names.append([name for name, p in made[-1].named_parameters() if p.requires_grad])
    theirs, ours = made
    assert names[0] == names[1] and any(name.endswith("q_proj.base_layer.bias") for name in names[1])
    check_gradients(theirs, ours)
    right, mine = trained(theirs), trained(ours)
    assert relative(mine, right) < 1e-5 and right[0] != right[-1]
    right = computed(theirs)
    assert relative(right, before) > 1e-2 and relative(computed(ours), right) < NEAR and answer(ours) == answer(theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative(computed(ours), computed(theirs)) < NEAR
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base", None, kv_dtype="f32"), tmp_path / "adapter").eval()
    assert relative(computed(again), right) < NEAR and answer(again) == answer(theirs)
    assert relative(computed(ours.merge_and_unload()), right) < NEAR


def exchanged(linear):
    linear.bias = nn.Parameter(linear.bias * 30)


def added(linear):
    linear.bias.data += 3  # which assigns the tensor that it has written to


EDITS = {
    "in place": lambda linear: linear.bias.mul_(30),
    "data": added,
    "data in place": lambda linear: linear.bias.data.add_(3),
    "other data": lambda linear: setattr(linear.bias, "data", linear.bias * 30),
    "exchanged": exchanged,
    "loaded": lambda linear: linear.load_state_dict({"bias": linear.bias - 3}, strict=False),
}


@pytest.mark.parametrize("name", BIASED)
def test_edits_of_biases_count_however_they_are_made(tmp_path, name):
    family, more = BIASED[name]
    right, mine = pair(tmp_path, family, **more)
    assert mine.num_parameters() == right.num_parameters() and list(mine.state_dict()) == list(right.state_dict())
    before = computed(right)
    for number, (how, edit) in enumerate(EDITS.items()):
        for model in (right, mine):
            with torch.no_grad():
                edit(model.model.layers[number % 2].self_attn.get_submodule(("q_proj", "v_proj")[number % 2]))
        now = computed(right)
        assert relative(now, before) > 1e-4 and relative(computed(mine), now) < NEAR, how
        assert answer(mine) == answer(right), how  # a token is one call
        before = now


@pytest.mark.parametrize("kind", EDITS)
def test_biases_in_half_precision(tmp_path, kind):
    """Kernels read a copy in f32; parameters are of the model's type, as in transformers."""
    right, mine = pair(tmp_path, "llama", torch.bfloat16, attention_bias=True, mlp_bias=True)
    assert mine.dtype is torch.bfloat16 and {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    x = torch.randn(7, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        for path, part in (("self_attn.k_proj", ""), ("mlp", "up_proj")):
            theirs, ours = (model.model.layers[1].get_submodule(path) for model in (right, mine))
            before = theirs(x)
            assert relative(ours(x), before) < 0.01
            for module in (theirs, ours):
                EDITS[kind](module.get_submodule(part))
            assert relative(theirs(x), before) > 0.2 and relative(ours(x), theirs(x)) < 0.01
            assert relative(ours(x[:1]), theirs(x[:1])) < 0.01


@pytest.mark.parametrize("part", ["mlp.gate", "input_layernorm", "self_attn.q_norm"])
def test_data_that_is_added_to_counts_in_half_precision(tmp_path, part):
    right, mine = pair(tmp_path, "qwen3_moe", torch.bfloat16)
    theirs, ours = (model.model.layers[0].get_submodule(part) for model in (right, mine))
    x = torch.randn(7, theirs.weight.shape[-1], dtype=torch.bfloat16)
    made = lambda module: out[0] if isinstance(out := module(x), tuple) else out  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            before = made(theirs)
            assert relative(made(ours), before) < 0.01
            for module in (theirs, ours):
                more = torch.linspace(-1, 1, module.weight.numel(), dtype=torch.bfloat16).view_as(module.weight)
                module.weight.data += more
            assert relative(made(theirs), before) > 0.1
        assert relative(made(ours), made(theirs)) < 0.01


WHOLE = {
    "the model": lambda model: model,
    "its layers": lambda model: model.model.layers,
    "one layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[0].self_attn,
    "an MLP": lambda model: model.model.layers[1].mlp,
}


@pytest.mark.parametrize("what", WHOLE)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_is_to_be_trained_as_a_whole_becomes_floats(tmp_path, family, what):
    two, losses = pair(tmp_path, family, tie_word_embeddings=family == "qwen2"), []
    for model in two:
        model.requires_grad_(False)
        WHOLE[what](model).requires_grad_(True)
        losses.append(trained(model))
    right, mine = two
    names = [[name for name, p in model.named_parameters() if p.requires_grad] for model in two]
    assert sorted(names[0]) == sorted(names[1]) and said(mine) == []
    assert relative(losses[1], losses[0]) < 1e-5 and losses[0][0] != losses[0][-1]
    assert relative(computed(mine), computed(right)) < NEAR and answer(mine) == answer(right)
    mine.save_pretrained(tmp_path / "trained")
    assert relative(computed(load(tmp_path / "trained", None, kv_dtype="f32")), computed(right)) < NEAR


@pytest.mark.parametrize(
    ("family", "path", "stuck"),
    [
        ("qwen3_moe", "", r"layers\.0\.mlp\.experts\.gate_up_proj"),
        ("qwen3_moe", "model.layers", r"layers\.0\.mlp\.experts\.gate_up_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts", r"layers\.1\.mlp\.experts\.gate_up_proj"),
        ("deepseek_v3", "model.layers.0", r"layers\.0\.self_attn\.kv_b_proj\.weight"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj", r"layers\.0\.self_attn\.kv_b_proj\.weight"),
    ],
)
def test_what_cannot_be_in_floats_says_so_before_anything_changes(tmp_path, family, path, stuck):
    right, mine = pair(tmp_path, family)
    kinds = [type(module) for module in mine.modules()]
    with pytest.raises(UsageError, match=f"{stuck} is packed .*keep the module in floats"):
        mine.get_submodule(path).requires_grad_(True)
    assert [type(module) for module in mine.modules()] == kinds and not any(p.requires_grad for p in mine.parameters())
    mine.get_submodule(path).requires_grad_(False)
    assert relative(computed(mine), computed(right)) < NEAR


def one_by_one(model):
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = True


FROZEN = {
    "nothing": (lambda model: None, "no weights of this model are trained: they are packed"),
    "what torch lists": (
        lambda model: [p.requires_grad_(True) for p in model.parameters()],
        "all parameters that torch lists of the model are trained, but their packed weights are not",
    ),
    "transformers' own container": (
        lambda model: model.model.requires_grad_(True),
        "all parameters that torch lists of the model are trained",
    ),
    "what torch lists of a layer": (one_by_one, "all parameters that torch lists of model.layers.0 are trained"),
}


@pytest.mark.parametrize("what", FROZEN)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_weights_that_training_leaves_out_are_told_once(tmp_path, family, what, caplog):
    _, mine = pair(tmp_path, family)
    prepare, text = FROZEN[what]
    prepare(mine)
    with caplog.at_level(logging.WARNING, "ktx"):
        mine(input_ids=PROMPT, labels=PROMPT)
        assert said(mine) == []  # not in training
        mine.train()
        with torch.no_grad():
            mine(input_ids=PROMPT, labels=PROMPT)
        assert said(mine) == []
        for _ in range(3):
            out = mine(input_ids=PROMPT, labels=PROMPT, use_cache=False)
    assert out.loss.requires_grad is (what != "nothing")
    (line,) = said(mine)
    assert line.startswith(text) and "peft.get_peft_model" in line and caplog.text.count(text) == 1


def learned_prompt(model):
    embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_()
    return {"inputs_embeds": embeds}


def with_head(model):
    model.lm_head.requires_grad_(True)
    return {"input_ids": PROMPT}


MEANT = {
    "a learned prompt": learned_prompt,
    "the output layer": with_head,
    "peft's prompt": lambda model: get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ),
    "peft's prefix": lambda model: get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ),
    "norms": lambda model: get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm"])),
}


@pytest.mark.parametrize("what", MEANT)
def test_what_is_meant_so_is_not_told(tmp_path, what):
    _, mine = pair(tmp_path, "qwen3_moe")
    made = MEANT[what](mine)
    run, given = (mine, made) if isinstance(made, dict) else (made, {"input_ids": PROMPT})
    run.train()
    run(**given, labels=PROMPT).loss.backward()
    assert mine.training and all("print_trainable_parameters" in text for text in said(mine))


def test_checkpointing_without_anything_to_train_is_told(tmp_path):
    """As trl's trainers set a model up: its inputs have gradients, so nothing fails."""
    _, mine = pair(tmp_path, "qwen3_moe")
    mine.gradient_checkpointing_enable()
    mine.enable_input_require_grads()
    mine.train()
    mine(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    assert len(said(mine)) == 1 and "no weights of this model are trained" in said(mine)[0]


def test_what_peft_counts_is_told(tmp_path):
    right, mine = pair(tmp_path, "qwen3_moe")
    made = [get_peft_model(model, lora(["o_proj"])) for model in (right, mine)]
    (theirs, everything), (ours, listed) = (model.get_nb_trainable_parameters() for model in made)
    assert ours == theirs and made[1].num_parameters() == everything
    assert said(mine) == [
        f"{everything - listed:,} packed weights are not among torch's parameters: PEFT's print_trainable_parameters() leaves them out"  # noqa: E501
        " of all params, model.num_parameters() counts them"
    ]
    made[1].train()
    made[1](input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    assert len(said(mine)) == 1


DROPPING = ["llama", "deepseek_v3", "gpt_oss", "qwen3_moe"]


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("family", DROPPING)
def test_attention_drops_weights_as_transformers_does(tmp_path, family, tokens):
    """Of its eager function, whose random numbers are the same; without gradients too, where a token is one call."""
    right, mine = pair(tmp_path, family, attention_dropout=0.3)
    right.set_attn_implementation("eager")
    ids = IDS[:, :tokens]
    with torch.no_grad():
        usual = mine(ids).logits
        assert relative(usual, right(ids).logits) < NEAR
        found = []
        for model in (right, mine):
            model.train()
            torch.manual_seed(3)
            found.append(model(ids, use_cache=False, output_attentions=True))
    theirs, ours = found
    assert relative(ours.logits, theirs.logits) < NEAR and relative(theirs.logits, usual) > 1e-3
    assert all(relative(a, b) < NEAR for a, b in zip(ours.attentions, theirs.attentions, strict=True) if b.any())
    assert relative(mine.eval()(ids).logits, usual) < 1e-6


@pytest.mark.parametrize("family", DROPPING)
def test_training_with_dropout(tmp_path, family):
    two, losses = pair(tmp_path, family, attention_dropout=0.3), []
    two[0].set_attn_implementation("eager")
    for model in two:
        torch.manual_seed(5)
        model = get_peft_model(model, lora(["o_proj"], lora_dropout=0.1))
        losses.append(trained(model))
    assert relative(losses[1], losses[0]) < 1e-5
    assert relative(trained(two[1], train=False), losses[1]) > 1e-4


def test_a_layer_in_training_drops_among_others_that_are_not(tmp_path):
    right, mine = pair(tmp_path, "llama", attention_dropout=0.9)
    right.set_attn_implementation("eager")
    token, found = IDS[:, :1], []
    for model in (right, mine):
        with torch.no_grad():
            model(token)
            model.model.layers[1].train()
            torch.manual_seed(4)
            found.append(model(token).logits)
            assert relative(model.eval()(token).logits, found[-1]) > 1e-3
    assert relative(found[1], found[0]) < NEAR


def test_an_engine_drops_nothing(tmp_path):
    for family in ("llama", "deepseek_v3"):
        _, mine = pair(tmp_path / family, family, attention_dropout=0.3)
        mine.ktx.tokenizer = tokenizer()
        with mine.ktx.engine(max_batch_size=1, kv_cache_tokens=512) as engine:
            mine.train()
            events = [event for _, event in engine.generate([PROMPT[0].tolist()])]
        assert "an engine's forward does not support attention dropout" in str(events[-1])


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_routers_add_noise_as_transformers_does(tmp_path, family, tokens):
    two, found = pair(tmp_path, family, router_jitter_noise=0.5), []
    ids = IDS[:, :tokens]
    for model in two:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        usual = model(ids, use_cache=False).logits
        model.train()
        torch.manual_seed(3)
        with torch.no_grad():
            noisy = model(ids, use_cache=False).logits
        torch.manual_seed(3)
        model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        assert relative(noisy, usual) > 1e-3
        found.append((noisy, embeds.grad))
    assert relative(found[1][0], found[0][0]) < NEAR and relative(found[1][1], found[0][1]) < 1e-4


def record(model, folder, adapter=True, resume=None, **more):
    """Losses of a Trainer, those of evaluation too."""
    torch.manual_seed(5)
    if adapter:
        model = get_peft_model(model, lora(["o_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(output_dir=folder, **(USUAL | more))
    trainer = Trainer(model, arguments, data_collator=together, train_dataset=rows(), eval_dataset=rows()[:2])
    trainer.train(resume_from_checkpoint=resume)
    seen = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
    return torch.tensor([loss for loss in seen if loss is not None]), computed(trainer.model.eval())


BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST |= {"load_best_model_at_end": True}
OPTIONS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "another optimiser": {"optim": "adafactor"},
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "evaluation and the best": BEST,
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(
    ("family", "option"),
    [(family, option) for family in ("gpt_oss", "deepseek_v3") for option in OPTIONS] + [("qwen3_next", "bf16")],
)
def test_a_trainers_options(tmp_path, family, option):
    """In autocast ktx multiplies in f32, transformers in bf16."""
    found = [
        record(model, tmp_path / str(i), **OPTIONS[option]) for i, model in enumerate(pair(tmp_path / "base", family))
    ]
    (right, logits), (mine, ours) = found
    assert len(mine) == len(right) > 3 and right[0] != right[-1]
    half = option == "bf16"
    assert relative(mine, right) < (2e-3 if half else 1e-5)
    assert half or relative(ours, logits) < 1e-3


@pytest.mark.parametrize("adapter", [True, False])
def test_training_goes_on_from_a_checkpoint(tmp_path, adapter):
    found = []
    for i in range(2):
        runs = []
        for resume in (None, str(tmp_path / f"run{i}" / "checkpoint-2")):
            model = pair(tmp_path / "base", "llama")[i]
            if not adapter:
                model.requires_grad_(True)
            runs.append(record(model, tmp_path / f"run{i}", adapter, resume, save_strategy="steps", save_steps=2))
        assert relative(runs[1][0][-2:], runs[0][0][-2:]) < 1e-3 and relative(runs[1][1], runs[0][1]) < 1e-2
        found.append(runs)
    for (right, logits), (mine, ours) in zip(*found, strict=True):
        assert relative(mine, right) < 1e-4 and relative(ours, logits) < 2e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_the_routers_loss_is_added(tmp_path, family):
    two, losses = pair(tmp_path, family, router_aux_loss_coef=0.5), []
    for model in two:
        torch.manual_seed(5)
        model = get_peft_model(model, lora(["o_proj"]))
        out = model(input_ids=PROMPT, labels=PROMPT, output_router_logits=True, use_cache=False)
        assert out.aux_loss.requires_grad
        losses.append(torch.stack([out.loss, out.aux_loss, *(logits.norm() for logits in out.router_logits)]).detach())
        losses[-1] = torch.cat([losses[-1], trained(model, output_router_logits=True)])
    assert relative(losses[1], losses[0]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_an_answer_between_steps_with_checkpointing(tmp_path, family):
    found = []
    for model in pair(tmp_path, family):
        torch.manual_seed(5)
        model = get_peft_model(model, lora(["o_proj"]))
        model.gradient_checkpointing_enable()
        losses = trained(model, 2)
        model.train()
        in_training = answer(model)
        model.eval()
        found.append((losses, in_training, answer(model), trained(model, 1)))
    right, mine = found
    assert relative(mine[0], right[0]) < 1e-5 and relative(mine[3], right[3]) < 1e-5
    assert mine[1:3] == right[1:3]  # some transformers answer otherwise in training


def test_an_optimiser_of_frozen_parameters(tmp_path):
    """As in transformers, where all is frozen: torch's own errors, behind a line that says why."""
    _, mine = pair(tmp_path, "qwen3_moe")
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad])
    before, steps = computed(mine), torch.optim.AdamW(mine.parameters(), 0.1)
    mine.train()
    with pytest.raises(RuntimeError, match="does not require grad"):
        mine(input_ids=PROMPT, labels=PROMPT).loss.backward()
    steps.step()
    assert "no weights of this model are trained" in said(mine)[0]
    assert torch.equal(computed(mine.eval()), before)
    assert any(isinstance(module, Experts) for module in mine.modules()) and type(mine.lm_head) is Linear


def test_other_methods_train_biases(tmp_path):
    two = pair(tmp_path, "qwen2")
    made = [
        get_peft_model(model, peft.BOFTConfig(boft_block_size=8, target_modules=["k_proj"], bias="boft_only"))
        for model in two
    ]
    losses = [trained(model) for model in made]
    assert relative(losses[1], losses[0]) < 1e-5 and relative(computed(made[1]), computed(made[0])) < NEAR
