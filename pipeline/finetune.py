"""Fine-tunes an exported model: `python -m pipeline.finetune --task sst2 --model H --data_dir glue`, or the same under
`deepspeed pipeline/finetune.py` on several ranks.

This file is the story of a run from top to bottom; what it calls is in the modules named for it.
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Under the launcher, as in pretrain.py: the folder above is the one that belongs on the path.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep import durable
from data_prep.errors import UserError, nearest
from pipeline.interruption import EXIT_INTERRUPTED, Interruption, follow_launcher
from pipeline.startup import World, hold, leave, set_environment
from pipeline.tasks.glue import TASKS, find_folder

if TYPE_CHECKING:
    from pipeline.batch import BatchPlan
    from pipeline.tasks.task import Task

RESULTS_NAME = "results.json"
MODEL_NAME = "model"
PREDICTIONS_NAME = "predictions"
_BOARD_NAME = "tensorboard"
_SQUAD = ("squad", "squad_v2")
_TEXT = "text_to_text"

EXAMPLES = """\
examples:
  python -m pipeline.finetune --task sst2 --model exported/bert --data_dir glue --output_dir runs/sst2
  python -m pipeline.finetune --task glue --model exported/bert --data_dir glue --seeds 1 2 3 4 5
  deepspeed pipeline/finetune.py --task squad_v2 --model exported/bert --data_dir squad \\
      --deepspeed_config ds_configs/zero2.json
  python -m pipeline.finetune --task text_to_text --model exported/gpt --data_dir en-de --separator ' = '

docs/finetuning.md has the files that each task reads, its metrics and its defaults.
"""


@dataclass(frozen=True)
class Defaults:
    """What a kind of task trains with where no flag says otherwise (docs/finetuning.md has the sources)."""

    lr: float
    epochs: int
    batch_size: int
    max_length: int


_OF_GLUE = Defaults(lr=2e-5, epochs=3, batch_size=32, max_length=128)
_DEFAULTS = {
    "squad": Defaults(lr=5e-5, epochs=3, batch_size=32, max_length=384),
    "squad_v2": Defaults(lr=5e-5, epochs=2, batch_size=48, max_length=384),
    _TEXT: Defaults(lr=5e-5, epochs=3, batch_size=32, max_length=256),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.finetune",
        description="Fine-tune a Hugging Face model folder, evaluate it on the dev set, and write the test set's"
        " predictions in the submission's format.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = (*TASKS, "glue", *_SQUAD, _TEXT)
    parser.add_argument(
        "--task", required=True, metavar="T", help=f"{', '.join(known)} (glue: all of its tasks that --data_dir holds)"
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder to start from")
    parser.add_argument(
        "--data_dir",
        type=Path,
        metavar="D",
        help="folder with the benchmark's own files (default for GLUE: the hub's nyu-mll/glue, through datasets)",
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="D", help="folder of the run (default: runs/finetune-<task>)"
    )
    parser.add_argument("--overwrite", action="store_true", help="run again what --output_dir has results of")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="JSON",
        help="how it is carried out (ds_configs/; default: ZeRO 0 in float32)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="one run each: of new weights, sample order and dropout; the best is kept (default: 1)",
    )
    of_kind = "default: 2e-5 for GLUE, else 5e-5"
    parser.add_argument("--lr", type=float, metavar="X", help=f"peak learning rate ({of_kind})")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 3, for squad_v2 2")
    parser.add_argument("--batch_size", type=int, metavar="N", help="samples of a step, default: 32, for squad_v2 48")
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="tokens of a row (default: 128 for GLUE, 384 for SQuAD, else 256; at most the model's positions)",
    )
    parser.add_argument(
        "--warmup", type=float, default=0.1, metavar="X", help="share of the steps (default: %(default)s)"
    )
    parser.add_argument("--weight_decay", type=float, default=0.01, metavar="X", help="default: %(default)s")
    parser.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="end a seed after N evaluations without a better one (default: 0, never)",
    )
    parser.add_argument(
        "--evaluations_per_epoch", type=int, default=1, metavar="N", help="on the dev set (default: %(default)s)"
    )
    squad = parser.add_argument_group("SQuAD")
    squad.add_argument(
        "--doc_stride",
        type=int,
        default=128,
        metavar="N",
        help="tokens that two windows of a long context have in common (default: %(default)s)",
    )
    squad.add_argument("--max_answer_length", type=int, default=30, metavar="N", help="tokens (default: %(default)s)")
    squad.add_argument(
        "--n_best", type=int, default=20, metavar="N", help="answers of a question that are kept (default: %(default)s)"
    )
    text = parser.add_argument_group("text_to_text")
    text.add_argument(
        "--separator",
        default="\\n",
        metavar="TEXT",
        help=r"between source and target; \n and \t may be written so (default: %(default)s)",
    )
    text.add_argument(
        "--max_new_tokens", type=int, default=128, metavar="N", help="of a generated target (default: %(default)s)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    return parser


@dataclass(frozen=True)
class Settings:
    """What decides a task's results, beside the data and the model."""

    task: str
    model: str
    data_dir: str | None
    ds_config: dict[str, Any]
    seeds: tuple[int, ...]
    lr: float
    epochs: int
    batch_size: int
    max_length: int
    warmup: float
    weight_decay: float
    patience: int
    evaluations_per_epoch: int
    doc_stride: int
    max_answer_length: int
    n_best: int
    separator: str
    max_new_tokens: int


