"""The files of a checkpoint: which of them are read, and their digests.

A checkpoint folder is untrusted input. Its index may name files elsewhere or pickles (which can hold code), a link may
point out of the folder, and an `adapter_config.json` makes transformers add an adapter. All of these are refused. Only
safetensors files are read as weights.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor

from ..errors import UserError
from ..files import file_digest, read_bytes, read_json, write_json
from ..recipe import is_hub_id

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"

SECOND_COPY = "consolidated*"
"""Mistral's second copy of the weights, in another format."""

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""Names of a tokenizer's files."""

READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "chat_template*")
"""Names of files that loading a checkpoint may read."""


def checkpoint_folder(model: str, revision: str | None, patterns: Sequence[str], but: str | None = None) -> Path:
    """A folder with the files of a checkpoint that match the patterns; files of a hub id are downloaded.

    Args:
        model: a folder or a hub id.
        revision: the revision of a hub id.
        patterns: names of the files, with wildcards.
        but: pattern of the names to exclude.

    Raises:
        UserError: if a hub id cannot be downloaded.
    """
    if not is_hub_id(model):
        return Path(model)
    try:
        ignored = [but] if but else None
        found = snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"base.model: {model!r} could not be downloaded: {reason}") from error
    return Path(found)


def own_files(folder: Path, patterns: Sequence[str], but: str | None = None) -> list[Path]:
    """The files in a checkpoint folder that match the patterns, sorted by name.

    Raises:
        UserError: if one of them is a link to a file outside the folder.
    """
    found = sorted(path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns))
    kept = [path for path in found if path.is_file() and not (but and fnmatch(path.name, but))]
    for path in kept:
        if leaves_folder(path, folder):
            raise UserError(
                f"base.model: {path} is a link to {os.path.realpath(path)}, outside of the checkpoint's folder; put "
                "the file itself there"
            )
    return kept


def leaves_folder(path: Path, folder: Path) -> bool:
    """Whether `path` is a link out of `folder`, other than those of the hub cache to its blobs."""
    if not path.is_symlink():
        return False
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return not real.is_relative_to(home) and (blobs is None or real.parent != blobs)


def check_files(folder: Path) -> None:
    """Check a checkpoint folder before anything is loaded from it.

    Raises:
        UserError: naming a file that is not the checkpoint's own, weights in another format, or an adapter.
    """
    if (folder / ADAPTER).exists():
        raise UserError(
            f"base.model: {folder / ADAPTER} makes this folder an adapter, not a base; move it, or merge the adapter "
            "into its base with PEFT first"
        )
    own_files(folder, READ)
    if (folder / INDEX).exists():
        _check_index(folder)
    elif not (folder / "model.safetensors").is_file():
        raise UserError(
            f"base.model: {folder} has no weights in the safetensors format (model.safetensors, or {INDEX} and the "
            "files it names); other formats can hold code and are never read"
        )


def _check_index(folder: Path) -> None:
    index = read_json(folder / INDEX, "repair the checkpoint")
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"base.model: {folder / INDEX} has no weight_map of tensor names to file names")
    for name in sorted(set(weights.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"base.model: {folder / INDEX} names {name!r}; only safetensors files in the same folder are read"
            )
        if not (folder / name).is_file():
            raise UserError(f"base.model: {folder / name}, named by {INDEX}, is missing; complete the checkpoint")


def quantisation_of(config: dict[str, Any]) -> str | None:
    """The quantisation method of a checkpoint's weights by its config.json, or None for plain weights."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = [part.get("quantization_config") or part.get("compression_config") for part in parts]
    methods = (q.get("quant_method", "unknown") if isinstance(q, dict) else q for q in found if q)
    return next((str(getattr(method, "value", method)) for method in methods), None)


def check_plain(tensors: dict[str, Tensor]) -> None:
    """Check that tensors are floats of at least 16 bits, as folding and merging require.

    Raises:
        UserError: naming the first that is not.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise UserError(
                f"base.model: {name} is stored as {tensor.dtype}, into which nothing can be folded; {UNQUANTISED}"
            )


UNQUANTISED = "tune the unquantised base, then quantise the export"


def check_complete(model: str, info: dict[str, Any], partial: bool) -> None:
    """Check that a checkpoint has exactly the weights of its model class.

    Args:
        model: folder or hub id, for the message.
        info: loading info of `from_pretrained`.
        partial: whether the class is that of a part of the checkpoint (a language model without its vision tower).

    Raises:
        UserError: naming weights that are missing, have another shape, or are not known to the class.
    """
    mismatched = [name if isinstance(name, str) else name[0] for name in info.get("mismatched_keys") or ()]
    unknown = [] if partial else [name for name in info.get("unexpected_keys") or () if not KNOWN_EXTRA.search(name)]
    kinds = {
        "are missing, and would be random": info.get("missing_keys") or (),
        "do not have the shape that config.json gives": mismatched,
        "are not of its model class": unknown,
    }
    for problem, names in kinds.items():
        if names:
            first, more = sorted(names)[:3], len(names) - 3
            raise UserError(
                f"base.model: {model}: weights {problem}: {', '.join(first)}{f' and {more} more' if more > 0 else ''}; "
                "complete the checkpoint, or repair its names"
            )


KNOWN_EXTRA = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|attention\.(masked_)?bias$")
"""Buffers that old releases of transformers saved and that current releases compute."""


def files_digest(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of files; see `kept_digest`."""
    facts = [(path.name, kept_digest(path)) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def kept_digest(path: Path) -> str:
    """SHA-256 of a file, kept in the user's cache under the size, times and inode of the file.

    The times include that of the last status change, which no program can set back, so that a file replaced by one of
    the same size and modification time is read again.
    """
    real = os.path.realpath(path)
    stat = os.stat(real)
    facts: list[str | int] = [real, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    kept = cache_folder() / "digests" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"
    try:
        value = json.loads(read_bytes(kept))
        if value["facts"] == facts and value["check"] == _check(facts, value["digest"]):
            return str(value["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_digest(Path(real))
    try:
        write_json(kept, {"facts": facts, "digest": digest, "check": _check(facts, digest)})
    except UserError:
        return digest  # if it cannot be kept, it is computed again the next time
    return digest


def _check(facts: list[str | int], digest: str) -> str:
    return hashlib.sha256(json.dumps([facts, digest]).encode()).hexdigest()


def cache_folder() -> Path:
    """The folder of caches: $YARN_TUNE_CACHE, or ~/.cache/yarn_tune; without a home, one for this user in /tmp."""
    if given := os.environ.get("YARN_TUNE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "yarn_tune"
    except RuntimeError:  # a UID without a passwd entry, and no HOME
        return Path(tempfile.gettempdir()) / f"yarn_tune-{os.getuid()}"
