"""An analytical model of sparse training on a wafer-scale machine. Imports no torch."""
