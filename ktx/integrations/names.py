"""The name under which ktx registers with transformers."""

NAME = "ktx"
