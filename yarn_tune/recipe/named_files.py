"""Resolve the names in a recipe: document files, datasets and checkpoints.

This module needs neither torch nor transformers, so that a mistyped name is reported at once.
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

HUB = "hub:"
"""Prefix of a dataset on the Hugging Face hub among document names."""
KINDS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet")
"""Document files, by the end of their names in lower case; all but Parquet also compressed."""
COMPRESSED = (".gz", ".zst")


def kind_of(path: str) -> tuple[str, str] | None:
    """Return a document file's kind and compression, as `(".jsonl", ".gz")`; None if its name has no known ending."""
    name = os.path.basename(path).lower()
    compression = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    kind = next((ending for ending in KINDS if name.removesuffix(compression).endswith(ending)), None)
    if kind is None or (kind == ".parquet" and compression):
        return None
    return kind, compression


def matching_files(pattern: str) -> list[str]:
    """Return the files that a name refers to, sorted: a file, the document files in a folder, or matches of a glob.

    A path that exists is used literally, even with `[` or `*` in it. In a folder and its subfolders, all files of a
    known kind are read, except hidden ones.
    """
    name = os.path.expanduser(pattern)
    if os.path.isdir(name):
        return sorted(_files_beneath(name))
    found = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
    return sorted(path for path in found if os.path.isfile(path))


def _files_beneath(top: str) -> Iterator[str]:
    """Yield the document files of a folder; what is hidden is skipped, and a folder that links lead to again."""
    seen = {os.path.realpath(top)}
    for folder, folders, files in os.walk(top, followlinks=True):
        inside, folders[:] = sorted(each for each in folders if not each.startswith(".")), []
        for each in inside:
            real = os.path.realpath(os.path.join(folder, each))
            if real not in seen:
                seen.add(real)
                folders.append(each)
        yield from (os.path.join(folder, file) for file in files if kind_of(file) and not file.startswith("."))


def missing_files(names: list[str]) -> list[str]:
    """Return the document names that match no file; datasets on the hub are not looked up."""
    return [name for name in names if not name.startswith(HUB) and not matching_files(name)]


def located(name: str, folder: Path) -> str:
    """Return a document name as it is, or joined to `folder`, the recipe's, if files match only there."""
    relative = not name.startswith((HUB, "~")) and not os.path.isabs(name)
    beside = str(folder / name)
    return beside if relative and not matching_files(name) and matching_files(beside) else name


def is_hub_id(model: str) -> bool:
    """Whether a name is a hub id, `org/name`; if a folder `org` exists, the name is a path instead."""
    path = Path(model)
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir()


def what_is(path: Path) -> str:
    """Describe a path and the command that accepts it, to end the message about a wrong argument."""
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
        return f"it is an adapter{_base_text(path)}; `yarn-tune export {path}` writes a checkpoint of it"
    if (path / "config.json").is_file():
        return (
            f"it is a checkpoint; `yarn-tune verify {path}` reads one, `yarn-tune init {path}` writes a recipe for it"
        )
    if any(path.glob("*.gguf")):
        return "it is a folder of GGUF files, which only llama.cpp reads"
    if any(kind_of(file.name) for file in path.iterdir()):
        return "it is a folder of documents, which data.train or data.heldout of a recipe can name"
    return "it is a folder without a config.json"


def _base_text(adapter: Path) -> str:
    """The base that an adapter's config names, with its revision; empty if it names none."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" of {base} (revision {revision})" if revision else f" of {base}"
