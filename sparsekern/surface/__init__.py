"""Torch's functions and methods on a SparseTensor, beside matmul and linear."""
