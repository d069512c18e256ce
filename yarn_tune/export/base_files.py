"""The files of the base that an export keeps: weights, tokenizer, templates, licences, and what lies in sub-folders.

Weights come from the top folder alone, where they were checked when the base was loaded. Of everything else, a file
that cannot be copied (a link out of the folder, or one that cannot be read) is left out with a message, so that nothing
in the base's folder can stop an export after training. Code is never copied.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..files import CARD, CHECKSUMS
from ..models import SECOND_COPY, BaseModel, leaves_folder

WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
"""Names of the files that hold the weights."""
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Names of other files of the base's folder that belong to an export."""
BENEATH = (
    ".json", ".jinja", ".txt", ".md", ".yaml", ".yml", ".model", ".tiktoken", ".pdf",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp",
)  # fmt: skip
"""Endings of files in sub-folders that are kept: templates, tokenizers, settings, texts and pictures."""
LICENCES = "LICENSES"
"""The sub-folder whose files are kept whatever their ending: licences are named as in `Apache-2.0`."""
CODE = (".py", ".pyc", ".so", ".sh", ".dll", ".js", ".ipynb", ".exe", ".pkl", ".pickle", ".pt", ".pth", ".bin")
"""Endings of files that hold code, or may: they are never copied."""
OWN = (CARD, CHECKSUMS, "config.json", "fidelity.json", "overrides.json", "SERVING.md")
"""Names that an export writes itself."""


def copy_base(base: BaseModel, folder: Path) -> None:
    """Copy what belongs to an export from the base into a folder.

    Raises:
        UserError: if a weight file is a link out of the base's folder.
        OSError: if `folder` cannot be written.
    """
    for source in base.files(WEIGHTS, but=SECOND_COPY):
        shutil.copyfile(source, folder / source.name)
    root = base.folder((*COPIED, f"{LICENCES}/*", *(f"*/*{ending}" for ending in BENEATH)), but=SECOND_COPY)
    for source in [*_beside(root), *_beneath(root)]:
        name = source.relative_to(root)
        if reason := _why_not(source, root):
            print(f"yarn-tune: {source} is left out of the export: {reason}", file=sys.stderr)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def _beside(root: Path) -> Iterator[Path]:
    """The files of the base's folder itself."""
    for path in sorted(root.iterdir()):
        named = any(fnmatch(path.name, pattern) for pattern in COPIED) and not fnmatch(path.name, SECOND_COPY)
        if named and not path.is_dir() and not path.name.lower().endswith(CODE):
            yield path


def _beneath(root: Path) -> Iterator[Path]:
    """The files of its sub-folders; hidden ones and links to folders are skipped."""
    for top, folders, files in os.walk(root):
        inside = Path(top).relative_to(root)
        folders[:] = sorted(
            each for each in folders if not each.startswith(".") and not (top == str(root) and each in OWN)
        )
        for name in sorted(files) if inside.parts else ():
            kept = inside.parts[0] == LICENCES or name.lower().endswith(BENEATH)
            if kept and not name.startswith(".") and not name.lower().endswith((*CODE, ".index.json", ".safetensors")):
                yield Path(top) / name


def _why_not(source: Path, root: Path) -> str:
    """The reason why a file cannot be copied; empty if it can."""
    if leaves_folder(source, root):
        return f"it is a link to {os.path.realpath(source)}, outside of the base's folder"
    if not source.is_file():
        return "it is no regular file"
    return "" if os.access(source, os.R_OK) else "it cannot be read"
