"""Outputs of this family alone: they are read as those of deepseek_v3."""

from tests.chat_formats.outputs.deepseek_v3 import CASES

__all__ = ["CASES"]
