"""Outputs of this family alone: they are read as those of mistral."""

from tests.chat_formats.outputs.mistral import CASES

__all__ = ["CASES"]
