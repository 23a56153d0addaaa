"""LoRA adapters in llama.cpp's GGUF files: what PEFT computes with the folder that they were made from."""

from __future__ import annotations

import shutil

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ktx.errors import BadFile, UsageError
from ktx.model.lora import read_adapter
from ktx.weights.lora import AdapterSpec
from tests.families.test_families import IDS, load, relative
from tests.model.test_lora import NEAR, ask
from tests.support.gguf_writer import LoraWriter, write_gguf, write_gguf_lora
from tests.support.tiny_chat_model import tokenizer
from tests.support.tiny_models import LINEAR, tiny

LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {  # what is adapted: modules, and parameters of experts
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"], []),  # noqa: E501
    "mixtral": (["q_proj", "k_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "qwen3_moe": (["q_proj", "v_proj", "lm_head"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "deepseek_v3": (
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "shared_experts.down_proj"],
        ["mlp.experts.down_proj"],
    ),
    "gpt_oss": (["q_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "qwen3_next": (["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"], ["mlp.experts.gate_up_proj"]),
    "qwen3_5_text": (["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "k_proj"], []),
    "phi3": (["qkv_proj", "gate_up_proj"], []),
}  # fmt: skip
MORE = {"qwen3_5_text": LINEAR | LAYERS | {"head_dim": 64}, "qwen3_next": LAYERS}


def made(family):
    return tiny(family, **({"tie_word_embeddings": False} | MORE.get(family, {})))


def adapter(family, folder, **more):
    """An adapter of random numbers by PEFT, and the same as a GGUF file."""
    modules, parameters = FAMILIES[family]
    known = {"target_modules": modules, "target_parameters": parameters, "r": 4, "lora_alpha": 12}
    config = LoraConfig(**{**known, "init_lora_weights": False, **more})
    model = made(family)
    torch.manual_seed(11)
    folder.parent.mkdir(exist_ok=True)
    get_peft_model(model, config).save_pretrained(folder)
    write_gguf_lora(folder.with_suffix(".gguf"), folder, made(family))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A model, and in adapters one (PEFT's folder) and one.gguf."""
    path = tmp_path_factory.mktemp(family)
    made(family).save_pretrained(path)
    adapter(family, path / "adapters" / "one")
    return path


@torch.no_grad()
def test_a_file_computes_what_pefts_folder_does(family, folder):
    base = made(family).eval()
    usual = base(input_ids=IDS).logits
    expected = PeftModel.from_pretrained(base, folder / "adapters" / "one").eval()(input_ids=IDS).logits
    mine = load(folder, None, kv_dtype="f32", lora=str(folder / "adapters" / "one.gguf"))
    assert list(mine.ktx.loras) == ["one"]
    found = mine(input_ids=IDS).logits
    assert relative(found, expected) < NEAR and relative(usual, expected) > 1e-2
    for number in range(2):  # no layer and no module was left out
        held = {name for name, module in mine.model.layers[number].named_modules() if "lora" in module.__dict__}
        assert held, number
    mine.ktx.unload_lora("one")
    assert relative(mine(input_ids=IDS).logits, usual) < NEAR
    assert mine.ktx.load_lora(folder / "adapters" / "one") == "one"
    mine.ktx.use_lora("one")
    assert relative(mine(input_ids=IDS).logits, found) < 1e-6


def test_beside_a_model_from_gguf_and_in_an_engine(tmp_path):
    base = made("llama")
    base.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", base, "F32")
    adapter("llama", tmp_path / "adapters" / "one")
    model = load(tmp_path, tmp_path / "model.gguf", kv_dtype="f32", lora=[f"file={tmp_path}/adapters/one.gguf"])
    model.ktx.load_lora(tmp_path / "adapters" / "one", "folder")
    model.ktx.use_lora()
    model.ktx.tokenizer = tokenizer()
    prompt = IDS[0, :70].tolist()
    with model.ktx.engine(max_batch_size=4, kv_cache_tokens=1024) as engine:
        (plain, one, other), cached = ask(engine, [(prompt, ()), (prompt, "file"), (prompt, "folder")])
    assert one == other != plain and cached == [0, 0, 0]


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0"])
def test_types_of_halves(tmp_path, quant):
    adapter("qwen3_moe", tmp_path / "one")
    write_gguf_lora(tmp_path / f"{quant}.gguf", tmp_path / "one", made("qwen3_moe"), quant)
    exact, rounded = (read_adapter(AdapterSpec.parse(tmp_path / f"{name}.gguf")).matrices for name in ("one", quant))
    assert exact.keys() == rounded.keys()
    for name, one in rounded.items():
        assert 0 < relative(one.b, exact[name].b) < 0.01 and relative(one.a, exact[name].a) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 0.0, 2.0, 12.0])
def test_scales_are_llama_cpps(tmp_path, alpha):
    """alpha over each tensor's own rank; 1 where it says nothing."""
    base = made("llama")
    adapter("llama", tmp_path / "one", rank_pattern={"q_proj": 2}, target_modules=["q_proj", "o_proj"])
    write_gguf_lora(tmp_path / "one.gguf", tmp_path / "one", base, **{gguf.Keys.Adapter.LORA_ALPHA: alpha})
    file = read_adapter(AdapterSpec.parse(f"{tmp_path / 'one.gguf'}=0.5")).matrices
    whole = read_adapter(AdapterSpec.parse(tmp_path / "one")).matrices
    for name, path, rank in (("attn_q", "q_proj", 2), ("attn_output", "o_proj", 4)):
        one, (other,) = file[f"blk.1.{name}.weight"], whole[f"model.layers.1.self_attn.{path}"]
        factor = 0.5 * (alpha / rank if alpha else 1) / (12 / rank)
        assert one.b.norm().item() == pytest.approx(factor * other.b.norm().item(), rel=1e-5)
        assert torch.equal(one.a, other.a)


# ---- one family suffices for what follows


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    base = made("llama")
    base.save_pretrained(path)
    (path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    return load(path, None), base


def file(path, base, halves, **keys):
    """A GGUF file with these pairs of shapes by tensor."""
    header = {"adapter.lora.alpha": 8.0} | keys
    writer = LoraWriter(path, base.config, "F32", False, False, False, header)
    for name, (a, b) in halves.items():
        writer.halves(name, torch.ones(a), torch.ones(b))
    writer.w.write_header_to_file()
    writer.w.write_kv_data_to_file()
    writer.w.write_tensors_to_file()
    writer.w.close()
    return path


Q = {"blk.0.attn_q.weight": ((4, 256), (256, 4))}


@pytest.mark.parametrize(
    "halves, keys, kind, words",
    [
        (Q, {"adapter.type": "control"}, UsageError, "adapter.type is 'control'"),
        (Q, {"adapter.type": None}, UsageError, "adapter.type is ''"),
        (Q, {"adapter.alora.invocation_tokens": [3, 4]}, UsageError, "invocation_tokens"),
        (Q, {"adapter.lora.alpha": float("nan")}, BadFile, "alpha is nan"),
        (Q, {"adapter.lora.alpha": "much"}, BadFile, "alpha is 'much'"),
        ({}, {}, BadFile, "no tensor"),
        ({"blk.2.attn_q.weight": ((4, 256), (256, 4))}, {}, BadFile, "the model has 2 layers"),
        ({"blk.0.attn_q.weight": ((4, 128), (128, 4))}, {}, BadFile, r"q_proj is \[128, 128\] in the adapter, but \[256, 256\] in the model"),  # noqa: E501
        ({"blk.0.attn_q.weight": ((4, 256), (257, 4))}, {}, BadFile, "q_proj.weight do not match this model's shape"),
        ({"blk.0.attn_q.weight": ((4, 256), (256, 5))}, {}, BadFile, "which do not match"),
        ({"blk.0.attn_q.weight": ((2, 4, 256), (2, 256, 4))}, {}, BadFile, "shape|in the adapter"),
        ({"blk.0.attn_qkv.weight": ((4, 256), (100, 4))}, {}, BadFile, "shape|in the adapter"),
        ({"blk.0.attn_sinks.weight": ((4, 256), (256, 4))}, {}, UsageError, "attn_sinks.weight does not match a matrix of this"),  # noqa: E501
        ({"blk.0.ffn_gate_exps.weight": ((8, 4, 256), (8, 96, 4))}, {}, UsageError, "ffn_gate_exps.weight does not match a matrix"),  # noqa: E501
        ({"blk.0.attn_norm.weight": ((4, 256), (256, 4))}, {}, UsageError, "RMSNorm"),
        ({"blk.0.attn_q.weight": ((4, 256), (256, 4)), "blk.0.foo": ((4, 256), (256, 4))}, {}, UsageError, "blk.0.foo"),
        ({"token_embd.weight": ((322, 4), (256, 4))}, {}, BadFile, "a lookup of"),
        ({"token_embd.weight": ((4, 320), (256, 4))}, {}, BadFile, "which do not match"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(plain, tmp_path, halves, keys, kind, words):
    model, base = plain
    with pytest.raises(kind, match=words):
        model.ktx.load_lora(file(tmp_path / "adapter.gguf", base, halves, **keys))
    assert not model.ktx.loras


def changed(path, before, after):
    """The same file with other bytes of the same length."""
    content = path.read_bytes()
    assert before in content and len(before) == len(after)
    path.write_bytes(content.replace(before, after))
    return path


@pytest.mark.parametrize(
    "before, after, kind, words",
    [
        (b"adapter.lora.alpha", b"adapter.lora.aloha", None, ""),  # no alpha is 1
        (b"attn_q.weight.lora_a", b"attn_q.weight.lora_c", UsageError, "lora_c is not a lora_a or lora_b"),
        (b"attn_q.weight.lora_b", b"attn_k.weight.lora_b", BadFile, "has lora_. but no lora_"),
        (b"llama", b"phi3\0", BadFile, "phi3"),
        (b"llama", b"qwen2", BadFile, "'qwen2', the model is a llama"),
        (b"llama", b"gemma", BadFile, "'gemma', the model is a llama"),
        (b"general.type", b"general.kind", UsageError, "general.type is 'model'"),
        (b"GGUF", b"GGML", BadFile, "GGUF|safetensors"),
    ],
)
def test_bytes_that_say_something_else(plain, tmp_path, before, after, kind, words):
    model, base = plain
    path = changed(file(tmp_path / "adapter.gguf", base, Q), before, after)
    if kind is None:
        assert model.ktx.load_lora(path) == "adapter"
        model.ktx.unload_lora("adapter")
        return
    with pytest.raises(kind, match=words):
        model.ktx.load_lora(path)


def test_norms_that_are_written_beside_an_adapter_are_refused(plain, tmp_path):
    """mergekit-extract-lora writes them, llama.cpp leaves them out."""
    model, base = plain
    writer = LoraWriter(tmp_path / "n.gguf", base.config, "F32", False, False, False, {})
    writer.w.add_tensor("blk.0.attn_norm.weight", torch.ones(256).numpy())
    writer.w.write_header_to_file(), writer.w.write_kv_data_to_file(), writer.w.write_tensors_to_file()
    writer.w.close()
    with pytest.raises(UsageError, match=r"attn_norm.weight is not a lora_a or lora_b; merge it"):
        model.ktx.load_lora(tmp_path / "n.gguf")


def test_a_file_cut_short(plain, tmp_path):
    model, base = plain
    path = file(tmp_path / "adapter.gguf", base, Q)
    whole = path.read_bytes()
    for length in (3, 40, 200, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            model.ktx.load_lora(path)


def test_a_folder_of_one_file(plain, tmp_path):
    model, base = plain
    folder = tmp_path / "style"
    folder.mkdir()
    file(folder / "style-f16.gguf", base, Q)
    assert model.ktx.load_lora(folder) == "style" and AdapterSpec.parse(folder / "style-f16.gguf").name == "style-f16"
    model.ktx.unload_lora("style")
    shutil.copy(folder / "style-f16.gguf", folder / "style-q8.gguf")
    with pytest.raises(BadFile, match=r"style-f16.gguf and style-q8.gguf; pass the file to use"):
        model.ktx.load_lora(folder)


def test_a_model_is_no_adapter_and_an_adapter_no_model(plain, tmp_path):
    model, base = plain
    base.config.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", base, "F32")
    with pytest.raises(UsageError, match="general.type is 'model'.*--weights"):
        model.ktx.load_lora(tmp_path / "model.gguf")
    with pytest.raises(BadFile, match="'adapter'; it belongs to a model but is not one: pass it to --lora"):
        load(tmp_path, file(tmp_path / "adapter.gguf", base, Q))


def test_halves_of_an_mla_are_refused(tmp_path):
    """The converter writes none of them, and nothing of llama.cpp's adds them."""
    base = made("deepseek_v3")
    base.save_pretrained(tmp_path)
    c = base.config
    k = ((4, c.num_attention_heads, 4, c.qk_nope_head_dim), (c.num_attention_heads, c.kv_lora_rank, 4))
    v = ((c.num_attention_heads, 4, c.kv_lora_rank), (c.num_attention_heads, c.v_head_dim, 4))
    halves = {"blk.1.attn_k_b.weight": (k[0][1:], k[1]), "blk.1.attn_v_b.weight": v}
    model = load(tmp_path, None)
    with pytest.raises(UsageError, match="attn_k_b.weight and blk.1.attn_v_b.weight"):
        model.ktx.load_lora(file(tmp_path / "adapter.gguf", base, halves))
