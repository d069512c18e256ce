"""`python -m yarn_tune` is `yarn-tune`."""

import sys

from .cli import main

sys.exit(main())
