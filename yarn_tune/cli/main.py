"""The command line: read the arguments, call one function, print its result.

Exit codes: 0 success, 2 a mistake of the user, 3 a failed check, 128 + n stopped by signal n, 1 a bug. With
`--json` one JSON object goes to stdout; progress and logs always go to stderr.
"""

import contextlib
import errno
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..errors import CheckFailed, Interrupted, UserError
from .parser import build_parser, parse
from .result import CommandResult, is_main_process


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        build_parser()[0].print_help()
        return 0
    try:
        with _ended_by_signals():
            return _run(arguments)
    except BrokenPipeError:  # the reader of our output ended, as `head` does
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (Python flushes it at the end)
        return 128 + 13
    except OSError as error:
        print(f"yarn-tune: {_os_error_text(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        print("yarn-tune: out of memory; use smaller batches, lengths or documents", file=sys.stderr)
        return 2
    except _Terminated:
        print("yarn-tune: stopped by SIGTERM; the same command continues", file=sys.stderr)
        return 128 + signal.SIGTERM


class _Terminated(BaseException):
    """Raised on SIGTERM outside of training (training handles it itself), so that partial files are deleted."""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM and KeyboardInterrupt on SIGINT; end at once while a module is imported.

    PyTorch's C++ code imports Python modules when it is loaded, and aborts the process (SIGABRT, a core dump) on an
    exception in them.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            os.write(2, f"yarn-tune: interrupted by {signal.Signals(number).name} while starting\n".encode())
            os._exit(128 + number)
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores SIGINT
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an import is among the calls that lead to this frame; calls through C code are part of the chain."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _os_error_text(error: OSError) -> str:
    """The message about an error of the operating system: where it occurred, what it is, and what to do."""
    place = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room and run the same command again: nothing saved is lost" if full else "check the path"
    return f"{place}{error.strerror or error}; {remedy}"


def _run(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
        if options.one_process and not is_main_process():
            return 0
        # DeepSpeed logs to stdout when it is imported; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result: CommandResult = options.command(options)
        if is_main_process():
            print(json.dumps(_as_json(result.value)) if options.json else _text(result), flush=True)
        if result.afterwards is not None:
            result.afterwards()
    except UserError as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("yarn-tune: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except CheckFailed as error:
        print(f"yarn-tune: check failed: {error}", file=sys.stderr)
        return 3
    return 0 if result.passed else 3


def _as_json(value: Any) -> Any:
    """A value with null in place of NaN and infinities, which are no JSON."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(result: CommandResult) -> str:
    return f"{result.text}\n\nnext: {result.next}" if result.next else result.text


if __name__ == "__main__":
    sys.exit(main())
