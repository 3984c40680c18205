"""Measuring: fair races on a CPU and on a GPU, this machine's ceilings, the crossovers."""
