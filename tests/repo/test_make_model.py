"""Random-weight models of the benchmarks: real shapes, types as llama-quantize chooses them, files that others read."""

from __future__ import annotations

import json
import os
from collections import Counter

import gguf
import pytest
import torch

import ktx
from tests.support import random_model
from tests.support.random_model import script

make_model = script("make_model")


def plan(preset: str, quant: str = "Q4_K_M") -> list:
    config = make_model.configuration(preset, {})
    layers = config["num_hidden_layers"]
    return [(tensor, make_model.qtype_of(tensor, quant, layers)) for tensor in make_model.tensors(config)]


def gib(entries: list) -> float:
    return sum(q.row_bytes(t.columns) * torch.Size(t.shape[:-1]).numel() for t, q in entries) / 2**30


@pytest.mark.parametrize(
    "preset,params,size", [("v2lite", 15.71e9, 9.66), ("qwen3-30b", 30.53e9, 17.28), ("v3", 671e9, 376.77)]
)
def test_a_preset_has_the_published_models_weights(preset, params, size):
    """Parameter counts of the real models, sizes of their Q4_K_M files (V3: 376.65 GiB, published)."""
    entries = plan(preset)
    assert sum(torch.Size(t.shape).numel() for t, _ in entries) == pytest.approx(params, rel=1e-3)
    assert gib(entries) == pytest.approx(size, rel=1e-3)


def test_rows_that_are_no_256_blocks_fall_back_as_llama_quantize_does():
    types = {t.name: q.name for t, q in plan("v2lite")}
    assert (
        types["blk.3.ffn_down_exps.weight"] == "Q5_0" and types["blk.26.ffn_down_exps.weight"] == "Q8_0"
    )  # rows of 1408
    assert types["blk.3.ffn_gate_exps.weight"] == "Q4_K" and types["output.weight"] == "Q6_K"
    assert types["blk.3.ffn_gate_inp.weight"] == types["blk.3.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("preset", ["v2lite", "v3", "qwen3-30b"])
def test_folder_and_file_load_and_agree(tmp_path, preset, capsys):
    file = random_model.write(tmp_path, preset, "--layers", "4")  # V3's first three have no experts
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    model, tokenizer = ktx.load(tmp_path, file, progress=False)
    assert tokenizer.decode(tokenizer("Hello wörld", add_special_tokens=False)["input_ids"]) == "Hello wörld"
    logits = model(**tokenizer("Hello", return_tensors="pt")).logits
    assert logits.isfinite().all() and 0.05 < logits.std() < 50
    counted = Counter(step.specs[0].qtype.name for step in model.ktx.plan if step.path.endswith("lm_head"))
    assert counted == {"Q6_K": 1}


def test_gguf_py_reads_what_was_written(tmp_path):
    """Another reader sees finite weights of the spread that keeps activations near one."""
    file = random_model.write(tmp_path, "v2lite")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name in (
        "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.0.attn_output.weight",
        "output.weight",
    ):
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert (
            values.std() == pytest.approx(int(tensor.shape[0]) ** -0.5, rel=0.1)
            and abs(values.mean()) < 0.1 * values.std()
        )
    first, second = (tensors[f"blk.1.ffn_{half}_exps.weight"].data for half in ("gate", "up"))
    assert (first != second).any()


def test_header_only_is_a_hole_that_plan_reads(tmp_path):
    make_model.main(["--preset", "v3", "--header-only", "-o", str(tmp_path)])
    file = tmp_path / "v3-Q4_K_M.gguf"
    assert file.stat().st_size > 376 * 2**30 and os.stat(file).st_blocks * 512 < 32 << 20
    assert sum(ktx.plan(tmp_path, file).totals().values()) / 2**30 == pytest.approx(376.77, rel=2e-3)


def test_changed_dimensions_reach_config_and_file(tmp_path):
    random_model.write(tmp_path, "qwen3-30b", "--experts-used", "99")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_experts"] == config["num_experts_per_tok"] == 8 and config["vocab_size"] == 512
    assert config["eos_token_id"] < 512


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is too small for 256 bytes"):
        make_model.main(["--preset", "v2lite", "-o", str(tmp_path), *random_model.TINY[:-1], "100"])
