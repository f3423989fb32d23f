"""Fine-tunes an exported model: `python -m pipeline.finetune --task sst2 --model H --data_dir glue`, or the same under
`deepspeed pipeline/finetune.py` on several ranks.

This file is the story of a run from top to bottom; what it calls is in the modules named for it.
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Under the launcher, as in pretrain.py: the folder above is the one that belongs on the path.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep import durable
from data_prep.errors import UserError
from pipeline.interruption import EXIT_INTERRUPTED, Interruption, follow_launcher
from pipeline.startup import World, hold, leave, set_environment
from pipeline.tasks.arguments import SQUAD, Settings, parse_arguments, settings_of, tasks_of
from pipeline.tasks.glue import TASKS
from pipeline.tasks.results import (
    PREDICTIONS_NAME,
    RESULTS_NAME,
    Records,
    average,
    describe_metrics,
    read_results,
    table,
)

if TYPE_CHECKING:
    from pipeline.batch import BatchPlan
    from pipeline.tasks.task import Task

MODEL_NAME = "model"
"""The folder of the best model, in a task's."""


def read_ds_config(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The ds_config, checked as far as one process can, and what to call it in messages."""
    from pipeline import ds_config_keys, ops
    from pipeline.ds_config import check_carried_out

    path = arguments.deepspeed_config
    source = "--deepspeed_config" if path is None else str(path)
    ds_config = {} if path is None else ds_config_keys.read_ds_config(path)
    ops.configure_environment()  # before the check imports deepspeed
    ds_config_keys.check_ds_config_keys(ds_config, source)
    check_carried_out(ds_config, source)
    return ds_config, source


def run(arguments: argparse.Namespace, interruption: Interruption) -> None:
    """What is asked for, on the ranks. Imports stand where they are needed: `--help` and mistakes answer at once."""
    tasks_of(arguments)
    ds_config, source = read_ds_config(arguments)

    from pipeline.startup import init_distributed

    world = init_distributed()
    run_tasks(arguments, ds_config, source, world, interruption)
    world.close()


def run_tasks(
    arguments: argparse.Namespace, ds_config: dict[str, Any], source: str, world: World, interruption: Interruption
) -> None:
    """All tasks, one after the other, and their table. source: of the ds_config, for messages."""
    from transformers.utils import logging as transformers_logging

    from pipeline import ops
    from pipeline.ds_config import check_ranks
    from pipeline.preflight import check_hosts_alike
    from pipeline.provenance import git_commit, package_versions
    from pipeline.startup import open_log

    output_dir = arguments.output_dir or Path("runs") / f"finetune-{arguments.task}"
    with world.first_alone() as first:
        held = hold(output_dir) if first else None  # noqa: F841 - let go of at the end
    check_hosts_alike(world, {"commit": str(git_commit()), "ds_config": str(ds_config), **package_versions()})
    check_ranks(ds_config, source, device=world.device.type, world_size=world.size)
    ops.build_ops(ops.required_ops(ds_config, world.device.type), print)

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger = open_log(output_dir, world.rank)

    results = {}
    for name in tasks_of(arguments):
        settings = settings_of(arguments, name, ds_config)
        folder = output_dir / name if arguments.task == "glue" else output_dir
        finished = world.from_first(read_results(folder) if world.is_first else None)
        if finished is not None and not arguments.overwrite:
            if finished["settings"] != json.loads(json.dumps(asdict(settings))):
                raise UserError(
                    f"{folder / RESULTS_NAME} has results of other settings; give --overwrite or another folder"
                )
            logger.info(f"{name}: {folder / RESULTS_NAME} is there, made with these settings")
            results[name] = finished
            continue
        results[name] = fine_tune(settings, source, folder, world, logger, interruption)
    if world.is_first:
        for line in table(results, whole=arguments.task == "glue"):
            logger.info(line)
        if arguments.task == "glue":
            durable.write_json(output_dir / RESULTS_NAME, {"tasks": results, "average": average(results)})


def open_task(settings: Settings, tokenizer: Any, logger: logging.Logger) -> "Task":
    """The task's data, as tokens."""
    data_dir = None if settings.data_dir is None else Path(settings.data_dir)
    if settings.task in TASKS:
        from pipeline.tasks.classification import Classification
        from pipeline.tasks.glue import read_hub, read_local

        glue = TASKS[settings.task]
        splits = read_hub(settings.task) if data_dir is None else read_local(glue, data_dir)
        if splits.left_out:
            logger.info(f"data      {splits.left_out} lines of {glue.folder} lack columns and are left out")
        return Classification.of(glue, splits, tokenizer, settings.max_length)
    assert data_dir is not None
    if settings.task in SQUAD:
        from pipeline.tasks.squad import QuestionAnswering

        return QuestionAnswering.of(
            settings.task,
            data_dir,
            tokenizer,
            settings.max_length,
            settings.doc_stride,
            n_best=settings.n_best,
            max_answer_length=settings.max_answer_length,
        )
    from pipeline.tasks.text_to_text import TextToText

    return TextToText.of(data_dir, tokenizer, settings.max_length, settings.separator, settings.max_new_tokens)


def fine_tune(
    settings: Settings, source: str, folder: Path, world: World, logger: logging.Logger, interruption: Interruption
) -> dict[str, Any]:
    """One task with all its seeds: leaves `folder` with the best model, results, metrics and predictions.

    source: of the ds_config, for messages. Returns what results.json holds.
    """
    from transformers import AutoConfig

    from pipeline.batch import plan_batches
    from pipeline.ds_config import describe, fill_in, merge_into_recipe
    from pipeline.model import longest_input
    from pipeline.recipe import OptimizerSection
    from pipeline.tasks.encoding import Collator, load_tokenizer
    from pipeline.tuning import Steps, Tuner

    # What is trained, on what, in which steps.
    model_dir = Path(settings.model)
    config = AutoConfig.from_pretrained(model_dir)
    limit = longest_input(config)
    if settings.max_length > limit:
        raise UserError(f"--max_length is {settings.max_length}, but --model {model_dir} has {limit} positions")
    tokenizer = load_tokenizer(model_dir)
    task = open_task(settings, tokenizer, logger)
    steps = Steps(len(task.train), settings.batch_size, settings.epochs, settings.warmup)
    # Devlin et al. 2019, appendix A.2, and google-research/bert's epsilon and clipping.
    optimizer = OptimizerSection(lr=settings.lr, eps=1e-6, weight_decay=settings.weight_decay, gradient_clipping=1.0)
    stated = {
        "training": {"global_batch_size": settings.batch_size, "max_steps": steps.total},
        "optimizer": optimizer.model_dump(),
        "schedule": {"type": "linear", "warmup_steps": math.ceil(settings.warmup * steps.total)},
    }
    _, ds_config = merge_into_recipe(stated, settings.ds_config, recipe_source="the flags", config_source=source)
    batches = plan_batches(
        ds_config,
        source=source,
        global_batch_size=settings.batch_size,
        world_size=world.size,
        sequence_length=settings.max_length,
        device=world.device.type,
        setting="--batch_size",
    )
    ds_config = fill_in(ds_config, optimizer, batches)
    collate = Collator(tokenizer, config, world.device)
    dev = ", ".join(f"{len(samples):,} {name}" for name, samples in task.dev.items())
    logger.info(f"task      {task.title}: {len(task.train):,} train, {dev}, rows of up to {settings.max_length} tokens")
    logger.info(f"model     {model_dir}, {config.model_type}")
    logger.info(f"batch     {batches}")
    logger.info(f"engine    {describe(ds_config, optimizer.type)} on {world.describe()}")
    logger.info(f"run       {folder}, {len(settings.seeds)} x {steps.total:,} steps")

    # The seeds, one after the other; the best evaluation of all leaves its model.
    best: dict[int, dict[str, Any]] = {}
    records = Records(folder, enabled=world.is_first)
    try:
        for seed in settings.seeds:
            model = _build_model(task, model_dir, tokenizer, seed)
            tuner = Tuner(model, task, optimizer, ds_config, batches, collate, world, seed)
            records.begin(seed, f"{task.title}, seed {seed}", steps.total)
            without_better = 0
            for step in range(steps.total):
                interruption.check()
                rate = steps.learning_rate(step, settings.lr)
                samples = [task.train[number] for number in steps.numbers(step, seed)]
                result = tuner.train_step(step, samples, rate)
                if not math.isfinite(result.loss):
                    raise UserError(
                        f"{task.title}, seed {seed}: the loss is {result.loss} at step {step + 1}; lower --lr"
                    )
                done = step + 1
                epoch = done / steps.of_epoch
                records.step(done, epoch, loss=result.loss, learning_rate=rate, grad_norm=result.grad_norm)
                if not steps.end_part(done, settings.evaluations_per_epoch):
                    continue
                found = _evaluate(task, tuner, world)
                records.evaluation(done, epoch, found)
                shown = describe_metrics(task, found)
                logger.info(f"{task.title}, seed {seed}, epoch {epoch:.2f}: {shown}, loss {result.loss:.4f}")
                score = task.score(found)
                is_first = seed not in best
                if is_first or score > best[seed]["score"]:
                    if all(score > other["score"] for other in best.values()):
                        tuner.save(folder / MODEL_NAME, tokenizer)
                    best[seed] = {"score": score, "step": done, "epoch": epoch, "metrics": found}
                    without_better = 0
                else:
                    without_better += 1
                if settings.patience and without_better >= settings.patience:
                    logger.info(
                        f"{task.title}, seed {seed}: no better evaluation since step {best[seed]['step']}; ended"
                    )
                    break
            tuner.close()
            del tuner, model
    finally:
        records.close()
    return _finish(task, settings, best, folder, world, collate, batches, logger)


def _build_model(task: "Task", folder: Path, tokenizer: Any, seed: int) -> Any:
    """The folder's model with the task's head in float32, what the folder has not being drawn from `seed`."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, **task.config)
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return getattr(transformers, task.model_class).from_pretrained(
                folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise UserError(
                f"--model {folder} is a {config.model_type}, for which transformers has no {task.model_class}"
            ) from None


def _evaluate(task: "Task", tuner: Any, world: World) -> dict[str, float]:
    """Metrics on the dev sets, the same on every rank."""
    outputs = {name: tuner.predictor.outputs(samples, name) for name, samples in task.dev.items()}
    return world.from_first(task.metrics(outputs) if world.is_first else None)


def _finish(
    task: "Task",
    settings: Settings,
    best: dict[int, dict[str, Any]],
    folder: Path,
    world: World,
    collate: Any,
    batches: "BatchPlan",
    logger: logging.Logger,
) -> dict[str, Any]:
    """Reads the best model back, as anybody would, and has it predict; writes and returns the results."""
    import transformers

    from pipeline.provenance import package_versions
    from pipeline.tasks.task import Predictor

    world.barrier()
    winner = max(best, key=lambda seed: best[seed]["score"])
    model = getattr(transformers, task.model_class).from_pretrained(folder / MODEL_NAME, dtype="auto")
    model.to(world.device)
    predictor = Predictor(model, task.head(model, world.device), collate, world, batches.micro_batch_size)
    outputs = {name: predictor.outputs(samples, name) for name, samples in task.dev.items()}
    read_back = task.metrics(outputs) if world.is_first else {}
    predictions = folder / PREDICTIONS_NAME
    if world.is_first:
        predictions.mkdir(exist_ok=True)
    further = task.predict(model, predictor, predictions)
    names = best[winner]["metrics"]
    saved = read_back | further
    results = {
        "settings": asdict(settings),
        "title": task.title,
        "shown": task.shown,
        "best": {"seed": winner, **best[winner]},
        "median": {name: statistics.median(found["metrics"][name] for found in best.values()) for name in names},
        "seeds": {str(seed): found for seed, found in best.items()},
        "saved_model": saved,
        "versions": package_versions(),
    }
    if world.is_first:
        durable.write_json(folder / RESULTS_NAME, results)
        logger.info(f"kept      {folder / MODEL_NAME}, of seed {winner}: {describe_metrics(task, saved)}")
        written = sorted(path.name for path in predictions.iterdir())
        if written:
            logger.info(f"written   {predictions}: {', '.join(written)}")
    return results


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    interruption = Interruption()
    threading.Thread(target=follow_launcher, args=(interruption, 0.0), daemon=True).start()
    try:
        set_environment()
        run(arguments, interruption)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank meets the same mistake
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped; tasks with results are kept, the others begin anew", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
