"""A tiny chat model on disk: random weights, a byte-level tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import tiny

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501
SPECIAL = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def write_model(folder: Path, family: str = "llama", quant: str = "Q8_0", **more: object) -> Path:
    """Folder with config.json, tokenizer and model.gguf."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny(family, **more)
    model.config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_gguf(folder / "model.gguf", model, quant)
    return folder
