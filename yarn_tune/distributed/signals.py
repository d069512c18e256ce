"""Stop a run on SIGTERM and SIGINT, after the current step is finished and saved.

A second signal ends the run at once, unless it is the same signal delivered twice: a scheduler signals every process,
and a launcher forwards its signal to its processes. All processes of a run stop after the same step, because the others
would block in a collective operation if one stopped alone.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TWICE = 5.0
"""Seconds within which the same signal counts as one request."""


class Request:
    """The signal that was received, if any."""

    def __init__(self) -> None:
        self.signal = 0
        self.announce: Callable[[int], None] | None = None
        """Called with the first signal."""
        self._last: tuple[int, float] | None = None
        """The signal that may be delivered twice, and the time of its first delivery."""

    def take(self, number: int) -> None:
        """Record a signal.

        Raises:
            KeyboardInterrupt: if this is a second request to stop.
        """
        now = time.monotonic()
        if self._last is None:
            self.signal, self._last = number, (number, now)
            if self.announce is not None:
                self.announce(number)
        elif number != self._last[0] or now - self._last[1] > TWICE:
            raise KeyboardInterrupt

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process received, 0 if none; a collective operation: every process must call it."""
        found = self.signal
        if accelerator.num_processes > 1:
            found = int(accelerator.gather(torch.tensor([found], device=accelerator.device)).max())
        if found:
            # The run ends now. When the first process exits, a launcher sends SIGTERM to those that are still saving.
            self._last = signal.SIGTERM, time.monotonic()
        return found


@contextmanager
def stop_on_signal() -> Iterator[Request]:
    """Record SIGTERM and SIGINT instead of ending the process; does nothing outside the main thread."""
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
