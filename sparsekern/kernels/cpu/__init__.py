"""Kernels for CPUs: the rows that call csrc/cpu, and the plans that cut a product."""
