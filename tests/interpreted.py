"""What tests in Triton's interpreter share."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def patched_once():
    """Whenever a kernel calls a function the interpreter patches triton.language anew, and searches
    all of it to find that nothing is left to patch."""
    from triton.runtime import interpreter

    is_builtin, patch, first = interpreter.tl.core.is_builtin, interpreter._patch_builtin, {}

    def patch_what_is_left(package, *others):
        if package not in first or is_builtin(getattr(package, first[package])):
            names = (name for name, member in vars(package).items() if is_builtin(member))
            first[package] = next(names)
            patch(package, *others)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_builtin", patch_what_is_left)
        yield
