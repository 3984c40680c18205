"""Training in several processes under torchrun, every one with the whole model: with the whole
optimizer (ddp: buckets.py), or with a share of it (fsdp: shards.py).

Every rank takes its part of one global batch, so a run computes the same on any number of ranks up
to rounding. Checkpoints hold whole tensors: they resume on any number of ranks as well.
"""

import gc
import os
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .flags import PARALLEL
from .heartbeat import SILENT_S, Heartbeat

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def check_device(name: str) -> None:
    """ValueError for what no machine has."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")


def is_started() -> bool:
    """Whether this process is one of a group, as torchrun starts them."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process is the one that tells and writes."""
    return not is_started() or os.environ["RANK"] == "0"


def _device(name: str, is_parallel: bool) -> torch.device:
    """That of this process; ValueError where this machine does not have it."""
    check_device(name)
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and is_parallel:
        if device.index is not None:
            raise ValueError(f"device: expected cuda under torchrun, one for each, got {name}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and not count:
        raise ValueError(f"device: expected cpu, this torch sees no GPU, got {name}")
    if (device.index or 0) >= max(1, count):
        raise ValueError(f"device: expected cpu or cuda:0 to cuda:{count - 1}, got {device}")
    return device


def _enter(device: torch.device) -> None:
    """Make this process one of its group, where it is not yet."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    # Defaults of its functions keep the group that is there when it is imported.
    from torch.distributed.nn import functional  # noqa: F401

    store, rank, size = connect()
    if device.type == "cuda":  # connected at once: a capture could not
        backend, device_id = "nccl", device
    else:
        backend, device_id = "gloo", None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    watch()


def connect() -> tuple[dist.Store, int, int]:
    """What processes tell each other before they are a group, this one's rank, and their number.

    torchrun may start all anew, and the same store still has the addresses of those before."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store), rank, size


class Ranks:
    """This process among those that torchrun started; the only one without torchrun."""

    def __init__(self, parallel: str, device: str) -> None:
        if parallel not in PARALLEL:
            raise ValueError(f"parallel: expected one of {', '.join(PARALLEL)}, got {parallel!r}")
        if parallel == "none" and is_started() and (size := os.environ["WORLD_SIZE"]) != "1":
            raise ValueError(
                f"parallel: expected ddp or fsdp in {size} processes, got none; prune and the demo "
                "work in one, without torchrun"
            )
        if parallel != "none" and not is_started():
            raise ValueError(
                f"parallel: {parallel} needs torchrun, as in: torchrun -m sparsekern; one process "
                "takes --parallel none"
            )
        self.parallel, self.device = parallel, _device(device, parallel != "none")
        if parallel != "none":
            _enter(self.device)
        self.rank = dist.get_rank() if parallel != "none" else 0
        self.size = dist.get_world_size() if parallel != "none" else 1

    def part(self, batch: Tensor) -> Tensor:
        """This rank's rows of a global batch, on its device."""
        count = batch.shape[0] // self.size
        rows = batch[self.rank * count : (self.rank + 1) * count]
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # else the copy waits for the GPU
        return rows.to(self.device, non_blocking=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, the same on each."""
        if self.size == 1:
            return value
        total = value.double()
        dist.all_reduce(total)
        return total / self.size

    def check_same(self, values: Mapping[str, object]) -> None:
        """ValueError in all processes where one has another value. All of them must ask
        together."""
        if self.size == 1:
            return
        of_all: list[Mapping[str, object]] = [values] * self.size
        dist.all_gather_object(of_all, values)
        for rank, others in enumerate(of_all):
            for name, value in of_all[0].items():
                if others[name] != value:
                    raise ValueError(
                        f"{name}: expected the same in all processes, got {str(value)[:80]} in the "
                        f"first and {str(others[name])[:80]} in process {rank}"
                    )

    def failures(self, error: Exception | None) -> list[str]:
        """What failed on which ranks, in words. All of them must ask together."""
        texts = [f"{type(error).__name__}: {first_line(error)}" if error else ""]
        if self.size > 1:
            texts *= self.size
            dist.all_gather_object(texts, texts[self.rank])
        return [f"process {rank}: {text}" for rank, text in enumerate(texts) if text]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


_watching: list[Heartbeat] = []  # of this process, at most one


def watch() -> None:
    """From now on this process ends when another one of its group has gone."""
    store, rank, size = connect()  # of its own: the group's may wait for another process
    if size > 1:
        store.set_timeout(timedelta(seconds=SILENT_S / 2))
        _watching.append(Heartbeat(dist.PrefixStore("sparsekern", store), rank, size))
        _watching[-1].start()


def finish() -> None:
    """Leave the group of processes, where there is one, and end its threads as far as nobody holds
    it: it may be that one of them, back from its last work while the interpreter ends, aborts.

    After an error the group is left as it is: its work may wait for a process that has gone."""
    if sys.exc_info()[0] or not dist.is_available() or not dist.is_initialized():
        return
    while _watching:
        _watching.pop().leave()
    gc.collect()  # NCCL waits for the graphs that it is in; a module may hold the group, and itself
    dist.destroy_process_group()


def lost(error: RuntimeError) -> str | None:
    """In words, that another process of the group has gone; None where the error is another one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
        return None
    return (
        "parallel: another process has gone, or does not answer; --resume goes on from the last "
        f"checkpoint, with any number of processes ({first_line(error)[:120]})"
    )


def load_optimizer(optimizer: Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict`, but the settings of its groups stay. ValueError where a tensor
    does not have its parameter's shape: a fused optimizer would write past its end."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, of_parameters = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(of_parameters, dict):
        raise ValueError("optimizer: expected state and param_groups")
    indices = [group.get("params") for group in groups if isinstance(group, dict)]
    wanted, first = [], 0
    for group in optimizer.param_groups:
        wanted.append(list(range(first, first + len(group["params"]))))
        first += len(group["params"])
    if indices != wanted:
        raise ValueError(
            f"optimizer: expected groups of {[len(w) for w in wanted]} parameters, got others"
        )
    for index, of_parameter in of_parameters.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"optimizer: expected {len(parameters)} parameters, got {index}")
        _check_moments(index, of_parameter, parameters[index])
    mine = [
        {key: value for key, value in group.items() if key != "params"} | {"params": params}
        for group, params in zip(optimizer.param_groups, wanted, strict=True)
    ]
    optimizer.load_state_dict({"state": of_parameters, "param_groups": mine})


def _check_moments(index: int, state: object, parameter: nn.Parameter) -> None:
    if not isinstance(state, dict) or state.keys() not in (set(), set(MOMENTS)):
        raise ValueError(f"optimizer: state of parameter {index}: expected {', '.join(MOMENTS)}")
    for key, t in state.items():
        shape = () if key == "step" else parameter.shape
        is_right = isinstance(t, Tensor) and t.shape == shape and t.is_floating_point()
        if not is_right:
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"optimizer: state of parameter {index}: {key}: expected floats of shape "
                f"{list(shape)}, got {got}"
            )
