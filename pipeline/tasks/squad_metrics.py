"""SQuAD's official metrics (Rajpurkar et al. 2016, section 6.1, and 2018, section 5; evaluate-v1.1.py and -v2.0.py).

Numbers are percentages, as those scripts print them.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Golds = Mapping[str, Sequence[str]]
"""The answers of each question by its id; none for a question that has no answer."""


def normalize(answer: str) -> str:
    """Lower case, without ASCII punctuation, articles and needless spaces, in this order."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, prediction: str) -> float:
    return float(normalize(gold) == normalize(prediction))


def f1(gold: str, prediction: str) -> float:
    """Harmonic mean of precision and recall over the words that both have, counted as often as in both; where either
    has no words, 1 if neither has."""
    gold_words, words = normalize(gold).split(), normalize(prediction).split()
    if not gold_words or not words:
        return float(gold_words == words)
    common = (Counter(gold_words) & Counter(words)).total()
    return 2 * common / (len(gold_words) + len(words))


def question_scores(golds: Golds, predictions: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """(exact, F1) of each question: the best over its answers. A question that has none is right with an empty
    prediction; one without a prediction has 0."""
    found = {}
    for name, answers in golds.items():
        if name not in predictions:
            found[name] = (0.0, 0.0)
            continue
        # An answer of nothing but articles and punctuation is none; evaluate-v2.0.py drops it.
        answers = [answer for answer in answers if normalize(answer)] or [""]
        prediction = predictions[name]
        found[name] = (
            max(exact(answer, prediction) for answer in answers),
            max(f1(answer, prediction) for answer in answers),
        )
    return found


def evaluate_v1(golds: Golds, predictions: Mapping[str, str]) -> dict[str, float]:
    """exact and f1 of SQuAD 1.1, where every question has answers."""
    return _means(question_scores(golds, predictions), golds)


def evaluate_v2(
    golds: Golds, predictions: Mapping[str, str], null_odds: Mapping[str, float], threshold: float | None = None
) -> dict[str, float]:
    """exact and f1 of SQuAD 2.0, of all questions, those with an answer (HasAns) and those without (NoAns).

    predictions: the likeliest text of each question. null_odds: how much likelier none is; above `threshold` a question
    counts as answered with nothing. Without a threshold, the one with the best F1 on these questions is taken, as
    evaluate-v2.0.py finds it; best_exact and best_f1 with their _thresh are what each would reach with its own.
    """
    scores = question_scores(golds, predictions)
    best_exact, exact_threshold = best_threshold(golds, predictions, null_odds, {k: v[0] for k, v in scores.items()})
    best_f1, f1_threshold = best_threshold(golds, predictions, null_odds, {k: v[1] for k, v in scores.items()})
    chosen = f1_threshold if threshold is None else threshold
    final = {
        name: (float(not golds[name]),) * 2 if null_odds[name] > chosen else score for name, score in scores.items()
    }
    found = _means(final, golds)
    for prefix, names in (
        ("HasAns_", [name for name, answers in golds.items() if answers]),
        ("NoAns_", [name for name, answers in golds.items() if not answers]),
    ):
        if names:
            found |= {prefix + metric: value for metric, value in _means(final, names).items()}
    return found | {
        "best_exact": best_exact,
        "best_exact_thresh": exact_threshold,
        "best_f1": best_f1,
        "best_f1_thresh": f1_threshold,
    }


def apply_threshold(predictions: Mapping[str, str], null_odds: Mapping[str, float], threshold: float) -> dict[str, str]:
    """Predictions, empty where none is likelier by more than the threshold."""
    return {name: "" if null_odds[name] > threshold else text for name, text in predictions.items()}


def best_threshold(
    golds: Golds, predictions: Mapping[str, str], null_odds: Mapping[str, float], scores: Mapping[str, float]
) -> tuple[float, float]:
    """The best mean score in percent that a threshold reaches, and that threshold (find_best_thresh of the script: the
    questions are given their predictions one by one, from the lowest odds on; 0 where no prediction is worth it)."""
    current = best = float(sum(not answers for answers in golds.values()))
    threshold = 0.0
    for name in sorted(null_odds, key=lambda name: null_odds[name]):
        if golds[name]:
            current += scores[name]
        elif predictions[name]:
            current -= 1
        if current > best:
            best, threshold = current, null_odds[name]
    return 100.0 * best / len(scores), threshold


def _means(scores: Mapping[str, tuple[float, float]], names: Iterable[str]) -> dict[str, float]:
    chosen = [scores[name] for name in names]
    return {
        metric: 100.0 * sum(score[place] for score in chosen) / len(chosen)
        for place, metric in enumerate(("exact", "f1"))
    }
