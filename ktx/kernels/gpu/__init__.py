"""Kernels on a GPU, in Triton, and FlashInfer's where it is installed."""
