"""Kernels in Triton for NVIDIA GPUs, with no compiler to install."""
