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


def what_is(path: Path) -> str:
    """Say what a path is, and which command takes it: the end of the message about a wrong argument."""
    if not path.exists():
        return "there is no such file or folder"
    if path.suffix == ".gguf":
        return "it is a GGUF file, which only llama.cpp reads; name the checkpoint that it was converted from"
    if path.suffix in (".yaml", ".yml"):
        return f"it is a recipe; `yarn-tune plan {path}` reads one"
    if path.is_file():
        return "it is a file"
    if (path / "recipe.yaml").is_file():
        if (path / "export" / "config.json").is_file():
            return f"it is a run folder; its checkpoint is {path / 'export'}"
        return f"it is a run folder without a checkpoint; `yarn-tune export {path}` writes one"
    if (path / "adapter_config.json").is_file():
        return f"it is an adapter; `yarn-tune export {path}` writes a checkpoint of it"
    if (path / "config.json").is_file():
        return (
            f"it is a checkpoint; `yarn-tune verify {path}` reads one, `yarn-tune init {path}` writes a recipe for it"
        )
    if any(path.glob("*.gguf")):
        return "it is a folder of GGUF files, which only llama.cpp reads"
    suffixes = sorted({file.suffix for file in path.iterdir() if file.suffix in (".txt", ".jsonl", ".parquet")})
    if suffixes:
        return f"it is a folder of documents; name its files, as in {path}/*{suffixes[0]}"
    return "it is a folder without a config.json"
