"""The version of ktx, which pyproject.toml repeats."""

VERSION = "0.2.0"
