"""Train a recipe in a given folder: `train_in.py FOLDER RECIPE [key=value ...]`, also under a launcher."""

import sys

from yarn_tune import Tuning

Tuning(sys.argv[2], sys.argv[3:], sys.argv[1]).train()
