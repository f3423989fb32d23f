"""SQuAD's metrics are the official scripts', windows keep answers where the text has them, the best spans win."""

import collections
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.tasks import squad_metrics
from pipeline.tasks.encoding import load_tokenizer
from pipeline.tasks.squad import Question, Window, best_answers, make_windows, predict_answers, read_squad
from tests.made_tasks import make_model


# An independent transcription of the definitions in evaluate-v1.1.py and evaluate-v2.0.py, in their own order of steps.
def official_normalize(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1_v1(prediction: str, gold: str) -> float:
    predicted, expected = official_normalize(prediction).split(), official_normalize(gold).split()
    same = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(predicted), 1.0 * same / len(expected)
    return (2 * precision * recall) / (precision + recall)


def official_f1_v2(gold: str, prediction: str) -> float:
    expected = official_normalize(gold).split() if gold else []
    predicted = official_normalize(prediction).split() if prediction else []
    if len(expected) == 0 or len(predicted) == 0:
        return int(expected == predicted)
    return official_f1_v1(prediction, gold)


def official_v1(golds: dict[str, list[str]], predictions: dict[str, str]) -> dict[str, float]:
    exact = f1 = 0.0
    for name, answers in golds.items():
        if name not in predictions:
            continue
        exact += max(official_normalize(predictions[name]) == official_normalize(answer) for answer in answers)
        f1 += max(official_f1_v1(predictions[name], answer) for answer in answers)
    return {"exact": 100.0 * exact / len(golds), "f1": 100.0 * f1 / len(golds)}


def official_v2(
    golds: dict[str, list[str]], predictions: dict[str, str], odds: dict[str, float], threshold: float
) -> dict[str, float]:
    exact_raw, f1_raw = {}, {}
    for name, answers in golds.items():
        answers = [answer for answer in answers if official_normalize(answer)]
        if not answers:
            answers = [""]
        exact_raw[name] = max(int(official_normalize(a) == official_normalize(predictions[name])) for a in answers)
        f1_raw[name] = max(official_f1_v2(a, predictions[name]) for a in answers)
    found: dict[str, float] = {}
    final = [
        {name: float(not golds[name]) if odds[name] > threshold else score for name, score in raw.items()}
        for raw in (exact_raw, f1_raw)
    ]
    for prefix, names in (
        ("", list(golds)),
        ("HasAns_", [name for name in golds if golds[name]]),
        ("NoAns_", [name for name in golds if not golds[name]]),
    ):
        for metric, scores in zip(("exact", "f1"), final, strict=True):
            if names:
                found[prefix + metric] = 100.0 * sum(scores[name] for name in names) / len(names)
    for metric, scores in (("exact", exact_raw), ("f1", f1_raw)):
        current = sum(1 for name in golds if not golds[name])
        best, best_threshold = current, 0.0
        for name in sorted(odds, key=lambda name: odds[name]):
            if golds[name]:
                current += scores[name]
            else:
                current += -1 if predictions[name] else 0
            if current > best:
                best, best_threshold = current, odds[name]
        found[f"best_{metric}"], found[f"best_{metric}_thresh"] = 100.0 * best / len(scores), best_threshold
    return found


def random_answer(generator: random.Random) -> str:
    words = ("the", "The", "a", "An", "cat", "Cat's", "cat.", "sat", "42", "'", "--", "naïve", "  ", "then", "a-b")
    return " ".join(generator.choices(words, k=generator.randint(0, 5)))


def test_metrics_are_the_official_scripts_on_random_answers():
    generator = random.Random(7)
    for _ in range(400):
        names = [f"q{index}" for index in range(generator.randint(1, 12))]
        golds = {name: [random_answer(generator) for _ in range(generator.randint(1, 3))] for name in names}
        predictions = {name: generator.choice([*golds[name], random_answer(generator)]) for name in names}
        # Version 1.1 gives an answer without words no F1, 2.0 does; SQuAD 1.1 has no such answers.
        worded = {name: [text or "cat" for text in map(str.strip, golds[name])] for name in names}
        worded = {name: [text if official_normalize(text) else "cat" for text in worded[name]] for name in names}
        partial = {name: text for name, text in predictions.items() if generator.random() < 0.9}
        assert squad_metrics.evaluate_v1(worded, partial) == pytest.approx(official_v1(worded, partial))
        with_none = {name: [] if generator.random() < 0.4 else answers for name, answers in golds.items()}
        odds = {name: generator.choice([generator.uniform(-3, 3), 0.0]) for name in names}
        threshold = generator.uniform(-2, 2)
        found = squad_metrics.evaluate_v2(with_none, predictions, odds, threshold)
        assert found == pytest.approx(official_v2(with_none, predictions, odds, threshold))


def test_scores_of_cases_worked_by_hand():
    assert squad_metrics.normalize('The  "Cat\'s" a-b an theme') == "cats ab theme"
    assert squad_metrics.exact("The cat.", "cat") == 1.0
    # Common: sat, on, mat of 4 and 5 words (articles do not count).
    assert squad_metrics.f1("cat sat on the mat", "it all sat on a mat") == pytest.approx(2 * 3 / (4 + 5))
    assert squad_metrics.f1("cat cat", "cat") == pytest.approx(2 / 3), "words count as often as both have them"
    assert squad_metrics.f1("", "") == 1.0 and squad_metrics.f1("", "cat") == 0.0
    golds = {"a": ["cat"], "b": [], "c": []}
    predictions = {"a": "cat", "b": "dog", "c": "dog"}
    # From the lowest odds on: 2 without any answer, 3 with a's, 2 with b's, 1 with c's.
    found = squad_metrics.evaluate_v2(golds, predictions, {"a": -2.0, "b": 1.0, "c": 2.0})
    assert (found["exact"], found["best_f1"], found["best_f1_thresh"]) == (100.0, 100.0, -2.0)
    assert (found["HasAns_f1"], found["NoAns_f1"]) == (100.0, 100.0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: load_tokenizer(make_model(folder / kind, kind)) for kind in ("bert", "gpt2")}


def squad_file(path: Path, questions: list[dict], context: str) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": questions}]}]}))
    return path


def test_official_files_are_read_and_their_mistakes_named(tmp_path):
    context = "name1 was in the film ."
    qas = [
        {"id": "1", "question": "who ?", "answers": [{"text": "name1", "answer_start": 0}], "is_impossible": False},
        {"id": "2", "question": "is ?", "answers": [], "is_impossible": True,
         "plausible_answers": [{"text": "the film", "answer_start": 13}]},
    ]  # fmt: skip
    path = squad_file(tmp_path / "a.json", qas, context)
    assert read_squad(path, answered=False) == [
        Question("1", "who ?", context, (("name1", 0),)), Question("2", "is ?", context, ()),
    ]  # fmt: skip
    assert [question.answers for question in read_squad(path, answered=None)] == [(), ()]
    with pytest.raises(UserError, match="question 2 has no answer; take --task squad_v2"):
        read_squad(path, answered=True)
    qas[0]["answers"][0]["answer_start"] = 1
    with pytest.raises(UserError, match="question 1: the context does not have 'name1' at 1"):
        read_squad(squad_file(path, qas, context), answered=False)
    path.write_text('{"version": 1}')
    with pytest.raises(UserError, match="is no SQuAD file"):
        read_squad(path, answered=False)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_every_window_that_has_the_answer_points_to_its_text(tokenizers, kind):
    """Random contexts of many windows: the target's tokens cover the answer and no word more, elsewhere it is null."""
    tokenizer, generator = tokenizers[kind], random.Random(3)
    for _ in range(40):
        words = [
            generator.choice(("name1", "film", "the", "'", "sat", "cold")) for _ in range(generator.randint(5, 90))
        ]
        context = " ".join(words)
        first = generator.randrange(len(words))
        last = min(len(words) - 1, first + generator.randrange(4))
        answer = " ".join(words[first : last + 1])
        start = len(" ".join(words[:first])) + (1 if first else 0)
        asked = " ".join(generator.choices(("who", "is"), k=generator.randint(1, 30)))
        question = Question("q", asked, context, ((answer, start),))
        samples, windows = make_windows(tokenizer, [question], 40, 12)
        covered = np.zeros(len(context), int)
        for sample, window in zip(samples, windows, strict=True):
            begin, end = (int(place) for place in sample.target)
            inside = np.flatnonzero(window.offsets[:, 0] >= 0)
            for left, right in window.offsets[inside]:
                covered[left:right] = 1
            whole = window.offsets[inside[0], 0] <= start and window.offsets[inside[-1], 1] >= start + len(answer)
            if whole:
                assert context[window.offsets[begin, 0] : window.offsets[end, 1]] == answer
            else:
                assert begin == end == window.null
            assert len(sample.input_ids) <= 40
            special = tokenizer.cls_token_id if kind == "bert" else tokenizer.eos_token_id
            assert sample.input_ids[window.null] == special
            assert window.null == (0 if kind == "bert" else len(sample.input_ids) - 1)
        assert covered.sum() == len(context) - context.count(" ")
        # Every token of the context is widest in exactly one window.
        widest = collections.Counter(
            tuple(offset) for window in windows for offset in window.offsets[window.widest].tolist()
        )
        assert set(widest.values()) == {1} and len(widest) == len(words)


def test_windows_overlap_by_the_stride(tokenizers):
    words = [f"name{index % 40}" for index in range(70)]
    question = Question("q", "who is", " ".join(words), (("name3", 18),))
    samples, windows = make_windows(tokenizers["bert"], [question], 30, 10)
    # 30 tokens less [CLS] who is [SEP] ... [SEP]: 25 of the context, of which 10 come again.
    spans = [(window.offsets[window.offsets[:, 0] >= 0][0, 0], window.offsets[:, 1].max()) for window in windows]
    starts = [len(" ".join(words[:place])) + (place > 0) for place in range(70)]
    assert [starts.index(begin) for begin, _ in spans] == [0, 15, 30, 45]
    assert len(samples[0].input_ids) == 30
    with pytest.raises(UserError, match="--doc_stride is 20, but rows of 30 tokens have room for 20"):
        make_windows(tokenizers["bert"], [question], 30, 20)


def test_answers_of_a_case_worked_by_hand():
    """Two windows over "red green blue gold", which share green; tokens 0 is null, the others the words."""
    context = "red green blue gold"
    offsets = {"red": (0, 3), "green": (4, 9), "blue": (10, 14), "gold": (15, 19)}
    rows = [["red", "green", "blue"], ["green", "blue", "gold"]]
    widest = [[0, 1, 1, 0], [0, 0, 1, 1]]  # blue is left out of the first to show that it is
    windows = [
        Window(0, np.array([(-1, -1), *(offsets[word] for word in row)], np.int32), 0, np.array(kept, bool))
        for row, kept in zip(rows, widest, strict=True)
    ]
    logits = [
        np.array([[1.0, 3.0, 2.0, 9.0], [1.0, 0.0, 1.5, 2.0]]),
        np.array([[4.0, 9.0, 2.5, 0.5], [0.5, 1.0, 2.25, 3.0]]),
    ]
    answers, null = best_answers(context, windows, logits, 20, 2)
    # blue cannot start in the first window, green not in the second; three words are too long.
    assert [answer.score for answer in answers] == [5.5, 4.75, 4.5, 4.0, 3.5, 3.5, 3.0]
    assert {answer.text: answer.score for answer in answers} == {
        "blue gold": 5.5, "blue": 4.75, "red green": 4.5, "green blue": 4.0, "gold": 3.5, "green": 3.5, "red": 3.0,
    }  # fmt: skip
    assert null.score == 2.0, "the window that finds it least likely that there is no answer"
    question = Question("q", "?", context, ())
    found = predict_answers([question], windows, logits, n_best=2, max_answer_length=2)
    assert found.texts == {"q": "blue gold"} and found.null_odds == {"q": 2.0 - 5.5}
    assert [answer.text for answer in found.candidates["q"]] == ["blue gold", "blue", ""]
