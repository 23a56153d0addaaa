"""A decoder layer on a GPU."""

from __future__ import annotations

from ktx.ops.fusion import layer


class Layer(layer.Layer):
    """transformers' own forward, child by child: what the CPU's joins saves nothing where launches run ahead of the device."""

    def ready(self) -> None:
        self.block = None
