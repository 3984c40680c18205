"""Models that people have: pruned, trained and adapted from outside."""
