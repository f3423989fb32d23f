"""Sequence classification and regression on GLUE's tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.tasks import metrics as task_metrics
from pipeline.tasks.encoding import Sample, encode
from pipeline.tasks.glue import Example, GlueTask, Splits, write_submission
from pipeline.tasks.heads import ClassificationHead, Head
from pipeline.tasks.task import Outputs, Predictor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Classification:
    """One GLUE task on one model's tokens; see pipeline.tasks.task.Task."""

    glue: GlueTask
    splits: Splits
    train: list[Sample]
    dev: dict[str, list[Sample]]
    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    model_class: str = "AutoModelForSequenceClassification"
    is_text: bool = False

    @staticmethod
    def of(glue: GlueTask, splits: Splits, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> "Classification":
        dev = {name: _encode(tokenizer, examples, max_length) for name, examples in splits.dev.items()}
        return Classification(glue, splits, _encode(tokenizer, splits.train, max_length), dev, tokenizer, max_length)

    @property
    def title(self) -> str:
        return self.glue.folder

    @property
    def shown(self) -> tuple[str, ...]:
        names = self.glue.metrics
        return names if len(self.dev) == 1 else tuple(f"{name}_{split}" for split in self.dev for name in names)

    @property
    def config(self) -> dict[str, Any]:
        if self.glue.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.glue.classes))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def head(self, model: Any, device: "torch.device") -> Head:
        return ClassificationHead(model)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """Of several held-out sets each metric has the set's name behind its own."""
        found: dict[str, float] = {}
        for split, logits in outputs.items():
            labels = np.array([example.label for example in self.splits.dev[split]])
            of_split = task_metrics.compute(self.glue.metrics, labels, np.stack(logits))
            found |= {f"{name}_{split}" if len(outputs) > 1 else name: value for name, value in of_split.items()}
        return found

    def score(self, metrics: dict[str, float]) -> float:
        """The plain mean of the task's metrics, as GLUE's average takes it (Wang et al. 2018, section 5)."""
        return sum(metrics.values()) / len(metrics)

    def predict(self, model: Any, predictor: Predictor, folder: Path) -> dict[str, float]:
        for name, examples in self.splits.test.items():
            outputs = predictor.outputs(_encode(self.tokenizer, examples, self.max_length), f"{self.title} {name}")
            if predictor.world.is_first:
                write_submission(self.glue, name, examples, np.stack(outputs), folder)
        return {}


def _encode(tokenizer: "PreTrainedTokenizerFast", examples: list[Example], max_length: int) -> list[Sample]:
    seconds = [example.second or "" for example in examples] if examples[0].second is not None else None
    targets = [(0.0 if example.label is None else example.label,) for example in examples]
    return encode(tokenizer, [example.first for example in examples], seconds, targets, max_length)
