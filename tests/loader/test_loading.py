"""Plan, checks, injection and loading on tiny models, and every way in which they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ktx
import ktx.injection.rules
import ktx.loader.load
import ktx.loader.resources
from ktx.errors import BadFile, DoesNotFit, UsageError
from ktx.kernels.check import multiplies_in_bf16
from ktx.ops.experts import Experts
from ktx.ops.registry import register
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny


class Needy(Experts):
    """An operator with an option that must be given."""

    @classmethod
    def from_hf(cls, old, ctx, level, loud=False, **kwargs):
        return super().from_hf(old, ctx)


class Unmade(ktx.Operator):
    pass


IDS = torch.randint(3, 320, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(ktx.loader.load, "read_tokenizer", lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    model = tiny("qwen3_moe")
    model.config.save_pretrained(folder)
    model.load_state_dict(write_gguf(folder / "m.gguf", model, "Q8_0"), strict=False)
    return folder, model


def load(folder, weights=None, **more):
    return ktx.load(folder, weights or folder / "m.gguf", progress=False, **more)[0]


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_plan_reads_no_weights_and_shows_everything(qwen):
    plan = ktx.plan(qwen[0], qwen[0] / "m.gguf")
    text = str(plan)
    assert (
        "Qwen3MoeExperts" in text
        and "Experts" in text
        and "Q8_0" in text
        and "moe.yaml:" in text
        and "model.layers.[0-1].mlp.experts" in text
    )
    assert plan.totals()["cpu"] == sum(step.nbytes for step in plan) > 0
    assert len(plan.table(fold=False).splitlines()) > len(text.splitlines())


def test_a_users_operator_in_a_yaml(qwen, tmp_path, monkeypatch):
    (tmp_path / "my_ops.py").write_text(
        "import torch, ktx\nfrom ktx.ops.experts import Experts\n"
        "class SkipLow(Experts):\n"
        "    @classmethod\n    def from_hf(cls, old, ctx, threshold=0.0):\n        new = super().from_hf(old, ctx)\n        new.threshold = threshold\n        return new\n"  # noqa: E501
        "    def forward(self, hidden, ids, weights):\n        return super().forward(hidden, torch.where(weights < self.threshold, -1, ids), weights)\n"  # noqa: E501
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rules = tmp_path / "mine.yaml"
    rules.write_text(
        "- match: {name: 'experts$'}\n  replace: {class: my_ops.SkipLow, kwargs: {threshold: THRESHOLD}}\n  recursive: false\n"  # noqa: E501
        + (ktx.injection.rules.rule_folder() / "moe.yaml").read_text()
    )
    text = rules.read_text()
    rules.write_text(text.replace("THRESHOLD", "0.0"))
    assert torch.equal(logits(load(qwen[0], rules=rules)), logits(load(qwen[0])))
    rules.write_text(text.replace("THRESHOLD", "0.3"))
    assert not torch.equal(logits(load(qwen[0], rules=rules)), logits(load(qwen[0])))


def test_registered_short_names(qwen):
    from ktx.ops.linear import Linear

    @register("LoudLinear")
    class LoudLinear(Linear):
        pass

    rules = [ktx.Rule(name="lm_head", replace="LoudLinear"), *ktx.injection.rules.load_rules("qwen3-moe")]
    assert type(load(qwen[0], rules=rules).lm_head).__name__ == "LoudLinear"
    with pytest.raises(UsageError):
        register("Linear")(LoudLinear)


def test_a_class_in_a_module_next_to_the_rule_file(qwen, tmp_path, monkeypatch):
    (tmp_path / "operators_next_to_rules.py").write_text(
        "from ktx.ops.linear import Linear\n\n\nclass QuietLinear(Linear):\n    pass\n"
    )
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- match: {name: lm_head}\n  replace: {class: operators_next_to_rules.QuietLinear}\n"
        "- match: {name: experts$}\n  replace: {class: Experts}\n  recursive: false\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert type(load(qwen[0], rules=rules).lm_head).__name__ == "QuietLinear"


@pytest.mark.parametrize(
    "rule,words",
    [
        (ktx.Rule(name="lm_head", replace="Liner", where="r.yaml:4"), ["r.yaml:4", "'Liner'", "did you mean 'Linear'"]),
        (
            ktx.Rule(name="lm_head", replace="no_such_package.Op", where="r.yaml:4"),
            ["r.yaml:4", "cannot import", "next to the rule file"],
        ),
        (ktx.Rule(name="lm_head", replace="ktx.ops.linear.Lineal", where="r.yaml:4"), ["no class Lineal", "Linear"]),
        (
            ktx.Rule(name="lm_head", replace="Linear", kwargs={"bitz": 4}, where="r.yaml:4"),
            ["r.yaml:4", "no option 'bitz'"],
        ),
        (
            ktx.Rule(name="experts$", replace="tests.loader.test_loading.Needy", where="r.yaml:4"),
            ["r.yaml:4", "needs the option 'level'"],
        ),
        (
            ktx.Rule(
                name="experts$",
                replace="tests.loader.test_loading.Needy",
                kwargs={"level": 1, "loud": 3},
                where="r.yaml:4",
            ),
            ["r.yaml:4", "loud must be of type bool", "found 3"],
        ),
        (
            ktx.Rule(name="experts$", replace="tests.loader.test_loading.Needy", kwargs={"levle": 1}, where="r.yaml:4"),
            ["no option 'levle'", "did you mean 'level'", "level loud"],
        ),
        (
            ktx.Rule(name="lm_head", replace="broken_module.Op", where="r.yaml:4"),
            ["r.yaml:4", "cannot import broken_module.Op: SyntaxError"],
        ),
        (
            ktx.Rule(name="lm_head", replace="tests.loader.test_loading.Unmade", where="r.yaml:4"),
            ["r.yaml:4", "Unmade must implement from_hf"],
        ),
        (
            ktx.Rule(name="embed_tokens", replace="Linear", where="r.yaml:4"),
            ["r.yaml:4", "model.embed_tokens is a Embedding"],
        ),
        (ktx.Rule(name="lm_head", replace="torch.nn.Linear", where="r.yaml:4"), ["not a subclass of ktx.Operator"]),
        (ktx.Rule(name="lm_head", replace="Linear", device="gpu0", where="r.yaml:4"), ["r.yaml:4", "is not a device"]),
    ],
)
def test_bad_rules_are_told_before_loading(qwen, rule, words, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("class Op(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError) as error:
        ktx.plan(qwen[0], qwen[0] / "m.gguf", rules=[rule])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_rule_that_matches_nothing_is_told(qwen):
    with pytest.warns(UserWarning, match="r.yaml:9: the rule for 'no_such_module' matched no module"):
        ktx.plan(
            qwen[0],
            qwen[0] / "m.gguf",
            rules=[ktx.Rule(name="no_such_module", where="r.yaml:9"), *ktx.injection.rules.load_rules("qwen3-moe")],
        )


def test_a_class_that_no_module_has_is_told_with_the_nearest(qwen):
    with pytest.warns(UserWarning, match="matched no module .did you mean 'Qwen3MoeRMSNorm'"):
        ktx.plan(
            qwen[0],
            qwen[0] / "m.gguf",
            rules=[ktx.Rule(cls="Qwen3RMSNrom", replace="RMSNorm"), *ktx.injection.rules.load_rules("qwen3-moe")],
        )


@pytest.mark.parametrize("gate", ["clamped", "none"])
def test_experts_with_another_gate_are_refused(qwen, gate, monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def clamped(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=7.0)) * up

    if gate == "clamped":
        monkeypatch.setattr(Qwen3MoeExperts, "_apply_gate", clamped)
    else:
        monkeypatch.setattr(
            Qwen3MoeExperts, "has_gate", property(lambda self: False, lambda self, value: None), raising=False
        )
    with pytest.raises(UsageError, match="moe.yaml:.*mlp.experts: .*Qwen3MoeExperts"):
        ktx.plan(qwen[0], qwen[0] / "m.gguf")


def test_without_rules_the_model_is_transformers_own(qwen):
    model = load(qwen[0], rules=[ktx.Rule(name="experts$", replace="Experts", recursive=False)])
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(logits(model), logits(qwen[1]), rtol=0.05, atol=0.05)


def test_two_models_in_one_process(qwen, tmp_path):
    other = tiny("llama")
    other.config.save_pretrained(tmp_path)
    other.load_state_dict(write_gguf(tmp_path / "m.gguf", other, "F32"), strict=False)
    first, second = load(qwen[0]), load(tmp_path)
    before = logits(first)
    assert (logits(second) - logits(other)).abs().max() < 1e-4
    assert torch.equal(logits(first), before)


def test_fewer_experts(qwen):
    assert load(qwen[0], num_experts_per_tok=1).model.layers[0].mlp.gate.top_k == 1
    for wrong in (0, 9):
        with pytest.raises(UsageError, match="must be 1 to 3"):
            load(qwen[0], num_experts_per_tok=wrong)


def test_safetensors_folder(qwen, tmp_path):
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path)
    assert (logits(load(tmp_path, tmp_path)) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "minimax_m2", "ernie4_5_moe", "qwen3_next"])
def test_safetensors_families(tmp_path, family):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    assert (logits(load(tmp_path, tmp_path)) - logits(model)).abs().max() < 1e-4


def test_block_fp8_safetensors(tmp_path):
    from ktx.quant.types import expand_scale

    model = tiny("llama", intermediate_size=300)
    model.config.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) * 0.01 + 0.005
            spread = expand_scale(scale, *tensor.shape)
            tensors[name], tensors[f"{name}_scale_inv"] = (tensor / spread).to(torch.float8_e4m3fn), scale
            tensor.copy_(tensors[name].float() * spread)
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert (logits(load(tmp_path, tmp_path)) - logits(model)).abs().max() < (2e-2 if multiplies_in_bf16() else 1e-4)


def test_kimi_k2_is_deepseek_v3_without_remote_code(tmp_path):
    model = tiny("deepseek_v3")
    model.config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {
        "model_type": "kimi_k2",
        "architectures": ["KimiK2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model.load_state_dict(write_gguf(tmp_path / "m.gguf", model, "F32"), strict=False)
    loaded = load(tmp_path)
    assert type(loaded).__name__ == "DeepseekV3ForCausalLM" and (logits(loaded) - logits(model)).abs().max() < 1e-4


NEW = {  # family: what it has that others have not
    "olmoe": {},
    "dots1": {},
    "phimoe": {"num_local_experts": 4},  # a router that is a Linear with a forward of its own
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},  # a scaled embedding, tied
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16},
}


def new_family(family, folder):
    """A tiny model of a family that has no rule file, saved; with every weight random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    common = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **common | NEW[family])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", NEW)
