"""What the same masks would do on a wafer-scale machine: an analytical model. Imports no torch."""
