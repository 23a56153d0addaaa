"""Byte-level BPE tokenizer of the demo model, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCAB = 2048
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")  # ordinary added tokens: decoding shows them, as with DeepSeek-R1
BOS, EOS, PAD, OPEN_THINK = 0, 1, 2, 6
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set text = message['content'] | trim -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' + text -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' + text -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + (text.split('</think>')[-1] | trim) + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train(texts: Iterable[str], vocab: int = VOCAB) -> Any:
    """Trains a ``tokenizers.Tokenizer`` of GPT-2's kind, because llama.cpp implements that pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [*SPECIAL, *THINK]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", BOS)])
    return tokenizer


def load(folder: Path) -> Any | None:
    """Loads the tokenizer that ``save`` wrote; None if there is none."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.exists() else None


def save(tokenizer: Any, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json for transformers; ``context`` is the maximum length."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    text = json.dumps(raw, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
