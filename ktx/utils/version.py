"""The version of ktx; pyproject.toml reads it."""

VERSION = "0.1.0"
