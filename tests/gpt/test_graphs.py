"""CUDA graphs and the random numbers that they draw, on a GPU."""

import pytest
import torch

from sparsekern.gpt.graphs import Aside, CudaGraph

RESET_AFTER, DRAWN_AFTER = 100_000_000, 400_000_000  # cycles: about 0.05 and 0.2 s


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("is_own", [False, True])
def test_a_replay_waits_for_the_reset_of_its_capture(is_own: bool, index: int, monkeypatch):
    """torch resets generators on the stream of the capture, as it begins. Here this is late."""
    if index >= torch.cuda.device_count():
        pytest.skip("wants two GPUs")
    device, begin = torch.device("cuda", index), torch.cuda.CUDAGraph.capture_begin
    torch.cuda.init()
    generator = torch.Generator(device) if is_own else torch.cuda.default_generators[index]
    drawn = torch.zeros(8, device=device)

    def launch() -> None:
        torch.cuda._sleep(DRAWN_AFTER)
        drawn.uniform_(generator=generator)

    def begin_late(*args, **kwargs) -> None:
        torch.cuda._sleep(RESET_AFTER)
        begin(*args, **kwargs)

    generator.manual_seed(2)
    launch()
    want = drawn.clone()
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin_late)
    generator.manual_seed(1)
    graph = CudaGraph(launch, Aside(device), generator=generator if is_own else None)
    generator.manual_seed(2)
    graph.replay()
    assert torch.equal(drawn, want)
