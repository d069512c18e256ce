"""What a command returns to `main`, and which process prints it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CommandResult:
    """The outcome of one command.

    Attributes:
        text: printed on stdout.
        value: object that `--json` prints instead of the text.
        next: the command that usually follows; empty if there is none.
        passed: False if a check failed, which is exit code 3.
        afterwards: called after the text was printed, for work whose failure must not lose the text.
    """

    text: str
    value: dict[str, Any]
    next: str = ""
    passed: bool = True
    afterwards: Callable[[], None] | None = None


def is_main_process() -> bool:
    """Whether this process prints results; true outside `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def in_launch() -> bool:
    """Whether a launcher started several processes of this command."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
