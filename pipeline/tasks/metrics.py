"""Metrics of classification and regression, as GLUE names them (Wang et al. 2018, table 1)."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray


def compute(names: Sequence[str], labels: NDArray[Any], outputs: NDArray[Any]) -> dict[str, float]:
    """Metrics by name: accuracy, f1 (of class 1), matthews (correlation), pearson, spearman; each at most 1.

    labels: class numbers or scores [examples]. outputs: logits [examples, classes], or scores [examples, 1]. A
    correlation with constant outputs, which is not defined, counts as 0, as Matthews' does.
    """
    import warnings

    from scipy import stats
    from sklearn import metrics

    predicted = outputs.argmax(-1) if outputs.shape[1] > 1 else outputs[:, 0]

    def correlation(function: Any) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            found = float(function(predicted, labels).statistic)
        return 0.0 if found != found else found

    known = {
        "accuracy": lambda: float(metrics.accuracy_score(labels, predicted)),
        "f1": lambda: float(metrics.f1_score(labels, predicted, zero_division=0)),
        "matthews": lambda: float(metrics.matthews_corrcoef(labels, predicted)),
        "pearson": lambda: correlation(stats.pearsonr),
        "spearman": lambda: correlation(stats.spearmanr),
    }
    return {name: known[name]() for name in names}
