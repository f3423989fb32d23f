"""SQuAD 1.1 and 2.0: the official json, windows over long contexts, and answers from the logits of their tokens."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep import durable
from data_prep.errors import UserError
from pipeline.tasks.encoding import Sample
from pipeline.tasks.heads import Head, SpanHead
from pipeline.tasks.squad_metrics import apply_threshold, evaluate_v1, evaluate_v2
from pipeline.tasks.task import Outputs, Predictor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_QUESTION_TOKENS = 64  # of a question that are kept (run_squad.py's max_query_length); at most a quarter of the row
_CHUNK = 512
_VALIDATION = "validation"


@dataclass(frozen=True)
class Question:
    """answers: (text, its place in the context in characters); none where it cannot be answered, or in test sets."""

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Window:
    """A row with a question and a part of its context.

    question: its number. offsets: of each token in the context, in characters [tokens, 2]; -1 outside it. null: the
    token whose logits say that the answer is not here. widest: whether a token of the context has more context around
    it here than in the question's other windows [tokens].
    """

    question: int
    offsets: NDArray[np.int32]
    null: int
    widest: NDArray[np.bool_]


@dataclass(frozen=True)
class Answer:
    """One candidate: its text, and the logits of its first and last token."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


def read_squad(path: Path, *, answered: bool | None) -> list[Question]:
    """The questions of an official file. answered: True where each has to have an answer (1.1), False where some have
    none (2.0), None for test sets, whose answers are not read.

    Raises UserError for another format, an unanswered question where there may be none, or an answer that does not
    stand where the file says.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    found = []
    try:
        for article in raw["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    answers: tuple[tuple[str, int], ...] = ()
                    if answered is not None and not entry.get("is_impossible", False):
                        answers = tuple((answer["text"], int(answer["answer_start"])) for answer in entry["answers"])
                    for text, start in answers:
                        if context[start : start + len(text)] != text:
                            raise UserError(
                                f"{path}: question {entry['id']}: the context does not have {text!r} at {start}"
                            )
                    if answered and not answers:
                        raise UserError(f"{path}: question {entry['id']} has no answer; take --task squad_v2")
                    found.append(Question(entry["id"], entry["question"], context, answers))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no SQuAD file: expected data[].paragraphs[].qas[] with id, question and answers ({error})"
        ) from None
    if not found:
        raise UserError(f"{path} holds no questions")
    return found


def make_windows(
    tokenizer: "PreTrainedTokenizerFast", questions: Sequence[Question], max_length: int, doc_stride: int
) -> tuple[list[Sample], list[Window]]:
    """Rows of question and context, of which long ones take several windows with `doc_stride` tokens in common.

    The target of a row is the span of the first answer's tokens, or the null token twice where the window does not have
    all of it. Raises UserError when a window has no room for more than the common tokens.
    """
    limit = min(_QUESTION_TOKENS, max_length // 4)
    room = max_length - limit - tokenizer.num_special_tokens_to_add(pair=True)
    if doc_stride >= room:
        raise UserError(
            f"--doc_stride is {doc_stride}, but rows of {max_length} tokens have room for {room} of the context beside"
            f" a question of {limit}; expected less than that"
        )
    samples: list[Sample] = []
    windows: list[Window] = []
    for first in range(0, len(questions), _CHUNK):
        chunk = questions[first : first + _CHUNK]
        encoded = tokenizer(
            _shortened(tokenizer, [question.text.lstrip() for question in chunk], limit),
            [question.context for question in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_token_type_ids=True,
        )
        for encoding, owner in zip(encoded.encodings, encoded["overflow_to_sample_mapping"], strict=True):
            in_context = np.array([sequence == 1 for sequence in encoding.sequence_ids])
            offsets = np.where(in_context[:, None], np.array(encoding.offsets), -1).astype(np.int32)
            ids = np.array(encoding.ids, np.int32)
            null = _null_token(ids, tokenizer.cls_token_id)
            windows.append(Window(first + owner, offsets, null, in_context))
            samples.append(
                Sample(ids, np.array(encoding.type_ids, np.int8), _target(chunk[owner].answers, offsets, null))
            )
    return samples, _with_widest(windows)


def _shortened(tokenizer: "PreTrainedTokenizerFast", texts: list[str], limit: int) -> list[str]:
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(offsets) <= limit else text[: offsets[limit - 1][1]]
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def _null_token(ids: NDArray[np.int32], classification: int | None) -> int:
    """[CLS], or the end of the row: a causal model's first token has seen nothing."""
    places = [] if classification is None else np.flatnonzero(ids == classification).tolist()
    return int(places[0]) if places else len(ids) - 1


