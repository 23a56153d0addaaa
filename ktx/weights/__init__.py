"""Checkpoint formats: GGUF, safetensors, packed checkpoints and LoRA adapters, read through `WeightSource`."""
