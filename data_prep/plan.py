"""Plans of samples: which documents are held out, how many samples there are, and what each is made of.

A shard's documents are split in two runs, training first, held-out last. "concatenate" cuts the tokens of a split,
shard after shard, into equal stretches: its plan is a few numbers, whatever the corpus. The other packings keep the
pieces of every sample in a file, which training maps into memory. A plan is a pure function of the shards and its
settings; packing again for another length or objective never tokenizes again.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep import durable, packing
from data_prep.errors import UserError
from data_prep.manifest import FileRecord, read_json
from data_prep.packing import OF_SENTENCES, PACKINGS, PAIRS, PIECE
from data_prep.progress import progress_bar
from data_prep.randomness import seed_of
from data_prep.sentences import Sentences
from data_prep.shards import Shard, ShardSet

PLAN_NAME = "plan.json"
PLAN_VERSION = 2
DEFAULT_VALIDATION_FRACTION = 0.005
DEFAULT_SHORT_SEQ_PROB = 0.1
SPLITS = ("train", "validation")
_WINDOW = 1 << 20  # documents that are packed together: what a worker's memory has room for, and more than it helps
_SENTENCES = 6  # first coordinate of what is drawn here; pipeline.samples has the others

Report = Callable[[int], object]
"""Called with the number of tokens planned since its last call."""


@dataclass(frozen=True)
class PackSettings:
    """What a plan is made for.

    short_seq_prob: share of the samples that are meant to be shorter, in packings of sentences; 0 in others.
    Raises UserError for values that make no plan.
    """

    objective: str
    sequence_length: int
    packing: str = "concatenate"
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    short_seq_prob: float = 0.0

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS[self.objective]:
            raise UserError(
                f"packing is {self.packing}, which objective {self.objective} has not; expected one of"
                f" {', '.join(PACKINGS[self.objective])}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}, expected 0 <= fraction < 1")
        if self.sequence_length < 8:
            raise UserError(f"sequence_length is {self.sequence_length}, expected at least 8 tokens")
        if not 0 <= self.short_seq_prob <= 1:
            raise UserError(f"short_seq_prob is {self.short_seq_prob}, expected 0 <= probability <= 1")
        if self.short_seq_prob and self.packing not in OF_SENTENCES:
            raise UserError(
                f"short_seq_prob is {self.short_seq_prob}, but packing {self.packing} is not of sentences; leave it out"
            )

    @property
    def name(self) -> str:
        """The folder of the plan below `samples/`."""
        short = f"-short-{float(self.short_seq_prob)!r}" if self.short_seq_prob else ""
        held_out = f"validation-{float(self.validation_fraction)!r}"
        return f"{self.objective}-{self.packing}-{self.sequence_length}-{held_out}{short}"

    @property
    def stride(self) -> int:
        """Tokens from one sample to the next of "concatenate". A causal sample reads one more, the last target; a
        masked-LM one stands between [CLS] and [SEP]."""
        return self.sequence_length - packing.frame_of(self.objective)

    @property
    def is_pairs(self) -> bool:
        return self.packing in PAIRS


@dataclass(frozen=True)
class Split:
    """One side of the held-out split.

    first_document, end_document: its documents [first, end) in each shard.
    first_token, tokens: its tokens in each shard, ends of documents included.
    samples: how many there are. pieces: that they are made of; 0 for "concatenate".
    """

    first_document: tuple[int, ...]
    end_document: tuple[int, ...]
    first_token: tuple[int, ...]
    tokens: tuple[int, ...]
    samples: int
    pieces: int = 0


@dataclass(frozen=True)
class Plan:
    """How a shard set is cut into samples.

    files: of the folder, `<split>.samples` and `<split>.pieces`; none for "concatenate".
    """

    folder: Path
    shards_fingerprint: str
    settings: PackSettings
    train: Split
    validation: Split
    files: dict[str, FileRecord] = field(default_factory=dict)

    def split(self, name: str) -> Split:
        return self.train if name == "train" else self.validation

    def pieces(self, split: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Index of each sample's first piece, and the end [samples + 1], and the pieces (`packing.PIECE`) [pieces],
        whose tokens are counted over all of the set's; through memory maps.

        Raises UserError when a file is not what the plan says.
        """
        side = self.split(split)
        first = _map(self.folder / f"{split}.samples", np.dtype("<i8"), side.samples + 1)
        return first, _map(self.folder / f"{split}.pieces", PIECE, side.pieces)

    def content(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        return {
            "version": PLAN_VERSION,
            "shards_fingerprint": self.shards_fingerprint,
            "settings": asdict(self.settings),
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "files": {name: asdict(record) for name, record in self.files.items()},
        }


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    size = path.stat().st_size if path.is_file() else -1
    if size != count * dtype.itemsize:
        found = "is missing" if size < 0 else f"has {size} bytes, expected {count * dtype.itemsize}"
        raise UserError(f"{path} {found}: remove {path.parent} and run `python -m data_prep pack` again")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


def plan_folder(shards: Path, settings: PackSettings) -> Path:
    """Where the plan of these settings is kept, beside the shards."""
    return shards / "samples" / settings.name


def split_documents(shards: ShardSet, validation_fraction: float) -> tuple[Split, Split]:
    """Training and held-out documents, without samples. Held out are the last documents of each shard, in exact
    proportion over all shards so far: appending shards leaves the split of those before as it was."""
    cuts = []
    seen = 0
    for documents in shards.documents:
        held_out = int((seen + documents) * validation_fraction) - int(seen * validation_fraction)
        cuts.append(documents - held_out)
        seen += documents
    cut_tokens = [
        shards.document_offset(index, cut) if cut < shards.documents[index] else shards.tokens[index]
        for index, cut in enumerate(cuts)
    ]
    nothing = (0,) * len(cuts)
    rest = tuple(tokens - cut for tokens, cut in zip(shards.tokens, cut_tokens, strict=True))
    return (
        Split(nothing, tuple(cuts), nothing, tuple(cut_tokens), 0),
        Split(tuple(cuts), shards.documents, tuple(cut_tokens), rest, 0),
    )


def make_plan(shards: ShardSet, settings: PackSettings, folder: Path, report: Report = lambda _: None) -> Plan:
    """Plans the samples and writes the plan into `folder`, which exists.

    Raises UserError for settings that leave no training sample, and where sentences are needed that the shards have
    not.
    """
    plan = Plan(folder, shards.fingerprint, settings, *split_documents(shards, settings.validation_fraction))
    if settings.packing == "concatenate":
        # The last target of a causal sample is the first token of the next one.
        overlap = 1 if settings.objective == "causal" else 0
        counted = [
            replace(side, samples=max(0, (sum(side.tokens) - overlap) // settings.stride))
            for side in (plan.train, plan.validation)
        ]
        files = {}
    else:
        counted = [_write_pieces(shards, settings, plan.split(name), folder, name, report) for name in SPLITS]
        names = sorted(f"{split}.{kind}" for split in SPLITS for kind in ("samples", "pieces"))
        files = {name: FileRecord.of(folder / name) for name in names}
    plan = replace(plan, train=counted[0], validation=counted[1], files=files)
    if plan.train.samples == 0:
        raise UserError(
            f"{shards.folder}: {sum(plan.train.tokens)} training tokens give no sample of"
            f" {settings.sequence_length} tokens; take a smaller sequence_length or more text"
        )
    durable.write_json(folder / PLAN_NAME, plan.content())
    return plan


def _write_pieces(
    shards: ShardSet, settings: PackSettings, side: Split, folder: Path, name: str, report: Report
) -> Split:
    """Writes the two files of a split; returns it with their counts."""
    samples = pieces = 0
    with durable.replacing(folder / f"{name}.samples") as first, durable.replacing(folder / f"{name}.pieces") as file:
        first.write(np.zeros(1, dtype="<i8").tobytes())
        for found, counts, tokens in _packed(shards, settings, side):
            _write(first, pieces + np.cumsum(counts, dtype="<i8"))
            _write(file, found)
            samples, pieces = samples + len(counts), pieces + len(found)
            report(tokens)
    return replace(side, samples=samples, pieces=pieces)


def _write(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).data)


def _packed(
    shards: ShardSet, settings: PackSettings, side: Split
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int]]:
    """The pieces, the pieces of each sample, and the number of tokens of one window of documents after the other. A
    sample lies in one shard, so shards that are appended leave those before as they were."""
    base = 0
    for index, tokens in enumerate(shards.tokens):
        shard = shards.shard(index)
        found = _sentences(shards, index, shard) if settings.packing in OF_SENTENCES else None
        for window in range(side.first_document[index], side.end_document[index], _WINDOW):
            stop = min(window + _WINDOW, side.end_document[index])
            offsets = shard.offsets_of(np.arange(window, stop + 1))
            begin, end = offsets[:-1], offsets[1:]
            if settings.objective == "mlm" and shards.end_of_document is not None:
                end = end - 1  # its place is the separator's
            pieces, counts = _pack(settings, begin, end, found, window, seed_of(_SENTENCES, index, window))
            pieces["start"] += base
            yield pieces, counts, int(offsets[-1] - offsets[0])
        base += tokens


def _sentences(shards: ShardSet, index: int, shard: Shard) -> Sentences:
    found = Sentences(shards.folder / shards.names[index])
    if found.documents != shard.documents:
        raise UserError(
            f"{shard.path} holds {shard.documents} documents, its .sentences {found.documents}: tokenize again"
        )
    return found


def _pack(
    settings: PackSettings,
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    found: Sentences | None,
    first_document: int,
    key: int,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    frame = packing.frame_of(settings.objective)
    if found is not None:
        return packing.sentences(
            begin,
            end,
            found,
            first_document,
            positions=settings.sequence_length,
            pairs=settings.is_pairs,
            short_seq_prob=settings.short_seq_prob,
            key=key,
        )
    if settings.packing == "document":
        return packing.whole_documents(begin, end, settings.sequence_length - frame)
    return packing.best_fit(begin, end, settings.sequence_length, frame)


def read_plan(shards: ShardSet, settings: PackSettings) -> Plan | None:
    """The plan of these settings, or None when there is none yet or it was made of other shards.

    Raises UserError when it is damaged.
    """
    path = plan_folder(shards.folder, settings) / PLAN_NAME
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        if raw["version"] != PLAN_VERSION or raw["shards_fingerprint"] != shards.fingerprint:
            return None
        return Plan(
            folder=path.parent,
            shards_fingerprint=raw["shards_fingerprint"],
            settings=PackSettings(**raw["settings"]),
            train=_read_split(raw["train"]),
            validation=_read_split(raw["validation"]),
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove {path.parent} and pack again") from None


def _read_split(raw: dict[str, Any]) -> Split:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    return Split(**values)


def write_plan(shards: ShardSet, settings: PackSettings, report: Report = lambda _: None) -> Plan:
    """Makes the plan anew and puts it beside the shards, whole or not at all."""
    folder = plan_folder(shards.folder, settings)
    with durable.replacing_folder(folder, overwrite=True) as temporary:
        plan = make_plan(shards, settings, temporary, report)
    return replace(plan, folder=folder)


def prepare_plan(shards: ShardSet, settings: PackSettings) -> tuple[Plan, bool]:
    """The plan of these settings beside the shards, and whether it had to be made."""
    if (plan := read_plan(shards, settings)) is not None:
        return plan, False
    bar: Any = None
    if settings.packing != "concatenate":
        bar = progress_bar(f"pack {settings.packing}", sum(shards.tokens), unit=" tokens")
    try:
        return write_plan(shards, settings, bar.update if bar else lambda _: None), True
    finally:
        if bar:
            bar.close()


def plan_fault(shards: ShardSet, folder: Path) -> str | None:
    """What is wrong with a plan beside the shards, or None: it is a pure function, so it is made again."""
    remedy = f"remove {folder} and run `python -m data_prep pack` again"
    path = folder / PLAN_NAME
    try:
        raw = json.loads(path.read_bytes())
        settings = PackSettings(**raw["settings"])
        if raw["shards_fingerprint"] != shards.fingerprint:
            return f"{path}: names other shards than those beside it; {remedy}"
        with tempfile.TemporaryDirectory() as again:
            plan = make_plan(shards, settings, Path(again))
        if plan_folder(shards.folder, settings) != folder or durable.json_bytes(plan.content()) != path.read_bytes():
            return f"{path}: is not the plan of these shards; {remedy}"
        for name, record in plan.files.items():
            if not (folder / name).is_file() or FileRecord.of(folder / name) != record:
                return f"{folder / name}: is missing, or not the plan of these shards; {remedy}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{path}: damaged ({' '.join(str(error).split())}); {remedy}"
    except UserError:
        return f"{path}: its settings give no plan of these shards; {remedy}"
    return None
