"""From a folder or a GGUF file to a model: build on the meta device, then load weights."""
