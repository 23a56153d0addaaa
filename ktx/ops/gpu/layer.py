"""A decoder layer on a GPU."""

from __future__ import annotations

from ktx.ops.fusion import layer


class Layer(layer.Layer):
    """Runs transformers' forward, child by child.

    Fusing a layer's calls, as on the CPU, saves nothing here because kernel launches run ahead of the device.
    """

    def ready(self) -> None:
        """Builds no fused step: those are for the CPU."""
        self.block = None
