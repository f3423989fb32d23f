"""Samples of shard sets for tests, as pipeline.data puts them together from a recipe."""

from pathlib import Path
from typing import Any

from data_prep.encoding import load_tokenizer_info
from data_prep.plan import PackSettings, prepare_plan
from data_prep.shards import ShardSet
from pipeline.order import Order, shares_of
from pipeline.rows import Corpus
from pipeline.samples import Samples, Style


def made_samples(
    sets: dict[str, ShardSet],
    tokenizer: Path,
    settings: PackSettings,
    split: str = "train",
    *,
    seed: int = 1234,
    stages: dict[int, dict[str, float]] | None = None,
    **style: Any,
) -> Samples:
    """stages: first number -> weights of the corpora (none: in proportion to their samples)."""
    info = load_tokenizer_info(tokenizer)
    corpora = tuple(Corpus(name, shards, prepare_plan(shards, settings)[0]) for name, shards in sets.items())
    sizes = [corpus.plan.split(split).samples for corpus in corpora]
    weights = stages or {0: {corpus.name: float(size) for corpus, size in zip(corpora, sizes, strict=True)}}
    order = Order(
        sizes,
        [corpus.key for corpus in corpora],
        [(first, shares_of(given, list(sets))) for first, given in weights.items()] if split == "train" else [],
        seed,
    )
    return Samples(corpora, order, split, Style(info.special, info.vocab_size, **style), seed)
