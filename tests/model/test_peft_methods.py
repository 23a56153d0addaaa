"""PEFT's other methods, its ways to switch, mix and save adapters, and trainers, on packed weights: what they compute
on transformers' own model.
"""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from ktx.ops.linear import Linear
from tests.families.test_families import IDS, load, relative
from tests.model.test_peft import answer
from tests.support.tiny_models import tiny

NEAR, PROMPT = 2e-5, IDS[:, :20]
FAMILIES = {  # linear layers of attention that have one input, and the last
    "llama": ["q_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    "gpt_oss": ["q_proj", "v_proj", "o_proj"],
}
PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt of the vocabulary": lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 1, 1], cpt_mask=[1, 1, 1]
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
METHODS = {
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=names[-1:], init_ia3_weights=False),
    "dora": lambda names: lora(names, use_dora=True),
    "vera": lambda names: peft.VeraConfig(r=4, target_modules=names[-1:], init_weights=False),
    "oft": lambda names: peft.OFTConfig(oft_block_size=8, target_modules=names, init_weights=False),
    "boft": lambda names: peft.BOFTConfig(boft_block_size=8, target_modules=names, init_weights=False),
    "loha": lambda names: peft.LoHaConfig(r=4, target_modules=names, init_weights=False),
    "lokr": lambda names: peft.LoKrConfig(r=4, target_modules=names, init_weights=False),
    "adalora": lambda names: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=names, init_lora_weights=False
    ),
    "hra": lambda names: peft.HRAConfig(r=4, target_modules=names, init_weights=False),
    "fourier": lambda names: peft.FourierFTConfig(n_frequency=20, target_modules=names, init_weights=False),
    "norms": lambda names: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "pissa": lambda names: lora(names, init_lora_weights="pissa"),
    "embedding": lambda names: lora([*names, "embed_tokens", "lm_head"]),
    "biases": lambda names: lora(names, bias="all"),
    "biases of what is adapted": lambda names: lora(names, bias="lora_only"),
    "tokens": lambda names: lora(names, trainable_token_indices={"embed_tokens": IDS[0, :3].tolist()}),
    "whole modules": lambda names: lora(names, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
    "a matrix by name": lambda names: lora([], target_parameters=["o_proj.weight", "embed_tokens.weight"]),
}


def lora(names, **more):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 16, "init_lora_weights": False} | more), target_modules=names)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny(request.param, tie_word_embeddings=False).save_pretrained(made)
    return request.param, made


def adapted(two, made, stir=True):
    """Both with the same adapter, whose numbers are none that do nothing."""
    found = []
    for model in two:
        torch.manual_seed(5)
        model = get_peft_model(model, made())
        numbers = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad and stir):
                p.add_(torch.randn(p.shape, generator=numbers) * 0.02)
        found.append(model.eval())
    return found


def computed(model):
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


def gradients(model):
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check_gradients(theirs, ours):
    right, mine = gradients(theirs), gradients(ours)
    assert right.keys() == mine.keys()
    largest = max((grad.norm() for grad in right.values()), default=0)
    for name, grad in right.items():
        assert (mine[name] - grad).norm() < 1e-3 * grad.norm() + 1e-4 * largest, name


@pytest.mark.parametrize("kind", METHODS)
def test_a_method(two, folder, kind, tmp_path):
    before = computed(two[0])
    theirs, ours = adapted(two, lambda: METHODS[kind](FAMILIES[folder[0]]))
    right = computed(theirs)
    assert relative(right, before) > 1e-3 and relative(computed(ours), right) < NEAR
    check_gradients(theirs, ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative(computed(ours), computed(theirs)) < NEAR
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder[1], None, kv_dtype="f32"), tmp_path).eval()
    assert relative(computed(again), right) < NEAR and answer(again) == answer(theirs)
    assert get_peft_model_state_dict(ours).keys() == get_peft_model_state_dict(theirs).keys()
    assert relative(computed(ours.merge_and_unload()), right) < NEAR


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_learned_prompt(two, folder, kind, tmp_path):
    theirs, ours = adapted(two, PROMPTS[kind])
    if kind == "prefix" and folder[0] == "deepseek_v3":  # keys of a latent have no heads, which PEFT does not know
        for model in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError), match="[Ss]izes? |cannot be continued"):
                computed(model)
        return
    right = computed(theirs)
    assert relative(computed(ours), right) < NEAR and answer(ours) == answer(theirs)
    for model in (theirs, ours):
        model.train()
    check_gradients(theirs, ours)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder[1], None, kv_dtype="f32"), tmp_path).eval()
    assert relative(computed(again), right) < NEAR


