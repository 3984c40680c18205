"""Kernels for NVIDIA GPUs: the layouts of packed weights, and the rows that launch csrc/cuda."""
