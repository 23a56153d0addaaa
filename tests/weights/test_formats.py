"""The format table, the quantisers, and headers that lie."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import time

import gguf
import numpy as np
import pytest
import torch

import ktx
from ktx.errors import BadFile, KtxError, UsageError
from ktx.quant.random_blocks import random_rows
from ktx.quant.types import BY_CODE, QTYPES
from ktx.weights.gguf_header import parse_header
from ktx.weights.open import open_weights
from ktx.weights.safetensors import parse_safetensors_header
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import FAMILIES, tiny

# relative RMS on gaussian rows: about what llama-quantize reaches without an importance matrix
ERRORS = {
    "Q4_0": 0.09,
    "Q4_1": 0.08,
    "Q5_0": 0.045,
    "Q5_1": 0.04,
    "Q8_0": 0.006,
    "Q2_K": 0.3,
    "Q3_K": 0.155,
    "Q4_K": 0.077,
    "Q5_K": 0.039,
    "Q6_K": 0.019,
    "IQ4_NL": 0.078,
    "IQ4_XS": 0.079,
    "MXFP4": 0.12,
    "F32": 0,
    "F16": 1e-3,
    "BF16": 4e-3,
}


def test_the_table_agrees_with_gguf_py():
    for code, qtype in BY_CODE.items():
        if code < 1000:
            assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(code)] == (qtype.block, qtype.nbytes)
    missing = (
        {t.name for t in gguf.GGMLQuantizationType} - set(QTYPES) - {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    )
    assert missing <= {"NVFP4", "Q1_0", "Q2_0"}, missing


@pytest.mark.parametrize("name", ERRORS)
def test_quantising(name):
    x = torch.randn(32, 1024)
    data = QTYPES[name].quantize(x)
    assert data.dtype == torch.uint8 and data.shape == (32, QTYPES[name].row_bytes(1024))
    error = (QTYPES[name].dequantize(data) - x).norm() / x.norm()
    assert error <= ERRORS[name]
    zeros = QTYPES[name].quantize(torch.zeros(2, 256))
    assert not QTYPES[name].dequantize(zeros).any()


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S"])
def test_types_that_need_an_importance_matrix_say_so(name):
    with pytest.raises(UsageError, match="importance matrix"):
        QTYPES[name].quantize(torch.randn(1, 256))
    assert QTYPES[name].dequantize(random_rows(QTYPES[name], 8, 512)).std() == pytest.approx(0.05, rel=0.2)


def test_rows_that_are_no_blocks():
    with pytest.raises(ValueError, match="blocks of 256"):
        QTYPES["Q4_K"].row_bytes(100)
    with pytest.raises(UsageError):
        QTYPES["Q4_K"].quantize(torch.randn(1, 100))


# ---- every parameter of every family comes back


@pytest.mark.parametrize(
    "options", [{}, {"split_kvb": False, "fuse_gate_up": True, "fuse_qkv": True}], ids=["plain", "fused"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, options):
    model = tiny(family)
    if family == "gpt_oss":
        options = {**options, "fuse_gate_up": False}
    if family in ("phi3", "deepseek_v2", "deepseek_v3"):
        options = {**options, "fuse_qkv": False}
    oracle = write_gguf(tmp_path / "m.gguf", model, "Q8_0", **options)
    source = open_weights(tmp_path / "m.gguf", model.config)
    for name, tensor in oracle.items():
        if "experts." in name and "_proj" in name and "shared" not in name:
            check_experts(source, name, tensor, family)
        elif ".kv_b_proj" in name or not name.endswith(("gate_up_proj",)):
            got = source.get(name).dequantize().reshape(tensor.shape)
            torch.testing.assert_close(got, tensor, rtol=1e-5, atol=1e-6, msg=name)
            assert np.prod(source.spec(name).shape) == tensor.numel(), name
    for layer in range(model.config.num_hidden_layers):  # what MLA asks for
        if getattr(model.config, "kv_lora_rank", None):
            (
                source.get(f"model.layers.{layer}.self_attn.k_b_proj.weight"),
                source.get(f"model.layers.{layer}.self_attn.v_b_proj.weight"),
            )
    model.config.save_pretrained(tmp_path)
    plan = ktx.plan(tmp_path, tmp_path / "m.gguf")
    plan.check()
    assert not plan.unread, plan.unread
    assert not source.config_mismatches(model.config)


def check_experts(source, name, tensor, family):
    oss = family == "gpt_oss"
    bias = name.endswith("_bias")
    if "down_proj" in name:
        got = source.get(name).dequantize()
        torch.testing.assert_close(got.transpose(1, 2) if oss and not bias else got, tensor, rtol=1e-5, atol=1e-6)
        return
    gate, up = (source.get(name.replace("gate_up_proj", half)).dequantize() for half in ("gate_proj", "up_proj"))
    if not oss:
        torch.testing.assert_close(torch.cat([gate, up], 1), tensor, rtol=1e-5, atol=1e-6)
    elif bias:
        torch.testing.assert_close(torch.stack([gate, up], 2).flatten(1, 2), tensor, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(
            torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2), tensor, rtol=1e-5, atol=1e-6
        )


def test_per_expert_files_of_old(tmp_path):
    model = tiny("mixtral")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w = torch.randn(4, 160, 256)
    for e in range(4):
        writer.add_tensor(f"blk.0.ffn_gate.{e}.weight", w[e].numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = open_weights(tmp_path / "m.gguf", model.config)
    assert torch.equal(source.get("model.layers.0.mlp.experts.gate_proj").dequantize(), w)
    assert len(source.get_parts("model.layers.0.mlp.experts.gate_proj")) == 4


def split(path, parts):
    """A file as gguf-split leaves it: the tensors shared out over files that name each other by number."""
    reader = gguf.GGUFReader(path)
    per = -(-len(reader.tensors) // parts)
    for i in range(parts):
        writer = gguf.GGUFWriter(path.parent / f"s-{i + 1:05d}-of-{parts:05d}.gguf", "llama")
        (
            writer.add_uint16("split.no", i),
            writer.add_uint16("split.count", parts),
            writer.add_int32("split.tensors.count", len(reader.tensors)),
        )
        for t in reader.tensors[i * per : (i + 1) * per]:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()


def test_split_files(tmp_path):
    model = tiny("llama")
    oracle = write_gguf(tmp_path / "m.gguf", model, "Q8_0")
    split(tmp_path / "m.gguf", 3)
    (tmp_path / "m.gguf").unlink()
    for path in (tmp_path / "s-00001-of-00003.gguf", tmp_path):
        source = open_weights(path, model.config)
        for name, tensor in oracle.items():
            torch.testing.assert_close(source.get(name).dequantize().reshape(tensor.shape), tensor)
    (tmp_path / "s-00002-of-00003.gguf").unlink()
    with pytest.raises(BadFile, match="1 of 3 parts are missing, the first is s-00002-of-00003.gguf"):
        open_weights(tmp_path / "s-00001-of-00003.gguf", model.config)


def test_two_models_in_one_folder(tmp_path):
    model = tiny("llama")
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", model, "Q8_0")
    with pytest.raises(BadFile, match="more than one model: a.gguf and b.gguf"):
        open_weights(tmp_path, model.config)


# ---- headers that lie


def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("header") / "m.gguf"
    write_gguf(
        path,
        tiny("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32),
        "Q8_0",
        extra=lambda w: (w.add_array("tokenizer.ggml.tokens", ["a", "bc", "ü"]), w.add_array("x.floats", [1.0, 2.0])),
    )
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return image(tmp_path_factory)


def patched(data, at, fmt, value):
    return data[:at] + struct.pack(fmt, value) + data[at + struct.calcsize(fmt) :]


def first_tensor(data):
    """Byte offsets of the first tensor entry's fields."""
    at = data.index(b"token_embd.weight") - 8
    dims = at + 8 + len(b"token_embd.weight")
    return {"length": at, "n_dims": dims, "dim0": dims + 4, "dim1": dims + 12, "type": dims + 20, "offset": dims + 24}


