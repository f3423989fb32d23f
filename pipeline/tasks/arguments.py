"""The flags of `pipeline.finetune`, what they are by default, and what is wrong with them."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, nearest
from pipeline.tasks.glue import TASKS, find_folder

SQUAD = ("squad", "squad_v2")
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
    known = (*TASKS, "glue", *SQUAD, _TEXT)
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


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    return _parser().parse_args(argv)


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


def tasks_of(arguments: argparse.Namespace) -> list[str]:
    """The tasks to run; raises UserError for what is wrong with the flags."""
    known = (*TASKS, "glue", *SQUAD, _TEXT)
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
    if arguments.data_dir is None and arguments.task in (*SQUAD, _TEXT):
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


def settings_of(arguments: argparse.Namespace, name: str, ds_config: dict[str, Any]) -> Settings:
    """What a task is run with: the flags, and its kind's defaults where they are silent."""
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
