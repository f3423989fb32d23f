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
from typing import Any

# The launcher runs this file as a script, which puts its own folder on the path, where our `export.py` and others
# would pass for top-level modules; the folder above is the one that belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.errors import UserError
from pipeline.arguments import Arguments, parse_arguments
from pipeline.startup import Timings, set_environment

EXIT_INTERRUPTED = 130


def run(arguments: Arguments, timings: Timings) -> None:
    from pipeline import checkpoint, provenance
    from pipeline.batch import plan_batches
    from pipeline.data import Ahead, is_missing, open_data, plan_samples, prepare, validation_batches
    from pipeline.ds_config import (
        complete_ds_config,
        merge_into_recipe,
        offloads_optimizer,
        precision,
        zero_stage,
    )
    from pipeline.metrics import Metrics
    from pipeline.recipe import check_recipe, override, read_recipe_file
    from pipeline.samples import step_numbers
    from pipeline.schedule import learning_rate

    # What is asked for: everything about it that can be wrong is found before anything is built.
    raw = read_recipe_file(arguments.recipe)
    for name, text in arguments.overrides:
        override(raw, name, text)

    from pipeline import ops
    from pipeline.ds_config_keys import check_ds_config_keys, read_ds_config

    ds_source = str(arguments.deepspeed_config)
    ds_raw = read_ds_config(arguments.deepspeed_config)
    ops.configure_environment()
    check_ds_config_keys(ds_raw, ds_source)
    raw, ds_raw = merge_into_recipe(raw, ds_raw, recipe_source=str(arguments.recipe), config_source=ds_source)
    recipe = check_recipe(raw, str(arguments.recipe))

    from pipeline.startup import init_distributed, open_log

    world = init_distributed()
    logger = open_log(arguments.output_dir, world.rank)
    if precision(ds_raw) == "fp16" and world.device.type == "cpu":
        raise UserError(f"{ds_source}: fp16 needs a GPU, and these ranks run on CPUs; use a bf16 or fp32 config")
    batches = plan_batches(
        ds_raw,
        source=ds_source,
        global_batch_size=recipe.training.global_batch_size,
        world_size=world.size,
        sequence_length=recipe.data.sequence_length,
        device=world.device.type,
    )
    ds_config = complete_ds_config(ds_raw, recipe, batches)
    resume_from = checkpoint.find(arguments.resume, arguments.output_dir)
    timings.finished("imports")

    with world.first_alone() as first:
        if first:
            if is_missing(recipe.data):
                logger.info(f"{recipe.data.shards} is missing: making it with {recipe.data.prepare}")
                prepare(recipe.data)
            plan_samples(recipe)
    ops.build_ops(
        ops.required_ops(ds_config, world.device.type), logger.info
    )  # once a host; its other ranks wait, visibly
    data = open_data(recipe)
    timings.finished("data")

    from pipeline.engine import Engine
    from pipeline.model import build_model, make_model_config, measure_model, peak_flops

    model_config = make_model_config(recipe, data.tokenizer)
    model = build_model(model_config, recipe.objective, recipe.seed, recipe.model.init_from)
    size = measure_model(model, recipe.objective, recipe.data.sequence_length)
    timings.finished("model")

    engine = Engine(model, recipe.optimizer, ds_config, world, recipe.seed)
    first_step = 0
    if resume_from is not None:
        info = checkpoint.load(engine.deepspeed, resume_from, world, zero_stage=zero_stage(ds_config))
        first_step = info.step
    with world.first_alone() as first:
        if first:
            if resume_from is not None:
                provenance.check_unchanged(arguments.output_dir, recipe, data)
            provenance.record_run(arguments.output_dir, recipe, ds_config, data, model_config.to_dict())
    timings.finished("engine")

    for line in (
        f"model     {model_config.model_type}, {size.parameters / 1e6:.1f} M parameters, objective {recipe.objective}",
        f"data      {recipe.data.shards}: {data.train.size:,} samples of {recipe.data.sequence_length} tokens; the run"
        f" takes {recipe.max_steps * batches.global_batch_size / data.train.size:.2f} epochs",
        f"batch     {batches}, {batches.global_batch_size * recipe.data.sequence_length:,} tokens a step",
        f"engine    ZeRO {zero_stage(ds_config)}, {precision(ds_config)}, {recipe.optimizer.type}"
        f"{' offloaded' if offloads_optimizer(ds_config) else ''}, {world.size} ranks on {world.device.type},"
        f" {os.environ['OMP_NUM_THREADS']} threads each",
        f"run       {arguments.output_dir}, {recipe.max_steps} steps"
        + (f", resumed from {resume_from} after step {first_step}" if resume_from else ""),
    ):
        logger.info(line)

    # The run.
    def batches_of(step: int) -> list[Any]:
        numbers = step_numbers(
            step,
            global_batch_size=batches.global_batch_size,
            micro_batch_size=batches.micro_batch_size,
            world_size=world.size,
            rank=world.rank,
        )
        return [data.train.batch(row) for row in numbers]

    def validate(step: int) -> None:
        held_out = validation_batches(
            data.validation,
            count=recipe.evaluation.samples,
            micro_batch_size=batches.micro_batch_size,
            world_size=world.size,
            rank=world.rank,
        )
        if data.validation.size:
            metrics.validation(step, engine.evaluate(held_out))

    def save(step: int) -> None:
        path = checkpoint.save(
            engine.deepspeed,
            arguments.output_dir,
            world,
            step=step,
            samples=step * batches.global_batch_size,
            ds={"zero_stage": zero_stage(ds_config), "precision": precision(ds_config)},
            keep=recipe.checkpoint.keep_last,
        )
        logger.info(f"step {step:>6}/{recipe.max_steps}  checkpoint {path}")

    metrics = Metrics(
        arguments.output_dir,
        first_step=first_step,
        max_steps=recipe.max_steps,
        enabled=world.is_first,
        logger=logger,
    )
    peak = None if world.device.type == "cpu" else peak_flops(device_name(world.device))
    ahead = Ahead(batches_of, first_step, recipe.max_steps)
    started = time.perf_counter()
    try:
        if first_step == 0:
            validate(0)
        timings.finished("evaluation")
        for step in range(first_step, recipe.max_steps):
            began = time.perf_counter()
            micro_batches, waited = ahead.next()
            rate = learning_rate(recipe, step)
            result = engine.train_step(step, micro_batches, rate)
            seconds = time.perf_counter() - began
            done = step + 1
            if step == first_step:
                timings.finished("first step")
                logger.info(f"start     {timings}")
            if not math.isfinite(result.loss):
                raise UserError(f"the loss is {result.loss} at step {done}; lower optimizer.lr or look at the samples")
            tokens_per_second = batches.global_batch_size * recipe.data.sequence_length / seconds
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
                    "tokens_per_second": tokens_per_second,
                    "mfu": tokens_per_second * size.flops_a_token / (peak * world.size) if peak else None,
                }
            )
            due = recipe.evaluation.every_steps
            if done == recipe.max_steps or (due and done % due == 0):
                validate(done)
            due = recipe.checkpoint.every_steps
            if done == recipe.max_steps or (due and done % due == 0):
                save(done)
    finally:
        ahead.close()
        metrics.close()
    if world.is_first:
        provenance.log_summary(arguments.output_dir, data.shards, time.perf_counter() - started, logger)


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device)


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
    sys.exit(main(sys.argv[1:]))
