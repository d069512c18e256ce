"""`accelerate launch` and `torchrun` with the exit code of what they ran; both alone end with a traceback and 1.

Arguments: `accelerate` or `torchrun`, and what that takes.
"""

import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(launcher: str, arguments: list[str]) -> int:
    """Launch; 0, or what the shell would say of the process that failed first."""
    try:
        if launcher == "accelerate":
            launch_command(launch_command_parser().parse_args(arguments))
        else:
            run.main(arguments)
    except ChildFailedError as error:
        return first_code(error)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def first_code(error: ChildFailedError) -> int:
    """Of the process that failed first; the launcher ends the others by a signal, which comes as a negative code."""
    failed = sorted(error.failures.values(), key=lambda failure: (failure.exitcode < 0, failure.timestamp))
    code = failed[0].exitcode
    return int(code if code > 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
