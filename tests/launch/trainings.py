"""Several trainings, one after another, by the processes of one launch: `trainings.py FILE [FILE ...]`.

A file holds a list of [recipe, run folder] as JSON; of several, each process reads its own. What a process sets up once
in its life is put back between trainings.
"""

import json
import os
import sys
from pathlib import Path

import accelerate
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train

if __name__ == "__main__":
    # The end of a training takes the processes apart, and the next one needs them.
    accelerate.Accelerator.end_training = lambda self: None
    files = sys.argv[1:]
    for tree, folder in json.loads(Path(files[int(os.environ["RANK"]) % len(files)]).read_text()):
        train(Run(parse_recipe(tree, []), Path(folder)))
        parallel_state_sp._release_sequence_parallel_groups()
