"""NVIDIA's libraries through their C interfaces, without their headers."""

import ctypes
from collections.abc import Mapping

pointer, integer, int64, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class Error(RuntimeError):
    """A call that a library refuses."""


class Library:
    """The functions of a library, by their names without its prefix."""

    def __init__(self, path: str, prefix: str, signatures: Mapping[str, tuple], words: str):
        """words: the function that has words for a status. OSError if the library does not load,
        AttributeError if it is without a function."""
        library = ctypes.CDLL(path)
        self._prefix, self._functions = prefix, {}
        for name, arguments in (*signatures.items(), (words, (integer,))):
            function = self._functions[name] = getattr(library, prefix + name)
            function.argtypes = arguments
        self._words = self._functions[words]
        self._words.restype = ctypes.c_char_p
        self.words_address = self.address(words)

    def call(self, name: str, *args) -> None:
        """Error with the function's name and the library's words if it does not succeed."""
        if status := self._functions[name](*args):
            words = self._words(status).decode()
            raise Error(f"{self._prefix}{name}: {words} (status {status})")

    def address(self, name: str) -> int:
        """Where C++ finds the function."""
        address = ctypes.cast(self._functions[name], pointer).value
        assert address
        return address

    def destroy(self, name: str, thing: object) -> None:
        """Whatever comes of it: nobody could do anything about that."""
        self._functions[name](thing)


class Made:
    """What was made with a library: destroyed, the last first, when nobody holds this any more."""

    def __init__(self, library: Library):
        self._library = library
        self._things: list[tuple[object, str | None]] = []

    def add(self, thing: object, destroy: str | None) -> None:
        """destroy: the function that does it; None for what others point to, and none does."""
        self._things.append((thing, destroy))

    def __del__(self) -> None:
        for thing, destroy in reversed(self._things):
            if destroy:
                self._library.destroy(destroy, thing)