def test_a_new_family_needs_no_code(tmp_path, family):
    model = new_family(family, tmp_path)
    loaded = load(tmp_path, tmp_path)
    experts = [type(module).__name__ for name, module in loaded.named_modules() if name.endswith(".experts")]
    assert set(experts) == (set() if family == "gemma3_text" else {"Experts"})
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4


def test_a_norm_is_what_it_computes_not_what_it_is_called(tmp_path):
    """Gemma multiplies by 1 + weight and has another attribute for epsilon than Llama."""
    model = new_family("gemma3_text", tmp_path)
    loaded = load(
        tmp_path, tmp_path, rules=[ktx.Rule("norm$", replace="RMSNorm"), *ktx.injection.rules.load_rules("generic")]
    )
    assert type(loaded.model.norm).__name__ == "RMSNorm" and loaded.model.norm.plus_one
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name,operator,said",
    [
        ("embed_tokens$", "Embedding", "Gemma3TextScaledWordEmbedding: Embedding replaces only plain nn.Embedding"),
        ("layernorm$", "RotaryEmbedding", "needs inv_freq"),
        ("mlp$", "Attention", "no cache index"),
        ("self_attn$", "RMSNorm", "needs a weight and an epsilon"),
    ],
)
def test_an_operator_refuses_what_it_would_compute_wrong(tmp_path, name, operator, said):
    new_family("gemma3_text", tmp_path)
    with pytest.raises(UsageError, match=said):
        load(tmp_path, tmp_path, rules=[ktx.Rule(name, replace=operator)])


