"""The progress of a training run on stderr: one line, rewritten at every step on a terminal, else every ten steps."""

import shutil
import signal
import sys
from collections import deque
from typing import TextIO

EVERY = 10
"""Steps between two lines where there is no terminal."""
RECENT = 20
"""Number of recent steps from whose mean time the remaining time is computed."""


class ProgressLine:
    """Prints `step 58/100  loss 3.16 (from 3.38)  4.3k tok/s  1:24 left`."""

    def __init__(self, steps: int, done: int, first_loss: float | None = None, stream: TextIO | None = None) -> None:
        """Start after `done` steps.

        Args:
            steps: number of steps of the whole run.
            done: number of steps done before an interruption.
            first_loss: loss of the run's first step; None: that of the first reported step.
            stream: where to print; None: stderr.
        """
        self.steps, self.done, self.first_loss = steps, done, first_loss
        self.stream = stream or sys.stderr
        self.rewrites = self.stream.isatty()
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._open = False

    def step(self, loss: float, tokens: int, seconds: float) -> None:
        """Report one step: its loss (NLL per token), the tokens it read, and its duration in seconds."""
        self.done += 1
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self._seconds.append(seconds)
        text = self.text(loss, tokens / seconds)
        last = self.done == self.steps
        if self.rewrites:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r{text[:width]:<{width}}")
            self._open = True
            if last:
                self.close()
        elif self.done % EVERY == 0 or self.done == 1 or last:
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def text(self, loss: float, speed: float) -> str:
        """The line after the last step; `speed` in tokens per second."""
        left = clock(self.expected() * (self.steps - self.done))
        speed_text = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
        return (
            f"step {self.done}/{self.steps}  loss {loss:.2f} (from {self.first_loss:.2f})  "
            f"{speed_text} tok/s  {left} left"
        )

    def expected(self) -> float:
        """Mean seconds of the recent steps; 0 before the first step."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def announce(self, number: int) -> None:
        """Print that a signal was received: the current step is finished and saved."""
        self.close()
        duration = f", about {clock(self.expected())}" if self._seconds else ""
        name = signal.Signals(number).name
        self.stream.write(f"{name}: the run stops after the current step{duration}; a second signal stops it at once\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line, so that further output begins on a new line."""
        if self._open:
            self.stream.write("\n")
            self.stream.flush()
            self._open = False


def clock(seconds: float) -> str:
    """A duration as `1:24` or `2:05:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
