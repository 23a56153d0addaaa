"""Tokenizers and ends of an answer made of GGUF metadata: what llama.cpp makes of the same keys."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from tokenizers import pre_tokenizers

import ktx
from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams
from ktx.errors import BadFile, KtxError
from ktx.weights.gguf_tokenizer import eog_token_ids, recommended_sampling, tokenizer_from_gguf
from ktx.weights.pretokenizers import PRE_TOKENIZERS
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

MARKS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|eot|>", "<|eom|>", "<|x|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
NUMBERS = ["12", "123", "1234", "34"]
MERGES = ["1 2", "12 3", "123 4", "3 4"]
CONTROL, NORMAL = 3, 1


def keys(*, marks=MARKS, more=(), **own):
    """Metadata of a byte-level tokenizer; `own` are keys under tokenizer.ggml."""
    tokens = [*marks, *LETTERS, *more, *NUMBERS]
    made = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL if token in marks else NORMAL for token in tokens],
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (made | own).items() if value is not None}


def pieces(text, **own):
    tokenizer = tokenizer_from_gguf(keys(**own), "m.gguf")
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- how text is cut


@pytest.mark.parametrize(
    "pre,expected",
    [
        *(
            (name, ["1", "2", "3", "4"])
            for name in ("tekken", "smollm", "deepseek-coder", "qwen2", "qwen35", "starcoder")
        ),
        *(
            (name, ["1", "2", "3", "4"])
            for name in ("refact", "command-r", "seed-coder", "bailingmoe", "viking", "youtu")
        ),
        *((name, ["123", "4"]) for name in ("gpt-4o", "kimi-k2", "llama-bpe", "deepseek-v3", "llama4", "minimax-m2")),
        *((name, ["123", "4"]) for name in ("glm4", "chatglm-bpe", "hunyuan-dense", "dbrx", "falcon", "default")),
        *((name, ["1", "2", "34"]) for name in ("superbpe", "tiny_aya", "afmoe")),  # 1 and 234
        *((name, ["1234"]) for name in ("gpt-2", "olmo", "trillion", "deepseek-llm", "bloom", "exaone4")),
    ],
)
def test_numbers_are_cut_as_the_name_says(pre, expected):
    assert pieces("1234", pre=pre) == expected


CUTS = {  # a text and where it is cut
    "qwen2": ("I'LL go  on\n\n!", ["I", "'LL", " go", " ", " on", "\n\n", "!"]),
    "gpt-2": ("I'll 12 go!?", ["I", "'ll", " 12", " go", "!?"]),
    "qwen35": ("नमस्ते", ["नमस्ते"]),
    "tekken": ("JavaScript it's", ["Java", "Script", " it", "'s"]),
    "gpt-4o": ("JavaScript it's a/\n", ["Java", "Script", " it's", " a", "/\n"]),
    "kimi-k2": ("ab漢字cd it's", ["ab", "漢字", "cd", " it's"]),
    "deepseek-v3": ("中文abc12345", ["中文", "abc", "123", "45"]),
    "deepseek-coder": ("ab 12.", ["ab", " ", "1", "2", "."]),
    "deepseek-llm": ("\u1f5f\u1f7d ab,", ["\u1f5f\u1f7d", " ab", ","]),
    "falcon": ("a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    "default": ("a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    "bailingmoe": ("a\n\nb 'S", ["a", "\n\n", "b", " '", "S"]),
    "exaone-moe": ("to be 12", ["to be", " ", "1", "2"]),
    "superbpe": ("a b 1234567", ["a b ", "1", "234", "567"]),
    "jais-2": ("a      b", ["a", "    ", " ", " b"]),
    "bloom": ("to be, or", ["to", " be", ",", " or"]),
    "laguna": ("a \nb", ["a", " ", "\n", "b"]),
    "minicpm5": ("a1234", ["a", "123", "4"]),
    "ufakzeka": ("it's", ["it", "'s"]),
    "chameleon": ("a    b.1", ["a", "    ", "b", ".", "1"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_words_are_cut_as_the_name_says(pre):
    text, expected = CUTS[pre]
    backend = tokenizer_from_gguf(keys(pre=pre), "m.gguf").backend_tokenizer
    assert [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_every_name_makes_a_tokenizer_that_loses_nothing():
    text = "Hello, I'LL say: 1234567 × ½ 漢字 かな 한국 नमस्ते\r\n\t  fn(x) {  return _y2; }\n\n\n"
    for pre in PRE_TOKENIZERS:
        tokenizer = tokenizer_from_gguf(keys(pre=pre), "m.gguf")
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text, pre


@pytest.mark.parametrize("pre,words", [
    ("no-such-name", "tokenizer.ggml.pre is 'no-such-name'.*pass --model a folder with tokenizer.json"),
    ("qwen3", "did you mean 'qwen"),
    ("", "tokenizer.ggml.pre is ''"),
    ("gemma4", "BPE on characters"),
    ("whitespace", "BPE on characters"),
])  # fmt: skip
def test_an_unknown_cut_is_refused(pre, words):
    with pytest.raises(BadFile, match=words):
        tokenizer_from_gguf(keys(pre=pre), "m.gguf")


def test_a_file_that_does_not_say_is_warned_of_and_cut_by_the_default():
    with pytest.warns(UserWarning, match="the pre-tokenizer is missing"):
        assert pieces("1234", pre=None) == ["123", "4"]


def test_a_whole_word_that_is_a_token_needs_no_merges():
    assert pieces("ab", more=["ab"], pre="llama-bpe") == ["ab"]
    assert pieces("ab", more=["ab"], pre="tekken") == ["ab"]
    assert pieces("ab", more=["ab"], pre="qwen2") == ["a", "b"]


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "gemma4", "no_vocab", "made-up", None])
def test_other_kinds_of_tokenizers_are_refused_by_name(model):
    with pytest.raises(BadFile, match=rf"tokenizer.ggml.model is {model!r}.*folder with tokenizer.json"):
        tokenizer_from_gguf(keys(model=model), "m.gguf")


# ---- marks

A = len(MARKS) + LETTERS.index("a")


@pytest.mark.parametrize(
    "own,expected",
    [
        ({}, [A]),
        ({"add_bos_token": True}, [1, A]),
        ({"add_eos_token": True}, [A, 2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, A, 2]),
        ({"add_sep_token": True, "seperator_token_id": 7}, [A]),  # it stands between two texts
        *(({"pre": pre}, [1, A]) for pre in ("llama-bpe", "llama3", "llama-v3", "tekken", "falcon3", "lfm2", "pixtral", "chameleon")),  # noqa: E501
        *(({"pre": pre}, [A]) for pre in ("qwen2", "deepseek-v3", "gpt-4o", "kimi-k2", "glm4", "dbrx", "smaug-bpe", "olmo")),  # noqa: E501
        ({"pre": "llama-bpe", "add_bos_token": False}, [A]),
        ({"pre": "tekken", "add_bos_token": False, "add_eos_token": True}, [A, 2]),
        ({"pre": "qwen2", "add_eos_token": True, "eos_token_id": 5}, [A, 5]),
    ],
)  # fmt: skip
def test_marks_of_a_text(own, expected):
    tokenizer = tokenizer_from_gguf(keys(**own), "m.gguf")
    assert tokenizer("a")["input_ids"] == expected
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [A]


def test_marks_of_two_texts():
    tokenizer = tokenizer_from_gguf(keys(add_bos_token=True), "m.gguf")
    assert tokenizer("a", "a")["input_ids"] == [1, A, 1, A]
    own = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": True, "seperator_token_id": 7}
    assert tokenizer_from_gguf(keys(**own), "m.gguf")("a", "a")["input_ids"] == [1, A, 2, 7, A, 2]


@pytest.mark.parametrize(
    "own",
    [
        {"add_bos_token": True, "bos_token_id": None},
        {"add_eos_token": True, "eos_token_id": None},
        {"add_sep_token": True},
        {"pre": "llama-bpe", "bos_token_id": None},
    ],
)
def test_a_mark_that_is_missing_is_refused(own):
    with pytest.raises(BadFile, match="token is added to every text .* is missing"):
        tokenizer_from_gguf(keys(**{**own, "marks": MARKS[:3]}), "m.gguf")


def test_falcon_has_its_own_mark_where_a_file_names_none():
    marks = [f"<|{i}|>" for i in range(11)] + ["<|endoftext|>"]
    own = {"marks": marks, "pre": "falcon3", "bos_token_id": None, "eos_token_id": None}
    assert tokenizer_from_gguf(keys(**own), "m.gguf")("a")["input_ids"][0] == 11
    assert eog_token_ids(keys(**own), "m.gguf") == [11]


def sentencepiece(**own):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1]
    made = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": [0.0] * 259 + [-3.0, -1.0, -2.0, -1.0]}
    return {f"tokenizer.ggml.{key}": value for key, value in (made | own).items()}


@pytest.mark.parametrize(
    "own,expected",
    [
        ({}, [1, 262, 261]),
        ({"add_bos_token": False}, [262, 261]),
        ({"add_eos_token": True}, [1, 262, 261, 2]),
        ({"add_space_prefix": False}, [1, 260, 261]),
        ({"bos_token_id": 0}, [0, 262, 261]),
    ],
)
def test_marks_of_sentencepiece(own, expected):
    assert tokenizer_from_gguf(sentencepiece(**own), "m.gguf")("ab")["input_ids"] == expected


@pytest.mark.parametrize("key", ["eos", "bos", "padding"])
def test_an_id_outside_the_vocabulary_is_warned_of(key):
    with pytest.warns(UserWarning, match=rf"tokenizer.ggml.{key}_token_id is 9999, the file has"):
        assert tokenizer_from_gguf(keys(**{f"{key}_token_id": 9999}), "m.gguf")("a")["input_ids"] == [A]


def test_arrays_that_contradict_each_other():
    with pytest.raises(BadFile, match="the token 'a' has two ids"):
        tokenizer_from_gguf(keys(more=["a"]), "m.gguf")
    with pytest.raises(BadFile, match="token types"):
        tokenizer_from_gguf(keys(token_type=[1, 1]), "m.gguf")
    with pytest.raises(BadFile, match="suppress_tokens"):
        tokenizer_from_gguf(keys(suppress_tokens=[3]), "m.gguf")


def test_templates_by_name():
    both = keys() | {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    tokenizer = tokenizer_from_gguf(both, "m.gguf")
    assert tokenizer.chat_template == {"default": "one", "tool_use": "two"}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "one"
    assert tokenizer_from_gguf(keys() | {"tokenizer.chat_template": "one"}, "m.gguf").chat_template == "one"
    assert tokenizer_from_gguf(keys(), "m.gguf").chat_template is None


@pytest.mark.parametrize("name,stripped", [("Phi-3-mini", True), ("phi3", True), ("Llama", False)])
def test_white_space_behind_marks_of_phi_3(name, stripped):
    tokenizer = tokenizer_from_gguf(keys() | {"general.name": name}, "m.gguf")
    ids = tokenizer("<|user|> a", add_special_tokens=False)["input_ids"]
    assert ids == ([3, A] if stripped else [3, len(MARKS) + LETTERS.index("Ġ"), A])


# ---- ends of an answer


@pytest.mark.parametrize(
    "marks,own,expected",
    [
        (MARKS, {}, [2]),
        (MARKS, {"eos_token_id": 7}, [7, 2]),  # </s> ends an answer whatever else does
        (MARKS, {"eot_token_id": 5}, [2, 5]),
        (MARKS, {"eom_token_id": 6}, [2, 6]),
        (MARKS, {"eot_token_id": 5, "eom_token_id": 6}, [2, 5, 6]),
        (MARKS, {"fim_pad_token_id": 4, "fim_rep_token_id": 5, "fim_sep_token_id": 6}, [2, 4, 5, 6]),
        (["<x>", "<y>", "<z>", "<|eot_id|>", "<|eom_id|>"], {}, [2, 3, 4]),
        (["<x>", "<y>", "<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}, [2, 3, 4, 5, 6]),  # noqa: E501
        (["<x>", "<y>", "<eos>", "<end_of_turn>", "<pad>"], {}, [2, 3]),
        (["<x>", "<y>", "<|endoftext|>", "<|end|>"], {}, [2, 3]),
        (["<x>", "<y>", "<|return|>", "<|call|>", "<|end|>"], {}, [2, 3]),  # gpt-oss: messages end, answers do not
        (["<x>", "<y>", "[EOS]", "[EOT]", "[PAD]"], {}, [2, 3, 4]),
        (["<x>", "<y>", "<｜end▁of▁sentence｜>", "[e~[", "<|end_of_text|>"], {}, [2, 3, 4]),
        (["<x>", "</s>", "<turn|>", "<|tool_response>"], {}, [2, 3]),
        (["<x>", "<y>", "<z>"], {"eos_token_id": None}, []),
    ],
)  # fmt: skip
def test_ends(marks, own, expected):
    assert eog_token_ids(keys(marks=marks, **own), "m.gguf") == expected


def test_an_end_that_a_file_calls_text_is_a_mark_all_the_same():
    tokenizer = tokenizer_from_gguf(keys(more=["<|im_end|>", "<|x_end|>"]), "m.gguf")
    number = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer.decode([number], skip_special_tokens=True) == ""
    assert len(tokenizer("<|x_end|>", add_special_tokens=False)["input_ids"]) > 1


def written(folder, name="m.gguf", change=None, **own):
    """A llama with a tokenizer in a file; `change` is done to the model first."""
    model = tiny("llama", hidden_size=320, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    with torch.no_grad():
        (change or (lambda model: None))(model)
    tokens = keys(**own)["tokenizer.ggml.tokens"]
    metadata = keys(more=[f"[{i}]" for i in range(320 - len(tokens))], **own)

    def extra(writer):
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    model.load_state_dict(write_gguf(folder / name, model, "F32", extra=extra), strict=False)
    return folder / name, model


A_, B_, C_ = 70, 71, 72


def chain(*steps):
    """A change after which the model answers each token with the next."""

    def change(model):
        for name, p in model.named_parameters():
            p.fill_(1.0) if "norm" in name else p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        for now, then in steps:
            model.lm_head.weight[then, now] = 1.0

    return change


@pytest.mark.parametrize("own,end", [
    ({"eot_token_id": 5}, 5), ({"eom_token_id": 6}, 6), ({"eos_token_id": 7}, 2), ({"fim_sep_token_id": 4}, 4),
])  # fmt: skip
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_answer_ends_there(tmp_path, own, end, folder):
    path, model = written(tmp_path, change=chain((A_, B_), (B_, end), (end, C_), (C_, C_)), **own)
    if folder:  # whose configuration names one end, and that has no tokenizer
        model.config.save_pretrained(tmp_path)
    mine, _ = ktx.load(tmp_path if folder else path, path, progress=False)
    with mine.ktx.engine(max_batch_size=1, kv_cache_tokens=512) as engine:
        events = engine.generate([[A_]], SamplingParams(max_new_tokens=8))
        (finished,) = [event for _, event in events if isinstance(event, Finished)]
    assert (finished.ids, finished.reason) == ([B_], "stop")
    assert mine.generate(torch.tensor([[A_]]), max_new_tokens=8, do_sample=False)[0, 1:].tolist() == [B_, end]


@pytest.mark.parametrize(
    "said,expected",
    [
        (
            {"temp": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True},
        ),
        ({"penalty_repeat": 1.1, "min_p": 0.05}, {"repetition_penalty": 1.1, "min_p": 0.05, "do_sample": True}),
        ({"temp": 0.0, "top_k": 20}, {"do_sample": False}),
        ({"sequence": "kpt", "mirostat": 0}, {}),
        ({}, {}),
    ],
)
def test_settings_that_a_file_recommends(said, expected):
    assert recommended_sampling({f"general.sampling.{key}": value for key, value in said.items()}, "m.gguf") == expected


def test_settings_that_ktx_does_not_have_are_named():
    with pytest.warns(UserWarning, match=r"recommends general.sampling.mirostat, which ktx does not support"):
        assert recommended_sampling({"general.sampling.mirostat": 2}, "m.gguf") == {}


# ---- a file is what its first bytes say


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("file"))


def close(mine, model):
    ids = torch.randint(3, 300, (1, 12))
    with torch.inference_mode():
        return (mine(ids).logits - model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["m.GGUF", "sha256-5f2a", "m.gguf.download", "m", "m.Gguf", "m.bin", "m.safetensors", "ü 模.x"]
)
def test_names_do_not_matter(tmp_path, file, name):
    path = shutil.copy(file[0], tmp_path / name)
    assert close(ktx.load(path, progress=False)[0], file[1])
    assert close(ktx.load(tmp_path, progress=False)[0], file[1])  # the folder's only one
    file[1].config.save_pretrained(tmp_path)
    assert close(ktx.load(tmp_path, path, progress=False)[0], file[1])
    assert close(ktx.load(tmp_path, progress=False)[0], file[1])


def test_links_do_not_matter(tmp_path, file):
    (tmp_path / "blobs").mkdir()
    shutil.copy(file[0], tmp_path / "blobs" / "5f2a")
    os.symlink(tmp_path / "blobs" / "5f2a", tmp_path / "latest")
    assert close(ktx.load(tmp_path / "latest", progress=False)[0], file[1])


def test_a_split_file_by_capitals_and_by_a_link(tmp_path, file):
    for name in ("m-00001-of-00001.GGUF", "half-00001-of-00002.gguf"):
        shutil.copy(file[0], tmp_path / name)
    os.symlink(tmp_path / "m-00001-of-00001.GGUF", tmp_path / "latest.gguf")
    for name in ("m-00001-of-00001.GGUF", "latest.gguf"):
        assert close(ktx.load(tmp_path / name, progress=False)[0], file[1])
    os.symlink(tmp_path / "half-00001-of-00002.gguf", tmp_path / "half.gguf")
    with pytest.raises(BadFile, match="1 of 2 parts are missing"):
        ktx.load(tmp_path / "half.gguf", progress=False)


@pytest.mark.parametrize("raw", [b"", b"GGU", b"PK\x03\x04 zip", b"\x80\x02 pickle"])
def test_what_is_none_is_not_called_missing(tmp_path, raw):
    (tmp_path / "m").write_bytes(raw)
    with pytest.raises(KtxError, match="is a file, but its first four bytes are not GGUF's"):
        ktx.load(tmp_path / "m", progress=False)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(KtxError, match="GGUF"):
        ktx.load(tmp_path / "m.gguf", progress=False)


def test_a_command_takes_such_a_name(tmp_path, file):
    import argparse

    from ktx.cli.arguments import infer_model

    path = shutil.copy(file[0], tmp_path / "sha256-5f2a")
    for weights in (path, tmp_path):
        args = argparse.Namespace(model=None, weights=str(weights))
        assert infer_model(args) and args.model == str(path)