def test_a_norm_of_another_formula_is_refused(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)

    def centred(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True))

    keep, type(model.model.norm).forward = type(model.model.norm).forward, centred
    try:
        with pytest.raises(UsageError, match="LlamaRMSNorm does not compute RMSNorm"):
            load(tmp_path, tmp_path)
    finally:
        type(model.model.norm).forward = keep


# ---- refusals


def test_a_file_of_another_model_is_told_in_full(qwen, tmp_path):
    raw = json.loads((qwen[0] / "config.json").read_text())
    raw |= {"num_hidden_layers": 3, "num_local_experts": 4, "vocab_size": 999}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadFile) as error:
        load(tmp_path, qwen[0] / "m.gguf")
    assert all(
        part in str(error.value)
        for part in ("layers: 2 in the file, 3", "experts: 8 in the file, 4", "vocabulary: 320 in the file, 999")
    ), str(error.value)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.norm.weight"] = torch.zeros(7)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(BadFile) as error:
        load(tmp_path, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({k: v.contiguous() for k, v in state.items() if "down_proj" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(
        BadFile,
        match=r"model.layers.\[0-1\].mlp.down_proj.weight is missing; model.layers.1.mlp.up_proj.weight is missing",
    ):
        load(tmp_path, tmp_path)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(
        error.value
    ) and "model.norm.weight is 7, the model needs 256" in str(error.value)


@pytest.mark.parametrize("written", [True, False], ids=["file", "list"])
def test_the_rule_that_experts_lack_is_named(qwen, tmp_path, written):
    linear = "- match: {class: torch.nn.Linear}\n  replace: {class: Linear}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(linear)
    rules = path if written else [ktx.Rule(cls="torch.nn.Linear", replace="Linear")]
    with pytest.raises(
        BadFile, match=r"no rule replaces model\.layers\.\[0-1\]\.mlp\.experts \(Qwen3MoeExperts\)"
    ) as error:
        load(qwen[0], rules=rules)
    remedy = str(error.value).partition("add as the first rule")[2]
    if written:
        where, _, rule = remedy.partition(": ")
        assert where == f" of {path}"
        path.write_text(f"{rule}\n{linear}")
    else:
        rules = [eval(remedy.removeprefix(": "), {"ktx": ktx}), *rules]
    torch.testing.assert_close(logits(load(qwen[0], rules=rules)), logits(load(qwen[0])), rtol=0.05, atol=0.05)


def test_experts_of_another_width_are_named(tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"moe_intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        BadFile, match=r"model.layers.\[0-1\].mlp.experts.gate_proj is 8 x 96 x 256, the model needs 8 x 64 x 256"
    ):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        '{"model_type": "qwen3_moe", "hidden_size": "many"}',
        '{"model_type": "no_such_model"}',
        '{"hidden_size": 4}',
        "\udcff",
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(qwen, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadFile) as error:
        load(tmp_path, qwen[0] / "m.gguf")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_is_said_before_loading(qwen, monkeypatch):
    monkeypatch.setattr(ktx.loader.resources, "memory", lambda: (2 << 30, 1 << 20))
    with pytest.raises(DoesNotFit, match="of memory, 1.0 MB of 2.1 GB are free"):
        load(qwen[0])


@pytest.mark.parametrize(
    "model,weights,words",
    [
        ("/no/such/folder", None, "no such"),
        ("FOLDER", "/no/such/file.gguf", "no such file or folder"),
        ("EMPTY", "FOLDER/m.gguf", "has no config.json"),
        ("BROKEN", "FOLDER/m.gguf", "is not valid JSON"),
        ("FOLDER", "FOLDER/config.json", "is not a GGUF file"),
        ("FOLDER", "EMPTY", "no .gguf and no .safetensors"),
    ],
)
def test_wrong_paths(qwen, tmp_path, model, weights, words):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()

    def real(text):
        return text and text.replace("FOLDER", str(qwen[0])).replace("EMPTY", str(tmp_path / "empty")).replace(
            "BROKEN", str(tmp_path / "broken")
        )

    with pytest.raises(BadFile, match=words):
        ktx.load(real(model), real(weights), progress=False)


def test_unknown_variables_are_told(qwen, monkeypatch):
    monkeypatch.setenv("KTX_THREDS", "2")
    with pytest.warns(UserWarning, match="KTX_THREDS is not known"):
        ktx.plan(qwen[0], qwen[0] / "m.gguf")


@pytest.mark.parametrize(
    ("words", "linear", "experts"),
    [({"quantize": "int8"}, "Q8_0", "Q8_0"), ({"quantize_experts": "int4"}, "BF16", "Q4_0")],
)
def test_float_weights_become_integers_on_loading(tmp_path, words, linear, experts):
    """The tiny model's expert width of 96 takes groups of 32; a wide layer takes 128."""
    from tests.support.tiny_models import tiny

    original = tiny("qwen3_moe").bfloat16()
    original.save_pretrained(tmp_path)
    plan = ktx.plan(tmp_path, **words)
    model = load(tmp_path, tmp_path, **words)
    layer = model.model.layers[0]
    used = {part.qtype.name for part in layer.self_attn.q_proj.parts}
    assert used == ({"INT8_128"} if linear == "Q8_0" else {linear})  # 256 columns
    assert layer.mlp.experts.weights["down_proj"].qtype.name == experts
    for step in plan:
        if step.operator in ("Linear", "Experts") and step.memory_bytes:
            assert step.memory_bytes == pytest.approx(model.get_submodule(step.path).weight_bytes()[0], rel=0.02)
    with torch.inference_mode():
        got, exact = model(input_ids=IDS).logits, original.float()(input_ids=IDS).logits
    assert ((got - exact).norm() / exact.norm()).item() < (0.05 if linear == "Q8_0" else 0.3)
    assert ">" in str(plan)


def test_a_type_that_cannot_be_made_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"quantize_experts 'int5'.*(int4|int8)"):
        ktx.plan(tmp_path, quantize_experts="int5")


def test_what_caches_keep(qwen, tmp_path):
    """f16 unless asked; an attention that stays transformers' own reads only what the model computes in."""
    from ktx.cache.kv import KVCache

    def last(model):
        cache = KVCache(model.config, model.ktx.kv_dtype)
        with torch.inference_mode():
            return cache, model(input_ids=IDS[:, :9], past_key_values=cache).logits[0, -1]

    assert load(qwen[0]).ktx.kv_dtype == torch.float16
    small = load(qwen[0], kv_dtype="q8_0")
    assert small.ktx.kv_dtype == "q8_0"
    (cache, got), exact = last(small), logits(load(qwen[0]))[0, 8]
    assert cache.layers[0].buffers[0].dtype == torch.uint8 and ((got - exact).norm() / exact.norm()).item() < 0.05
    stock = small.generate(IDS[:, :9], max_new_tokens=4, do_sample=False, use_cache=True)
    assert stock.shape[1] == 13
    own = load(qwen[0], rules=[ktx.Rule(name="experts$", replace="Experts", recursive=False)])
    assert own.ktx.kv_dtype is None
    assert last(own)[1].isfinite().all()
    with pytest.raises(UsageError, match=r"rules keep transformers' attention module .*layers\.0\.self_attn"):
        load(qwen[0], rules=[ktx.Rule(name="experts$", replace="Experts", recursive=False)], kv_dtype="q8_0")
    with pytest.raises(UsageError, match=r"kv_dtype 'q8_1'.*q8_0"):
        load(qwen[0], kv_dtype="q8_1")


@pytest.mark.parametrize("numa", ["off", "fake:2"])
def test_packed_weights_on_disk(qwen, tmp_path, numa):
    """The second start maps what the first wrote; another file, type or number of nodes is another folder."""
    program = """
import json, os, sys, torch, transformers.modeling_utils
for line in sys.stdin:  # a process each, that has its imports already
    if (child := os.fork()) == 0:
        import ktx, ktx.loader.load
        folder, cache = json.loads(line)
        ktx.loader.load.read_tokenizer = lambda *args: None
        model, _ = ktx.load(folder, folder + "/m.gguf", progress=False, packed_cache_dir=cache or None)
        logits = model(input_ids=torch.arange(3, 40)[None]).logits
        mapped = "packed.bin" in open("/proc/self/maps").read()
        print(json.dumps({"mapped": mapped, "sum": logits.double().abs().sum().item(), "held": model.ktx.nbytes}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""  # noqa: E501
    environment = os.environ | {"KTX_NUMA": numa, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, env=environment, stdin=-1, stdout=-1, text=True) as parent:
        check_packed_weights_on_disk(parent, qwen[0], tmp_path, maps=numa == "off")
        parent.stdin.close()
        assert parent.wait() == 0


def check_packed_weights_on_disk(parent, folder, tmp_path, maps):
    """`maps`: whether a copy is mapped. A file's pages lie on any node, so several nodes get copies of their shares."""

    def run(cache=""):
        parent.stdin.write(json.dumps([str(folder), str(cache)]) + "\n")
        parent.stdin.flush()
        return json.loads(parent.stdout.readline())

    def folders():
        return sorted(path.name for path in (tmp_path / "packed").iterdir())

    plain, first, second = run(), run(tmp_path / "packed"), run(tmp_path / "packed")
    assert first["sum"] == second["sum"] == plain["sum"] and second["held"] == plain["held"]
    assert (plain["mapped"], first["mapped"], second["mapped"]) == (False, False, maps)
    (only,) = folders()
    assert only.startswith("m-")
    whole = tmp_path / "packed" / only / "packed.bin"
    assert plain["held"] * 0.9 < whole.stat().st_size < plain["held"] * 1.1 + (1 << 20)
    with open(whole, "r+b") as file:  # a copy that was cut short is made again
        file.truncate(whole.stat().st_size - 1)
    again = run(tmp_path / "packed")
    assert again["sum"] == plain["sum"] and not again["mapped"] and folders() == [only]
    assert run(tmp_path / "packed")["mapped"] == maps
    os.utime(folder / "m.gguf")
    run(tmp_path / "packed")
    assert len(folders()) == 2


def test_mapped_weights_move_to_memory(tmp_path):
    """The same bytes at the same addresses, no longer the file's pages."""
    from ktx.kernels import cpu
    from ktx.kernels.packed_cache import PROMOTE_CHUNK_BYTES, promote_to_huge_pages

    huge = 2 << 20
    content = torch.randint(0, 256, (PROMOTE_CHUNK_BYTES + 3 * huge + 777,), dtype=torch.uint8)
    content.numpy().tofile(tmp_path / "w.bin")
    mapped = cpu.ops.map_file(str(tmp_path / "w.bin"))
    start = mapped.data_ptr()

    def of_the_file():
        with open("/proc/self/maps") as maps:
            lines = [line.split() for line in maps if line.rstrip().endswith("w.bin")]
        return [tuple(int(end, 16) - start for end in line[0].split("-")) for line in lines]

    assert of_the_file() == [(0, (len(content) + 4095) // 4096 * 4096)]
    promote_to_huge_pages(mapped, threading.Event())
    assert mapped.data_ptr() == start and torch.equal(mapped, content)
    # Less than a huge page stays in the file.
    assert of_the_file() == [(PROMOTE_CHUNK_BYTES + 3 * huge, PROMOTE_CHUNK_BYTES + 3 * huge + 4096)]
    with pytest.raises(RuntimeError, match="multiple of a huge page"):
        cpu.ops.remap_huge_pages(mapped, 4096, 4096)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        cpu.ops.map_file(str(tmp_path / "none"))


def test_a_cache_folder_that_cannot_be(qwen, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="packed_cache_dir .*file.*cannot be created"):
        load(qwen[0], packed_cache_dir=tmp_path / "file" / "below")
    with monkeypatch.context() as patch, pytest.raises(DoesNotFit, match="0.0 GB are free on that disk"):
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        load(qwen[0], packed_cache_dir=tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="were not cached: No space left"):
        model = load(qwen[0], packed_cache_dir=tmp_path / "packed")
    assert logits(model).isfinite().all() and not list((tmp_path / "packed").iterdir())
