"""`python -m pipeline.score`: how plausible a model finds each line of a file.

A causal model (GPT) gives log P(line), read behind the end of a document as training shows it; a masked one (BERT) the
pseudo-log-likelihood of Salazar et al. 2020, in which each token is predicted from all others.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError, exit_status
from pipeline.text_lines import STDIN, bar, in_groups, read_lines, writing

if TYPE_CHECKING:
    from pipeline.exported import Exported

EXAMPLES = """\
examples:
  python -m pipeline.score --model exported/demo-gpt --input sentences.txt
  python -m pipeline.score --model exported/demo-gpt --input - --json < sentences.txt
  python -m pipeline.score --model exported/demo-gpt --input hypotheses.tsv --nbest --weight 0.5 --length_bonus 0.3

columns:
  log_probability (natural logarithm), tokens, perplexity (a token), bits_per_byte (of the line in UTF-8), text

n-best lists:
  lines of id, hypothesis and, optionally, an external score (of a recognizer or translation model, larger is better),
  with tabs between. Of each id the hypothesis is printed whose total is largest:
  external + weight x log_probability + length_bonus x tokens
"""

_LINES_AT_ONCE = 4096  # sorted by length together
_HEADER = ("log_probability", "tokens", "perplexity", "bits_per_byte", "text")
_NBEST_HEADER = ("id", "total", "log_probability", "tokens", "external", "text")

Scorer = Callable[[Sequence[str]], list["Score"]]


@dataclass(frozen=True)
class Score:
    """Of one text. log_probability: in nats. tokens: that it is of. text_bytes: of the text in UTF-8."""

    log_probability: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float | None:
        """exp of the mean over tokens; None without tokens."""
        return math.exp(min(-self.log_probability / self.tokens, 700.0)) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        return -self.log_probability / math.log(2) / self.text_bytes if self.text_bytes else None

    def __add__(self, other: "Score") -> "Score":
        return Score(*(getattr(self, name) + getattr(other, name) for name in asdict(self)))


@dataclass(frozen=True)
class Hypothesis:
    """A line of an n-best list."""

    id: str
    text: str
    external: float | None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.score",
        description="Log-probability, perplexity and bits per byte of a file's lines; or the best of n-best lists.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="H", help="Hugging Face folder of a GPT or BERT")
    parser.add_argument("--input", required=True, metavar="FILE", help="one text a line, UTF-8; - is stdin")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: stdout)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of tab-separated columns")
    parser.add_argument("--nbest", action="store_true", help="the lines are hypotheses: print the best of each id")
    parser.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="of log_probability in --nbest (default: %(default)s)"
    )
    parser.add_argument(
        "--length_bonus",
        type=float,
        default=0.0,
        metavar="B",
        help="added a token in --nbest: models prefer short texts (default: %(default)s)",
    )
    parser.add_argument(
        "--end", action="store_true", help="count the end of the document behind each line as a token of it (GPT only)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="GPT: tokens between the windows of a line longer than the model's positions (default: half of those)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="fp32",
        help="precision of the computation; auto: the weights' (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch_tokens", type=int, default=8192, metavar="N", help="of a forward pass (default: %(default)s)"
    )
    return parser


def make_scorer(
    exported: "Exported", *, end: bool = False, stride: int | None = None, batch_tokens: int = 8192
) -> Scorer:
    """A function from texts to their scores. end, stride: of causal models, as the flags say."""
    from pipeline.likelihood import pseudo_log_likelihood, token_log_probabilities

    special = exported.tokenizer.special

    def scores_of(texts: Sequence[str]) -> list[Score]:
        sequences = [encoding.astype(np.int64) for encoding in exported.encoder.encode_batch(list(texts))]
        if exported.objective == "causal":
            start = special.end_of_document
            if end:
                sequences = [np.append(ids, start) for ids in sequences]
            scored = token_log_probabilities(exported.model, sequences, start, stride=stride, batch_tokens=batch_tokens)
            found = [scores.log_probabilities for scores in scored]
        else:
            found = pseudo_log_likelihood(exported.model, sequences, special, batch_tokens=batch_tokens)
        return [
            Score(float(of_tokens.sum()), len(of_tokens), len(text.encode()))
            for of_tokens, text in zip(found, texts, strict=True)
        ]

    return scores_of


def read_hypotheses(name: str) -> dict[str, list[Hypothesis]]:
    """The hypotheses of an n-best list by id, in the file's order; raises UserError naming a line that is none."""
    found: dict[str, list[Hypothesis]] = {}
    columns = None
    for number, line in enumerate(read_lines(name), 1):
        fields = line.split("\t")
        if len(fields) not in (2, 3) or columns not in (None, len(fields)):
            expected = "2 or 3 (id, hypothesis[, external score])" if columns is None else f"{columns} as in line 1"
            raise UserError(f"{name}, line {number}: {len(fields)} tab-separated columns, expected {expected}")
        columns = len(fields)
        external = None
        if columns == 3:
            try:
                external = float(fields[2])
            except ValueError:
                raise UserError(
                    f"{name}, line {number}: the external score is {fields[2]!r}, expected a number"
                ) from None
        found.setdefault(fields[0], []).append(Hypothesis(fields[0], fields[1], external))
    return found