def test_a_good_header(good):
    header = parse_header(good, "m.gguf")
    assert list(header.metadata["tokenizer.ggml.tokens"]) == ["a", "bc", "ü"] and list(header.metadata["x.floats"]) == [
        1.0,
        2.0,
    ]
    assert header.tensors["token_embd.weight"].shape == (32, 32)


@pytest.mark.parametrize(
    "field,fmt,value,words",
    [
        ("length", "<Q", 1 << 60, "a tensor name claims"),
        ("n_dims", "<I", 9, "9 dimensions"),
        ("n_dims", "<I", 0, "0 dimensions"),
        ("dim0", "<Q", 0, "is empty"),
        ("dim0", "<Q", 33, "needs a multiple of 32"),
        ("dim0", "<Q", 1 << 62, "truncated"),
        ("dim1", "<Q", (1 << 64) - 1, "truncated"),
        ("type", "<I", 250, "ggml type 250"),
        ("type", "<I", 1000, "ggml type 1000"),
        ("offset", "<Q", 1 << 63, "truncated"),
        ("offset", "<Q", 33, "not a multiple of 32"),
    ],
)
def test_hostile_tensors(good, field, fmt, value, words):
    with pytest.raises(BadFile, match=words):
        parse_header(patched(good, first_tensor(good)[field], fmt, value), "m.gguf")