def _target(answers: Sequence[tuple[str, int]], offsets: NDArray[np.int32], null: int) -> tuple[float, float]:
    if not answers:
        return null, null
    text, start = answers[0]
    end = start + len(text)
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return null, null
    touched = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (null, null)


def _with_widest(windows: list[Window]) -> list[Window]:
    """The windows with `widest` worked out: a token counts where the smaller of its two sides is largest, with a
    hundredth of the window's length beside (`_check_is_max_context` of run_squad.py)."""
    best: dict[tuple[int, int, int], tuple[float, int]] = {}
    for number, window in enumerate(windows):
        inside = np.flatnonzero(window.widest)
        for place, token in enumerate(inside.tolist()):
            score = min(place, len(inside) - 1 - place) + 0.01 * len(inside)
            key = _place_of(window, token)
            if key not in best or score > best[key][0]:
                best[key] = (score, number)
    found = []
    for number, window in enumerate(windows):
        widest = window.widest.copy()
        for token in np.flatnonzero(window.widest).tolist():
            widest[token] = best[_place_of(window, token)][1] == number
        found.append(Window(window.question, window.offsets, window.null, widest))
    return found


def _place_of(window: Window, token: int) -> tuple[int, int, int]:
    """Which token of which context it is."""
    return window.question, int(window.offsets[token, 0]), int(window.offsets[token, 1])


def best_answers(
    context: str,
    windows: Sequence[Window],
    logits: Sequence[NDArray[Any]],
    n_best: int,
    max_answer_length: int,
) -> tuple[list[Answer], Answer]:
    """The candidates of one question from its windows, best first, each text once and never empty; and the answer that
    there is none: that of the window which finds it least likely, as the others may lie beside the answer.

    logits: of first and last tokens for each window [2, tokens].
    """
    found: list[Answer] = []
    nulls = []
    for window, (starts, ends) in zip(windows, logits, strict=True):
        nulls.append(Answer("", float(starts[window.null]), float(ends[window.null])))
        inside = np.flatnonzero(window.offsets[:, 0] >= 0)
        widest = np.flatnonzero(window.widest)
        first = widest[np.argsort(-starts[widest], kind="stable")[:n_best]]
        last = inside[np.argsort(-ends[inside], kind="stable")[:n_best]]
        lengths = last[None, :] - first[:, None] + 1
        for row, column in np.argwhere((lengths >= 1) & (lengths <= max_answer_length)):
            start, end = first[row], last[column]
            text = context[window.offsets[start, 0] : window.offsets[end, 1]].strip()
            found.append(Answer(text, float(starts[start]), float(ends[end])))
    unique: dict[str, Answer] = {}
    for answer in sorted(found, key=lambda answer: -answer.score):
        if answer.text and answer.text not in unique and len(unique) < n_best:
            unique[answer.text] = answer
    return list(unique.values()), min(nulls, key=lambda answer: answer.score)


@dataclass(frozen=True)
class Predictions:
    """By question: the likeliest text, how much likelier no answer is (difference of logits), and the candidates."""

    texts: dict[str, str]
    null_odds: dict[str, float]
    candidates: dict[str, list[Answer]]


def predict_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    outputs: Sequence[NDArray[Any]],
    *,
    n_best: int,
    max_answer_length: int,
) -> Predictions:
    of_question: list[list[int]] = [[] for _ in questions]
    for number, window in enumerate(windows):
        of_question[window.question].append(number)
    found = Predictions({}, {}, {})
    for question, numbers in zip(questions, of_question, strict=True):
        answers, null = best_answers(
            question.context,
            [windows[number] for number in numbers],
            [outputs[number] for number in numbers],
            n_best,
            max_answer_length,
        )
        best = answers[0] if answers else null
        found.texts[question.id] = best.text
        found.null_odds[question.id] = null.score - best.score
        found.candidates[question.id] = sorted([*answers, null], key=lambda answer: -answer.score)
    return found


def _probabilities(answers: Sequence[Answer]) -> list[float]:
    """Softmax over the scores."""
    highest = max(answer.score for answer in answers)
    exponentials = [math.exp(answer.score - highest) for answer in answers]
    return [value / sum(exponentials) for value in exponentials]


