"""GPU operators: same names, options, weights and errors as in ktx.ops, computed by Triton kernels."""
