"""Upload an export or an adapter with its card to the Hugging Face Hub, in one commit.

An export is verified first: if its config is no longer served as learned, or a file other than the model card was
edited, the upload is refused. Local paths of the base are replaced by its name on the hub.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ..adapter import BESIDE, CONFIG, WEIGHTS, YarnTuneConfig, is_adapter, read_config
from ..errors import CheckFailed, UserError
from ..files import CARD, CHECKSUMS, file_digest, read_checked, with_checksum
from ..models import inside_wrapper, leaves_folder
from ..recipe import is_hub_id, what_is
from ..serving import verify
from .fidelity import FIDELITY
from .model_card import HERE, at_revision, card_header, licence_from, revision_key

TEXTS = (".md", ".json", ".yaml")

HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
"""The exception of the HTTP library that this huggingface_hub uses, raised if the hub is not reached."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and where."""

    repo: str
    what: str
    """`checkpoint` or `adapter`."""
    files: dict[str, Path | bytes]
    """Name in the repository -> file, or its content if it differs from the file's."""
    notes: tuple[str, ...] = ()
    """What the user should know about the files."""

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}

    def text(self) -> str:
        """The files and their sizes, as text."""
        sizes = self.sizes()
        lines = [f"  {size:>14,}  {name}" for name, size in sorted(sizes.items())]
        head = f"{self.what} -> {self.repo}: {len(sizes)} files, {sum(sizes.values()):,} bytes"
        return "\n".join([head, *lines, *self.notes])


def prepare_upload(
    source: Path, repo: str, base: str | None = None, adapter: bool = False, revision: str | None = None
) -> Upload:
    """Collect the files of an export or an adapter, without a connection to the hub.

    Args:
        source: a run folder, an export or an adapter.
        repo: `org/name` on the hub.
        base: hub id of the base, if the run used a local folder.
        adapter: whether to upload a run's adapter instead of its export.
        revision: revision of the base that an adapter belongs to, in place of the recorded one.

    Raises:
        UserError: if there is nothing to upload, the base has no name on the hub, or an export has a `revision`.
        CheckFailed: if a stack does not serve the checkpoint as it was learned.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is not a name of a repository on the hub (org/name): {error}") from error
    if (source / "recipe.yaml").is_file():
        source = source / ("adapter" if adapter else "export")
    if (source / FIDELITY).is_file():
        if revision is not None:
            raise UserError(f"--revision: {source} is an export, which has the weights; only an adapter needs its base")
        return _checkpoint(source, repo, base)
    if is_adapter(source):
        return _adapter(source, repo, base, revision)
    raise UserError(
        f"{source}: neither an export (with fidelity.json) nor an adapter; {what_is(source)}; run `yarn-tune export`"
    )


def _checkpoint(folder: Path, repo: str, base: str | None) -> Upload:
    card = folder / CARD
    if not card.is_file():
        raise UserError(f"{folder}: has no model card (README.md); run `yarn-tune export` again")
    checked = verify(str(folder))
    if not checked.passed:
        raise CheckFailed(f"{folder}: is not served as it was learned, so it is not uploaded:\n{checked.text()}")
    named = card_header(_text(card)).get("base_model")
    if not isinstance(named, str):
        raise UserError(
            f"{card}: its header names no base_model; write `base_model: ORG/NAME` between the lines `---`, or run "
            "`yarn-tune export` again"
        )
    listed = _listed(folder)
    written = str(listed.get("base", named))
    base = base or (named if named != written and is_hub_id(named) else None)
    files = _renamed(folder, written, base)
    content = files[CARD]
    text = content if isinstance(content, bytes) else content.read_bytes()
    if HERE.encode() in text:
        files[CARD] = text.replace(HERE.encode(), repo.encode())
    if not listed:
        return Upload(repo, "checkpoint", files)
    edited = file_digest(card) != listed["files"].get(CARD)
    notes = (f"{card} was edited since the export; it is uploaded as it is now.",) if edited else ()
    return Upload(repo, "checkpoint", _with_checksums(files, listed | {"base": base or written}), notes)


def _text(card: Path) -> str:
    """A model card's text; raises `UserError` if it is not UTF-8, which the hub requires."""
    try:
        return card.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{card}: not valid UTF-8 at byte {error.start}; save it as UTF-8") from error


def _listed(folder: Path) -> dict[str, Any]:
    """What an export wrote into checksums.json: `files` and `base`; empty for an export of version 0.1.0."""
    path = folder / CHECKSUMS
    return read_checked(path, "run `yarn-tune export` again") if path.is_file() else {}


