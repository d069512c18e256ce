"""The loop: a few learned numbers, a frozen model, a few hundred steps. Read it from top to bottom.

A step reads `batch_size` rows (the same whatever the number of processes), sums nats over micro-batches, clips,
and moves the numbers. The rate and the rows of a step are functions of the step's number, so a run continued
from a checkpoint ends with the same values, bit for bit, as one that was never interrupted.
"""

import hashlib
import math
import signal
import sys
import time
from array import array

import torch
from safetensors.torch import save
from tqdm import tqdm
from transformers import PreTrainedModel

from ..adapter import place_of
from ..data import RowRequest, RowSet, build_rows, check_heldout, plant_needles
from ..distributed import (
    Request,
    Sharding,
    World,
    check_weights,
    checkpoint_layers,
    loading,
    offload_inputs,
    report_lost_peers,
    spread,
    start,
    stop_on_signal,
    tile_mlps,
    world_text,
)
from ..errors import CheckFailed, Interrupted
from ..models import load_model, switch_off_dropout
from ..recipe import Recipe
from ..runs import (
    EARLIER,
    MetricsLog,
    Run,
    State,
    claimed,
    end_training,
    latest_state,
    load_optimizer_tensors,
    optimizer_tensors,
    previous_run,
    progress_text,
    save_state,
    write_learned,
)
from ..serving import Target, make_representable
from ..tunable import Learned, TunableRotary, at_start, attach
from .batches import Batch, backward
from .objective import Objective, ObjectiveConfig
from .optimizer import make_optimizer, set_rates


def train(run: Run) -> Learned:
    """Learn the recipe's numbers, from the start or from the last checkpoint.

    Raises:
        UserError: if the recipe, the base or the documents do not allow it.
        CheckFailed: if the loss became NaN or infinite, or another process died; the last good state is kept.
        Interrupted: if SIGTERM or SIGINT asked for a stop; the state after the last step is kept.
    """
    recipe = run.recipe
    # What cannot be served is refused before anything is learned.
    begin, target = at_start(run.base, recipe.rope), Target.of_model(run.base, recipe.export)
    make_representable(begin.learned(), target)
    if latest_state(run.checkpoints) is None:
        previous_run(recipe)
    check_heldout(recipe.data, recipe.eval, run.base, begin.start.native, recipe.rope.window)
    train = recipe.train
    rows = build_rows(recipe.data, run.base, RowRequest(recipe.row_tokens(), recipe.rows(), train.seed))
    rows = plant_needles(rows, recipe.data, run.base, train.seed)
    world = start(recipe.runtime, train.seed, train.batch_size, train.micro_batch_size, run.folder)
    with report_lost_peers(world, run.folder), claimed(run, world):
        model, rotary = prepare(recipe, world, begin)
        with stop_on_signal() as request:
            fit(run, world, model, rotary, rows, request)
        learned = make_representable(rotary.learned(), target)
        if learned.scale is not None:
            rotary.set_scale(learned.scale)
        if world.main:
            write_learned(run, rotary, learned, place_of(model))
        end_training(world)
    return learned


def prepare(recipe: Recipe, world: World, begin: TunableRotary) -> tuple[PreTrainedModel, TunableRotary]:
    """The frozen model, as the recipe wants it held in memory, and what is learned of it, at its start."""
    with loading(sharding_of(recipe), world):
        model = load_model(recipe.base.model, recipe.base.revision, recipe.base.dtype)
    if not sharding_of(recipe).sharded:
        model.to(world.device)  # type: ignore[arg-type]
    check_weights(model, recipe.base.dtype)
    switch_off_dropout(model)
    rotary = attach(model, begin.start, begin.frequencies, begin.adjustments, recipe.lora).to(world.device)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model, recipe.train.keep_attention)
    if recipe.train.offload_activations:
        offload_inputs(model, world.device.type)
    if recipe.train.tiled_mlp is not None:
        tile_mlps(model, recipe.train.tiled_mlp)
    model.train()
    return model, rotary


def sharding_of(recipe: Recipe) -> Sharding:
    """How the recipe distributes the frozen weights and the rows."""
    return Sharding(recipe.runtime, recipe.base.dtype, recipe.train.micro_batch_size)


def fit(run: Run, world: World, model: PreTrainedModel, rotary: TunableRotary, rows: RowSet, request: Request) -> None:
    """The steps themselves; `request` may ask to stop between two of them."""
    recipe, settings = run.recipe, run.recipe.train
    optimizer = make_optimizer(rotary, settings)
    objective = Objective(model, rotary, ObjectiveConfig.of(recipe, rotary.start.native, rows.prefix))
    parameters, sharding = rotary.trainable(), sharding_of(recipe)
    numbers = sum(parameter.numel() for parameter in parameters)
    done = resume(run, world, rotary, optimizer)
    if world.processes > 1:
        world.check_agreement(beginning(recipe, rotary, rows, done))
    log = MetricsLog(run.folder, recipe, world, done)
    bar = tqdm(total=settings.steps, initial=done, unit="step", disable=not world.main, file=sys.stderr)

    with spread(objective, model, parameters, sharding, world) as release:
        if world.main:
            bar.write(world_text(sharding, world, model, settings.batch_size, settings.clip, numbers), file=sys.stderr)
        for step in range(done, settings.steps):
            begun = time.monotonic()
            set_rates(optimizer, settings, recipe.rope, step)

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
            tokens = settings.batch_size * recipe.row_tokens()
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


def resume(run: Run, world: World, rotary: TunableRotary, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint, or else what an earlier run learned; the number of steps done."""
    state = latest_state(run.checkpoints)
    if state is None:
        if (earlier := previous_run(run.recipe)) is not None:
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
