"""`python -m pipeline.evaluate`: what a model knows without fine-tuning, from local files; or lm-eval's tasks."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError, exit_status, nearest
from pipeline.exported import load_exported, objective_of
from pipeline.text_lines import bar as progress_bar

if TYPE_CHECKING:
    from pipeline.exported import Exported
    from pipeline.tasks.language import Found

EXAMPLES = """\
examples:
  python -m pipeline.evaluate --model exported/gpt --task perplexity --input data/shards
  python -m pipeline.evaluate --model exported/gpt --task wikitext --input wiki.test.tokens --stride 512
  python -m pipeline.evaluate --model exported/gpt --task lambada --input lambada_test.jsonl
  python -m pipeline.evaluate --model exported/bert --task minimal_pairs --input blimp/ --json
  python -m pipeline.evaluate --model exported/gpt --task lm_eval:hellaswag,piqa --num_fewshot 5

tasks:
  perplexity     of held-out documents (--input: a folder of shards), or of a text: .jsonl with "text", or a file
  wikitext       perplexity a word of the file as it is, its text detokenised (GPT-2, Megatron-LM)
  lambada        the last word of each "text" of a .jsonl file
  minimal_pairs  sentence_good against sentence_bad of a .jsonl file, or of all those in a folder (BLiMP)
  lm_eval:NAMES  tasks of EleutherAI's lm-eval (pip install '.[lm_eval]'), which fetches their data itself

A GPT is measured by likelihood, a BERT by pseudo-likelihood (perplexity, wikitext and minimal_pairs).
"""
_LM_EVAL = "lm_eval:"
_LM_EVAL_ROWS = 16  # of a forward pass; lm-eval alone takes 1
_TASKS = ("perplexity", "wikitext", "lambada", "minimal_pairs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate",
        description="Measure a Hugging Face model folder without fine-tuning it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a GPT or BERT")
    parser.add_argument("--task", required=True, metavar="T", help="one of the tasks below")
    parser.add_argument("--input", type=Path, metavar="PATH", help="the task's file or folder")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.005,
        metavar="X",
        help="perplexity of shards: data.validation_fraction of the training (default: %(default)s)",
    )
    parser.add_argument(
        "--max_documents", type=int, metavar="N", help="perplexity of shards: the first N held-out ones (default: all)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the windows of a text longer than the model's positions (default: half of those)",
    )
    parser.add_argument("--no_detokenize", action="store_true", help="wikitext: read the text as it is")
    parser.add_argument(
        "--num_fewshot", type=int, metavar="N", help="lm_eval: examples in a prompt (default: the task's)"
    )
    parser.add_argument(
        "--include_path",
        metavar="D",
        help="lm_eval: folder with task files (YAML) of your own, which may name local data",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="lm_eval: examples of a task (default: all)")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="fp32",
        help="precision of the computation; auto: the weights' (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    task, source = arguments.task, arguments.input
    objective = objective_of(arguments.model)
    if task.startswith(_LM_EVAL):
        if objective != "causal":
            raise UserError(f"--task {task}: lm-eval measures causal models; {arguments.model} is a masked one")
        return
    if task not in _TASKS:
        raise UserError(f"--task is {task!r}; {nearest(task, [*_TASKS, _LM_EVAL + 'NAME'])}")
    if source is None:
        raise UserError(f"--task {task} reads local files; give them with --input")
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    if source.is_dir() and task not in ("perplexity", "minimal_pairs"):
        raise UserError(f"--input {source} is a folder; --task {task} reads a file")
    if task == "lambada" and objective != "causal":
        raise UserError(f"--task lambada asks for what comes next; {arguments.model} is a masked model")
    if not 0 < arguments.validation_fraction < 1:
        raise UserError(f"--validation_fraction is {arguments.validation_fraction}, expected a number between 0 and 1")
    for name in ("stride", "max_documents"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more")


def measure(exported: "Exported", arguments: argparse.Namespace) -> "Found":
    """Runs one of our own tasks."""
    import itertools

    from pipeline.tasks import language

    with progress_bar(arguments.task, "token") as progress:

        def bar(tokens: int) -> Any:
            progress.reset(tokens)
            return progress.update

        source: Path = arguments.input
        match arguments.task:
            case "perplexity" if source.is_dir():
                found = language.held_out_documents(source, exported, arguments.validation_fraction)
                documents = list(itertools.islice(found, arguments.max_documents))
                return language.perplexity(exported, documents, bar, arguments.stride)
            case "perplexity":
                texts = language.read_texts(source)
                return language.perplexity(exported, language.encode(exported, texts), bar, arguments.stride)
            case "wikitext":
                texts = language.read_texts(source)
                detokenize = not arguments.no_detokenize
                return language.word_perplexity(exported, texts, bar, arguments.stride, detokenize=detokenize)
            case "lambada":
                texts = [row["text"] for row in language.read_objects(source, ("text",))]
                return language.lambada(exported, texts, bar)
            case _:
                files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
                if not files:
                    raise UserError(f"--input {source} holds no .jsonl file")
                names = ("sentence_good", "sentence_bad")
                pairs = [pair for file in files for pair in language.read_objects(file, names)]
                return language.minimal_pairs(exported, pairs, bar)


def measure_by_lm_eval(arguments: argparse.Namespace) -> "Found":
    """Hands the folder to lm-eval; raises UserError when it is not installed, or ends with an error, such as for data
    that it cannot reach."""
    from pipeline.ds_config import TORCH_DTYPES
    from pipeline.tasks.language import Found

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm-eval is not installed; pip install '.[lm_eval]' brings it") from None
    import torch

    names = arguments.task.removeprefix(_LM_EVAL).split(",")
    dtype = "auto" if arguments.dtype == "auto" else TORCH_DTYPES[arguments.dtype]
    try:
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(arguments.model), "dtype": dtype},
            tasks=names,
            task_manager=TaskManager(include_path=arguments.include_path),
            num_fewshot=arguments.num_fewshot,
            batch_size=_LM_EVAL_ROWS,
            limit=arguments.limit,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except Exception as error:  # of its tasks, the hub, the network: all sorts
        what = str(error).strip().partition("\n")[0]
        raise UserError(f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: {what})") from None
    parts = {
        task: {name.removesuffix(",none"): float(value) for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }
    return Found({}, parts)


def evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.task.startswith(_LM_EVAL):
        found = measure_by_lm_eval(arguments)
    else:
        found = measure(load_exported(arguments.model, dtype=arguments.dtype), arguments)
    if arguments.json:
        shown = {"task": arguments.task, "model": str(arguments.model), "metrics": found.metrics, "parts": found.parts}
        print(json.dumps(shown))
        return 0
    for line in table(found):
        print(line)
    return 0


def table(found: "Found") -> list[str]:
    """Lines of names and numbers: each part's, then all's."""
    rows = [(part, name, value) for part, metrics in found.parts.items() for name, value in metrics.items()]
    rows += [("all" if found.parts else "", name, value) for name, value in found.metrics.items()]
    width = max((len(part) for part, _, _ in rows), default=0)
    return [
        f"{part:<{width}}  {name:<20}{value:>14,.4f}".strip()
        if isinstance(value, float)
        else f"{part:<{width}}  {name:<20}{value:>14,}".strip()
        for part, name, value in rows
    ]


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
