"""The console script `sparsekern`.

It stands outside the package, whose __init__ imports torch for all but the command line: that
knows the script by this module, and the command imports torch after it has parsed its arguments.
"""

from sparsekern.cli import main

__all__ = ["main"]
