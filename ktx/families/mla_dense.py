"""Models whose attention class is DeepSeek's MLA under another name; a rule of the user's may name `MLA` for them."""

from __future__ import annotations

from ktx.families.family import Family

FAMILIES = (
    Family(model_types=("axk1",), mla={"AXK1Attention": "config"}),
    Family(model_types=("minicpm3",), mla={"MiniCPM3Attention": "halves"}),
    Family(model_types=("youtu",), mla={"YoutuAttention": "config"}),
)
