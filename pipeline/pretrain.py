"""Pretrains a model: `deepspeed pipeline/pretrain.py --deepspeed_config ds_configs/zero2.json [--recipe ...]`.

This file is the story of a run from top to bottom; what it calls is in the modules named for it.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

# The launcher runs this file as a script, which puts its own folder on the path, where our `export.py` and others
# would pass for top-level modules; the folder above is the one that belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.errors import UserError
from pipeline.arguments import Arguments, parse_arguments
from pipeline.startup import Timings, leave, set_environment

EXIT_INTERRUPTED = 130


def run(arguments: Arguments, timings: Timings) -> None:
    """One run, or the rest of one. Imports stand where they are needed: `--help` and mistakes answer at once."""
    # What is asked for. Whatever can be wrong about it is found here, before anything is built.
    from pipeline.configuration import resolve

    recipe, ds_config = resolve(arguments.recipe, arguments.overrides, arguments.deepspeed_config)

    from pipeline import checkpoint, ops, provenance
    from pipeline.batch import plan_batches
    from pipeline.data import (
        Ahead,
        is_missing,
        open_data,
        plan_samples,
        prepare,
        step_batches,
        validation_batches,
        wait_for_shards,
    )
    from pipeline.ds_config import complete_ds_config, describe, precision, zero_stage
    from pipeline.metrics import Metrics
    from pipeline.startup import init_distributed, open_log

    world = init_distributed()
    output_dir = arguments.output_dir
    logger = open_log(output_dir, world.rank)
    if precision(ds_config) == "fp16" and world.device.type == "cpu":
        raise UserError(f"{arguments.deepspeed_config}: fp16 needs a GPU; CPU ranks take a bf16 or fp32 ds_config")
    batches = plan_batches(
        ds_config,
        source=str(arguments.deepspeed_config),
        global_batch_size=recipe.training.global_batch_size,
        world_size=world.size,
        sequence_length=recipe.data.sequence_length,
        device=world.device.type,
    )
    ds_config = complete_ds_config(ds_config, recipe, batches)
    resume_from = checkpoint.find(arguments.resume, output_dir)
    if resume_from is not None:
        checkpoint.check_fits(resume_from, world, zero_stage(ds_config))
    timings.finished("imports")

    # The data, made first where the recipe says how; and C++ ops, built ahead once a host.
    if is_missing(recipe.data) and world.is_first:
        logger.info(f"{recipe.data.shards} is missing: making it with {recipe.data.prepare}")
        prepare(recipe.data)
    wait_for_shards(recipe.data)
    with world.first_alone() as first:
        if first:
            plan_samples(recipe)
    data = open_data(recipe)
    if resume_from is not None:
        provenance.check_unchanged(output_dir, recipe, data)
    ops.build_ops(ops.required_ops(ds_config, world.device.type), logger.info)
    timings.finished("data")

    # The model, and the engine that trains it.
    from pipeline.engine import Engine
    from pipeline.model import build_model, make_model_config, measure_model, peak_flops
    from pipeline.schedule import learning_rate

    model_config = make_model_config(recipe, data.tokenizer)
    model = build_model(model_config, recipe.objective, recipe.seed, recipe.model.init_from)
    size = measure_model(model, recipe.objective, recipe.data.sequence_length)
    timings.finished("model")
    engine = Engine(model, recipe.optimizer, ds_config, world, recipe.seed)
    first_step = 0
    if resume_from is not None:
        first_step = checkpoint.load(engine.deepspeed, resume_from, world, zero_stage=zero_stage(ds_config)).step
    with world.first_alone() as first:
        if first:
            provenance.record_run(output_dir, recipe, ds_config, data, model_config.to_dict())
    timings.finished("engine")

    # What is about to run, in words.
    max_steps, tokens_a_step = recipe.max_steps, batches.global_batch_size * recipe.data.sequence_length
    epochs = max_steps * batches.global_batch_size / data.train.size
    logger.info(f"model     {model_config.model_type}, {size.parameters / 1e6:,.1f} M parameters, {recipe.objective}")
    logger.info(f"data      {recipe.data.shards}, {data.train.size:,} samples of {recipe.data.sequence_length} tokens")
    for note in data.notes:
        logger.info(f"data      {note}")
    logger.info(f"batch     {batches}, {tokens_a_step:,} tokens a step")
    logger.info(f"engine    {describe(ds_config, recipe)} on {world.describe()}")
    logger.info(f"run       {output_dir}, {max_steps:,} steps, {epochs:.2f} epochs")
    if resume_from is not None:
        finished = "; the run is complete" if first_step >= max_steps else ""
        logger.info(f"resumed   from {resume_from}, after step {first_step}{finished}")

    # The steps.
    def validate(step: int) -> None:
        if data.validation.size:
            held_out = validation_batches(data.validation, recipe.evaluation.samples, batches, world.rank)
            metrics.validation(step, engine.evaluate(held_out))

    def save(step: int) -> None:
        path = checkpoint.save(
            engine.deepspeed,
            output_dir,
            world,
            step=step,
            samples=step * batches.global_batch_size,
            zero_stage=zero_stage(ds_config),
            precision=precision(ds_config),
            keep=recipe.checkpoint.keep_last,
        )
        metrics.say(f"step {step:>6}/{max_steps}  checkpoint {path}")

    def due(every_steps: int, step: int) -> bool:
        return step == max_steps or (every_steps > 0 and step % every_steps == 0)

    metrics = Metrics(output_dir, first_step=first_step, max_steps=max_steps, enabled=world.is_first, logger=logger)
    ahead = Ahead(lambda step: step_batches(data.train, step, batches, world.rank), first_step, max_steps)
    peak = peak_flops(world.device_name)
    started = time.perf_counter()
    try:
        if first_step == 0:
            validate(0)
        timings.finished("evaluation")
        for step in range(first_step, max_steps):
            began = time.perf_counter()
            micro_batches, waited = ahead.next()
            rate = learning_rate(recipe, step)
            result = engine.train_step(step, micro_batches, rate)
            seconds = time.perf_counter() - began
            done = step + 1
            if step == first_step:
                timings.finished("first step")
                metrics.say(f"start     {timings}")
            if not math.isfinite(result.loss):
                raise UserError(f"the loss is {result.loss} at step {done}; lower optimizer.lr or look at the samples")
            metrics.step(
                {
                    "step": done,
                    "loss": result.loss,
                    "learning_rate": rate,
                    "grad_norm": result.grad_norm,
                    "tokens": result.tokens,
                    "samples": done * batches.global_batch_size,
                    "step_seconds": seconds,
                    "data_wait_seconds": waited,
                    "tokens_per_second": tokens_a_step / seconds,
                    "mfu": tokens_a_step / seconds * size.flops_a_token / (peak * world.size) if peak else None,
                }
            )
            if due(recipe.evaluation.every_steps, done):
                validate(done)
            if due(recipe.checkpoint.every_steps, done):
                save(done)
    finally:
        ahead.close()
        metrics.close()
    if world.is_first:
        provenance.log_summary(output_dir, data.shards, time.perf_counter() - started, logger)
    world.close()


def main(argv: list[str]) -> int:
    set_environment()
    timings = Timings.since_process_start()
    try:
        run(parse_arguments(argv), timings)
    except UserError as error:
        # Every rank meets a mistake in the configuration; one line a machine says it.
        if os.environ["LOCAL_RANK"] == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if os.environ["RANK"] == "0":
            print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def _terminate(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)  # the launcher's way to stop its ranks
    leave(main(sys.argv[1:]))
