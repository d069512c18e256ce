"""The learned parameters of a finished run: written at its end, and read back for comparison and export."""

from dataclasses import dataclass

from ..adapter import adapter_numbers, is_adapter, read_sections, write_adapter
from ..errors import UserError
from ..files import read_checked, read_tensors, save_tensors, write_atomically, write_checked
from ..serving import Target, representable_parameters
from ..tunable import Learned, TunableRotary, at_start
from .folder import RERUN_FREELY, AdapterRun, Run, changes
from .metrics import LOST, SUMMARY, spent

BASE = "base"
"""Key of the summary: digests of the base's files when the run ended."""

MEANING = ("rope", "lora")
"""Sections that determine what the learned numbers are offsets from."""


def learned_of(run: Run | AdapterRun) -> Learned:
    """The learned parameters of a finished run (or of an adapter), adjusted to what a config can carry.

    Raises:
        UserError: if the run is not finished, or its parameters are damaged, or belong to another base or recipe.
    """
    rotary = at_start(run.base, run.sections.rope)
    if isinstance(run, Run):
        changed = changes(run, MEANING, begins=False)
    else:
        changed = [] if read_sections(run.folder).rope == run.sections.rope else ["rope"]
    if changed:
        raise UserError(
            f"{run.folder}: its parameters were learned with other settings, and mean something else with these; leave "
            "the settings as they were, or train anew under another name=:\n  " + "\n  ".join(changed)
        )
    if isinstance(run, AdapterRun):
        rotary.load_numbers(adapter_numbers(run.folder, rotary))
    elif run.numbers_path.is_file():
        _check_base(run)
        rotary.load_numbers(read_tensors(run.numbers_path))
    else:
        raise UserError(f"{run.folder}: holds no finished run; run `yarn-tune train` to the end first")
    return representable_parameters(rotary, Target.of_model(run.base, run.sections.export, run.sections.rope))


def _check_base(run: Run) -> None:
    """Check that the base is the one the run was trained on; raises `UserError` if its weights or config changed."""
    if not (run.folder / SUMMARY).is_file():
        return
    trained: dict[str, str] = read_checked(run.folder / SUMMARY, LOST).get(BASE, {})
    changed = [name for name, digest in run.base.digests.items() if trained.get(name, digest) != digest]
    if changed := [name for name in changed if not name.startswith("tokenizer")]:
        raise UserError(
            f"{run.folder}: the {' and the '.join(changed)} changed since this run was trained on "
            f"{run.base.source.model}; its parameters belong to the base as it was. Put that back, or train anew under "
            "another name="
        )


def is_complete(run: Run) -> bool:
    """Whether a run is finished and all that its training writes is there, under the same free settings."""
    kept = run.numbers_path.is_file() and (run.folder / SUMMARY).is_file() and is_adapter(run.folder / "adapter")
    return kept and run.recipe_path.is_file() and not changes(run, RERUN_FREELY)


def write_learned(run: Run, rotary: TunableRotary, learned: Learned, place: str) -> None:
    """Write the results of a finished run: learned parameters, PEFT adapter, JSON summary.

    Args:
        run: the run whose folder is written; the caller holds its lock.
        rotary: the module with the learned parameters.
        learned: the learned parameters in natural units.
        place: dotted name of the base's rotary module.
    """
    write_adapter(run.folder / "adapter", run.recipe, rotary, place)
    steps = run.recipe.train.steps
    summary = {"frequencies": learned.frequencies, "numbers": rotary.count(), "steps": steps, **learned.summary()}
    write_checked(run.folder / SUMMARY, summary | {BASE: run.base.digests})
    # Written last: this file marks the run as finished.
    write_atomically(run.numbers_path, save_tensors(rotary.numbers()))


@dataclass(frozen=True)
class TunedRow:
    """Learned parameters, and what they cost."""

    learned: Learned
    tokens: int
    """Tokens read in training."""
    seconds: float


def tuned_row(run: Run) -> TunedRow:
    """The learned parameters of a finished run, and what they cost.

    Raises:
        UserError: if the run is not finished, or its record is damaged.
    """
    learned = learned_of(run)
    _, tokens, seconds = spent(run.folder)
    return TunedRow(learned, tokens, seconds)
