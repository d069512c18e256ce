"""The commands about a checkpoint that exists: check it, upload it.

Packages are imported inside the functions, after the arguments are checked, so that a user error needs no import of
torch.
"""

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .arguments import check_model, check_revision, stacks_of
from .result import CommandResult
from .terminal import verification_summary


def verify_command(options: argparse.Namespace) -> CommandResult:
    """Check what each stack computes from a config; a mismatch is exit code 3."""
    check_model("CHECKPOINT", options.checkpoint)
    check_revision(options.checkpoint, options.revision)
    stacks = stacks_of(options.stacks, every=True) if options.stacks else None
    overrides = overrides_of(options.hf_overrides)
    if options.revision and options.engine:
        raise UserError("--engine: the engine loads no revision; download it, and name its folder without --revision")
    if overrides is not None and options.engine:
        raise UserError("--engine: the engine is run on the checkpoint as it is; leave --hf-overrides out")

    from ..engines import TOLERANCE, compare_with_transformers
    from ..serving import verify

    made = verify(options.checkpoint, stacks, overrides, options.revision)
    text = made.text() if options.all else verification_summary(made)
    passed = made.passed
    value: dict[str, Any] = asdict(made) | {"passed": passed}
    if options.engine:
        found = compare_with_transformers(options.checkpoint, options.engine_python)
        passed = passed and found.worst <= TOLERANCE
        lengths = ", ".join(f"{d:.1e} at {n} tokens" for n, d in found.differences.items())
        text += f"\n\nvLLM itself (window {found.max_model_len}), log-probabilities against transformers: {lengths}"
        value |= {"passed": passed, "vllm": asdict(found)}
    serve = f"vllm serve {options.checkpoint} --max-model-len {made.lines[0].window}"
    if overrides is not None:
        serve += f" --hf-overrides {shlex.quote(options.hf_overrides)}"
    return CommandResult(text, value, serve if passed else "", passed)


def overrides_of(text: str | None) -> dict[str, Any] | None:
    """The JSON object behind --hf-overrides; None without that flag."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--hf-overrides: {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'--hf-overrides: {text!r} is not a JSON object, such as {{"rope_parameters": {{...}}}}')
    return value


def push_command(options: argparse.Namespace) -> CommandResult:
    """List what would be uploaded, or upload it."""
    from ..export import prepare_upload, upload

    made = prepare_upload(Path(options.source), options.repo, options.base, options.adapter, options.revision)
    value = {"repo": made.repo, "what": made.what, "files": made.sizes(), "commit": None}
    if not options.upload:
        return CommandResult(f"{made.text()}\nNothing was uploaded.", value, "the same command with --upload")
    address = upload(made, options.private, options.message)
    return CommandResult(f"{made.text()}\n{address}", value | {"commit": address})
