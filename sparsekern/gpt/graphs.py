"""CUDA graphs of a model: what is captured, and the stream beside the others on which it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Aside:
    """The stream that passes are captured on, and taken on without a graph: what autograd keeps of
    a parameter belongs to one stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work inside comes after that before, and before that behind."""
        around = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(around)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            around.wait_stream(self.stream)


class CudaGraph:
    """What a function launches on the GPU. Making one runs nothing: replay() does."""

    def __init__(
        self,
        launch: Callable[[], None],
        aside: Aside,
        first: "CudaGraph | None" = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Captured on the stream of `aside`; in the memory of `first`, which is replayed before.
        `generator`: that it draws from, beside the default one."""
        self._graph = torch.cuda.CUDAGraph()
        if generator:
            with torch.cuda.device(aside.stream.device):  # where torch puts its seed
                self._graph.register_generator_state(generator)
        pool, stream = first and first._graph.pool(), aside.stream
        # A capture begins with a reset of the generators on its stream, which no replay waits for:
        # the first one could draw as if seeded otherwise. So what comes later waits. The stream of
        # now is also that of afterwards, where a capture fails.
        with aside():
            # thread_local: products plan in the thread of autograd, too.
            with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                launch()

    def replay(self) -> None:
        self._graph.replay()
