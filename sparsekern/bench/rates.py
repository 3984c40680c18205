"""What follows from the times of a case: speed-ups, rates, and shares of the machine's ceilings."""

from collections.abc import Collection

from .records import DENSE, OURS, SPARSE, Run, cases

MEMORY = "memory"
PRODUCTS = {"spmm": 1, "spmm_t": 1, "sddmm": 1, "linear": 3}  # in an op
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
INDEX_BYTES = {"cpu": 2, "cuda": 1}  # of a column, as the kernels store it


def derived(run: Run) -> list[dict]:
    """The cases of a table. Where the run measured the peak of multiply-adds, `dense_share` is what
    the best dense call has of it."""
    found = [derive(case) for case in cases(run.records)]
    limits = run.about.get("machine", {}).get("ceilings", {})
    for case in found:
        peak = limits.get(str(case.get("threads")), {}).get("flop_per_s")
        if peak and "dense_flop" in case and "dense_s" in case:
            case["dense_share"] = case["dense_flop"] / case["dense_s"] / peak
    return found


def derive(case: dict, ceilings: dict | None = None) -> dict:
    """The case with its counts, and where a dense call was timed: ours (the fastest of ours), how
    many times faster than the best dense call everybody is, rates, and with ceilings (ceilings.py)
    the shares of them.

    Medians are compared: round by round, all contenders met the same machine. Nobody who is wrong
    is the best. The case itself is changed.
    """
    if case.get("op") in PRODUCTS:
        case |= _counts(case)
    timed = {name: way for name, way in case["ways"].items() if "median_s" in way}
    dense = {n: w["median_s"] for n, w in timed.items() if w["kind"] == DENSE and w["is_right"]}
    if not dense:
        if any(way.get("kind") == DENSE for way in timed.values()):
            raise ValueError(f"no dense call is right: {case}")
        return case
    case["best_dense"] = min(dense, key=dense.get)
    case["dense_s"] = dense[case["best_dense"]]
    case["speedups"] = speedups = {
        name: case["dense_s"] / way["median_s"]
        for name, way in timed.items()
        if way["kind"] != DENSE
    }
    right = {name: way for name, way in timed.items() if way["is_right"]}
    peers = [speedups[name] for name, way in right.items() if way["kind"] == SPARSE]
    case["best_peer"] = max(peers, default=None)
    ours = {name: way["median_s"] for name, way in right.items() if way["kind"] == OURS}
    if ours:
        case["ours"] = name = min(ours, key=ours.get)
        case |= {"ours_s": ours[name], "speedup": speedups[name]}
        case |= {"error": right[name]["error"], "kernel": right[name].get("kernel", name)}
        _add_rates(case, right[name].get("bytes"), ceilings)
    return case


def _counts(case: dict) -> dict:
    M, N, K, nnz, passes = *(case[name] for name in ("M", "N", "K", "nnz")), PRODUCTS[case["op"]]
    item = ITEM_BYTES[case["dtype"]]
    return {
        "density": nnz / (N * K),
        "dense_bytes": N * K * item,
        "passes": passes,
        "useful_flop": passes * 2 * M * nnz,
        "dense_flop": passes * 2 * M * N * K,
    }


def _add_rates(case: dict, packed_bytes: int | None, ceilings: dict | None) -> None:
    """Moved are the values and column indices of W, or its packed bytes, and the activations of
    both sides, each once. With ceilings the level that the data comes from, and the shares that the
    rates are of the arithmetic peak, of that level's bandwidth, and of what the two allow together
    (roofline)."""
    if "passes" in case:
        M, N, K, item = *(case[name] for name in ("M", "N", "K")), ITEM_BYTES[case["dtype"]]
        weight = packed_bytes or case["nnz"] * (item + INDEX_BYTES[case["device"]])
        case["moved_bytes"] = case["passes"] * (weight + M * (N + K) * item)
    for count in ("useful_flop", "moved_bytes"):
        if count in case:
            case[f"{count}_per_s"] = case[count] / case["ours_s"]
    if not ceilings or "moved_bytes" not in case:
        return
    of_pass = case["moved_bytes"] // case["passes"]
    case["level"] = level = MEMORY if case["is_cold"] else level_of(of_pass, ceilings)
    peak, bandwidth = ceilings["flop_per_s"], ceilings["bytes_per_s"][level]
    limit = min(peak, case["useful_flop"] / case["moved_bytes"] * bandwidth)
    case["dense_share"] = case["dense_flop"] / case["dense_s"] / peak
    case["shares"] = {
        "flop": case["useful_flop_per_s"] / peak,
        "bytes": case["moved_bytes_per_s"] / bandwidth,
        "roofline": case["useful_flop_per_s"] / limit,
    }


def together(each: Collection[dict], name: str) -> float | None:
    """Times dense of all three products of one W: the sum of the best dense times over that of
    `name`. None where one was not timed, or where a result of ours is wrong."""
    ways = [case["ways"].get(name, {}) for case in each]
    if {case["op"] for case in each} != {"spmm", "spmm_t", "sddmm"}:
        return None
    if any("median_s" not in w or (w["kind"] == OURS and not w["is_right"]) for w in ways):
        return None
    return sum(case["dense_s"] for case in each) / sum(way["median_s"] for way in ways)


def level_of(nbytes: int, ceilings: dict) -> str:
    """The nearest that holds so many bytes. Each was measured on half of what it holds."""
    fits = (name for name, size in ceilings["bytes"].items() if nbytes <= 2 * size)
    return next(fits, MEMORY)


def case_name(case: dict) -> str:
    """'spmm 768x768-M256-50%-1T' and what sets it apart from the standard case."""
    if "model" in case:
        what, tokens = case["model"], case.get("batch", case.get("M"))
    else:
        what, tokens = f"{case['N']}x{case['K']}", case.get("M")
    parts = [f"{case['op']} {what}", *([f"M{tokens}"] if tokens else [])]
    if case["op"] == "generate" and "context" in case:
        parts.append(f"context {case['context']}")
    parts.append(f"{case['sparsity']:.0%}")
    parts.append(f"{case['threads']}T" if case.get("threads") else "GPU")
    parts += [case[name] for name in ("dtype", "mask") if case.get(name, "random") != "random"]
    return "-".join(parts) + "-cold" * case.get("is_cold", False)
