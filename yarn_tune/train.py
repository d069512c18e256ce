"""The loop: a few learned numbers, a frozen model, a few hundred steps. Read it from top to bottom.

A step reads `batch_rows` rows (the same whatever the number of processes), sums nats over micro-batches, clips,
and moves the numbers. The rate and the rows of a step are functions of the step's number, so a run continued
from a checkpoint ends with the same values, bit for bit, as one that was never interrupted.
"""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save
from tqdm import tqdm
from transformers import PreTrainedModel

from .adapter import place_of
from .adapter_files import write_adapter
from .batches import Batch, backward, forward_only
from .checkpoint import (
    State,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    save_state,
    write_atomically,
    write_json,
)
from .data import RowSet, build_rows
from .errors import CheckFailed, Interrupted, UserError
from .estimate import estimate_gradient
from .families import load_model, load_tokenizer, switch_off_dropout
from .interrupts import Request, requested
from .learned import Learned
from .lessons import Lesson, Objective
from .needles import plant
from .runtime import environment, start
from .sections import Recipe
from .serving.profiles import Target, settle
from .tunable import TunableRotary, at_start, attach

RERUN_FREELY = ("eval", "export", "runtime")
"""Recipe sections that may change between the parts of an interrupted run."""


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe."""

    recipe: Recipe
    folder: Path

    @property
    def numbers_path(self) -> Path:
        """Where the learned offsets are, once training is done."""
        return self.folder / "learned.safetensors"


def train(run: Run) -> Learned:
    """Learn the recipe's numbers, from the start or from the last checkpoint.

    Raises:
        UserError: if the recipe, the base or the documents do not allow it.
        CheckFailed: if the loss became NaN or infinite; the last good state is kept.
        Interrupted: if SIGTERM or SIGINT asked for a stop; the state after the last step is kept.
    """
    recipe = run.recipe
    # What cannot be served is refused before anything is learned.
    begin, target = at_start(recipe), Target.of_recipe(recipe)
    settle(begin.learned(), target)
    tokenizer = load_tokenizer(recipe.base.model, recipe.base.revision)
    rows = plant(build_rows(recipe, tokenizer), recipe, tokenizer)
    accelerator = start(recipe, run.folder)
    claim_folder(run)

    model = load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype).to(accelerator.device)
    switch_off_dropout(model)
    rotary = attach(model, begin.start, begin.learn, begin.gains, recipe.lora)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model)
    model.train()

    with requested() as request:
        fit(run, accelerator, model, rotary, rows, request)
    learned = settle(rotary.learned(), target)
    if learned.scale is not None:
        rotary.set_scale(learned.scale)
    if accelerator.is_main_process:
        write_atomically(run.numbers_path, save(rotary.numbers()))
        write_adapter(run.folder / "adapter", recipe, rotary, place_of(model))
        write_json(
            run.folder / "learned.json", {"learn": learned.learn, "numbers": rotary.count(), **learned.summary()}
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return learned


def fit(
    run: Run, accelerator: Accelerator, model: PreTrainedModel, rotary: TunableRotary, rows: RowSet, request: Request
) -> None:
    """The steps themselves; `request` may ask to stop between two of them."""
    recipe, settings = run.recipe, run.recipe.train
    optimizer = make_optimizer(rotary, recipe)
    lesson = Lesson.of(recipe, rotary.start.native)
    objective, optimizer = accelerator.prepare(Objective(model, rotary, lesson), optimizer)
    parameters = rotary.trainable()
    done = resume(run, rotary, optimizer)
    log = MetricsLog(run, accelerator, done)
    bar = tqdm(
        total=settings.steps, initial=done, unit="step", disable=not accelerator.is_main_process, file=sys.stderr
    )

    for step in range(done, settings.steps):
        begun = time.monotonic()
        set_rates(optimizer, recipe, step)

        # A gradient, from a backward pass or from forward passes alone.
        batch = Batch.of(recipe, rows, step)
        if settings.gradient == "backprop":
            aim, loss = backward(accelerator, objective, batch)
        else:
            read = partial(forward_only, accelerator, objective, batch)
            estimate_gradient(parameters, read, settings.probes, settings.seed, step)
            aim, loss = read()

        # One update, unless it would spoil what was learned.
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf).item()
        if not (math.isfinite(aim) and math.isfinite(loss) and math.isfinite(norm)):
            checkpoint_now(run, accelerator, rotary, optimizer, step)
            raise CheckFailed(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; the values after step {step} are kept in "
                f"{run.folder / 'checkpoints'}. Lower train.learning_rate, or look at the documents of this step"
            )
        optimizer.step()
        optimizer.zero_grad()

        # Tell, and save.
        seconds, learned = time.monotonic() - begun, rotary.sketch()
        tokens = settings.batch_rows * recipe.row_tokens()
        log.write(step + 1, loss, norm, tokens, seconds, learned)
        bar.set_postfix_str(progress_text(loss, learned, tokens / seconds))
        bar.update()
        asked = request.agreed(accelerator)
        if asked or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            checkpoint_now(run, accelerator, rotary, optimizer, step + 1)
        if asked and step + 1 < settings.steps:
            raise Interrupted(
                asked,
                f"stopped by {signal.Signals(asked).name} after step {step + 1} of {settings.steps}, which is saved; "
                "the same command continues from there",
            )

    bar.close()


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


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Non-reentrant gradient checkpointing; the switch has a new name in newer releases of transformers."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def claim_folder(run: Run) -> None:
    """Write the recipe into the run folder, or check that the folder is this very run's, if anything was learned in it.

    Raises:
        UserError: if the folder holds a run with other values.
    """
    path = run.folder / "recipe.yaml"
    now = run.recipe.to_dict()
    learned = run.numbers_path.is_file() or any((run.folder / "checkpoints").glob("*"))
    if learned and path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = [
            f"{section}: {before.get(section)} -> {now[section]}"
            for section in now
            if section not in RERUN_FREELY and before.get(section) != now[section]
        ]
        if changed:
            raise UserError(
                f"{run.folder} holds a run with other values; give this one another name (name=...) or delete "
                "the folder:\n  " + "\n  ".join(changed)
            )
    write_atomically(path, yaml.safe_dump(now, sort_keys=False).encode())


def resume(run: Run, rotary: TunableRotary, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint; the number of steps done."""
    state = latest_state(run.folder / "checkpoints")
    if state is None:
        return 0
    rotary.load_numbers(state.numbers)
    load_optimizer_tensors(optimizer, state.optimizer)
    return state.step


