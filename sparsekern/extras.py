"""Optional packages: imported where they are used, named clearly where they are missing."""

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """The module, or an ImportError of one line that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is not installed; run: pip install 'sparsekern[{extra}]'"
        ) from error
