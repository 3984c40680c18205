"""Shares of this machine's ceilings (ceilings.py) that a measurement reaches."""

MEMORY = "memory"


def add_rates(info: dict, ceilings: dict) -> None:
    """Add to a record the level that its data comes from, and the shares that its rates are of the
    arithmetic peak, of that level's bandwidth, and of what the two allow together (roofline)."""
    if not ceilings or "moved_bytes" not in info or "ours_s" not in info:
        return
    of_pass = info["moved_bytes"] // info["passes"]
    level = MEMORY if info["is_cold"] else level_of(of_pass, ceilings)
    peak, bandwidth = ceilings["flop_per_s"], ceilings["bytes_per_s"][level]
    flop_per_s = info["useful_flop"] / info["ours_s"]
    bytes_per_s = info["moved_bytes"] / info["ours_s"]
    limit = min(peak, info["useful_flop"] / info["moved_bytes"] * bandwidth)
    info["level"] = level
    info["shares"] = {
        "flop": flop_per_s / peak,
        "bytes": bytes_per_s / bandwidth,
        "roofline": flop_per_s / limit,
    }


def level_of(nbytes: int, ceilings: dict) -> str:
    """The nearest that holds so many bytes. Each was measured on half of what it holds."""
    fits = (name for name, size in ceilings["bytes"].items() if nbytes <= 2 * size)
    return next(fits, MEMORY)
