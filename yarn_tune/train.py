"""The loop: a few learned numbers, a frozen model, a few hundred steps. Read it from top to bottom.

A step reads `batch_rows` rows (the same whatever the number of processes), sums nats over micro-batches, clips,
and moves the numbers. The rate and the rows of a step are functions of the step's number, so a run continued
from a checkpoint ends with the same values, bit for bit, as one that was never interrupted.
"""

import hashlib
import math
import signal
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import save
from tqdm import tqdm
from transformers import PreTrainedModel

from .adapter import place_of
from .adapter_files import write_adapter
from .batches import Batch, backward
from .checkpoint import (
    LEARNED,
    State,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_state,
    write_atomically,
    write_json,
)
from .data import RowSet, build_rows
from .earlier import earlier_of
from .errors import CheckFailed, Interrupted, UserError
from .heldout import check_heldout
from .interrupts import Request, requested
from .learned import Learned
from .lessons import Lesson, Objective
from .longrows import checkpoint_layers, offload_inputs, tile_mlps
from .metrics import EARLIER, MetricsLog, end_training, progress_text
from .models import load_model, load_tokenizer, switch_off_dropout
from .needles import plant
from .recipe import load_recipe
from .runtime import World, company, start
from .sections import Recipe
from .serving.profiles import Target, settle
from .sharding import check_weights, loading, spread, world_text
from .tunable import TunableRotary, at_start, attach

RERUN_FREELY = ("eval", "export", "runtime")
"""Recipe sections that may change between the parts of an interrupted run."""


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    recipe: Recipe
    folder: Path

    @property
    def recipe_path(self) -> Path:
        """The recipe as run."""
        return self.folder / "recipe.yaml"

    @property
    def numbers_path(self) -> Path:
        """Where the learned offsets are, once training is done."""
        return self.folder / LEARNED

    @property
    def checkpoints(self) -> Path:
        """Folder of the saved states."""
        return self.folder / "checkpoints"


def train(run: Run) -> Learned:
    """Learn the recipe's numbers, from the start or from the last checkpoint.

    Raises:
        UserError: if the recipe, the base or the documents do not allow it.
        CheckFailed: if the loss became NaN or infinite, or another process died; the last good state is kept.
        Interrupted: if SIGTERM or SIGINT asked for a stop; the state after the last step is kept.
    """
    recipe = run.recipe
    # What cannot be served is refused before anything is learned.
    begin, target = at_start(recipe), Target.of_recipe(recipe)
    settle(begin.learned(), target)
    if latest_state(run.checkpoints) is None:
        earlier_of(recipe)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    check_heldout(recipe, tokenizer, begin.start.native)
    rows = plant(build_rows(recipe, tokenizer), recipe, tokenizer)
    world = start(recipe, run.folder)
    with company(world, run.folder), claimed(run, world):
        model, rotary = prepare(recipe, world, begin)
        with requested() as request:
            fit(run, world, model, rotary, rows, request)
        learned = settle(rotary.learned(), target)
        if learned.scale is not None:
            rotary.set_scale(learned.scale)
        if world.main:
            write_learned(run, rotary, learned, place_of(model))
        end_training(world)
    return learned


def write_learned(run: Run, rotary: TunableRotary, learned: Learned, place: str) -> None:
    """What a run leaves when it is done: its numbers, the adapter for the rotary module at `place`, and a summary."""
    write_atomically(run.numbers_path, save(rotary.numbers()))
    write_adapter(run.folder / "adapter", run.recipe, rotary, place)
    write_json(run.folder / "learned.json", {"learn": learned.learn, "numbers": rotary.count(), **learned.summary()})


def prepare(recipe: Recipe, world: World, begin: TunableRotary) -> tuple[PreTrainedModel, TunableRotary]:
    """The frozen model, as the recipe wants it held in memory, and what is learned of it, at its start."""
    with loading(recipe, world):
        model = load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype)
    if not recipe.sharded():
        model.to(world.device)  # type: ignore[arg-type]
    check_weights(model, recipe.base.dtype)
    switch_off_dropout(model)
    rotary = attach(model, begin.start, begin.learn, begin.gains, recipe.lora).to(world.device)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model, recipe.train.keep_attention)
    if recipe.train.offload_activations:
        offload_inputs(model, world.device.type)
    if recipe.train.tiled_mlp is not None:
        tile_mlps(model, recipe.train.tiled_mlp)
    model.train()
    return model, rotary


