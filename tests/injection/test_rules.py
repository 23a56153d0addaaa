"""Rule files: what they may say, where they are wrong, and KTransformers' own."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ktx.errors import BadFile, UsageError
from ktx.injection.rules import Rule, load_rules, parse_rules, rule_folder, shipped_rules

GOOD = """
- match: {name: '^a\\.b$', class: torch.nn.Linear}
  replace: {class: Linear}
  recursive: false
  device: cpu
- match: {class: LlamaRMSNorm}
"""
PIECES = [
    "!!python/object:os.system",
    "&a",
    "*a",
    "<<: ",
    "? [a]\n: b",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "- ",
    "\n  ",
    ":",
    "2020-99-99",
    "~",
    "\0",
    "\t",
    "|",
    "---\n",
    "!!int x",
    "!!timestamp z",
    "(",
    "[[[" * 200,
]


def test_a_rule_file():
    first, second = parse_rules(GOOD, "x.yaml")
    assert (first.name.pattern, first.cls, first.replace, first.recursive, first.device) == (
        r"^a\.b$",
        "torch.nn.Linear",
        "Linear",
        False,
        "cpu",
    )
    assert (first.where, second.where) == ("x.yaml:2", "x.yaml:6")
    assert second.replace is None and second.recursive


@pytest.mark.parametrize(
    "text,line,words",
    [
        ("- mach: {name: a}", 1, ["'mach'", "did you mean 'match'?"]),
        ("- match: {nmae: a}", 1, ["'nmae'", "in match", "'name'"]),
        ("- match: {name: a}\n  replace:\n    clas: Linear", 3, ["'clas'", "'class'"]),
        ("- match: {name: '('}", 1, ["not a regular expression"]),
        ("- match: {name: a}\n- replace: {class: Linear}", 2, ["needs 'match'"]),
        ("- match: {}", 1, ["a name or a class"]),
        ("match: {name: a}", 1, ["is a list"]),
        ("- match: {name: a}\n  recursive: maybe", 2, ["true or false", "'maybe'"]),
        ("- match: {name: a}\n  match: {name: b}", 2, ["appears twice"]),
        ("- match: [a, b]", 1, ["must be a mapping", "a list"]),
        ("- match: {name: a\n", 2, ["not valid YAML"]),
        ("", 1, ["no rules"]),
        ("- match: {name: 3}", 1, ["must be text"]),
        ("- match: {name: a}\n  ? [x]\n  : y", 2, ["must be a word", "a list"]),
        (
            "- match: {name: a}\n  replace: {kwargs: {a: !!python/object:os.system {}}}",
            2,
            ["replace.kwargs", "could not determine a constructor"],
        ),
        ("- match: {name: a}\n  replace: {kwargs: {a: !!timestamp z}}", 2, ["replace.kwargs cannot be read"]),
        ("- match: {name: a}\n  replace: {kwargs: {a: 2020-99-99}}", 2, ["replace.kwargs cannot be read"]),
        ("[" * 3000, 1, ["nested too deeply"]),
    ],
)
def test_errors_name_file_and_line(text, line, words):
    with pytest.raises(UsageError) as error:
        parse_rules(text, "my.yaml")
    assert str(error.value).startswith(f"my.yaml:{line}:")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_matching_by_name_and_class():
    linear = nn.Linear(2, 2)
    assert Rule(cls="Linear").matches("x", type(linear)) and Rule(cls="torch.nn.Linear").matches("x", type(linear))
    assert not Rule(cls="other.nn.Linear").matches("x", type(linear))
    assert Rule(cls="Module").matches("x", type(linear))  # bases count
    assert Rule(name="b").matches("a.b.c", type(linear)) and not Rule(name="^b").matches("a.b.c", type(linear))
    assert not Rule(name="b", cls="Embedding").matches("a.b.c", type(linear))


def test_a_layer_with_a_forward_of_its_own_is_another_formula():
    class Named(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert Rule(cls="torch.nn.Linear").matches("x", Named) and not Rule(cls="torch.nn.Linear").matches("x", Scaled)
    assert Rule(cls="Scaled").matches("x", Scaled)


def test_a_dotted_class_is_that_class_and_no_namesake():
    class Linear(nn.Module):
        pass

    assert Rule(cls="Linear").matches("x", Linear) and not Rule(cls="torch.nn.Linear").matches("x", Linear)
    assert Rule(cls="torch.nn.modules.linear.Linear").matches("x", nn.Linear) and not Rule(
        cls="torch.nn.quantized.Linear"
    ).matches("x", nn.Linear)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_rule_file_is_one_line_or_rules(data):
    text = data.draw(
        st.sampled_from(
            [(rule_folder() / f"{name}.yaml").read_text() for name in ("moe", "hybrid", "generic")] + [GOOD]
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 6))
        text = text[:at] + data.draw(st.sampled_from(PIECES) | st.text(max_size=3)) + text[at + cut :]
    try:
        assert all(isinstance(rule, Rule) for rule in parse_rules(text, "f"))
    except UsageError as error:
        assert re.match(r"f:\d+: [^\n]+$", str(error)), repr(str(error))


def test_every_shipped_file_parses_and_is_short():
    from ktx.families import RULE_ALIASES, RULE_FILES

    assert {*RULE_FILES.values(), *RULE_ALIASES.values()} <= set(shipped_rules())
    for name in shipped_rules():
        assert parse_rules((rule_folder() / f"{name}.yaml").read_text(), name)
        assert len((rule_folder() / f"{name}.yaml").read_text().splitlines()) <= 40


def test_finding_rule_files(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert len(load_rules(tmp_path / "mine.yaml")) == 2
    assert (
        load_rules("deepseek-v3")
        and load_rules("DeepSeek-V3.yaml")
        and load_rules(None, "qwen3_moe")
        and load_rules(None, "brand_new")
    )
    with pytest.raises(BadFile, match="did you mean 'deepseek-v3'"):
        load_rules("deepsek-v3")


KTRANSFORMERS = """
- match:
    name: "^model\\\\.layers\\\\.(?!.*self_attn\\\\.kv_b_proj).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs:
      generate_device: "cuda"
      prefill_device: "cuda"
      generate_op: "KLinearMarlin"
      prefill_op: "KLinearTorch"