def checkpoint_now(
    run: Run, accelerator: Accelerator, rotary: TunableRotary, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Save the state after `step` steps, in one process."""
    if accelerator.is_main_process:
        state = State(step, rotary.numbers(), optimizer_tensors(optimizer))
        save_state(run.folder / "checkpoints", state, run.recipe.train.keep_checkpoints)


def progress_text(loss: float, learned: Learned, speed: float) -> str:
    """Loss, learned values and tokens per second, for the progress bar."""
    values = " ".join(f"{name} {value:.4g}" for name, value in learned.summary().items())
    return f"loss {loss:.4f} {values} {speed:.0f} tok/s"


class MetricsLog:
    """`metrics.jsonl` (one object a step) and the trackers."""

    def __init__(self, run: Run, accelerator: Accelerator, done: int) -> None:
        self.accelerator = accelerator
        self.path = run.folder / "metrics.jsonl"
        if not accelerator.is_main_process:
            return
        # Steps after the checkpoint will be done again, so their lines go.
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines[:done] if line.endswith("}}")]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())
        write_json(run.folder / "environment.json", environment(accelerator))
        accelerator.init_trackers("yarn_tune", config=_flat(run.recipe.to_dict()))

    def write(self, step: int, loss: float, norm: float, tokens: int, seconds: float, learned: Learned) -> None:
        """Log one step."""
        values = {"loss": loss, "gradient_norm": norm, "tokens": tokens, "seconds": round(seconds, 3)}
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values, "learned": learned.summary()}) + "\n")
        self.accelerator.log({**values, **learned.summary()}, step=step)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested values under dotted keys, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat
