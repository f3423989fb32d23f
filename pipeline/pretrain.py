"""Pretrains a model: `deepspeed pipeline/pretrain.py --deepspeed_config ds_configs/zero2.json [--recipe ...]`.

This file is the story of a run from top to bottom; what it calls is in the modules named for it.
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path

# The launcher runs this file as a script, which puts its own folder on the path, where our `export.py` and others
# would pass for top-level modules; the folder above is the one that belongs there.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.errors import UserError
from pipeline.arguments import Arguments, parse_arguments
from pipeline.interruption import (
    EXIT_CRASHED,
    EXIT_INTERRUPTED,
    SUPERVISED,
    Interruption,
    follow_launcher,
)
from pipeline.startup import (
    RankError,
    StartAgain,
    Timings,
    hold,
    leave,
    seed_generators,
    set_environment,
    start_again,
    use_deterministic_algorithms,
)

GRACE_SECONDS = 60.0
"""That a run has to finish its step and to save when its launcher has gone."""


def run(arguments: Arguments, timings: Timings, interruption: Interruption) -> int:
    """One run, or the rest of one; returns the exit status.

    Imports stand where they are needed: `--help` and mistakes answer at once.
    """
    # What is asked for. Whatever can be wrong about it is found here, before anything is built.
    from pipeline.configuration import resolve
    from pipeline.versions import check_versions

    check_versions()
    recipe, ds_config = resolve(arguments.recipe, arguments.overrides, arguments.deepspeed_config)

    from pipeline import checkpoint, incidents, ops, provenance, replay
    from pipeline.activation_checkpointing import check_stage
    from pipeline.batch import plan_batches
    from pipeline.data import is_missing, open_data, plan_samples, prepare, resolve_weights, wait_for_shards
    from pipeline.ds_config import check_ranks, complete_ds_config, describe, precision, zero_stage
    from pipeline.launchers import check_hosts_asked_for, runner_arguments
    from pipeline.preflight import check_hosts_alike, check_output_shared, describe_copies, describe_host, dry_run
    from pipeline.report import describe_batches, describe_data, hyperparameters
    from pipeline.startup import init_distributed, open_log

    if arguments.deterministic:
        use_deterministic_algorithms()
    seed_generators(recipe.seed)
    check_hosts_asked_for(os.environ, runner_arguments())
    world = init_distributed()
    output_dir = arguments.output_dir
    logger = open_log(output_dir, world.rank)
    check_output_shared(world, output_dir)
    check_ranks(ds_config, str(arguments.deepspeed_config), device=world.device.type, world_size=world.size)
    check_stage(recipe.model.activation_checkpointing, zero_stage(ds_config))
    if arguments.verify_every:
        replay.check_possible(zero_stage(ds_config), world.device.type, deterministic=arguments.deterministic)
    with world.first_alone() as first:
        held = hold(output_dir) if first and not arguments.dry_run else None
    resume_from = checkpoint.find(arguments.resume, output_dir, world)
    changes = provenance.Changes(arguments.allow_changed, logger.warning)
    first_step = 0
    if resume_from is not None:
        for fault in resume_from.skipped:
            logger.warning(f"warning: {fault}; going on from {resume_from.folder.name}")
        first_step = resume_from.info.step
        recipe = provenance.continue_recipe(output_dir, recipe, first_step, changes)
    if arguments.resume == "none" and world.is_first and not arguments.dry_run:
        incidents.forget(output_dir)
    history = world.from_first(incidents.read_history(output_dir) if world.is_first else None)
    recipe = incidents.passed_over(recipe, history)
    sizes = recipe.training.batch_sizes
    batches = plan_batches(
        ds_config,
        source=str(arguments.deepspeed_config),
        global_batch_size=sizes.at(first_step),
        later_sizes=tuple(size for start, size in sizes.stages.items() if start > first_step),
        world_size=world.size,
        sequence_length=recipe.data.sequence_length,
        device=world.device.type,
    )
    ds_config = complete_ds_config(ds_config, recipe, batches)
    hosts = check_hosts_alike(world, describe_host(recipe, ds_config))
    timings.finished("imports")

    # The data, made first where the recipe says how; and C++ ops, built ahead once a host.
    if is_missing(recipe.data) and world.is_first:
        logger.info(f"{recipe.data.shards} is missing: making it with {recipe.data.prepare}")
        prepare(recipe.data)
    wait_for_shards(recipe.data)
    recipe = resolve_weights(recipe)
    if resume_from is not None:
        recipe = provenance.continue_weights(output_dir, recipe, first_step)
    with world.first_alone() as first:
        if first:
            plan_samples(recipe)
    data = open_data(recipe)
    check_hosts_alike(world, describe_copies(data))
    if resume_from is not None:
        provenance.check_data(output_dir, data, changes)
    ops.build_ops(ops.required_ops(ds_config, world.device.type), logger.info)
    timings.finished("data")

    # The model, and the engine that trains it.
    from pipeline.activation_checkpointing import enable
    from pipeline.attention import describe as describe_attention
    from pipeline.checkpointer import Checkpointer
    from pipeline.costs import shape_of
    from pipeline.engine import Engine
    from pipeline.model import build_model, make_model_config, measure_model
    from pipeline.plan import expectations
    from pipeline.schedule import learning_rate
    from pipeline.token_drop import TokenDrop, install
    from pipeline.vocabulary import pad_vocabulary

    model_config = make_model_config(recipe, data.tokenizer)
    model = build_model(
        model_config,
        recipe.objective,
        recipe.seed,
        recipe.model.init_from,
        pairs=recipe.pack_settings.is_pairs,
        has_boundaries=recipe.has_boundaries,
    )
    size = measure_model(model, recipe.objective, recipe.data.sequence_length)
    pad_vocabulary(model, recipe.model.pad_vocab_to_multiple_of)
    drop, curriculum = None, recipe.curriculum
    if curriculum.token_drop_start is not None:
        drop = TokenDrop(
            install(model), curriculum.token_drop_start, curriculum.token_drop_steps, curriculum.token_drop_multiple
        )
    enable(model, recipe.model.activation_checkpointing)
    timings.finished("model")
    engine = Engine(
        model,
        recipe.optimizer,
        ds_config,
        world,
        recipe.seed,
        len(data.corpora),
        vocabulary=model_config.get_text_config().vocab_size,
        z_loss=recipe.loss.z_loss,
        label_smoothing=recipe.loss.label_smoothing,
    )
    sources = provenance.sources_of(recipe, data)
    checkpointer = Checkpointer(
        engine,
        output_dir,
        recipe.checkpoint,
        zero_stage=zero_stage(ds_config),
        precision=precision(ds_config),
        sources=sources,
        say=logger.info,
    )
    if resume_from is not None:
        loaded = checkpointer.load(resume_from.folder, goes_on=not arguments.dry_run)
        rate = learning_rate(recipe, first_step - 1)
        checkpoint.check_position(loaded, sizes.consumed(first_step), rate, sources)
        if first_step and recipe.optimizer.ema_decay is not None:
            engine.check_average()
    if recipe.has_boundaries:
        engine.check_isolation()
    with world.first_alone() as first:
        if first and not arguments.dry_run:
            provenance.record_run(output_dir, recipe, ds_config, data, model_config.to_dict())
    timings.finished("engine")

    # What is about to run, in words.
    model_type, in_words = model_config.model_type, describe(ds_config, recipe.optimizer.type)
    on = f"{world.describe()} on {hosts} hosts" if hosts > 1 else world.describe()
    attention = f", {describe_attention(world.device, engine.dtype, model_config)}" if recipe.has_boundaries else ""
    for line in (
        f"model     {model_type}, {size.parameters / 1e6:,.1f} M parameters, {recipe.objective}",
        *describe_data(data, sizes.first_sample(recipe.max_steps)),
        *describe_batches(recipe, batches),
        f"engine    {in_words} on {on}{attention}",
        *expectations(
            shape_of(model, model.config, size.flops_a_token),
            recipe,
            ds_config,
            batches,
            device_name=world.device_name,
            gpus_per_node=int(os.environ["LOCAL_SIZE"]),
        ),
        f"run       {output_dir}, {recipe.max_steps:,} steps",
    ):
        logger.info(line)
    if resume_from is not None:
        finished = "; the run is complete" if first_step >= recipe.max_steps else ""
        logger.info(f"resumed   from {resume_from.folder}, after step {first_step}{finished}")
        if not checkpointer.has_layout_of(resume_from.info):
            logger.info(f"          written by {resume_from.info.layout}")

    if arguments.dry_run:
        for line in dry_run(world, engine, recipe, data, batches, output_dir, size.parameters):
            logger.info(line)
        logger.info("dry run   nothing was trained and nothing saved")
        world.close()
        return 0

    # The steps.
    from pipeline.loop import Run, train

    started = time.perf_counter()
    ended = train(
        Run(
            output_dir=output_dir,
            recipe=recipe,
            world=world,
            logger=logger,
            data=data,
            batches=batches,
            engine=engine,
            checkpointer=checkpointer,
            history=history,
            first_step=first_step,
            drop=drop,
            flops_a_token=size.flops_a_token,
            verify_every=arguments.verify_every,
            profile=arguments.profile,
            hyperparameters=hyperparameters(recipe, model_type, size.parameters, in_words),
        ),
        interruption,
        timings,
    )
    if world.is_first and not ended.status and ended.next_port is None:
        provenance.log_summary(
            output_dir, [corpus.shards for corpus in data.corpora], time.perf_counter() - started, logger
        )
    world.close()
    if held is not None:
        held.close()
    if ended.next_port is not None:
        raise StartAgain(ended.next_port)
    return ended.status


def main(argv: list[str]) -> int:
    timings = Timings.since_process_start()
    try:
        set_environment()
        arguments = parse_arguments(argv)
        if arguments.max_restarts and SUPERVISED not in os.environ:
            from pipeline.supervisor import supervise

            return supervise([sys.executable, *sys.orig_argv[1:]], arguments.max_restarts, os.environ)
        return run_to_the_end(arguments, timings)
    except UserError as error:
        # Every rank meets a mistake in the configuration; one line a machine says it.
        if isinstance(error, RankError):
            print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def run_to_the_end(arguments: Arguments, timings: Timings) -> int:
    """A run in this process: whatever ends it becomes an exit status."""
    interruption = Interruption()
    threading.Thread(target=follow_launcher, args=(interruption, GRACE_SECONDS), daemon=True).start()
    try:
        return run(arguments, timings, interruption)
    except StartAgain as again:
        start_again(again.port)
    except KeyboardInterrupt:
        if os.environ["RANK"] == "0":
            print("stopped; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except UserError:
        raise
    except Exception:
        traceback.print_exc()
        return EXIT_CRASHED


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
