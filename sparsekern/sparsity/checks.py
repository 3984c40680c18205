"""Checks of settings. An error shows a value in bounded length, whatever the value is: a YAML file
of 400 bytes can stand for 10^9 elements."""

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

_LARGEST = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 4
_REPR.maxstring = _REPR.maxother = 60


def shown(value: Any) -> str:
    """`value` as an error shows it, 200 characters at most."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def number(name: str, value: Any) -> float:
    """A finite number. ValueError otherwise."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if math.isfinite(result):
            return result
    hint = ""
    if isinstance(value, str) and len(value) < 40 and _is_numeral(value):
        hint = "; YAML reads an exponent as a number only after a point, as in 1.0e-5"
    raise ValueError(f"{name}: expected a finite number, got {shown(value)}{hint}")


def whole(name: str, value: Any, least: int | None = None) -> int:
    """An integer, 100.0 included. ValueError otherwise, and below `least` or beyond 64 bits."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (isinstance(value, Integral) or float(value).is_integer()):
        raise ValueError(f"{name}: expected a whole number, got {shown(value)}")
    result = int(value)
    if least is not None and not least <= result <= _LARGEST:
        bound = f"at least {least}" if result < least else "less than 2**63"
        raise ValueError(f"{name}: expected {bound}, got {shown(value)}")
    return result


def share(name: str, value: Any) -> float:
    """A number in [0, 1]. ValueError otherwise."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and 0 <= value <= 1:
        return float(value)
    hint = ""
    if is_number and 1 < value < 100:
        hint = f"; {value:g} percent is {value / 100:g}"
    raise ValueError(f"{name}: expected a number in [0, 1], got {shown(value)}{hint}")


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """`value` in the case of `known`. ValueError if it is none of them."""
    known = list(known)
    if isinstance(value, str) and value.lower() in known:
        return value.lower()
    raise ValueError(
        f"{name}: expected one of {', '.join(known)}, got {shown(value)}{nearest(value, known)}"
    )


def known_keys(name: str, settings: Iterable[Any], known: Iterable[str]) -> None:
    """ValueError for a key of `settings` that is not in `known`."""
    known = list(known)
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{name}: expected the keys {', '.join(known)}, "
                f"got {shown(key)}{nearest(key, known)}"
            )


def check_state(name: str, state: Any) -> None:
    """ValueError for the state_dict of another algorithm than that of this name. Older states do
    not say whose they are."""
    if not isinstance(state, Mapping):
        raise TypeError(f"algorithm: expected a state_dict of {name}, got {type(state).__name__}")
    of = "Group" if "algorithms" in state else state.get("algorithm", name)
    if of != name:
        raise ValueError(
            f"algorithm: expected the state of {name}, got that of {str(of)[:60]}; to go on with "
            "another algorithm take the weights without its state"
        )


def nearest(word: Any, known: Iterable[str], likeness: float = 0.6) -> str:
    """A question for an error: what was meant. Empty if nothing is as like."""
    if not isinstance(word, str):
        return ""
    close = difflib.get_close_matches(word[:60].lower(), list(known), 1, likeness)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_numeral(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
