"""Choosing among records: dicts with the fields of a measurement."""

from collections.abc import Callable, Iterable


def select(records: Iterable[dict], **wanted) -> list[dict]:
    """Records with these fields; a tuple lists the values that will do."""

    def fits(record: dict) -> bool:
        return all(
            record.get(name) in (value if isinstance(value, tuple) else (value,))
            for name, value in wanted.items()
        )

    return [record for record in records if fits(record)]


def groups(records: Iterable[dict], *keys: Callable[[dict], object]) -> dict[tuple, list[dict]]:
    """Together what has the same keys, in the order of first appearance."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(key(record) for key in keys), []).append(record)
    return found


def sparsities_of(records: Iterable[dict]) -> list[float]:
    return sorted({record["sparsity"] for record in records})
