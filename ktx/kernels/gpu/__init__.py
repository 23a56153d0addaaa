"""GPU kernels, written in Triton; FlashInfer's attention where it is installed."""
