"""Our side of benchmarks/samples.py: one process a measurement, one line of JSON.

python our_samples.py first SHARDS BATCH                     from nothing to the first batch
python our_samples.py rate|tensors SHARDS BATCH SECONDS      samples a second, in the order of the run
python our_samples.py mask token|word ROWS.npz TOKENIZER BATCH SECONDS
python our_samples.py waiting SHARDS BATCH SECONDS           behind a consumer of 1,000,000 tokens a second
rate: batches as they are made. tensors: and as the int64 tensors that training gets.
"""

import functools
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peers.measuring import FirstBatch, read_ahead, samples_per_second
from data_prep.encoding import SpecialTokens
from data_prep.plan import PackSettings, prepare_plan
from data_prep.shards import ShardSet
from pipeline.order import Order
from pipeline.rows import Corpus
from pipeline.samples import Samples, Style

SEQUENCE_LENGTH = 1024
TOKENS_PER_SECOND = 1_000_000
SEED = 1234


def open_samples(folder: Path) -> Samples:
    """The training samples of a shard set; plans them where there is no plan yet, as the first start of a run does."""
    shards = ShardSet.open(folder)
    plan, _ = prepare_plan(shards, PackSettings("causal", SEQUENCE_LENGTH))
    corpus = Corpus("benchmark", shards, plan)
    order = Order([plan.train.samples], [corpus.key], [(0, np.ones(1, dtype=np.int64))], SEED)
    special = SpecialTokens(0, None, None, None, None, None)
    assert shards.vocab_size is not None
    return Samples((corpus,), order, "train", Style(special, shards.vocab_size), SEED)


def numbers(step: int, size: int) -> np.ndarray:
    return np.arange(step * size, (step + 1) * size)


def first(folder: str, batch_size: str) -> None:
    measured = FirstBatch()
    open_samples(Path(folder)).batch(numbers(0, int(batch_size)))
    measured.report()


def rate(folder: str, batch_size: str, seconds: str, *, tensors: bool = False) -> None:
    size = int(batch_size)
    for path in Path(folder).glob("*.bin"):
        read_ahead(path)
    samples = open_samples(Path(folder))
    if not tensors:
        samples_per_second(lambda step: samples.batch(numbers(step, size)), size, float(seconds))
        return
    import torch

    from pipeline.loader import to_device

    torch.set_num_threads(1)
    host = torch.device("cpu")
    samples_per_second(lambda step: to_device(samples.batch(numbers(step, size)), host), size, float(seconds))


def mask(unit: str, rows_path: str, tokenizer: str, batch_size: str, seconds: str) -> None:
    from data_prep.encoding import load_tokenizer_info
    from data_prep.randomness import hash64
    from pipeline.masking import Masking, MaskRates
    from pipeline.words import word_starts

    info, size = load_tokenizer_info(Path(tokenizer)), int(batch_size)
    masking = Masking(
        unit=unit,
        special=info.special,
        vocab_size=info.vocab_size,
        word_starts=word_starts(Path(tokenizer)) if unit == "word" else None,
    )
    rates = MaskRates(0.15, 0.8, 0.1)
    with np.load(rows_path) as rows:
        ids = rows["ids"]
    count = len(ids) // size * size

    def make(step: int) -> object:
        place = step * size % count
        batch = ids[place : place + size].copy()
        return batch, masking.apply(batch, hash64(1, numbers(step, size)), rates, None)

    samples_per_second(make, size, float(seconds))


def waiting(folder: str, batch_size: str, seconds: str) -> None:
    """Prints the share of the steps' time that went into waiting, after the first step, and the share of a core that
    making the batches takes at that rate."""
    import torch

    from pipeline.loader import Ahead

    torch.set_num_threads(1)
    size = int(batch_size)
    step_seconds = size * SEQUENCE_LENGTH / TOKENS_PER_SECOND
    steps = max(2, round(float(seconds) / step_seconds))
    samples = open_samples(Path(folder))
    loader = Ahead(lambda step: [samples.batch(numbers(step, size))], 0, steps + 1, torch.device("cpu"))
    loader.next()
    waited, started, processor = 0.0, time.perf_counter(), time.process_time()
    for _ in range(steps):
        time.sleep(step_seconds)
        _, seconds_waited = loader.next()
        waited += seconds_waited
    elapsed, processor = time.perf_counter() - started, time.process_time() - processor
    loader.close()
    tokens = steps * size * SEQUENCE_LENGTH
    print(
        json.dumps(
            {
                "waited_percent": 100 * waited / elapsed,
                "core_percent": 100 * processor / (tokens / TOKENS_PER_SECOND),
            }
        )
    )


if __name__ == "__main__":
    tensors = functools.partial(rate, tensors=True)
    modes = {"first": first, "rate": rate, "tensors": tensors, "mask": mask, "waiting": waiting}
    modes[sys.argv[1]](*sys.argv[2:])
