"""What a command returns to `main`, and which process prints it."""

import os
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
    """

    text: str
    value: dict[str, Any]
    next: str = ""
    passed: bool = True


def is_main_process() -> bool:
    """Whether this process prints results; true outside `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"