def test_adapters_are_mixed(two, folder):
    made = adapted(two, lambda: lora(FAMILIES[folder[0]]))
    for model in made:
        torch.manual_seed(7)
        model.add_adapter("second", lora(FAMILIES[folder[0]]))
        model.add_weighted_adapter(["default", "second"], [0.4, 0.7], "mixed", combination_type="linear")
        model.set_adapter("mixed")
    theirs, ours = made
    assert relative(computed(ours), computed(theirs)) < NEAR
    for model in made:
        model.base_model.set_adapter(["default", "second"])
    assert relative(computed(ours), computed(theirs)) < NEAR
    right = computed(theirs)
    assert relative(computed(ours.merge_and_unload(adapter_names=["default", "second"])), right) < NEAR


@pytest.mark.parametrize("whole", [[], ["lm_head"]])
def test_adapters_by_transformers(two, folder, whole, tmp_path):
    """add_adapter, disable_adapters, save_pretrained, load_adapter of the model itself."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"this transformers takes no adapters of peft {peft.__version__}: {error}")
    before = computed(two[0])
    experts = [] if folder[0] == "llama" else ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    for model in two:
        torch.manual_seed(5)
        model.add_adapter(lora(["o_proj"], target_parameters=experts, modules_to_save=whole or None))
    right = computed(two[0])
    assert relative(computed(two[1]), right) < NEAR
    two[1].disable_adapters()
    assert relative(computed(two[1]), before) < NEAR
    two[1].enable_adapters()
    two[1].save_pretrained(tmp_path)
    again = load(folder[1], None, kv_dtype="f32")
    again.load_adapter(str(tmp_path))
    assert relative(computed(again), right) < NEAR
    again.load_adapter(str(tmp_path), adapter_name="second")
    again.set_adapter("second")
    again.delete_adapter("default")
    assert relative(computed(again), right) < NEAR


def test_a_module_that_is_to_be_trained_becomes_torchs_own(two, folder):
    seen = []
    for model in two:
        model.requires_grad_(False)
        model.lm_head.register_forward_hook(lambda module, args, out: seen.append(type(module)))
        model.lm_head.requires_grad_(True)
        model.model.embed_tokens.weight.requires_grad = True
        model.model.layers[1].self_attn.o_proj.weight.requires_grad_(True)
    assert type(two[1].lm_head) is nn.Linear and type(two[1].model.embed_tokens) is nn.Embedding
    assert relative(computed(two[1]), computed(two[0])) < NEAR and seen == [nn.Linear, nn.Linear]
    check_gradients(*two)
    with torch.no_grad():
        for model in two:
            model.model.layers[1].self_attn.o_proj.weight.mul_(0.5)
    assert relative(computed(two[1]), computed(two[0])) < NEAR
    assert type(two[1].model.layers[0].self_attn.o_proj) is Linear


def test_tied_matrices_are_trained_as_one(tmp_path):
    tiny("qwen2").save_pretrained(tmp_path)
    right, mine = tiny("qwen2"), load(tmp_path, None, kv_dtype="f32")
    for model in (right, mine):
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert relative(computed(mine), computed(right)) < NEAR
    check_gradients(right, mine)


def rows():
    return [{"input_ids": ids, "labels": ids} for ids in IDS[0, :96].view(6, 16).tolist()]


def together(found):
    return {key: torch.tensor([row[key] for row in found]) for key in ("input_ids", "labels")}


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


USUAL = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_a_trainer(two, folder, reentrant, tmp_path):
    more = {}
    if reentrant is not None:
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    experts = [] if folder[0] == "llama" else ["mlp.experts.down_proj"]
    found = []
    for model in adapted(two, lambda: lora(FAMILIES[folder[0]], target_parameters=experts, task_type="CAUSAL_LM")):
        if reentrant:
            model.enable_input_require_grads()
        arguments = TrainingArguments(output_dir=tmp_path, **USUAL, **more)
        found.append(losses(Trainer(model, arguments, data_collator=together, train_dataset=rows())))
    theirs, ours = found
    assert len(theirs) == 4 and theirs[0] != theirs[-1]
    assert all(abs(a - b) < 1e-3 * a for a, b in zip(theirs, ours, strict=True))


def test_trls_trainer(two, folder, tmp_path):
    trl, datasets, arrow = map(pytest.importorskip, ("trl", "datasets", "pyarrow"))
    from tests.support.tiny_chat_model import tokenizer

    columns = {key: [row[key] for row in rows()] for key in ("input_ids", "labels")}
    given = datasets.Dataset(datasets.table.InMemoryTable(arrow.table(columns)), fingerprint="rows")
    found = []
    for model in two:
        torch.manual_seed(5)
        arguments = trl.SFTConfig(
            output_dir=tmp_path, **USUAL, bf16=False, max_length=16, dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=given,
            processing_class=tokenizer(),
            peft_config=lora(FAMILIES[folder[0]], task_type="CAUSAL_LM"),
        )
        found.append(losses(trainer))
    theirs, ours = found
    assert len(theirs) == 4 and all(abs(a - b) < 1e-3 * a for a, b in zip(theirs, ours, strict=True))