def _tasks(arguments: argparse.Namespace) -> list[str]:
    """The tasks to run; raises UserError for what is wrong with the flags."""
    known = (*TASKS, "glue", *_SQUAD, _TEXT)
    if arguments.task not in known:
        raise UserError(f"--task is {arguments.task!r}; {nearest(arguments.task, known)}")
    if not (arguments.model / "config.json").exists():
        raise UserError(
            f"--model {arguments.model} is no Hugging Face model folder; make one with `python -m pipeline.export`"
        )
    for name, least in (
        *((name, 1) for name in ("epochs", "batch_size", "evaluations_per_epoch", "max_answer_length", "n_best")),
        *((name, 0) for name in ("patience", "weight_decay", "doc_stride")),
        ("max_length", 8),
        ("max_new_tokens", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, expected {least} or more")
    if arguments.lr is not None and arguments.lr <= 0:
        raise UserError(f"--lr is {arguments.lr}, expected a number above 0")
    if not 0 <= arguments.warmup <= 1:
        raise UserError(f"--warmup is {arguments.warmup}, expected a share of the steps, from 0 to 1")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise UserError(f"--seeds are {arguments.seeds}, expected different numbers of 0 or more")
    if arguments.data_dir is None and arguments.task in (*_SQUAD, _TEXT):
        raise UserError(f"--task {arguments.task} reads local files; give their folder with --data_dir")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise UserError(f"--data_dir {arguments.data_dir}: no such folder")
    if arguments.task != "glue":
        return [arguments.task]
    if arguments.data_dir is None:
        return list(TASKS)
    found = [name for name, task in TASKS.items() if find_folder(task, arguments.data_dir / task.folder)]
    if not found:
        folders = ", ".join(task.folder for task in TASKS.values())
        raise UserError(
            f"--data_dir {arguments.data_dir} holds none of GLUE's folders ({folders}) with their tsv files"
        )
    return found


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
    _tasks(arguments)
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
    for name in _tasks(arguments):
        settings = _settings(arguments, name, ds_config)
        folder = output_dir / name if arguments.task == "glue" else output_dir
        finished = _from_first(read_results(folder) if world.is_first else None)
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


def _settings(arguments: argparse.Namespace, name: str, ds_config: dict[str, Any]) -> Settings:
    defaults = _DEFAULTS.get(name, _OF_GLUE)
    given = {key: getattr(arguments, key) for key in Settings.__dataclass_fields__ if hasattr(arguments, key)}
    chosen = {key: value if given[key] is None else given[key] for key, value in asdict(defaults).items()}
    if given["max_length"] is None:
        chosen["max_length"] = _fitting(arguments.model, defaults.max_length)
    given |= chosen | {
        "task": name,
        "model": str(arguments.model),
        "data_dir": None if arguments.data_dir is None else str(arguments.data_dir),
        "ds_config": ds_config,
        "seeds": tuple(arguments.seeds),
        "separator": arguments.separator.replace("\\n", "\n").replace("\\t", "\t"),
    }
    return Settings(**given)


def _fitting(model: Path, length: int) -> int:
    """The length, or the model's positions where it has fewer."""
    from transformers import AutoConfig

    from pipeline.model import longest_input

    return min(length, longest_input(AutoConfig.from_pretrained(model)))


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
    if settings.task in _SQUAD:
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
    records = _Records(folder, enabled=world.is_first)
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
                logger.info(
                    f"{task.title}, seed {seed}, epoch {epoch:.2f}: {_shown(task, found)}, loss {result.loss:.4f}"
                )
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
    return _from_first(task.metrics(outputs) if world.is_first else None)


def _from_first(value: Any) -> Any:
    """What rank 0 gives, on every rank."""
    from torch import distributed

    shared = [value]
    distributed.broadcast_object_list(shared, 0)
    return shared[0]


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
        logger.info(f"kept      {folder / MODEL_NAME}, of seed {winner}: {_shown(task, saved)}")
        written = sorted(path.name for path in predictions.iterdir())
        if written:
            logger.info(f"written   {predictions}: {', '.join(written)}")
    return results


class _Records:
    """`metrics.jsonl`, TensorBoard and the progress bar of rank 0; elsewhere every method does nothing."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._enabled, self._folder = enabled, folder
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_NAME).unlink(missing_ok=True)  # of another run, which this one replaces
        for name in (PREDICTIONS_NAME, _BOARD_NAME):
            shutil.rmtree(folder / name, ignore_errors=True)
        self._file = open(folder / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115 - closed by `close`
        self._board: Any = None
        self._bar: Any = None

    def begin(self, seed: int, title: str, steps: int) -> None:
        if not self._enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._end()
        self._seed = seed
        self._board = SummaryWriter(str(self._folder / _BOARD_NAME / f"seed-{seed}"))
        self._bar = tqdm(
            total=steps, desc=title, unit="step", dynamic_ncols=True, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def step(self, step: int, epoch: float, **values: float | None) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"seed": self._seed, "step": step, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"train/{name}", value, step)
        self._bar.update()

    def evaluation(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"seed": self._seed, "step": step, "epoch": epoch, "dev": metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(f"dev/{name}", value, step)
        self._bar.clear()

    def _end(self) -> None:
        if self._board is not None:
            self._board.close()
            self._bar.close()

    def close(self) -> None:
        if self._enabled:
            self._end()
            self._file.close()


def read_results(folder: Path) -> dict[str, Any] | None:
    """What a finished run left, None where there is none."""
    try:
        return dict(json.loads((folder / RESULTS_NAME).read_bytes()))
    except FileNotFoundError:
        return None


def _shown(task: "Task", metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name in task.shown)


def _task_score(results: dict[str, Any]) -> float:
    """A GLUE task's score: the mean of its metrics' medians over the seeds."""
    return statistics.fmean(results["median"].values())


def average(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of the tasks' scores: of all, and without WNLI, as Devlin et al. 2019, table 1, leave it out."""
    scores = {name: _task_score(found) for name, found in results.items()}
    without = [score for name, score in scores.items() if name != "wnli"]
    found = {"all": statistics.fmean(scores.values())}
    return found | ({"without_wnli": statistics.fmean(without)} if without else {})


def table(results: dict[str, dict[str, Any]], *, whole: bool) -> list[str]:
    """Lines with each task's metrics: the median over the seeds and the best seed's. whole: with GLUE's average."""
    lines = [f"{'task':<14}{'metric':<24}{'median':>9}{'best':>9}  of seeds"]
    for name in TASKS if whole else results:
        if name not in results:
            lines.append(f"{TASKS[name].folder:<14}{'no files':<24}{'-':>9}{'-':>9}")
            continue
        found = results[name]
        seeds = ", ".join(found["seeds"])
        for index, metric in enumerate(found["shown"]):
            title = found["title"] if index == 0 else ""
            # What needs the finished model, such as generated texts, there is of the best seed alone.
            median = f"{found['median'][metric]:.4f}" if metric in found["median"] else "-"
            best = (found["best"]["metrics"] | found["saved_model"])[metric]
            lines.append(f"{title:<14}{metric:<24}{median:>9}{best:>9.4f}  {'' if index else seeds}".rstrip())
    if whole:
        for name, value in average(results).items():
            of = f"of {len(results)} tasks" if name == "all" else "without WNLI"
            lines.append(f"{'average':<14}{of:<24}{value:>9.4f}")
    return lines


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    return _parser().parse_args(argv)


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
