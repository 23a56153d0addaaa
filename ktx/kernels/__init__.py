"""CPU kernels, their plain-torch twins and gradients."""
