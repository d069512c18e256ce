"""The training loop: a few learned numbers, a frozen model, a few hundred steps.

A step reads `batch_size` rows (the same for any number of processes), sums the loss over micro-batches, clips the
gradient and updates the numbers. The rates and the rows of a step are functions of the step's number, so a run that is
resumed from a checkpoint ends with the same values, bit for bit, as one that was never interrupted.
"""

import math
import signal
import sys
import time

import torch

from ..adapter import place_of
from ..data import RowSet, check_heldout
from ..distributed import Request, World, report_lost_peers, spread, start, stop_on_signal, world_text
from ..errors import CheckFailed, Interrupted
from ..runs import (
    Decision,
    MetricsLog,
    Run,
    claimed,
    end_training,
    is_complete,
    latest_state,
    learned_of,
    previous_run,
    write_decision,
    write_learned,
)
from ..serving import Target, check_mergeable, make_representable
from ..tunable import Learned, TunableRotary, at_start
from .batches import Batch, backward, measure_scales, read_rows
from .decision import States, decide
from .objective import Objective, ObjectiveConfig
from .optimizer import make_optimizer, set_rates
from .preparation import prepare, sharding_of
from .resuming import Progress, check_finished, facts_to_agree_on


def train(run: Run) -> Learned:
    """Learn the numbers that the recipe names, from the start or from the last checkpoint.

    Of a finished run, the numbers are read and nothing is trained.

    Raises:
        UserError: if the recipe, the base or the documents do not allow it.
        CheckFailed: if the loss became NaN or infinite, or another process died; the last good state is kept.
        Interrupted: if the run was stopped by SIGTERM or SIGINT; the state after the last step is kept.
    """
    recipe, base, settings = run.recipe, run.base, run.recipe.train
    # Check before training that the result can be served and measured.
    begin, target = at_start(base, recipe.rope), Target.of_model(base, recipe.export, recipe.rope)
    make_representable(begin.learned(), target)
    check_mergeable(target.base, recipe.lora)
    if latest_state(run.checkpoints) is None:
        previous_run(recipe)
    check_heldout(recipe.data, recipe.eval, base, begin.start.native, recipe.rope.window)
    rows, validation = read_rows(recipe, base)
    if is_complete(run):
        check_finished(run, (rows, validation))
        return learned_of(run)

    world = start(recipe.runtime, settings.seed, settings.batch_size, settings.micro_batch_size, run.folder)
    with report_lost_peers(world, run.folder), claimed(run, world.main):
        model, rotary = prepare(recipe, base, world, begin)
        objective = Objective(model, rotary, ObjectiveConfig.of(settings, rotary.start.native, rows.prefix))
        with stop_on_signal() as request:
            decision = fit(run, world, objective, rows, validation, request)
        learned = _representable(rotary, target)
        if world.main:
            if decision is not None:
                write_decision(run, decision)
            write_learned(run, rotary, learned, place_of(model))
        end_training(world)
    return learned


def fit(
    run: Run, world: World, objective: Objective, rows: RowSet, validation: RowSet | None, request: Request
) -> Decision | None:
    """Run the remaining steps and save checkpoints; then decide which state is kept (`train.decide`).

    Args:
        run: the run, with its folder.
        world: the processes.
        objective: the loss, with the model and the learned numbers.
        rows: the training rows.
        validation: the rows of the decision; None: no decision.
        request: a signal to stop, which is checked after each step.

    Returns:
        The decision, after the chosen state was loaded; None without `validation`.

    Raises:
        CheckFailed: if the loss or its gradient became NaN or infinite.
        Interrupted: if the run was stopped by a signal; the state is saved.
    """
    recipe, settings, rotary = run.recipe, run.recipe.train, objective.rotary
    parameters, sharding = rotary.trainable(), sharding_of(recipe)
    optimizer = make_optimizer(rotary, settings)
    progress = Progress.of(run, world, rotary, optimizer, (rows, validation))
    done = progress.resume()
    if world.processes > 1:
        world.check_agreement(facts_to_agree_on(progress, done))
    log = MetricsLog(run.folder, recipe, world, done)
    request.announce = log.announce

    with spread(objective, objective.model, parameters, sharding, world) as release:
        if world.main:
            count = sum(parameter.numel() for parameter in parameters)
            text = world_text(sharding, world, objective.model, settings.batch_size, settings.clip, count)
            print(text, file=sys.stderr)
        if done == 0:
            measure_scales(world, objective, Batch.of(recipe, rows, 0), release)
        for step in range(done, settings.steps):
            started = time.monotonic()

            # Compute the gradient of the step's rows.
            set_rates(optimizer, settings, recipe.rope, step)
            loss, nll = backward(world, objective, Batch.of(recipe, rows, step), release)
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf).item()

            # Update the numbers, unless the loss or the gradient is not finite.
            if not all(map(math.isfinite, (loss, nll, norm))):
                progress.save(step)
                raise CheckFailed(_not_finite_text(run, step, nll, norm))
            optimizer.step()
            optimizer.zero_grad()

            # Record the step.
            seconds, learned = time.monotonic() - started, rotary.sketch()
            tokens = settings.batch_size * recipe.row_tokens()
            log.write(step + 1, nll, norm, tokens, seconds, learned)

            if validation is not None:
                progress.average.add(step, rotary.numbers())

            # Save a checkpoint, and end the run if a signal was received.
            stopped = request.agreed(world.accelerator)
            if stopped or (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                progress.save(step + 1)
            if stopped and step + 1 < settings.steps:
                raise Interrupted(
                    stopped,
                    f"stopped by {signal.Signals(stopped).name} after step {step + 1} of {settings.steps}, which is "
                    "saved; the same command continues from there",
                )

        if validation is None:
            return None
        average, length = progress.average.mean(settings.steps), max(recipe.data.lengths or [recipe.row_tokens()])
        kept = States(average, progress.recent)
        return decide(objective, kept, validation, length, world, release, request)


def _not_finite_text(run: Run, step: int, loss: float, norm: float) -> str:
    return (
        f"step {step + 1}: loss {loss}, gradient norm {norm}; the values after step {step} are kept. Look at the "
        "documents of this step, or continue from these values under a lower train.learning_rate, with another name= "
        f"and rope.init={run.checkpoints}/step-{step:06}"
    )


def _representable(rotary: TunableRotary, target: Target) -> Learned:
    """The learned numbers in a form that the target's stacks can serve; the scale of `rotary` is changed to match."""
    learned = make_representable(rotary.learned(), target)
    if learned.scale is not None:
        rotary.set_scale(learned.scale)
    return learned
