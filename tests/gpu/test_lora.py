"""LoRA adapters on modules of a GPU: what the CPU's twin computes with them; what is not computed there is refused by
name.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams
from ktx.errors import UsageError
from tests.families.test_families import relative
from tests.gpu.helpers import Twins
from tests.support.tiny_chat_model import tokenizer

IDS = torch.tensor([[5, 9, 200, 31, 7]])


def adapter(twins, folder, **config):
    """An adapter of random numbers, and transformers' model with it."""
    torch.manual_seed(3)
    made = get_peft_model(twins.reference, LoraConfig(r=4, init_lora_weights=False, **config))
    made.save_pretrained(folder)
    made.unload()
    return folder


def test_an_adapter_on_a_gpu(tmp_path):
    twins = Twins(tmp_path, "qwen3_moe")
    path = adapter(twins, tmp_path / "one", target_modules=["q_proj", "v_proj", "o_proj", "lm_head"])
    mine = twins.on(Experts="cpu")
    mine.ktx.load_lora(path)
    mine.ktx.use_lora("one")
    adapted = PeftModel.from_pretrained(twins.reference, path).eval()
    with torch.no_grad():
        expected = adapted(IDS).logits
        assert relative(mine(IDS).logits.float().cpu(), expected) < 1e-4
        with adapted.disable_adapter():
            usual = adapted(IDS).logits
    assert relative(usual, expected) > 1e-2
    mine.ktx.tokenizer = tokenizer()
    with mine.ktx.engine(max_batch_size=2, kv_cache_tokens=256, cuda_graphs=True) as engine:
        for lora, logits in (("one", expected), ((), usual)):
            sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)
            events = [event for _, event in engine.generate([IDS[0].tolist()], sampling, lora)]
            assert [event.ids for event in events if isinstance(event, Finished)] == [[int(logits[0, -1].argmax())]]


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("deepseek_v3", {"target_modules": ["kv_b_proj"]}, r"kv_b_proj \(MLA on a GPU\)"),
        (
            "qwen3_moe",
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
            r"experts \(Experts on a GPU\)",
        ),
    ],
)
def test_what_a_gpu_does_not_compute_is_refused(tmp_path, family, config, words):
    twins = Twins(tmp_path, family)
    path = adapter(twins, tmp_path / "one", **config)
    mine = twins.on()
    with pytest.raises(UsageError, match=words):
        mine.ktx.load_lora(path)
