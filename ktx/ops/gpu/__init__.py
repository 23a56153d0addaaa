"""Operators on a GPU: the same options, weights and errors as those of their names in ktx.ops, on Triton's kernels."""