def fit(run: Run, world: World, model: PreTrainedModel, rotary: TunableRotary, rows: RowSet, request: Request) -> None:
    """The steps themselves; `request` may ask to stop between two of them."""
    recipe, settings = run.recipe, run.recipe.train
    optimizer = make_optimizer(rotary, recipe)
    objective = Objective(model, rotary, Lesson.of(recipe, rotary.start.native, rows.bos))
    parameters = rotary.trainable()
    numbers = sum(parameter.numel() for parameter in parameters)
    done = resume(run, world, rotary, optimizer)
    if world.processes > 1:
        world.check_agreement(beginning(recipe, rotary, rows, done))
    log = MetricsLog(run.folder, recipe, world, done)
    bar = tqdm(total=settings.steps, initial=done, unit="step", disable=not world.main, file=sys.stderr)

    with spread(objective, recipe, world) as release:
        if world.main:
            bar.write(world_text(recipe, world, model, numbers), file=sys.stderr)
        for step in range(done, settings.steps):
            begun = time.monotonic()
            set_rates(optimizer, recipe, step)

            aim, loss = backward(world, objective, Batch.of(recipe, rows, step), release)

            # One update, unless it would spoil what was learned.
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf).item()
            if not (math.isfinite(aim) and math.isfinite(loss) and math.isfinite(norm)):
                checkpoint_now(run, world, rotary, optimizer, step)
                raise CheckFailed(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}; the values after step {step} are kept. Look "
                    "at the documents of this step, or learn on from them under a lower train.learning_rate, with "
                    f"another name= and rope.init={run.checkpoints}/step-{step:06}"
                )
            optimizer.step()
            optimizer.zero_grad()

            # Tell, and save.
            seconds, learned = time.monotonic() - begun, rotary.sketch()
            tokens = settings.batch_rows * recipe.row_tokens()
            log.write(step + 1, loss, norm, tokens, seconds, learned)
            bar.set_postfix_str(progress_text(loss, learned, tokens / seconds))
            bar.update()
            asked = request.agreed(world.accelerator)
            if asked or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                checkpoint_now(run, world, rotary, optimizer, step + 1)
            if asked and step + 1 < settings.steps:
                raise Interrupted(
                    asked,
                    f"stopped by {signal.Signals(asked).name} after step {step + 1} of {settings.steps}, which is "
                    "saved; the same command continues from there",
                )

    bar.close()


def beginning(recipe: Recipe, rotary: TunableRotary, rows: RowSet, done: int) -> dict[str, object]:
    """What all processes must start from alike; of what is long, a digest."""
    tokens = hashlib.sha256()
    for row in rows.rows:
        tokens.update(array("q", row.input_ids))
    return {
        "recipe": recipe.to_dict(),
        "learned values": hashlib.sha256(save(rotary.numbers())).hexdigest(),
        "checkpoint": done,
        "rows": tokens.hexdigest(),
    }


def make_optimizer(rotary: TunableRotary, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the learned offsets; weight decay pulls them to zero, which is search-free YaRN."""
    decays = recipe.train.decays()
    groups = [
        {"params": members, "name": kind, "weight_decay": getattr(decays, kind)}
        for kind, members in rotary.parameter_groups().items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then a cosine down to a tenth."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1.0, steps - rising)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Give each kind of number its rate for this step."""
    share = rate_share(step, recipe.train.steps, recipe.train.warmup)
    rates = recipe.train.rates(recipe.rope.temperature)
    for group in optimizer.param_groups:
        group["lr"] = share * getattr(rates, group["name"])


@contextmanager
def claimed(run: Run, world: World) -> Iterator[None]:
    """The run folder, with the recipe in it, while this start of the command is at work there.

    No other start may write into it meanwhile; a killed one leaves it free.

    Raises:
        UserError: if another is at work there, or the folder holds a run with other values.
    """
    if not world.main:
        check_folder(run)
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{run.folder}: another process is learning there; wait for it, or give this run a name="
        ) from error
    try:
        claim_folder(run)
        yield
    finally:
        lock.release()


def claim_folder(run: Run) -> None:
    """Write the recipe into the run folder; raises as `check_folder` does."""
    check_folder(run)
    write_atomically(run.recipe_path, yaml.safe_dump(run.recipe.to_dict(), sort_keys=False).encode())


def check_folder(run: Run) -> None:
    """See that the folder is this very run's, if anything was learned in it.

    Raises:
        UserError: if it holds a run with other values.
    """
    if not (run.numbers_path.is_file() or any(run.checkpoints.glob("*"))):
        return
    changed = changes(run, [section for section in run.recipe.to_dict() if section not in RERUN_FREELY])
    if changed:
        raise UserError(
            f"{run.folder} holds a run with other values; give this one another name (name=...) or delete "
            "the folder:\n  " + "\n  ".join(changed)
        )


def changes(run: Run, sections: Sequence[str], begins: bool = True) -> list[str]:
    """In which of these sections the recipe is another than the one in the folder; "section: before -> now".

    Where the run has ended, it may no longer matter from what it `begins` (`rope.init`).
    """
    if not run.recipe_path.is_file():
        return []
    # Read as a recipe, so that settings which are newer than the run have their defaults.
    before, now = load_recipe(run.recipe_path).to_dict(), run.recipe.to_dict()
    if not begins:
        now["rope"]["init"] = before["rope"]["init"]
    return [f"{each}: {before[each]} -> {now[each]}" for each in sections if before[each] != now[each]]


def resume(run: Run, world: World, rotary: TunableRotary, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint, or else what an earlier run learned; the number of steps done."""
    state = latest_state(run.checkpoints)
    if state is None:
        if (earlier := earlier_of(run.recipe)) is not None:
            rotary.load_numbers(earlier.numbers)
            if world.main:
                earlier.note(run.folder)
        elif world.main:  # of a start under other settings, which ended before its first checkpoint
            (run.folder / EARLIER).unlink(missing_ok=True)
        return 0
    rotary.load_numbers(state.numbers)
    load_optimizer_tensors(optimizer, state.optimizer)
    return state.step


def checkpoint_now(run: Run, world: World, rotary: TunableRotary, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the state after `step` steps, in one process."""
    if world.main:
        state = State(step, rotary.numbers(), optimizer_tensors(optimizer))
        save_state(run.checkpoints, state, run.recipe.train.keep_checkpoints)
