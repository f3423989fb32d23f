"""The data of a run: tokenizer, shards and plan checked against one another, and batches made ahead of the step."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.encoding import TokenizerInfo, load_tokenizer_info
from data_prep.errors import UserError
from data_prep.pack import Plan, make_plan, read_plan, write_plan
from data_prep.shards import ShardSet, has_shards, survey
from pipeline.batch import BatchPlan
from pipeline.recipe import DataSection, Recipe
from pipeline.samples import Batch, Samples

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on.

    notes: lines for the log, such as what could not be checked.
    """

    tokenizer: TokenizerInfo
    shards: ShardSet
    plan: Plan
    train: Samples
    validation: Samples
    notes: tuple[str, ...] = ()


def is_missing(section: DataSection) -> bool:
    """True when the shards are not there (or not finished) but the recipe says how to make them."""
    return section.prepare is not None and not has_shards(Path(section.shards))


def prepare(section: DataSection) -> None:
    """Runs the recipe's data_prep job; raises UserError when it fails or makes other shards."""
    from data_prep.__main__ import run_stage

    assert section.prepare is not None
    run_stage("run", [section.prepare])
    if is_missing(section):
        raise UserError(f"data.prepare: {section.prepare} does not make data.shards {section.shards}")


def wait_for_shards(section: DataSection) -> None:
    """Returns when another rank has made the shards. A collective would do, but for its time-out: a corpus may take
    hours. (When that rank fails, the launcher ends this one.)"""
    while is_missing(section):
        time.sleep(0.2)


def open_shards(section: DataSection) -> ShardSet:
    """The recipe's shards; raises UserError saying how to make them when they are missing."""
    folder = Path(section.shards)
    if not has_shards(folder):
        raise UserError(
            f"data.shards: {folder} holds no finished shards; make them with `python -m data_prep tokenize --input ..."
            f" --tokenizer {section.tokenizer} --output_dir {folder}`"
        )
    return ShardSet.open(folder)


def plan_samples(recipe: Recipe) -> None:
    """Writes the plan of the recipe's samples beside the shards unless it is there, whole and of these shards."""
    section = recipe.data
    shards = open_shards(section)
    settings = (recipe.objective, section.sequence_length, section.validation_fraction)
    plan = make_plan(shards, *settings)
    if read_plan(shards, *settings) != plan:
        write_plan(shards.folder, plan)


def open_data(recipe: Recipe) -> Data:
    """Opens tokenizer, shards and plan.

    Raises UserError when one is missing, or when the shards were made with another tokenizer.
    """
    section = recipe.data
    shards = open_shards(section)
    tokenizer = load_tokenizer_info(Path(section.tokenizer))
    notes: tuple[str, ...] = ()
    if shards.tokenizer_fingerprint is None:
        shards, notes = adopt(shards, tokenizer)
    elif tokenizer.fingerprint != shards.tokenizer_fingerprint:
        raise UserError(
            f"data.tokenizer {section.tokenizer} has fingerprint {tokenizer.fingerprint[:12]}, but the shards in"
            f" {shards.folder} were made with {shards.tokenizer_fingerprint[:12]}; name the tokenizer that made them,"
            " or tokenize again"
        )
    plan = read_plan(shards, recipe.objective, section.sequence_length, section.validation_fraction)
    if plan is None:
        raise UserError(f"{shards.folder} has no plan for these samples; run `python -m data_prep pack` (see --help)")
    train, validation = (
        Samples(shards, plan, split, seed=recipe.seed, special=tokenizer.special, masking=recipe.masking)
        for split in ("train", "validation")
    )
    return Data(tokenizer, shards, plan, train, validation, notes)


def adopt(shards: ShardSet, tokenizer: TokenizerInfo) -> tuple[ShardSet, tuple[str, ...]]:
    """Shards of another program with what their files do not say taken from `tokenizer`, and what to log about it.

    Raises UserError when they hold ids that the tokenizer has not.
    """
    found = survey(shards)
    for extreme in (found.smallest, found.largest):
        if not 0 <= extreme < tokenizer.vocab_size:
            raise UserError(
                f"data.shards {shards.folder} hold id {extreme}, but data.tokenizer {tokenizer.folder} has"
                f" {tokenizer.vocab_size} ids: another tokenizer made them; name that one"
            )
    looked_at = "all" if found.tokens == sum(shards.tokens) else f"{found.tokens:,} of {sum(shards.tokens):,}"
    notes = [
        f"{shards.folder} has no manifest.json ({len(shards.names)} shards of another program): that"
        f" {tokenizer.folder} made them could not be checked, only that its ids reach theirs ({looked_at} tokens seen)"
    ]
    end = tokenizer.special.end_of_document
    if found.last != end:
        notes.append(
            f"warning: {found.last_share:.1%} of the documents end with id {found.last}, few or none with the end of"
            f" document of {tokenizer.folder}, {end}: their ends are not told from their text"
        )
    elif found.last_share < 1:
        notes.append(
            f"warning: {found.last_share:.1%} of the documents end with the tokenizer's end of document, {end}; the"
            " others run into the ones that follow"
        )
    adopted = replace(
        shards,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=end,
    )
    return adopted, tuple(notes)


def step_batches(samples: Samples, step: int, batches: BatchPlan, rank: int) -> list[Batch]:
    """One rank's micro-batches of one step: micro-batch m of rank r is the (m x world + r)-th run of the step's
    samples."""
    numbers = step * batches.global_batch_size + np.arange(batches.global_batch_size, dtype=np.int64)
    runs = numbers.reshape(-1, batches.world_size, batches.micro_batch_size)
    return [samples.batch(run) for run in runs[:, rank]]


def validation_batches(samples: Samples, count: int, batches: BatchPlan, rank: int) -> Iterator[Batch]:
    """One rank's share of the first `count` held-out samples (all of them if there are fewer); every rank gets equally
    many batches, filled up with rows that have no targets."""
    count, micro = min(count, samples.size), batches.micro_batch_size
    for start in range(0, count, micro * batches.world_size):
        numbers = start + rank * micro + np.arange(micro)
        yield samples.batch(np.where(numbers < count, numbers, -1))


class Ahead:
    """Makes the batches of coming steps in a thread, so that the step does not wait for them.

    make: the batches of a step, called for first_step, first_step + 1, ... below end_step.
    """

    def __init__(self, make: Callable[[int], list[Batch]], first_step: int, end_step: int) -> None:
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make, first_step, end_step), daemon=True)
        self._thread.start()

    def _fill(self, make: Callable[[int], list[Batch]], first_step: int, end_step: int) -> None:
        item: list[Batch] | BaseException
        for step in range(first_step, end_step):
            try:
                item = make(step)
            except BaseException as error:  # handed to the training thread, which raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def next(self) -> tuple[list[Batch], float]:
        """The batches of the next step, and the seconds that it waited for them."""
        started = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item, time.perf_counter() - started

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
