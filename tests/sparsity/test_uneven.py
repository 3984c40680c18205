"""Ranks with different numbers of batches, inside of DDP's join(): an update is an error there, and
no wait for ranks that never come."""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel

from sparsekern.sparsity import SET

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

FREQ = 3
NOT_ALL = r"inside of join\(\) some have no batches left, or have made fewer steps before"


def run(rank: int, path: str, cases: list) -> None:
    """Each case: where updates stop, and epochs of so many batches on each rank."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=300)  # where many share the machine
    url = f"file://{path}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2, timeout=wait)
    for stop, epochs in cases:
        algorithm = SET(0.5, update={"freq": FREQ} | stop)
        model = algorithm.apply(nn.Sequential(nn.Linear(16, 16)))
        parallel = DistributedDataParallel(model)
        optimizer = algorithm.apply(torch.optim.SGD(parallel.parameters(), 0.1))
        for counts in epochs:
            with parallel.join():
                for _ in range(counts[rank]):
                    optimizer.zero_grad()
                    parallel(torch.randn(4, 16)).square().sum().backward()
                    optimizer.step()
        assert algorithm.steps == sum(counts[rank] for counts in epochs)
    dist.barrier()
    dist.destroy_process_group()


def test_an_update_without_some_ranks_is_an_error(tmp_path):
    right = [({}, [(4, 4), (5, 5)]), ({"stop": 4}, [(3, 3), (1, 4)])]
    wrong = ({}, [(2, 4)])
    with pytest.raises(ProcessRaisedException, match=NOT_ALL) as told:
        spawn(run, (str(tmp_path / "store"), [*right, wrong]), nprocs=2)
    assert told.value.error_index == 1  # the one that has batches


def test_an_update_of_ranks_that_made_different_numbers_of_steps_is_an_error(tmp_path):
    with pytest.raises(ProcessRaisedException, match=NOT_ALL) as told:
        spawn(run, (str(tmp_path / "store"), [({}, [(2, 1), (2, 2)])]), nprocs=2)
    assert told.value.error_index == 0
