"""The commands of `python -m sparsekern`, one file each."""
