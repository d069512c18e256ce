"""Export a finished run as an ordinary Hugging Face checkpoint, which is reloaded and compared before it is renamed.

The base's weight files are copied byte for byte, unless a requested stack needs values folded into the query weights;
otherwise only config.json and the tokenizer's window change. The checkpoint is written under another name, reloaded
with stock classes, compared with the tuned model in memory below, at and above the native window, and then renamed. If
a comparison fails, nothing is left, and an earlier export stays.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import (
    CHECKSUMS,
    file_digest,
    locked,
    partial_of,
    put_in_place,
    read_json,
    unreadable,
    unwritable,
    write_atomically,
    write_checked,
    write_json,
)
from ..models import BaseModel
from ..runs import AdapterRun, Run, check_worth_serving, learned_of
from ..serving import RopeEncoding, Target, choose_encoding
from ..tunable import KINDS, Folded, Learned, config_changes, fold_checkpoint, merge_checkpoint
from .base_files import copy_base
from .fidelity import FIDELITY, Comparison, compare_with_memory
from .model_card import write_card
from .rounding import rounding_cost
from .serving_page import serving_page

FOREIGN = ("auto_map", "attn_implementation", "_attn_implementation")
"""Keys of a config that name the base's own code, which is not copied, or kernels to download."""
OVERRIDABLE = ("vllm", "vllm-0.29")


def export(run: Run | AdapterRun, anyway: bool = False, out: Path | None = None) -> Path:
    """Write the checkpoint of a finished run, with its pages; returns its folder.

    Args:
        run: the run.
        anyway: also export a run whose decision (`train.decide`) was for search-free YaRN.
        out: the folder to write, for runs and adapters in read-only places; None: `export` in the run folder.

    Raises:
        UserError: if nothing that was learned is better than search-free YaRN; if no config serves what was learned on
            all requested stacks; if another process writes there; or if `out` holds anything but an earlier export.
        CheckFailed: if the reloaded checkpoint does not compute what was learned.
    """
    if not anyway and isinstance(run, Run):
        check_worth_serving(run)
    final = run.folder / "export" if out is None else _writable(out)
    with locked(run.folder) if out is None else locked(final.parent, final.name):
        learned = learned_of(run)
        target = Target.of_model(run.base, run.sections.export, run.sections.rope)
        served = choose_encoding(learned, target)
        partial = partial_of(final)
        try:
            partial.mkdir(parents=True)
            folded = write_checkpoint(run.base, learned, served, target, partial)
            compared = Comparison(run.base, learned, served, partial, run.sections.export.tolerance)
            fidelity = replace(compare_with_memory(compared), fold=folded)
            if isinstance(run, Run) and served.folds(learned):
                fidelity = replace(fidelity, rounding_cost=rounding_cost(run, compared))
            write_checked(partial / FIDELITY, fidelity.as_json())
            page = serving_page(run.sections.base.model, learned, served, target, fidelity)
            write_atomically(partial / "SERVING.md", page.encode())
            write_card(run, learned, fidelity, run.base.folder(), partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {path.relative_to(partial).as_posix(): file_digest(path) for path in files}
            write_checked(partial / CHECKSUMS, {"files": digests, "base": run.sections.base.model})
            put_in_place(partial, final)
        except OSError as error:
            raise unwritable(final, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _writable(out: Path) -> Path:
    """The absolute path of a folder to export into; raises `UserError` if that would replace something else."""
    path = Path(os.path.abspath(out))
    if path.exists() and not (path / FIDELITY).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"--out: {out} exists and is no export of yarn_tune; name a folder that does not exist")
    return path


def export_overrides(run: Run | AdapterRun, anyway: bool = False, out: Path | None = None) -> Path:
    """Write overrides.json: what vLLM's --hf-overrides needs to serve the base as tuned, without a checkpoint.

    It is written into `out`, by default into the run folder.

    Raises:
        UserError: if what was learned is in the weights, or vLLM does not read it from a config; or as `export`.
    """
    if not anyway and isinstance(run, Run):
        check_worth_serving(run)
    folder = out or run.folder
    with locked(folder):
        learned = learned_of(run)
        for name in [*(fold.kind for fold in learned.folds), *(["lora"] if learned.lora else [])]:
            raise UserError(
                f"{KINDS[name].key}: {KINDS[name].label} are in the weights, which overrides of the base's config do "
                "not change; export a checkpoint"
            )
        target = Target.of_model(run.base, run.sections.export, run.sections.rope)
        # Only vLLM has overrides, so the other stacks need not be able to read the values.
        vllm = tuple(name for name in target.stacks if name.startswith("vllm")) or OVERRIDABLE
        path = folder / "overrides.json"
        served = choose_encoding(learned, replace(target, stacks=vllm, fold="never"))
        write_json(path, served.overrides(target.base))
    return path


def write_checkpoint(
    base: BaseModel, learned: Learned, served: RopeEncoding, target: Target, folder: Path
) -> Folded | None:
    """Copy the base, put the learned rope section into its config, and fold what the config does not carry.

    Returns what was folded into the weights; None if nothing was.
    """
    copy_base(base, folder)
    _lift_generation_limits(folder / "generation_config.json", served.max_position_embeddings)
    config = served.config(target.base | config_changes(learned.folds))
    written = {key: value for key, value in config.items() if key not in FOREIGN}
    write_json(folder / "config.json", _without_limits(written, served.max_position_embeddings))
    folds = served.folds(learned)
    if learned.lora is not None:
        merge_checkpoint(folder, target.base, learned.lora)
    elif not folds:
        write_json(folder / "overrides.json", served.overrides(target.base))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        remedy = "it is the base's: repair it there, and run the same command again"
        tokenizer = read_json(settings, remedy)
        if not isinstance(tokenizer, dict):
            raise unreadable(settings, TypeError("it is not an object"), remedy)
        write_json(settings, tokenizer | {"model_max_length": served.max_position_embeddings})
    return fold_checkpoint(folder, target.base, served.fold, learned.folds) if folds else None


def _lift_generation_limits(path: Path, window: int) -> None:
    """Remove the base's limits on generated lengths where the export's window is longer.

    A `max_length` of the base's own window would make `generate` refuse any longer prompt.
    """
    if not path.is_file():
        return
    try:
        settings = read_json(path, "it is left out of the export")
        if not isinstance(settings, dict):
            raise unreadable(path, TypeError("it is not an object"), "it is left out of the export")
    except UserError as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        path.unlink()
        return
    write_json(path, _without_limits(settings, window))


def _without_limits(settings: dict[str, Any], window: int) -> dict[str, Any]:
    """Settings without a `max_length` or `max_new_tokens` below the window; other values stay."""
    limits = ("max_length", "max_new_tokens")
    return {key: value for key, value in settings.items() if key not in limits or not value or value >= window}
