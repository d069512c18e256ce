"""SIGTERM and SIGINT, as schedulers and people send them: the step is finished and saved, then the run ends.

A second signal ends it at once. The processes of a run agree on stopping, since one alone would leave the others
waiting for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Request:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.signal = 0

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that came to any process, 0 if none; every process must ask."""
        if accelerator.num_processes == 1:
            return self.signal
        found = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(found.max())


@contextmanager
def requested() -> Iterator[Request]:
    """Collect signals instead of dying of them; outside the main thread, where Python takes none, nothing changes."""
    request, before = Request(), dict[Any, Any]()

    def take(number: int, frame: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
