"""Numbers of a step on their way from its device."""

import torch
from torch import Tensor


class Reading:
    """0-dimensional tensors, copied to the host behind the work that makes them; nobody waits."""

    def __init__(self, *numbers: Tensor) -> None:
        on_device = torch.stack(numbers)
        # Into pinned memory; the tensors may be written again right after.
        self._numbers = on_device.to("cpu", non_blocking=True)
        self._arrival = None
        if on_device.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(on_device.device))

    def wait(self) -> list[float]:
        """The numbers, once they are here."""
        if self._arrival:
            self._arrival.synchronize()
        return self._numbers.tolist()