def total_of(hypothesis: Hypothesis, score: Score, weight: float, length_bonus: float) -> float:
    """What n-best lists are ordered by; larger is better."""
    return (hypothesis.external or 0.0) + weight * score.log_probability + length_bonus * score.tokens


def score_lines(name: str, scores_of: Scorer, write: Callable[[str], object], *, as_json: bool) -> tuple[int, Score]:
    """Writes a line for each line of a file, in its order; returns how many there were and their sum."""
    total, lines = Score(0.0, 0, 0), 0
    if not as_json:
        write("\t".join(_HEADER) + "\n")
    with bar("score", "line") as progress:
        for texts in in_groups(read_lines(name), _LINES_AT_ONCE):
            for text, score in zip(texts, scores_of(texts), strict=True):
                values = (score.log_probability, score.tokens, score.perplexity, score.bits_per_byte, text)
                write(_row(_HEADER, values, as_json=as_json))
                total += score
            lines += len(texts)
            progress.update(len(texts))
    return lines, total


def pick_best(
    name: str, scores_of: Scorer, write: Callable[[str], object], weight: float, length_bonus: float, *, as_json: bool
) -> tuple[int, Score]:
    """Writes the best hypothesis of each id, in the order of the ids; returns how many were scored and their sum."""
    lists = read_hypotheses(name)
    total, lines = Score(0.0, 0, 0), 0
    if not as_json:
        write("\t".join(_NBEST_HEADER) + "\n")
    with bar("score", "hypothesis", sum(map(len, lists.values()))) as progress:
        for group in _groups_of(list(lists.values())):
            scores = iter(scores_of([hypothesis.text for hypotheses in group for hypothesis in hypotheses]))
            for hypotheses in group:
                scored = [(hypothesis, next(scores)) for hypothesis in hypotheses]
                best, score = max(scored, key=lambda pair: total_of(pair[0], pair[1], weight, length_bonus))
                summed = total_of(best, score, weight, length_bonus)
                values = (best.id, summed, score.log_probability, score.tokens, best.external, best.text)
                write(_row(_NBEST_HEADER, values, as_json=as_json))
                total = sum((score for _, score in scored), total)
                lines += len(scored)
                progress.update(len(scored))
    return lines, total


def _groups_of(lists: list[list[Hypothesis]]) -> Iterator[list[list[Hypothesis]]]:
    """Whole lists, with about _LINES_AT_ONCE hypotheses together."""
    group: list[list[Hypothesis]] = []
    for hypotheses in lists:
        group.append(hypotheses)
        if sum(map(len, group)) >= _LINES_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _row(names: Sequence[str], values: Sequence[float | int | str | None], *, as_json: bool) -> str:
    if as_json:
        return json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n"
    shown = ("-" if value is None else f"{value:.6f}" if isinstance(value, float) else str(value) for value in values)
    return "\t".join(shown) + "\n"


def score(arguments: argparse.Namespace) -> int:
    from pipeline.exported import load_exported, objective_of

    if objective_of(arguments.model) == "mlm" and (arguments.end or arguments.stride is not None):
        raise UserError(f"--model {arguments.model} is a masked language model, which has no --end and no --stride")
    for name in ("batch_tokens", "stride"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more")
    if arguments.input != STDIN and not Path(arguments.input).is_file():
        raise UserError(f"--input {arguments.input} is no file")
    exported = load_exported(arguments.model, dtype=arguments.dtype)
    scores_of = make_scorer(exported, end=arguments.end, stride=arguments.stride, batch_tokens=arguments.batch_tokens)
    with writing(arguments.output) as write:
        if arguments.nbest:
            weights = (arguments.weight, arguments.length_bonus)
            lines, total = pick_best(arguments.input, scores_of, write, *weights, as_json=arguments.json)
        else:
            lines, total = score_lines(arguments.input, scores_of, write, as_json=arguments.json)
    pseudo = "pseudo-" if exported.objective == "mlm" else ""
    averages = ""
    if total.perplexity is not None and total.bits_per_byte is not None:
        averages = f", {pseudo}perplexity {total.perplexity:,.2f}, {total.bits_per_byte:.4f} bits per byte"
    print(
        f"{lines:,} lines, {total.tokens:,} tokens, {pseudo}log-probability {total.log_probability:,.2f}{averages}",
        file=sys.stderr,
    )
    return 0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: score(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
