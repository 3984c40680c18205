"""Models that people have: their zeros made use of, layer by layer, with a report; pruned, trained
and adapted from outside."""

from .accelerate import accelerate_
from .report import Layer, Report, Skipped

__all__ = ["Layer", "Report", "Skipped", "accelerate_"]
