"""Llama, Mistral and other dense models with their layout, and Llama 4's chat format."""

from __future__ import annotations

from ktx.families.family import GGUF, Family

FAMILIES = (
    Family(
        model_types=("llama",),
        rules="dense",
        rules_alias="llama",
        layers=("LlamaDecoderLayer",),
        attention=("LlamaAttention",),
        gguf=GGUF("llama", config_keys={}, interleaved_qk=True),
    ),
    Family(
        model_types=("mistral",),
        rules="dense",
        layers=("MistralDecoderLayer",),
        attention=("MistralAttention",),
        gguf=GGUF("llama", config_keys={}, interleaved_qk=True),
        chat="mistral",
        chat_model_types=("mistral3", "ministral3"),
    ),
    Family(model_types=("llama4", "llama4_text"), chat="llama-4"),
)
