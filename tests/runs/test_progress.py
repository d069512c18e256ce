"""The progress of a run: one line of a screen, or one every ten steps."""

import io
import os
import signal

import pytest
from yarn_tune.runs.progress import ProgressLine, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (84, "1:24"), (3599, "59:59"), (7509, "2:05:09")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_line_every_ten_steps_without_a_terminal():
    stream = io.StringIO()
    progress = ProgressLine(25, 0, stream=stream)
    for step in range(25):
        progress.step(loss=3.5 - step / 100, tokens=8192, seconds=2.0)
    assert stream.getvalue().splitlines() == [
        "step 1/25  loss 3.50 (from 3.50)  4.1k tok/s  0:48 left",
        "step 10/25  loss 3.41 (from 3.50)  4.1k tok/s  0:30 left",
        "step 20/25  loss 3.31 (from 3.50)  4.1k tok/s  0:10 left",
        "step 25/25  loss 3.26 (from 3.50)  4.1k tok/s  0:00 left",
    ]


def test_a_continued_run_counts_from_its_first_step():
    stream = io.StringIO()
    ProgressLine(100, 57, first_loss=3.38, stream=stream).step(loss=3.16, tokens=100, seconds=2.0)
    assert stream.getvalue() == ""
    progress = ProgressLine(100, 59, first_loss=3.38, stream=stream)
    progress.step(loss=3.16, tokens=100, seconds=2.0)
    assert stream.getvalue() == "step 60/100  loss 3.16 (from 3.38)  50 tok/s  1:20 left\n"
    assert progress.expected() == 2.0


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_one_line_of_the_screen_is_rewritten(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = ProgressLine(3, 0, stream=stream)
    for loss in (3.5, 3.25, 3.0):
        progress.step(loss, tokens=8192, seconds=1.0)
    assert stream.getvalue().count("\n") == 1
    drawn = stream.getvalue().rstrip("\n").split("\r")[1:]
    assert [len(line) for line in drawn] == [columns - 1] * 3
    assert drawn[-1].startswith("step 3/3  loss 3.00 (from 3.50)")
    assert os.linesep not in "".join(drawn)


def test_a_signal_is_acknowledged_with_the_time_of_a_step():
    stream = Terminal()
    progress = ProgressLine(10, 0, stream=stream)
    progress.step(3.5, tokens=100, seconds=63.0)
    progress.announce(signal.SIGINT)
    assert stream.getvalue().splitlines()[-1] == (
        "SIGINT: the run stops after the current step, about 1:03; a second signal stops it at once"
    )