def _with_checksums(files: dict[str, Path | bytes], listed: dict[str, Any]) -> dict[str, Path | bytes]:
    """The files of an export, with checksums of the card and of other files whose text changed."""
    changed = {name: f for name, f in files.items() if isinstance(f, bytes)} | {CARD: files[CARD]}
    changed.pop(CHECKSUMS, None)
    digests = {name: hashlib.sha256(f).hexdigest() if isinstance(f, bytes) else file_digest(f)
               for name, f in changed.items()}  # fmt: skip
    content = with_checksum(listed | {"files": listed["files"] | digests})
    return files | {CHECKSUMS: (json.dumps(content, indent=1) + "\n").encode()}


def _adapter(folder: Path, repo: str, base: str | None, given: str | None) -> Upload:
    config = read_config(folder)
    written, recorded = str(config.base_model_name_or_path), config.revision
    named, revision = base or written, given or recorded
    # Leave other files out: `yarn-tune export` of an adapter writes its checkpoint into the same folder.
    own = {CONFIG, WEIGHTS, f"{BESIDE}/{CONFIG}", f"{BESIDE}/{WEIGHTS}"}
    files = {name: file for name, file in _renamed(folder, written, base).items() if name in own}
    notes = []
    if revision is None:
        notes.append(f"No revision of {named} is recorded; if it may change, name its commit with --revision.")
    elif recorded not in (None, revision):
        notes.append(f"{folder / CONFIG} records revision {recorded} of the base; {revision} is uploaded (--revision).")
    if revision != recorded:
        for name in (CONFIG, f"{BESIDE}/{CONFIG}"):
            if name in files:
                files[name] = _with_revision(files[name], revision)
    return Upload(repo, "adapter", files | {CARD: _adapter_card(config, named, revision).encode()}, tuple(notes))


def _with_revision(config: Path | bytes, revision: str | None) -> bytes:
    """An adapter's config with another revision of its base."""
    written = json.loads(config if isinstance(config, bytes) else config.read_bytes())
    return (json.dumps(written | {"revision": revision}, indent=1) + "\n").encode()


def _adapter_card(config: YarnTuneConfig, named: str, revision: str | None) -> str:
    """The card of an adapter, with the code that loads it on the revision of its base."""
    header = {
        "base_model": named,
        **revision_key(revision),
        "library_name": "peft",
        **licence_from(_base_folder(str(config.base_model_name_or_path), config.revision)),
        "tags": ["yarn_tune"],
    }
    pinned = f', revision="{revision}"' if revision else ""
    wrapped = any(map(inside_wrapper, config.target_modules or ()))
    auto = "AutoModelForImageTextToText" if wrapped else "AutoModelForCausalLM"
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# RoPE adapter of {named}\n\n"
        f"A window of {config.window} tokens for {named}{at_revision(revision)}, whose weights stay as they are. "
        "Learned with yarn_tune, which has to be installed to load it:\n\n"
        "    import yarn_tune.adapter\n    from peft import PeftModel\n"
        f"    from transformers import {auto}\n"
        f'    base = {auto}.from_pretrained("{named}"{pinned})\n'
        '    model = PeftModel.from_pretrained(base, "ORG/THIS-REPOSITORY")\n\n'
        "To serve it, merge it into an ordinary checkpoint: `yarn-tune export THIS-FOLDER`.\n"
    )


def _base_folder(written: str, revision: str | None) -> Path:
    """The local folder with the base's card, if there is one; nothing is downloaded."""
    if not is_hub_id(written):
        return Path(written)
    card = try_to_load_from_cache(written, CARD, revision=revision)
    return Path(card).parent if isinstance(card, str) else Path(written)


def _renamed(folder: Path, written: str, base: str | None) -> dict[str, Path | bytes]:
    """All files of a folder; local paths of the base in texts are replaced by its name on the hub."""
    if not is_hub_id(written) and base is None:
        raise UserError(
            f"{folder}: the base is named by a path, {written!r}; give its name on the hub with --base ORG/NAME"
        )
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        if leaves_folder(path, folder):
            raise UserError(f"{path} is a link to {os.path.realpath(path)}, outside of the folder to upload; remove it")
        name = path.relative_to(folder).as_posix()
        files[name] = path
        if base is not None and path.suffix in TEXTS and path.name != "tokenizer.json":
            content = path.read_bytes()
            if written.encode() in content:
                files[name] = content.replace(written.encode(), base.encode())
    return files


def upload(made: Upload, private: bool, message: str) -> str:
    """Create the repository if there is none, and commit everything at once; returns the commit's address.

    Raises:
        UserError: if the hub refuses or is not reached, with the hub's message.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=f) for name, f in made.files.items()]
    try:
        api.create_repo(made.repo, private=private, exist_ok=True)
        return str(api.create_commit(made.repo, operations, commit_message=message).commit_url)
    except (OSError, ValueError, HTTP_ERROR) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{made.repo}: not uploaded: {' '.join(line.strip() for line in reason if line.strip())}. Log in with "
            "`hf auth login` or set HF_TOKEN; nothing of a commit that fails is kept"
        ) from error
