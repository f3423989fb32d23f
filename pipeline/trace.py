"""Names what a run trained on at a step: `python -m pipeline.trace --output_dir runs/first --step 31415 --text`.

Everything follows from the run's recipe: neither a checkpoint nor a GPU is needed, and a step that is still to come can
be looked at as well as one that was.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import Encoder
from data_prep.errors import UserError, exit_status

EXAMPLES = """\
examples:
  python -m pipeline.trace --output_dir runs/first --step 31415                the documents of every sample of a step
  python -m pipeline.trace --output_dir runs/first --step 31415 --sample 7 --text       one of them as the model saw it
  python -m pipeline.trace --output_dir runs/first --step 31415 --json | jq .documents

in texts:
  --- document ...   where a document begins that does not see those before it
  {shown>target}     a position of masked LM that is to be predicted: what the model was shown, and what it had to find
  (token)            objective causal: a token that is not to be predicted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.trace",
        description="Name every document of a training step, and show its samples as the model saw them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the run")
    parser.add_argument(
        "--step", type=int, required=True, metavar="N", help="step as metrics.jsonl counts them, from 1"
    )
    parser.add_argument("--sample", type=int, metavar="K", help="only this sample of the step, from 0 (default: all)")
    parser.add_argument("--text", action="store_true", help="decode the samples, masks and boundaries included")
    parser.add_argument("--json", action="store_true", help="one JSON object a sample instead of lines")
    return parser


def traced(output_dir: Path, step: int, sample: int | None, *, text: bool) -> Iterator[dict[str, Any]]:
    """The samples of a step, or one of them, each as a dict of what is known about it.

    Raises UserError when the folder is no run, its data are not there or not the run's, or the step has no such sample.
    """
    from pipeline.data import open_data
    from pipeline.provenance import TOKENIZER_FOLDER, check_data, read_run
    from pipeline.recipe import check_recipe

    raw = read_run(output_dir)["recipe"]
    raw["data"]["tokenizer"] = str(output_dir / TOKENIZER_FOLDER)
    recipe = check_recipe(raw, str(output_dir / "run.json"))
    sizes = recipe.training.batch_sizes
    if not step >= 1:
        raise UserError(f"--step is {step}, expected 1 or more (as metrics.jsonl counts them)")
    size, first = sizes.at(step - 1), sizes.first_sample(step - 1)
    if sample is not None and not 0 <= sample < size:
        raise UserError(f"--sample is {sample}, but step {step} has samples 0 to {size - 1}")
    data = open_data(recipe)
    check_data(output_dir, data)
    encoder = Encoder(output_dir / TOKENIZER_FOLDER) if text else None
    for number in range(size) if sample is None else (sample,):
        numbers = np.array([first + number])
        places = data.train.order.place(numbers)
        corpus = data.corpora[int(places.corpus[0])]
        found: dict[str, Any] = {
            "step": step,
            "sample": number,
            "consumed_as": first + number,
            "corpus": corpus.name,
            "epoch": int(places.epoch[0]),
            "index": int(places.sample[0]),
            "documents": [
                {name: str(value) if isinstance(value, Path) else value for name, value in vars(stretch).items()}
                for stretch in data.train.origins(places)[0]
            ],
        }
        if encoder is not None:
            batch = data.train.batch(numbers, step - 1)
            if batch.pair_labels is not None:
                found["pair_label"] = int(batch.pair_labels[0])
            found["text"] = shown(batch, encoder, causal=recipe.objective == "causal")
        yield found


def shown(batch: Any, encoder: Encoder, *, causal: bool) -> str:
    """The one row of a batch as text, with marks for targets and for where documents begin."""
    ids, labels = batch.input_ids[0], batch.labels[0]
    begins = batch.boundaries[:-1].tolist() if batch.boundaries is not None else [0]
    # A causal position predicts the next token: the one behind a position without a target is left out.
    left_out = np.concatenate(([False], labels[:-1] < 0))
    lines = []
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(ids)], strict=True)):
        part = slice(begin, end)
        lines.append(f"--- document {number} of the sample, positions {begin} to {end - 1}")
        if (labels[part] < 0).all() and (ids[part] == ids[end - 1]).all():
            lines.append(f"{encoder.decode(ids[begin : begin + 1])} x {end - begin}")
        elif causal:
            lines.append(_causal(ids[part], left_out[part], encoder))
        else:
            lines.append(_masked(ids[part], labels[part], encoder))
    return "\n".join(lines)


def _causal(ids: NDArray[Any], left_out: NDArray[np.bool_], encoder: Encoder) -> str:
    return "".join(
        encoder.decode(ids[begin:end])
        if not marked
        else "".join(f"({encoder.decode([token])})" for token in ids[begin:end])
        for begin, end, marked in _runs(left_out)
    )


def _masked(ids: NDArray[Any], labels: NDArray[np.int64], encoder: Encoder) -> str:
    return "".join(
        encoder.decode(ids[begin:end])
        if not marked
        else "".join(
            f"{{{encoder.decode([token])}>{encoder.decode([target])}}}"
            for token, target in zip(ids[begin:end], labels[begin:end], strict=True)
        )
        for begin, end, marked in _runs(labels >= 0)
    )


def _runs(marks: NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """Stretches of equal marks."""
    edges = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1).tolist(), len(marks)]
    for begin, end in itertools.pairwise(edges):
        if begin < end:
            yield begin, end, bool(marks[begin])


def describe(found: dict[str, Any]) -> str:
    """One sample in lines."""
    lines = [
        f"sample {found['sample']}: number {found['consumed_as']:,} of the run; corpus {found['corpus']}, epoch"
        f" {found['epoch']}, its sample {found['index']:,}"
        + (f"; pair label {found['pair_label']}" if "pair_label" in found else "")
    ]
    for stretch in found["documents"]:
        last = stretch["first"] + stretch["tokens"]
        lines.append(
            f"  {stretch['shard']}  document {stretch['document']:,}  tokens {stretch['first']:,} to {last - 1:,} of"
            f" {stretch['document_tokens']:,}  bytes {stretch['begin_byte']:,} to {stretch['end_byte']:,}"
        )
    if "text" in found:
        lines.append(found["text"])
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)

    def show() -> int:
        for found in traced(arguments.output_dir, arguments.step, arguments.sample, text=arguments.text):
            print(json.dumps(found, ensure_ascii=False) if arguments.json else describe(found))
        return 0

    return exit_status(show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
