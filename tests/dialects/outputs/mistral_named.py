"""Outputs of this family alone: they are read as those of mistral."""

from tests.dialects.outputs.mistral import CASES

__all__ = ["CASES"]
