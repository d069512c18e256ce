"""The package works without `datasets`, which only .parquet files and datasets on the hub need."""

import subprocess
import sys

CODE = """
import sys
for name in ("datasets", "pyarrow", "deepspeed", "matplotlib", "wandb"):
    sys.modules[name] = None
from pathlib import Path
from yarn_tune import UserError
import yarn_tune.cli, yarn_tune.training, yarn_tune.evaluation, yarn_tune.export, yarn_tune.planning
from yarn_tune.data.readers import hub_records
try:
    list(hub_records("data.train", "hub:org/name", ("text",)))
except UserError as error:
    print(error)
"""


def test_a_hub_dataset_names_the_missing_package():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "data.train: hub:org/name: reading this needs the package `datasets`; pip install datasets" in done.stdout
