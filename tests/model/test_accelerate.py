"""accelerate on a loaded model: hooks, dispatching, checkpoints and Accelerator as on transformers' own; what would
move packed weights says so.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from peft import get_peft_model

from ktx.errors import UsageError
from tests.families.test_families import IDS, load, relative
from tests.model.test_peft_methods import check_gradients, computed, lora
from tests.support.tiny_models import tiny

NEAR = 2e-5
FAMILIES = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    tiny(request.param, tie_word_embeddings=False).save_pretrained(made)
    return request.param, made


@pytest.fixture(autouse=True)
def afresh():
    """accelerate has one precision for a process, which a Trainer may have chosen before."""
    AcceleratorState._reset_state(reset_partial_state=True)


PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"} | {
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def aligned(model, path):
    """A hook that moves what goes in and out, not the module."""
    add_hook_to_module(model.get_submodule(path), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def listed(model, folder):
    """A norm and a router are torch's parameters, which accelerate may keep elsewhere."""
    for path in ("model.norm", "model.layers.1.post_attention_layernorm", "model.layers.1.mlp.gate"):
        if not path.endswith("gate") or hasattr(model.model.layers[1].mlp, "gate"):
            add_hook_to_module(model.get_submodule(path), AlignDevicesHook(execution_device="cpu", offload=True))
    return model


def with_all_inside(model, folder):
    """What torch lists of an attention: biases, norms and sinks; its packed weights stay."""
    hook = AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True, offload_buffers=True)
    add_hook_to_module(model.model.layers[1].self_attn, hook)
    return model


def from_checkpoint(model, folder):
    """The checkpoint's floats count, whatever was packed before."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.zero_()
    model.lm_head.weight.data.mul_(2)
    load_checkpoint_in_model(model, folder)
    return model


def dispatched(model, folder):
    model.lm_head.weight.data.mul_(2)
    return load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})


RIGHT = {
    "dispatch_model": lambda model, folder: dispatch_model(model, {"": "cpu"}),
    "dispatch_model by parts": lambda model, folder: dispatch_model(model, PLACES, main_device="cpu", force_hooks=True),
    "a hook on the model": lambda model, folder: aligned(model, ""),
    "a hook on a layer": lambda model, folder: aligned(model, "model.layers.0"),
    "a hook on a linear layer": lambda model, folder: aligned(model, "model.layers.1.self_attn.o_proj"),
    "a hook on an MLP": lambda model, folder: aligned(model, "model.layers.1.mlp"),
    "offload what torch lists": listed,
    "offload what torch lists in a module": with_all_inside,
    "prepare": lambda model, folder: Accelerator(cpu=True).prepare(model),
    "cpu_offload_with_hook": lambda model, folder: cpu_offload_with_hook(model, "cpu")[0],
    "load_checkpoint_in_model": from_checkpoint,
    "load_checkpoint_and_dispatch": dispatched,
}


@pytest.mark.parametrize("how", RIGHT)
def test_what_accelerate_does_with_a_model_on_its_own_device(two, folder, how):
    right, mine = two
    expected = computed(right)
    made = RIGHT[how](mine, folder[1])
    assert relative(computed(made), expected) < NEAR
    ids = IDS[:, :1]
    with torch.no_grad():
        assert relative(made(ids).logits, right(ids).logits) < NEAR


@pytest.mark.parametrize("path", ["model.layers.1", "model.layers.1.mlp", "model.layers.0.self_attn.o_proj"])
def test_a_hook_is_called_and_taken_off(two, folder, path):
    class Halving(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return tuple(0.5 * arg if torch.is_tensor(arg) else arg for arg in args), kwargs

    outs = []
    for model in two:
        seen, module = [], model.get_submodule(path)
        before = computed(model)
        add_hook_to_module(module, Halving())
        outs.append(computed(model))
        assert seen == [module] and relative(outs[-1], before) > 1e-5
        remove_hook_from_module(module)
        assert relative(computed(model), before) < 1e-6 and len(seen) == 1
    assert relative(outs[1], outs[0]) < NEAR


MOVING = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=folder
    ),
    "a linear layer": lambda model, folder: add_hook_to_module(
        model.model.layers[1].self_attn.o_proj, AlignDevicesHook(execution_device="cpu", offload=True)
    ),
    "to meta": lambda model, folder: add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="meta")),
}


@pytest.mark.parametrize("how", MOVING)
def test_packed_weights_are_not_moved(two, folder, how, tmp_path):
    right, mine = two
    with pytest.raises(
        UsageError,
        match=r"\.weight is packed and stays where it was loaded: accelerate can neither.*ktx\.load\(\.\.\., device",
    ):
        MOVING[how](mine, tmp_path)
    remove_hook_from_module(mine, recurse=True)
    assert relative(computed(mine), computed(right)) < NEAR


def test_experts_are_not_moved(two, folder):
    experts = next((m for path, m in two[1].named_modules() if path.endswith(".experts")), None)
    if experts is None:
        pytest.skip("a family without experts")
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj is packed and stays where it was loaded"):
        add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", offload=True))
    remove_hook_from_module(two[1], recurse=True)
    assert relative(computed(two[1]), computed(two[0])) < NEAR


@pytest.mark.parametrize("buffers", [False, True])
def test_weights_are_loaded_whatever_init_empty_weights_says(two, folder, buffers):
    with init_empty_weights(include_buffers=buffers):
        mine = load(folder[1], None, kv_dtype="f32")
    assert relative(computed(mine), computed(two[0])) < NEAR


def test_an_accelerator_trains_an_adapter(two, folder):
    made, losses = [], []
    for model in two:
        torch.manual_seed(5)
        model = get_peft_model(model, lora(["o_proj"]))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        model, steps = accelerator.prepare(model, steps)
        losses.append([])
        for at in (0, 16, 32, 48):
            ids = IDS[:, at : at + 16]
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                steps.step(), steps.zero_grad()
            losses[-1].append(loss.item())
        made.append(accelerator.unwrap_model(model))
    assert relative(*map(torch.tensor, losses[::-1])) < 1e-5 and losses[0][0] != losses[0][-1]
    check_gradients(*made)
    assert relative(computed(made[1]), computed(made[0])) < 1e-3
