"""Phi-3: dense, with fused q, k, v and fused gate and up projections."""

from __future__ import annotations

from ktx.families.family import GGUF, Family

FAMILIES = (Family(model_types=("phi3",), rules="dense", rules_alias="phi3", gguf=GGUF("phi3", config_keys={})),)
