"""What a weak collection holds, also while other threads train models and add to it."""

from typing import Any


def alive(collection: Any) -> list:
    """The members of a WeakSet, or the keys of a WeakKeyDictionary: those of one moment, as its own
    iteration ends in a RuntimeError where another thread adds to it meanwhile."""
    refs = list(collection.data)  # in one step of the interpreter
    return [member for ref in refs if (member := ref()) is not None]