- match:
    name: "^model\\\\.layers\\\\..*\\\\.mlp$"
    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3MoE
  replace:
    class: ktransformers.operators.experts.KDeepseekV3MoE
    kwargs:
      generate_device: "cuda"
- match:
    name: "^model\\\\.layers\\\\..*\\\\.self_attn$"
  replace:
    class: ktransformers.operators.attention.KDeepseekV2Attention
    kwargs:
      generate_device: "cuda"
      absorb_for_prefill: False
- match:
    name: "^model.embed_tokens"
  replace:
    class: "default"
    kwargs:
      generate_device: "cpu"
"""


def test_ktransformers_rule_files():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        linear, moe, mla, embed = parse_rules(KTRANSFORMERS, "DeepSeek-V3-Chat.yaml")
    assert linear.replace == "Linear" and linear.kwargs == {} and linear.device == "cuda:0"
    assert moe.replace is None and moe.cls == "DeepseekV3MoE"
    assert mla.replace == "MLA" and mla.kwargs == {"absorb_for_prefill": False}
    assert embed.replace is None and embed.device == "cpu"
    text = [str(w.message) for w in said]
    assert any("DeepSeek-V3-Chat.yaml:2" in line and "prefill_op has no effect" in line for line in text)
    assert any("generate_op" in line for line in text)


def test_an_unknown_ktransformers_class_is_an_error():
    with pytest.raises(UsageError, match="did you mean 'KTransformersExperts'"):
        parse_rules(
            "- match: {name: a}\n  replace: {class: ktransformers.operators.experts.KTransformerExperts}", "k.yaml"
        )


def test_old_spellings_and_moved_modules_of_ktransformers():
    (rule,) = parse_rules(
        "- match: {name: 'layers\\..*\\.block_sparse_moe\\.experts$'}\n"
        "  replace: {class: ktransformers.operators.experts.KTransformersMLPExpert}",
        "Mixtral.yaml",
    )
    assert rule.replace == "Experts" and rule.name.search("model.layers.3.mlp.experts")


def test_a_rule_must_match_something():
    with pytest.raises(UsageError):
        Rule()


def test_rules_import_no_torch_operator_until_planned():
    assert (
        parse_rules("- match: {name: a}\n  replace: {class: no.such.module.Class}", "x")[0].replace
        == "no.such.module.Class"
    )


def test_a_list_of_something_else_is_refused():
    with pytest.raises(UsageError, match="must contain ktx.Rule, found str"):
        load_rules(["deepseek-v3"])


def test_a_class_may_be_a_regular_expression():
    class TinyRMSNorm(nn.Module):
        pass

    class Derived(TinyRMSNorm):
        pass

    path = f"{TinyRMSNorm.__module__}.{TinyRMSNorm.__qualname__}"
    assert Rule(cls=r"\w+RMSNorm").matches("x", TinyRMSNorm) and Rule(cls=r"\w+RMSNorm").matches("x", Derived)
    assert Rule(cls=re.escape(path)).matches("x", TinyRMSNorm) and Rule(cls=r"(?!Tiny)\w+").matches("x", nn.Linear)
    for partial in (r"RMSNor[m]", r"\w+RMSNor", r"\w+RMSNorm\w+", r"(?!Tiny)\w+RMSNorm"):
        assert not Rule(cls=partial).matches("x", TinyRMSNorm), partial
    own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})  # computes something else than the layer
    assert not Rule(cls=r"\w*Linear").matches("x", own) and Rule(cls=r"O\w+").matches("x", own)
    assert Rule(cls="torch.nn.Linear").matches("x", nn.Linear) and not Rule(cls="torch.nn.Linear").matches("x", Derived)


@pytest.mark.parametrize("pattern", [r"\w+(", "*Norm", "[a-", "(?P<x>a)(?P<x>b)"])
def test_a_class_that_is_no_regular_expression_is_an_error_with_its_line(pattern):
    with pytest.raises(UsageError, match=r"f:2: match.class .* is not a regular expression"):
        parse_rules(f"-\n  match: {{class: '{pattern}'}}\n  replace: {{class: Linear}}\n", "f")
    with pytest.raises(UsageError, match=r"mine: match.class .* is not a regular expression"):
        Rule(cls=pattern, where="mine")


@pytest.mark.parametrize("name", ["deepseek-v2", "qwen3-moe", "llama", "gpt-oss", "qwen3_5-moe"])
def test_shipped_files_are_found_by_their_earlier_names(name):
    from ktx.families import RULE_ALIASES

    expected = load_rules(RULE_ALIASES[name])
    assert load_rules(name) == load_rules(f"{name}.yaml") == load_rules(rule_folder() / f"{name}.yaml") == expected
