"""Kernels: plain functions on flat tensors, and the table that chooses among them."""
