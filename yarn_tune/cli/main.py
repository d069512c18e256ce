"""The command line: read the arguments, call one function, print its result.

Exit codes: 0 success, 2 a mistake of the user, 3 a failed check, 128 + n stopped by signal n, 1 a bug. With
`--json` one JSON object goes to stdout; progress and logs always go to stderr.
"""

import contextlib
import errno
import json
import sys

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
        options = parse(arguments)
        # DeepSpeed logs to stdout when it is imported; stdout is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result: CommandResult = options.command(options)
    except UserError as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("yarn-tune: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"yarn-tune: {error}; make room and run the same command again: nothing saved is lost", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"yarn-tune: check failed: {error}", file=sys.stderr)
        return 3
    if is_main_process():
        print(json.dumps(result.value) if options.json else _text(result))
    return 0 if result.passed else 3


def _text(result: CommandResult) -> str:
    return f"{result.text}\n\nnext: {result.next}" if result.next else result.text


if __name__ == "__main__":
    sys.exit(main())
