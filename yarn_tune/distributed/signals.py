"""SIGTERM and SIGINT, as schedulers and people send them: the step is finished and saved, then the run ends.

A second signal ends it at once, unless it is the first one come twice: a scheduler signals every process, and a
launcher passes on to its processes what it got. The processes of a run agree on stopping, since one alone would leave
the others waiting for it.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TWICE = 5.0
"""Seconds within which the same signal is the same request."""


class Request:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.signal = 0
        self._last: tuple[int, float] | None = None
        """The request that may come twice, and when it came."""

    def take(self, number: int) -> None:
        """A signal that came.

        Raises:
            KeyboardInterrupt: if this is a second request.
        """
        now = time.monotonic()
        if self._last is None:
            self.signal, self._last = number, (number, now)
        elif number != self._last[0] or now - self._last[1] > TWICE:
            raise KeyboardInterrupt

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that came to any process, 0 if none; every process must ask."""
        found = self.signal
        if accelerator.num_processes > 1:
            found = int(accelerator.gather(torch.tensor([found], device=accelerator.device)).max())
        if found:
            # The run ends now. A launcher sends SIGTERM to those still saving when the first process is out.
            self._last = signal.SIGTERM, time.monotonic()
        return found


@contextmanager
def stop_on_signal() -> Iterator[Request]:
    """Collect signals instead of dying of them; outside the main thread, where Python takes none, nothing changes."""
    request, before = Request(), dict[Any, Any]()

    def take(number: int, frame: FrameType | None) -> None:
        request.take(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
