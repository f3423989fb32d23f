"""The README.md of an exported model: what it is, what it was trained on and how, and what it reached."""

import json
from collections.abc import Sequence
from typing import Any

from data_prep.errors import UserError
from data_prep.shards import ShardSet
from pipeline.recipe import Recipe

_LOSSES = 20  # rows of the table, the first and last evaluation among them


def model_card(
    run: dict[str, Any], recipe: Recipe, step: int, samples: int, losses: Sequence[tuple[int, float]], precision: str
) -> str:
    """run: of `run.json`. step, samples: of the checkpoint. losses: (step, nats a token) up to there. precision: of
    the weights in training."""
    causal = recipe.objective == "causal"
    auto = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    shown = [losses[round(i * (len(losses) - 1) / (_LOSSES - 1))] for i in range(_LOSSES)]
    rows = "\n".join(f"| {at} | {loss:.4f} |" for at, loss in (shown if len(losses) > _LOSSES else losses))
    return f"""---
library_name: transformers
pipeline_tag: {"text-generation" if causal else "fill-mask"}
---
# {run["model_config"]["model_type"]}, {recipe.objective}, {step} steps

Pretrained on {samples:,} samples of {recipe.data.sequence_length} tokens in {precision}\
{f", from {recipe.model.init_from}" if recipe.model.init_from else ", from scratch"}.

```python
from transformers import {auto}, AutoTokenizer

model, tokenizer = {auto}.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
{_USES[recipe.objective]}

## Data

| corpus | documents | tokens | MB of text | fingerprint (sha256) |
|---|---|---|---|---|
{_corpora(run["corpora"], recipe)}

Tokenizer: fingerprint {run["tokenizer_fingerprint"]}.

## Losses on held-out documents

| step | nats a token |
|---|---|
{rows}

## Recipe

```json
{json.dumps(run["recipe"], indent=2)}
```

DeepSpeed's configuration:
```json
{json.dumps(run["deepspeed_config"], indent=2)}
```

Commit {run["git_commit"]}; {versions}.
"""


_USES = {
    "causal": "A document begins behind the end of the one before: give the model `tokenizer.eos_token_id` and then the"
    " text, as in training. Texts are tokenized without special tokens.",
    "mlm": "`pipeline('fill-mask', model=FOLDER)` fills `[MASK]`.",
}


def _corpora(fingerprints: dict[str, str], recipe: Recipe) -> str:
    """Rows of the table; the sizes of corpora whose shards are at hand as the run had them."""
    from pipeline.data import open_shards

    try:
        sets: dict[str, ShardSet] = open_shards(recipe.data)[0]
    except (UserError, OSError):
        sets = {}
    rows = []
    for name, fingerprint in fingerprints.items():
        shards = sets.get(name)
        sizes = ["", "", ""]
        if shards is not None and shards.fingerprint == fingerprint:
            text = "" if shards.text_bytes is None else f"{shards.text_bytes / 1e6:,.1f}"
            sizes = [f"{sum(shards.documents):,}", f"{sum(shards.tokens):,}", text]
        rows.append(f"| {name} | {' | '.join(sizes)} | {fingerprint} |")
    return "\n".join(rows)