@dataclass(frozen=True)
class QuestionAnswering:
    """SQuAD on one model's tokens; see pipeline.tasks.task.Task. has_unanswerable: it is 2.0."""

    title: str
    has_unanswerable: bool
    train: list[Sample]
    dev: dict[str, list[Sample]]
    questions: list[Question]
    windows: list[Window]
    test: list[Question]
    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    doc_stride: int
    n_best: int
    max_answer_length: int
    model_class: str = "AutoModelForQuestionAnswering"
    is_text: bool = False
    shown: tuple[str, ...] = ("exact", "f1")

    @staticmethod
    def of(
        name: str,
        data_dir: Path,
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int,
        doc_stride: int,
        *,
        n_best: int,
        max_answer_length: int,
    ) -> "QuestionAnswering":
        """name: squad or squad_v2. Raises UserError as `read_squad` does."""
        version = {"squad": "1.1", "squad_v2": "2.0"}[name]

        def find(stem: str) -> Path | None:
            names = (f"{stem}-v{version}.json", f"{stem}.json")
            return next((data_dir / name for name in names if (data_dir / name).is_file()), None)

        train, dev, test = (find(stem) for stem in ("train", "dev", "test"))
        if train is None or dev is None:
            raise UserError(f"--data_dir {data_dir}: expected train-v{version}.json and dev-v{version}.json in it")
        answered = name == "squad"
        training, _ = make_windows(tokenizer, read_squad(train, answered=answered), max_length, doc_stride)
        questions = read_squad(dev, answered=answered)
        samples, windows = make_windows(tokenizer, questions, max_length, doc_stride)
        return QuestionAnswering(
            title=f"SQuAD {version}",
            has_unanswerable=not answered,
            train=training,
            dev={_VALIDATION: samples},
            questions=questions,
            windows=windows,
            test=[] if test is None else read_squad(test, answered=None),
            tokenizer=tokenizer,
            max_length=max_length,
            doc_stride=doc_stride,
            n_best=n_best,
            max_answer_length=max_answer_length,
        )

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def head(self, model: Any, device: "torch.device") -> Head:
        return SpanHead(model)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        found = self._predicted(self.questions, self.windows, outputs[_VALIDATION])
        golds = {question.id: [text for text, _ in question.answers] for question in self.questions}
        if self.has_unanswerable:
            return evaluate_v2(golds, found.texts, found.null_odds)
        return evaluate_v1(golds, found.texts)

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["f1"]

    def predict(self, model: Any, predictor: Predictor, folder: Path) -> dict[str, float]:
        """predictions.json, nbest_predictions.json and, of 2.0, null_odds.json, as run_squad.py writes them for the dev
        set; of a test set the same with test_ before. Both use the threshold with the best F1 on the dev set."""
        outputs = predictor.outputs(self.dev[_VALIDATION], _VALIDATION)
        threshold = math.inf
        if predictor.world.is_first:
            if self.has_unanswerable:
                threshold = self.metrics({_VALIDATION: outputs})["best_f1_thresh"]
            self._write(folder, "", self._predicted(self.questions, self.windows, outputs), threshold)
        if self.test:
            samples, windows = make_windows(self.tokenizer, self.test, self.max_length, self.doc_stride)
            outputs = predictor.outputs(samples, "test")
            if predictor.world.is_first:
                self._write(folder, "test_", self._predicted(self.test, windows, outputs), threshold)
        return {}

    def _predicted(self, questions: list[Question], windows: list[Window], outputs: list[NDArray[Any]]) -> Predictions:
        sizes = {"n_best": self.n_best, "max_answer_length": self.max_answer_length}
        return predict_answers(questions, windows, outputs, **sizes)

    def _write(self, folder: Path, prefix: str, found: Predictions, threshold: float) -> None:
        texts = found.texts
        if self.has_unanswerable:
            texts = apply_threshold(found.texts, found.null_odds, threshold)
            durable.write_json(folder / f"{prefix}null_odds.json", found.null_odds)
        durable.write_json(folder / f"{prefix}predictions.json", texts)
        best: dict[str, list[dict[str, Any]]] = {}
        for name, answers in found.candidates.items():
            chosen = answers if self.has_unanswerable else [answer for answer in answers if answer.text] or answers
            best[name] = [
                {
                    "text": answer.text,
                    "probability": probability,
                    "start_logit": answer.start_logit,
                    "end_logit": answer.end_logit,
                }
                for answer, probability in zip(chosen, _probabilities(chosen), strict=True)
            ]
        durable.write_json(folder / f"{prefix}nbest_predictions.json", best)
