"""A causal model fine-tuned on pairs of texts, such as translations or summaries: the target is learned, the source is
only read. A row is `source` + separator + `target` + end of document; a prompt is what stands before the target."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep import durable
from data_prep.errors import UserError
from pipeline.tasks.encoding import Sample
from pipeline.tasks.heads import Head, TextHead
from pipeline.tasks.task import Outputs, Predictor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_VALIDATION = "validation"
_ENDINGS = ("jsonl", "tsv")


@dataclass(frozen=True)
class Pair:
    """target: None in test sets."""

    source: str
    target: str | None


def read_pairs(path: Path, *, with_targets: bool = True) -> list[Pair]:
    """The pairs of a .jsonl file (objects with "source" and "target") or a .tsv file (source, tab, target; no header,
    no quoting). Raises UserError naming the line that is none."""
    found = []
    try:
        file = open(path, encoding="utf-8", newline="\n")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            line = line.removesuffix("\n").removesuffix("\r")
            if path.suffix == ".jsonl":
                try:
                    row: Any = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no JSON ({error})") from None
                texts = [row.get("source"), row.get("target")] if isinstance(row, dict) else []
            else:
                texts = [*line.split("\t"), None][:2] if line.count("\t") < 2 else []
            texts = texts if with_targets else [*texts[:1], ""]
            if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                expected = 'an object with "source" and "target"' if path.suffix == ".jsonl" else "source, tab, target"
                raise UserError(f"{path}, line {number}: found {line[:60]!r}, expected {expected}")
            found.append(Pair(str(texts[0]), texts[1] if with_targets else None))
    if not found:
        raise UserError(f"{path} holds no pairs")
    return found


def make_rows(
    tokenizer: "PreTrainedTokenizerFast", pairs: Sequence[Pair], max_length: int, separator: str
) -> list[Sample]:
    """A row a pair, whose target number is that of its prompt's tokens; pairs without a target give prompts alone.

    Prompt and target are encoded apart, so that a prompt has the same tokens in training and in use. What is too long
    loses the source's beginning, and a target longer than `max_length` - 1 its end.
    """
    prompts = tokenizer([pair.source + separator for pair in pairs], add_special_tokens=False)["input_ids"]
    targets = tokenizer([pair.target or "" for pair in pairs], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    found = []
    for pair, prompt, target in zip(pairs, prompts, targets, strict=True):
        answer = [] if pair.target is None else [*target, end][: max_length - 1]
        prompt = (prompt or [end])[-(max_length - len(answer)) :]
        ids = np.array([*prompt, *answer], np.int32)
        found.append(Sample(ids, np.zeros(len(ids), np.int8), (len(prompt),)))
    return found


@dataclass(frozen=True)
class TextToText:
    """Pairs of texts on one model's tokens; see pipeline.tasks.task.Task."""

    train: list[Sample]
    dev: dict[str, list[Sample]]
    dev_pairs: list[Pair]
    test_pairs: list[Pair]
    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    separator: str
    max_new_tokens: int
    title: str = "text to text"
    model_class: str = "AutoModelForCausalLM"
    is_text: bool = True
    shown: tuple[str, ...] = ("loss", "perplexity", "exact_match")

    @staticmethod
    def of(
        data_dir: Path, tokenizer: "PreTrainedTokenizerFast", max_length: int, separator: str, max_new_tokens: int
    ) -> "TextToText":
        """Raises UserError for missing files or lines that are no pairs."""
        files = {
            stem: next((path for end in _ENDINGS if (path := data_dir / f"{stem}.{end}").is_file()), None)
            for stem in ("train", "dev", "test")
        }
        train, dev, test = files.values()
        if train is None or dev is None:
            raise UserError(f"--data_dir {data_dir}: expected train.jsonl (or .tsv) and dev.jsonl (or .tsv) in it")
        if tokenizer.eos_token_id is None:
            raise UserError("--task text_to_text needs a tokenizer with an eos_token, which ends a target")
        dev_pairs = read_pairs(dev)
        return TextToText(
            make_rows(tokenizer, read_pairs(train), max_length, separator),
            {_VALIDATION: make_rows(tokenizer, dev_pairs, max_length, separator)},
            dev_pairs,
            [] if test is None else read_pairs(test, with_targets=False),
            tokenizer,
            max_length,
            separator,
            max_new_tokens,
        )

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def head(self, model: Any, device: "torch.device") -> Head:
        return TextHead(model, device)

    def metrics(self, outputs: Outputs) -> dict[str, float]:
        """loss: nats a token of the targets, their ends included; perplexity: its exponential."""
        nats, tokens = np.stack(outputs[_VALIDATION]).sum(axis=0, dtype=np.float64).tolist()
        return {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0))}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["loss"]

    def predict(self, model: Any, predictor: Predictor, folder: Path) -> dict[str, float]:
        """generations.jsonl: source, target and what the model writes for each source of the dev set, taking the
        likeliest token each time; test_generations.jsonl of a test set. exact_match: share of the dev targets met."""
        found = {}
        for name, pairs in (("generations", self.dev_pairs), ("test_generations", self.test_pairs)):
            written = self._generate(model, predictor, pairs)
            if predictor.world.is_first and pairs:
                lines = (
                    {"source": pair.source, "target": pair.target, "prediction": text}
                    for pair, text in zip(pairs, written, strict=True)
                )
                content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                durable.write_bytes(folder / f"{name}.jsonl", content.encode())
                if name == "generations":
                    met = sum((pair.target or "").strip() == text for pair, text in zip(pairs, written, strict=True))
                    found["exact_match"] = met / len(pairs)
        return found

    def _generate(self, model: Any, predictor: Predictor, pairs: list[Pair]) -> list[str]:
        """What follows each source, on rank 0: every rank takes its share of the prompts, left-padded batches of like
        length."""
        import torch
        from torch import distributed
        from tqdm import tqdm

        world = predictor.world
        prompts = make_rows(
            self.tokenizer, [Pair(pair.source, None) for pair in pairs], self.max_length, self.separator
        )
        longest = _room(model, self.max_new_tokens)
        padding = self.tokenizer.pad_token_id
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].input_ids))
        mine = order[world.rank :: world.size]
        found: dict[int, str] = {}
        model.eval()
        bar = tqdm(
            total=len(mine),
            desc="generate",
            unit="text",
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not (world.is_first and sys.stderr.isatty()),
        )
        for numbers in _groups(mine, predictor.batch_size):
            rows = [prompts[number].input_ids[-longest:] for number in numbers]
            width = max(map(len, rows))
            ids = np.full((len(rows), width), padding, np.int64)
            mask = np.zeros((len(rows), width), np.int64)
            for place, row in enumerate(rows):
                ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
            with torch.no_grad():
                written = model.generate(
                    input_ids=torch.from_numpy(ids).to(world.device),
                    attention_mask=torch.from_numpy(mask).to(world.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=padding,
                )
            texts = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            found |= dict(zip(numbers, (text.strip() for text in texts), strict=True))
            bar.update(len(numbers))
        bar.close()
        gathered: list[Any] = [None] * world.size if world.is_first else []
        distributed.gather_object(found, gathered if world.is_first else None)
        texts_of = {number: text for rank in gathered for number, text in rank.items()}
        return [texts_of[number] for number in range(len(pairs))] if world.is_first else []


def _room(model: Any, max_new_tokens: int) -> int:
    """Tokens of a prompt that leave room for an answer; raises UserError where there are none."""
    from pipeline.model import longest_input

    room = longest_input(model.config) - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens is {max_new_tokens}, but the model has {room + max_new_tokens} positions for prompt and"
            " target; lower it"
        )
    return room


def _groups(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
