"""The demo model's training and export, on a network of a few thousand weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

from ktx import demo
from tools.demo import corpus, export, tokenizer
from tools.demo.model import SETTINGS, Trainee, fake_quantize
from tools.demo.train import Data, FakeQuantized, make_optimizer


def test_split_is_disjoint_and_steady():
    found = [f"entry {i}\n about {i * i}" for i in range(2000)]
    train, held = corpus.split_heldout(found)
    again = corpus.split_heldout(found[::-1])
    assert not set(train) & set(held)
    assert (set(train), set(held)) == (set(again[0]), set(again[1]))
    assert 0.01 < len(held) / len(found) < 0.05


def test_entries_join_lines_and_drop_the_header():
    text = "00-database\n\n(TM)\n //\n\n    one\n    two\n\n    three\n\nword\n n.\n\n    “four”\n"
    assert corpus.parse_entries(text) == ["(TM) //\n one two\n three", 'word n.\n "four"']


def small_net() -> Trainee:
    less = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
    }
    made = DeepseekV3Config(**SETTINGS | less | {"q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8})
    made._attn_implementation, made._experts_implementation = "sdpa", "eager"
    return Trainee(made).train()


def test_training_learns_a_batch_and_its_next_but_one_token():
    net, ids = small_net(), torch.arange(24).repeat(2, 1) % 12 + 3
    adam, losses = make_optimizer(net), []
    for _ in range(40):
        main, ahead = net.losses(ids, torch.ones(ids.shape), with_mtp=True)
        losses.append((main.item(), ahead.item()))
        (main + ahead).backward()
        adam.step()
        adam.zero_grad()
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]


def test_balance_favours_idle_experts():
    net = small_net()
    net.load[0] += torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])
    overload = net.balance(0.1)
    bias = net.routers[0].e_score_correction_bias
    assert bias[0] < 0 < bias[1] and overload == pytest.approx(4.5)
    assert not net.load[0].any()


def test_coarsened_weights_come_back():
    net = small_net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    with FakeQuantized(net, active=True):
        inside = net.main.lm_head.weight.clone()
    assert torch.equal(inside, fake_quantize(before["main.lm_head.weight"]))
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_rows_begin_with_the_begin_mark_and_weigh_answers():
    words = AutoTokenizer.from_pretrained(demo.path())
    encode = lambda text: words(text, add_special_tokens=False).input_ids  # noqa: E731
    data = Data(torch.arange(1000), demo.questions(), encode, random.Random(0))
    ids, weight = data.sample_batch(8, 64, 0.5)
    assert ids.shape == weight.shape == (8, 64)
    assert (ids[:, 0] == tokenizer.BOS).all()
    chat_ids, chat_weight = data.sample_chat(3)
    answered = [w for token, w in zip(chat_ids, chat_weight, strict=True) if token == tokenizer.EOS]
    assert answered == [1.0] * 3
    assert 0.1 in chat_weight and chat_weight[0] == 0.0


def test_exported_names_load_in_transformers(tmp_path: Path):
    net = small_net().eval()
    for value in net.parameters():
        value.data = value.data.bfloat16().float()
    settings = SETTINGS | {
        key: net.main.config.to_dict()[key] for key in ("vocab_size", "hidden_size", "intermediate_size")
    }
    settings |= {"moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16}
    settings |= {"qk_rope_head_dim": 8}
    export.write_folder(net.state_dict(), settings, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = net.main(input_ids=ids).logits, again(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-5
