"""Operators, which replace modules of a transformers model."""
