"""The steps of a run: samples, a step, a judgement of it, and what is shown and saved.

`pipeline.pretrain` builds what they work on and imports this module when it is all there.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.encoding import Encoder
from pipeline import incidents, replay
from pipeline.batch import BatchPlan
from pipeline.checkpointer import Checkpointer, Due
from pipeline.data import Data
from pipeline.engine import Engine, StepResult
from pipeline.hardware import peak_flops
from pipeline.interruption import EXIT_SAVED, Interruption, Requests
from pipeline.loader import Ahead, step_batches, validation_batches
from pipeline.metrics import Metrics, recent_losses
from pipeline.profiling import Profiler
from pipeline.recipe import Recipe
from pipeline.report import step_values, validation_values
from pipeline.schedule import learning_rate
from pipeline.startup import Timings, World
from pipeline.token_drop import TokenDrop
from pipeline.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """What the steps work on.

    first_step: how many were done before this start. history: of the run's incidents. flops_a_token: of forward and
    backward. verify_every: steps between replays, or 0. profile: steps to trace. hyperparameters: by which TensorBoard
    compares runs.
    """

    output_dir: Path
    recipe: Recipe
    world: World
    logger: logging.Logger
    data: Data
    batches: BatchPlan
    engine: Engine
    checkpointer: Checkpointer
    history: incidents.History
    first_step: int
    drop: TokenDrop | None
    flops_a_token: float
    verify_every: int
    profile: range
    hyperparameters: Mapping[str, bool | str | float]


@dataclass(frozen=True)
class Ended:
    """How the steps ended. status: to exit with. next_port: where all ranks meet to start again from the newest
    checkpoint, past the samples since; None where they do not."""

    status: int = 0
    next_port: int | None = None


def train(run: Run, interruption: Interruption, timings: Timings) -> Ended:
    """Takes the steps of a run that are left; called on every rank.

    Raises UserError where the run cannot go on (Judge.look, Checkpointer.wait, samples that cannot be read).
    """
    recipe, world, engine, checkpointer = run.recipe, run.world, run.engine, run.checkpointer
    first_step, max_steps, sizes = run.first_step, recipe.max_steps, recipe.training.batch_sizes
    metrics = Metrics(
        run.output_dir,
        first_step=first_step,
        max_steps=max_steps,
        enabled=world.is_first,
        logger=run.logger,
        monitor=engine.deepspeed.monitor,
    )
    metrics.describe(run.hyperparameters)
    losses = recent_losses(run.output_dir, first_step, 2 * incidents.WINDOW) if world.is_first else None
    judge = incidents.Judge(
        run.output_dir,
        recipe.faults,
        run.history,
        losses=world.from_first(losses),
        first_step=first_step,
        last_saved=checkpointer.last_saved,
        sizes=sizes,
        batches=run.batches,
        is_first=world.is_first,
        say=metrics.say,
    )
    requests = Requests(run.output_dir, interruption, is_first=world.is_first)
    watchdog = Watchdog(world, recipe.faults.hang_seconds, run.output_dir, run.logger)
    validate = partial(_validate, run, metrics, watchdog, Encoder(run.data.tokenizer.folder))
    values_of = partial(_values, run, peak_flops(world.device_name))
    ahead = Ahead(
        lambda step: step_batches(run.data.train, step, sizes, run.batches, world.rank, run.drop),
        first_step,
        max_steps,
        world.device,
    )
    saves = Due(recipe.checkpoint, max_steps)
    profiler = Profiler(run.profile, run.output_dir, world.rank)
    ended = Ended()
    interruption.finish_steps()
    try:
        if first_step == 0:
            validate(0)
        timings.finished("evaluation")
        for step in range(first_step, max_steps):
            interruption.check()
            done = step + 1
            profiler.before(done)
            began = time.perf_counter()
            watchdog.enter("samples", done)
            micro_batches, waited = ahead.next()
            if _is_due(run.verify_every, done):
                watchdog.enter("replay", done)
                replay.verify(engine, world, step, micro_batches)
            watchdog.enter("first step" if step == first_step else "step", done)
            rate = learning_rate(recipe, step)
            before = engine.own_weights() if _is_due(recipe.evaluation.histograms_every_steps, done) else None
            discard, asked = judge.left_out(done), (*requests.mine(), saves.asks())
            result = engine.train_step(step, micro_batches, rate, discard=discard, requests=asked)
            seconds = time.perf_counter() - began
            watchdog.worked(result.own_seconds)
            if (trace := profiler.after(done, max_steps)) is not None:
                metrics.say(f"step {done:>6}/{max_steps}  profile {trace}")
            if step == first_step:
                timings.finished("first step")
                metrics.say(f"start     {timings}")
            action = judge.look(done, result)
            if result.applied or result.scaling:
                metrics.step(values_of(done, result, rate, seconds, waited))
            else:
                metrics.left_out({"step": done, "samples": sizes.consumed(done), "left_out": True})
            for name, distribution in engine.distributions(before) if before is not None else ():
                metrics.distribution(done, name, distribution)
            if action == "rollback":
                ended = Ended(next_port=world.agreed_port())
                break
            save_asked, stop_asked, minutes_over = (count > 0 for count in result.requests)
            if done == max_steps or _is_due(recipe.evaluation.every_steps, done):
                validate(done)
            if saves.at(done, save_asked or stop_asked or minutes_over):
                watchdog.enter("checkpoint", done)
                checkpointer.save(done, sizes.consumed(done), rate)
            if save_asked or stop_asked:
                checkpointer.wait()
                requests.done()
            if stop_asked and done < max_steps:
                metrics.say(f"step {done:>6}/{max_steps}  ended on {requests.reason()}; the same command goes on")
                ended = Ended(EXIT_SAVED)
                break
        if ended.next_port is None:
            checkpointer.close()
    finally:
        watchdog.close()
        ahead.close()
        checkpointer.settle()
        metrics.close()
    return ended


def _is_due(every_steps: int, step: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _validate(run: Run, metrics: Metrics, watchdog: Watchdog, encoder: Encoder, step: int) -> None:
    """Evaluates held-out samples after `step` steps, with the averaged weights as well where there are any, and shows
    a few of them as text."""
    engine, recipe, held_out = run.engine, run.recipe, run.data.validation
    if not held_out.size:
        return
    watchdog.enter("evaluation", step)

    def batches() -> Any:
        found = validation_batches(held_out, recipe.evaluation.samples, run.batches, run.world.rank)
        return watchdog.along(found, phase="evaluation", step=step)

    values = validation_values(engine.evaluate(batches()), run.data)
    if step and recipe.optimizer.ema_decay is not None:
        with engine.averaged_weights():
            values["ema_loss"] = engine.evaluate(batches()).loss
    metrics.validation(step, values)
    if recipe.evaluation.text_samples:
        metrics.texts(step, engine.text_samples(held_out, encoder, recipe.evaluation.text_samples))


def _values(
    run: Run, peak: float | None, step: int, result: StepResult, rate: float, seconds: float, waited: float
) -> dict[str, Any]:
    """A line of `metrics.jsonl`, of step `step`, from 1. peak: FLOPs a second of a rank's device, where known. seconds:
    that the step took, of which `waited` for its samples."""
    sizes = run.recipe.training.batch_sizes
    tokens_per_second = sizes.at(step - 1) * run.recipe.data.sequence_length / seconds
    return {
        "step": step,
        "loss": result.losses.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens": result.losses.tokens,
        "samples": sizes.consumed(step),
        "step_seconds": seconds,
        "data_wait_seconds": waited,
        "tokens_per_second": tokens_per_second,
        "memory_bytes": run.world.memory_bytes(),
        "mfu": tokens_per_second * run.flops_a_token / (peak * run.world.size) if peak else None,
        **step_values(result.losses, run.data, sizes.consumed(step)),
    }