@pytest.mark.parametrize(
    "at,fmt,value,words",
    [
        (0, "<I", 1, "is not a GGUF file"),
        (4, "<I", 1, "version 1"),
        (4, "<I", 3 << 24, "big-endian"),
        (8, "<Q", 1 << 50, "claims"),
        (16, "<Q", 1 << 50, "claims"),
        (24, "<Q", 1 << 40, "claims"),
    ],
)
def test_hostile_heads(good, at, fmt, value, words):
    with pytest.raises(BadFile, match=words):
        parse_header(patched(good, at, fmt, value), "m.gguf")


def test_duplicate_names(good):
    names = [good.index(b"blk.0.attn_norm.weight"), good.index(b"blk.0.ffn_norm.weight")]
    assert all(n > 0 for n in names)
    again = good.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1)
    with pytest.raises(BadFile, match="blk.0.attn_k.weight appears twice"):
        parse_header(again, "m.gguf")


def test_truncation_anywhere(good):
    whole = parse_header(good, "m.gguf")
    end = max(spec.offset + spec.nbytes for spec in whole.tensors.values())
    for at in [*range(0, end, max(1, end // 400)), end - 1]:
        with pytest.raises(BadFile):
            parse_header(good[:at], "m.gguf")


@pytest.mark.wall_clock
def test_twenty_thousand_mutated_headers(good):
    """Each is read or refused, quickly, and never by another error."""
    rng = random.Random(1)
    header = good[: min(spec.offset for spec in parse_header(good, "m.gguf").tensors.values())]
    tail = good[len(header) :]
    sizes = [0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
    slowest = 0.0
    for _ in range(14000):
        data = bytearray(header)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, len(data) - 8)
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                data[at : at + 8] = struct.pack("<Q", rng.choice(sizes))
        start = time.perf_counter()
        try:
            header_read = parse_header(bytes(data) + tail, "m.gguf")
            for value in header_read.metadata.values():
                if hasattr(value, "__iter__") and not isinstance(value, str):
                    list(value)
        except KtxError:
            pass
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1.0


# ---- safetensors


def header_of(entries):
    raw = json.dumps(entries).encode()
    return raw, 8 + len(raw) + 64


GOOD = {"a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}


@pytest.mark.parametrize(
    "change,words",
    [
        ({"dtype": "I64"}, "does not fit"),
        ({"dtype": "I65"}, "dtype 'I65'"),
        ({"dtype": "F4"}, "does not fit"),
        ({"dtype": 7}, "dtype '7'"),
        ({"shape": [2, 9]}, "does not fit"),
        ({"shape": [0, 8]}, "does not fit"),
        ({"shape": [1 << 61, 8]}, "does not fit"),
        ({"shape": [-2, 8]}, "shape"),
        ({"shape": "2"}, "no dtype, shape"),
        ({"data_offsets": [0, 1 << 40]}, "does not fit"),
        ({"data_offsets": [64, 0]}, "does not fit"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"shape": [2.0, 8]}, "shape"),
        ({"data_offsets": [True, 64]}, "data_offsets"),
    ],
)
def test_hostile_safetensors(change, words):
    raw, size = header_of({"a": GOOD["a"] | change})
    with pytest.raises(BadFile, match=words):
        parse_safetensors_header(raw, "m.safetensors", size)


def test_safetensors_duplicates_and_damage():
    entry = json.dumps(GOOD["a"])
    for raw in (f'{{"a": {entry}, "a": {entry}}}', "[1]", "{", '{"a": 3}', "[" * 100000):
        with pytest.raises(BadFile):
            parse_safetensors_header(raw.encode(), "m", 10**6)


def test_mutated_safetensors():
    rng = random.Random(2)
    raw, size = header_of(
        {**GOOD, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    )
    for _ in range(8000):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]",:-eE\x00\xff')
        with contextlib.suppress(KtxError):
            parse_safetensors_header(bytes(data), "m", size)


@pytest.mark.parametrize("data,words", [(b"", "truncated"), (b"\x00" * 8, "damaged"), (b"\xff" * 16, "truncated")])
def test_safetensors_files(tmp_path, data, words):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BadFile, match=words):
        open_weights(tmp_path, tiny("llama").config)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(BadFile, match="model-1.safetensors is missing"):
        open_weights(tmp_path, tiny("llama").config)
