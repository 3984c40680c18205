"""The training runs of the experiments of November 2026 as records, and nested again by name.

A record is an evaluation of a run, or a round of pruning; `case` holds the run's name. Times of
steps are records of their own, from which the runs' are made.
"""

from .records import Run

CONFIG = ("layers", "width", "context", "batch", "steps", "lr", "seed")
TIMES = {"step": "step_s", "latency": "latency_s", "densified latency": "dense_latency_s"}
OWN = ("machine", "data", "failed")  # parts of the nested form that are no runs


def flat(results: dict) -> Run:
    machine = dict(results.get("machine", {}))
    about = {
        "benchmark": "experiments",
        "date": machine.pop("date", ""),
        "commit": {"id": machine.pop("commit", "unknown"), "dirty": False},
        "machine": machine,
        **{name: results[name] for name in ("data", "failed") if name in results},
    }
    records: list[dict] = []
    for key, run in results.items():
        if key == "times":
            for name, timed in run["times"].items():
                records += _times(name, timed)
        elif key not in OWN:
            records += _rounds(key, run) if "rows" in run else _evaluations(key, run)
    return Run(about, records)


def _times(name: str, timed: dict) -> list[dict]:
    found = [
        {"op": "time", "case": name, "contender": contender, "median_s": timed[field]}
        for contender, field in TIMES.items()
    ]
    found[0] |= {"min_s": timed["least_s"], "max_s": timed["most_s"]}
    return found


def _rounds(key: str, run: dict) -> list[dict]:
    names = ("sparsity", "steps", "loss", "flop_ratio", "parameters")
    return [
        {"op": "prune", "case": key, "contender": key.split()[1], "step": i}
        | {name: row[name] for name in names}
        for i, row in enumerate(run["rows"])
    ]


def _evaluations(key: str, run: dict) -> list[dict]:
    words = key.split()
    sparsity = 0.0 if words[0] == "prune" else float(words[1])
    own = {"op": "control" if words[0] == "prune" else words[0], "case": key, "sparsity": sparsity}
    own["contender"] = f"{sparsity:.0%} sparse" if sparsity else "dense"
    if "diverged" in run:
        return [own | {"note": run["diverged"]}]
    own |= {name: run["config"][name] for name in CONFIG}
    own |= {"parameters": run["parameters"], "flops": float(run["flops"])}
    own["bytes"] = run["peak_gpu_bytes"]
    points = run["evaluations"]
    return [own | {"step": point["step"], "loss": point["loss"]} for point in points]


def nested(run: Run) -> dict:
    """Name -> run, with the times of its steps; `times`, `machine`, `data` and `failed`."""
    about = run.about
    results: dict = {}
    if machine := about["machine"]:  # a run has ended
        results["machine"] = machine | {"commit": about["commit"]["id"], "date": about["date"]}
    results |= {name: about[name] for name in ("data", "failed") if name in about}
    for r in run.records:
        if r["op"] == "time":
            times = results.setdefault("times", {"times": {}})["times"].setdefault(r["case"], {})
            times[TIMES[r["contender"]]] = r["median_s"]
            if "min_s" in r:
                times |= {"least_s": r["min_s"], "most_s": r["max_s"]}
        elif r["op"] == "prune":
            results.setdefault(r["case"], {"rows": []})["rows"].append(r)
        elif "loss" not in r:
            results[r["case"]] = {"loss": None, "diverged": r["note"]}
        else:
            new = {"config": {name: r[name] for name in CONFIG}, "evaluations": []}
            new |= {"parameters": r["parameters"], "flops": r["flops"]}
            made = results.setdefault(r["case"], new | {"peak_gpu_bytes": r.get("bytes", 0)})
            made["evaluations"].append({"step": r["step"], "loss": r["loss"]})
            made["loss"] = r["loss"]
    add_times(results)
    return results


def add_times(results: dict) -> None:
    """Give each run the times of its steps alone on a GPU."""
    times = results.get("times", {}).get("times", {})
    for key, run in results.items():
        kind, sparsity = [*key.split(), ""][:2]
        timed = times.get("finetune" if kind == "finetune" else sparsity)
        if kind not in ("pretrain", "finetune") or not timed or not run["loss"]:
            continue
        config, step_s = run["config"], timed["step_s"]
        run["step_s"], run["steps_s"] = step_s, config["steps"] * step_s
        run["tokens_per_s"] = config["batch"] * config["context"] / step_s
        for evaluation in run["evaluations"]:
            evaluation["seconds"] = evaluation["step"] * step_s


def trained(results: dict, kind: str = "pretrain") -> dict[float, dict[int, dict]]:
    """Sparsity -> seed -> run; of fine-tunings at several rates the best. Runs that diverged are
    left out."""
    found: dict[float, dict[int, dict]] = {}
    for key, run in results.items():
        words = key.split()
        if words[0] == kind and run["loss"] is not None:
            seeds, seed = found.setdefault(float(words[1]), {}), int(words[3])
            seeds[seed] = min(run, seeds.get(seed, run), key=lambda r: r["loss"])
    return {sparsity: dict(sorted(seeds.items())) for sparsity, seeds in sorted(found.items())}


def costs(runs: dict[float, dict[int, dict]]) -> dict[float, list[float]]:
    """Sparsity -> loss above the dense run of the same seed, one for each seed that both have."""
    dense = runs.get(0.0, {})
    return {
        s: [run["loss"] - dense[seed]["loss"] for seed, run in seeds.items() if seed in dense]
        for s, seeds in runs.items()
        if s
    }


def path(run: dict, spent: str) -> tuple[list[float], list[float]]:
    """What was spent ('seconds', or 'flops' in 1e15) at each evaluation, and the losses; without
    the first one, which would hide what differs."""
    points = [point for point in run["evaluations"] if point["step"]]
    if spent == "seconds":
        x = [point["seconds"] for point in points]
    else:
        x = [1e-15 * run["flops"] * point["step"] / points[-1]["step"] for point in points]
    return x, [point["loss"] for point in points]
