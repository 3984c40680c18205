"""A minimal GPT that shows what sparsity buys in wall-clock time."""
