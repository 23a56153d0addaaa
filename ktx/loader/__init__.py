"""Loads a folder or a GGUF file into a model: builds it on the meta device, then loads its weights."""
