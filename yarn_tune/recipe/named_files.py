"""What the names in a recipe refer to: document files, datasets and checkpoints.

This module needs neither torch nor transformers, so that a mistyped name is reported at once.
"""

import glob
import os
from pathlib import Path

HUB = "hub:"
"""Prefix of a dataset on the Hugging Face hub among document names."""


def matching_files(pattern: str) -> list[str]:
    """Return the files that a name or glob stands for, sorted."""
    return sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))


def missing_files(names: list[str]) -> list[str]:
    """Return the document names that match no file; datasets on the hub are not looked up."""
    return [name for name in names if not name.startswith(HUB) and not matching_files(name)]


def is_hub_id(model: str) -> bool:
    """Whether this is `org/name`; if `org` is a folder here it is a path, perhaps a mistyped one."""
    path = Path(model)
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir()
