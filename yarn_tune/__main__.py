"""`python -m yarn_tune` is `yarn-tune`."""

import sys

try:
    from .cli import main

    code = main()
except KeyboardInterrupt:
    print("yarn-tune: interrupted", file=sys.stderr)
    code = 130
sys.exit(code)
