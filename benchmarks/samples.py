"""The sample path beside the tools people use: from shards on disk to batches in memory, one thread each, in one run.

python benchmarks/samples.py                       all of it, under ten minutes on two cores
python benchmarks/samples.py --only rate masks     some tables
python benchmarks/samples.py --quick               small sizes, to see that it runs: nothing is judged
python benchmarks/samples.py --run runs/demo-gpt   the waiting of that run (the default, where it is there)

first    from nothing to the first 8 samples of 1,024 tokens of a data set of 10^9 ... 10^12 tokens (sparse files)
rate     samples a second of processor time in batches of 64, in random order
masks    rows a second of processor time masked for masked LM, in batches of 32 of 512 tokens
waiting  what a consumer of 1,000,000 tokens a second waits for its batches

Every measurement is a process of its own that imports first. The programs of a table take turns, `--repeats` times; a
row shows the median and the spread, (largest - smallest) / median. What the peers run is in benchmarks/peers/; they are
in the project's own environment (its test extra). The exit status is 1 when something required is missed.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.manifest import FileRecord, Manifest
from data_prep.shards import KIND, ShardWriter, dtype_for, index_bytes

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "benchmarks" / "our_samples.py"
PEERS = ROOT / "benchmarks" / "peers"
WORK = ROOT / "build" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results" / "samples.json"
GROUPS = ("first", "rate", "masks", "waiting")
VOCABULARY = 32_000
DTYPE = dtype_for(VOCABULARY)
MEAN_DOCUMENT = 1000
SHARD_TOKENS = 1 << 27
FIRST_SAMPLES, BATCH, MASK_ROWS = 8, 64, 32
TRILLION = 10**12
STARTS = ("first start", "later start")


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of each start, tokens in memory, seconds of a rate, megabytes of text for masks."""

    ours: tuple[int, ...] = (10**9, 10**10, 10**11, TRILLION)
    peers: tuple[int, ...] = (10**8, 10**9, 10**10, 10**11)
    tokens: int = 200_000_000
    seconds: float = 2.0
    megabytes: int = 8
    vocabulary: int = 16_000


QUICK = Sizes((10**9, 10**10), (10**7, 10**8), 20_000_000, 0.5, 1, 4_000)


@dataclass(frozen=True)
class Program:
    """One process that prints one line of JSON. command: script and arguments.

    required: ours must be this many times as fast; None: for information, or ours itself.
    """

    name: str
    command: tuple[object, ...]
    required: float | None = None


@dataclass(frozen=True)
class Row:
    """What a table shows of a program, or of ours.

    median, spread: of `unit` over the repeats. ratio: how much better ours is; required: at least. allowed: what the
    median has to be below. core: share of a core that it had, the least of the repeats.
    """

    name: str
    median: float
    unit: str
    spread: float = 0.0
    megabytes: float | None = None
    ratio: float | None = None
    required: float | None = None
    allowed: float | None = None
    core: float | None = None

    @property
    def missed(self) -> bool:
        too_slow = self.ratio is not None and self.required is not None and self.ratio < self.required
        return too_slow or (self.allowed is not None and self.median >= self.allowed)


def measure(program: Program) -> dict[str, float]:
    """Runs a program once and returns its figures; exits with what it said when it fails."""
    command = [sys.executable, *map(str, program.command)]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program.name}: exit status {done.returncode}\n{' '.join(command)}\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    print(f"  {program.name:<56} {shown}", file=sys.stderr, flush=True)
    return figures


def in_turns(programs: list[Program], repeats: int) -> list[list[dict[str, float]]]:
    """The figures of each program, repeat by repeat."""
    rounds = [[measure(program) for program in programs] for _ in range(repeats)]
    return [list(figures) for figures in zip(*rounds, strict=True)]


def row(name: str, figures: list[dict[str, float]], figure: str, unit: str, **more: Any) -> Row:
    """A row with median and spread of one figure over the repeats."""
    values = [one[figure] for one in figures]
    median = statistics.median(values)
    return Row(name, median, unit, (max(values) - min(values)) / median if median else 0.0, **more)


def describe(title: str, rows: list[Row]) -> str:
    """A table as text."""
    head = f"  {'':<66} {'median':>11} {'':<9} {'spread':>6} {'core':>5} {'MB':>7} {'ours is':>9} {'needed':>6}"
    lines = [title, head]
    for one in rows:
        megabytes = "" if one.megabytes is None else f"{one.megabytes:,.0f}"
        ratio = "" if one.ratio is None else f"{one.ratio:,.2f}x" if one.ratio < 1000 else f"{one.ratio:,.0f}x"
        needed = f"{one.required:g}x" if one.required else f"< {one.allowed:g}" if one.allowed else ""
        median = f"{one.median:,.0f}" if one.median >= 1000 else f"{one.median:.4g}"
        core = "" if one.core is None else f"{one.core:.0%}"
        lines.append(
            f"  {one.name:<66} {median:>11} {one.unit:<9} {one.spread:>6.0%} {core:>5} {megabytes:>7}"
            f" {ratio:>9} {needed:>6}" + ("  missed" if one.missed else "")
        )
    return "\n".join(lines)


def rates(programs: list[Program], unit: str, repeats: int) -> list[Row]:
    """Rows of a table of rates, each beside the program of ours that was named last before it."""
    rows: list[Row] = []
    ours = math.nan
    for program, figures in zip(programs, in_turns(programs, repeats), strict=True):
        found = row(program.name, figures, "rate", unit, core=min(one["core"] for one in figures))
        if program.command[0] == OURS:
            ours = found.median
        else:
            found = replace(found, ratio=ours / found.median, required=program.required)
        rows.append(found)
    return rows


def document_lengths(tokens: int, mean: float, generator: np.random.Generator) -> np.ndarray:
    """Tokens of documents, log-normal with sigma 1, `tokens` in all."""
    count = max(1, round(tokens / mean))
    block = np.maximum(8.0, generator.lognormal(math.log(mean) - 0.5, 1.0, min(count, 1_000_000)))
    ends = np.cumsum(np.resize(block, count))
    return np.diff(np.rint(ends * (tokens / ends[-1])).astype(np.int64), prepend=0).astype(np.int32)


def write_manifest(folder: Path, names: list[str], documents: list[int], tokens: list[int], files: Any) -> None:
    """The manifest.json of a shard set as `data_prep tokenize` writes it, as far as a reader looks."""
    made = zip(names, documents, tokens, strict=True)
    content = {
        "tokens": sum(tokens),
        "documents": sum(documents),
        "dtype": DTYPE.name,
        "tokenizer": {"fingerprint": "0" * 64, "vocab_size": VOCABULARY, "end_of_document": 0},
        "shards": [{"name": name, "documents": number, "tokens": count} for name, number, count in made],
    }
    Manifest(kind=KIND, job={"command": "benchmark"}, files=files, content=content).write(folder)


def sparse_shards(folder: Path, tokens: int, index: Path) -> None:
    """A set of that many tokens: .bin files without a block on disk, one .idx under every name."""
    folder.mkdir()
    count = -(-tokens // SHARD_TOKENS)
    names = [f"shard-{number:06d}" for number in range(count)]
    files = {}
    for name in names:
        os.link(index, folder / f"{name}.idx")
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(SHARD_TOKENS * DTYPE.itemsize)
        for suffix, size in ((".bin", SHARD_TOKENS * DTYPE.itemsize), (".idx", index.stat().st_size)):
            # Checksums are made up, one a name: no start reads the files whole.
            files[name + suffix] = FileRecord(size, hashlib.sha256((name + suffix).encode()).hexdigest())
    documents = (index.stat().st_size - 42) // 20  # 34 bytes of header, 20 a document, 8 for the end
    write_manifest(folder, names, [documents] * count, [SHARD_TOKENS] * count, files)


def first_table(folder: Path, sizes: Sizes, repeats: int) -> list[Row]:
    """From nothing to the first batch, ours by size and GPTDataset by size, and what it comes to at 10^12 tokens."""
    generator = np.random.default_rng(1)
    index = folder / "one.idx"
    index.write_bytes(index_bytes(document_lengths(SHARD_TOKENS, 1024, generator), DTYPE))
    rows: list[Row] = []
    ours: dict[int, list[Row]] = {}
    for tokens in sizes.ours:
        shards = folder / f"ours-{tokens}"
        sparse_shards(shards, tokens, index)

        def forget(shards: Path = shards) -> None:
            shutil.rmtree(shards / "samples", ignore_errors=True)

        program = Program(f"ours, 10^{math.log10(tokens):g} tokens", (OURS, "first", shards, FIRST_SAMPLES))
        ours[tokens] = starts(program, forget, repeats)
        rows += ours[tokens]
        shutil.rmtree(shards)
    peers = []
    for tokens in sizes.peers:
        prefix, cache = folder / f"peer-{tokens}", folder / f"cache-{tokens}"
        prefix.with_suffix(".idx").write_bytes(index_bytes(document_lengths(tokens, MEAN_DOCUMENT, generator), DTYPE))
        with open(prefix.with_suffix(".bin"), "wb") as file:
            file.truncate(tokens * DTYPE.itemsize)

        def forget(cache: Path = cache) -> None:
            shutil.rmtree(cache, ignore_errors=True)

        command = (PEERS / "gpt_dataset.py", "first", prefix, cache, FIRST_SAMPLES)
        program = Program(f"GPTDataset, 10^{math.log10(tokens):g} tokens", command)
        peers.append(starts(program, forget, 1 if tokens > 10**10 else repeats))
        forget()
        for suffix in (".idx", ".bin"):
            prefix.with_suffix(suffix).unlink()
    rows += [row for pair in peers for row in pair]
    largest = max(sizes.ours)
    for number, start in enumerate(STARTS):
        exponent = growth(sizes.peers, [pair[number].median for pair in peers])
        seconds, megabytes = (
            linear(sizes.peers, [getattr(pair[number], figure) for pair in peers], TRILLION)
            for figure in ("median", "megabytes")
        )
        ratio = seconds / ours[largest][number].median
        name = f"GPTDataset at 10^12, {start}, extrapolated (grew as n^{exponent:.2f})"
        rows.append(Row(name, seconds, "s", 0.0, megabytes, ratio, 1000.0 if number == 0 else None))
    at_largest = ours[largest][0]
    rows.append(Row("ours at the largest, first start", at_largest.median, "s", at_largest.spread, allowed=1.0))
    rows.append(Row("ours at the largest, memory", at_largest.megabytes or math.nan, "MB", allowed=150.0))
    return rows


def starts(program: Program, forget: Callable[[], None], repeats: int) -> list[Row]:
    """Two rows: a first start, with nothing made before, and a later one, which finds what the first one kept."""
    figures: list[list[dict[str, float]]] = [[], []]
    for _ in range(repeats):
        forget()
        for start in figures:
            start.append(measure(program))
    return [
        row(f"{program.name}, {name}", start, "seconds", "s", megabytes=max(one["megabytes"] for one in start))
        for name, start in zip(STARTS, figures, strict=True)
    ]


def growth(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent between the two largest sizes."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])


def linear(sizes: tuple[int, ...], values: list[float], size: int) -> float:
    """The value at `size` on the line through the two largest sizes (in the peer's favour where it grows faster)."""
    slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    return values[-1] + slope * (size - sizes[-1])


@dataclass(frozen=True)
class Tokens:
    """One corpus three times: our shards, one .bin with .idx (`prefix`), Arrow rows."""

    shards: Path
    prefix: Path
    arrow: Path


def write_tokens(folder: Path, tokens: int) -> Tokens:
    """Random tokens in documents of log-normal lengths; our shards are four, Megatron's is one."""
    generator = np.random.default_rng(2)
    made = Tokens(folder / "shards", folder / "whole", folder / "rows.arrow")
    made.shards.mkdir()
    lengths = document_lengths(tokens, MEAN_DOCUMENT, generator)
    parts = np.array_split(lengths, 4)
    names = [f"shard-{number:06d}" for number in range(len(parts))]
    files: dict[str, FileRecord] = {}
    counts = []
    with ShardWriter(made.prefix, DTYPE) as whole:
        for name, part in zip(names, parts, strict=True):
            with ShardWriter(made.shards / name, DTYPE) as shard:
                for batch in np.array_split(part, max(1, len(part) // 10_000)):
                    ids = generator.integers(1, VOCABULARY, int(batch.sum()), dtype=np.uint16)
                    ids[np.cumsum(batch) - 1] = 0
                    shard.append_batch(ids, batch)
                    whole.append_batch(ids, batch)
            counts.append(shard.tokens)
            files |= shard.files
    write_manifest(made.shards, names, [len(part) for part in parts], counts, files)
    return made


def rate_table(tokens: Tokens, folder: Path, sizes: Sizes, repeats: int, quick: bool) -> list[Row]:
    tail = (tokens.shards, BATCH, sizes.seconds)
    ours = [
        Program("ours: the same and as int64 tensors on the CPU", (OURS, "tensors", *tail)),
        Program("ours: order, documents, inputs and labels as in the shards (uint16)", (OURS, "rate", *tail)),
    ]
    gpt_dataset, arrow_rows, memmap_loop = (
        PEERS / name for name in ("gpt_dataset.py", "arrow_rows.py", "memmap_loop.py")
    )
    bin_path = tokens.prefix.with_suffix(".bin")
    subprocess.run([sys.executable, str(arrow_rows), "write", str(bin_path), str(tokens.arrow)], check=True)

    def gpt(name: str, mode: str, required: float | None) -> Program:
        return Program(name, (gpt_dataset, mode, tokens.prefix, folder / "cache", BATCH, sizes.seconds), required)

    def arrow(name: str, mode: str, required: float | None) -> Program:
        return Program(name, (arrow_rows, mode, tokens.arrow, BATCH, sizes.seconds), required)

    def memmap(name: str, mode: str) -> Program:
        return Program(name, (memmap_loop, mode, bin_path, BATCH, sizes.seconds))

    programs = [
        *ours,
        gpt("GPTDataset, default_collate", "collate", 10),
        gpt("GPTDataset, __getitem__ alone", "items", 10),
        gpt("GPTDataset, its positions by document, default_collate", "documents", 10),
        arrow("Arrow, run_clm's Trainer: rows, default_data_collator", "trainer", 20),
        arrow("Arrow, numpy format, dataset[i] row by row", "rows", 20),
        arrow("Arrow, numpy format, dataset[indices]", "batch", None),
        arrow("Arrow, arrow format, its buffer as it is (int32)", "buffer", None),
        memmap("np.memmap, nanoGPT's get_batch", "nanogpt"),
        memmap("np.memmap, a loop of slices, stacked (uint16)", "slices"),
        memmap("np.memmap, one gather a batch (uint16)", "gather"),
    ]
    if quick:
        programs = [*ours, programs[2], programs[5], programs[-1]]
    return rates(programs, "samples/s", repeats)


def write_rows(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """(rows.npz, tokenizer folder): rows of 512 tokens of the built-in corpus in a WordPiece tokenizer's ids, with what
    the collators need beside them."""
    documents, tokenizer, rows = folder / "documents", folder / "tokenizer", folder / "rows.npz"
    stages = (
        f"builtin_corpus --output_dir {documents} --max_megabytes {sizes.megabytes}",
        f"train_tokenizer --input {documents}/*.jsonl --output_dir {tokenizer} --type wordpiece"
        f" --vocab_size {sizes.vocabulary}",
    )
    for stage in stages:
        command = [sys.executable, "-m", "data_prep", *stage.split()]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    classification, separator = (encoder.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    ids, offsets = [], []
    for path in sorted(documents.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            encoded = encoder.encode(json.loads(line)["text"], add_special_tokens=False)
            for start in range(0, len(encoded.ids) - 509, 510):
                ids.append([classification, *encoded.ids[start : start + 510], separator])
                offsets.append([(0, 0), *encoded.offsets[start : start + 510], (0, 0)])
    array = np.array(ids[:1024], dtype=np.uint16)
    special = np.isin(array, [encoder.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")])
    np.savez(rows, ids=array, special=special, offsets=np.array(offsets[:1024], dtype=np.int32))
    return rows, tokenizer


def masks_table(folder: Path, sizes: Sizes, repeats: int, quick: bool) -> list[Row]:
    rows, tokenizer = write_rows(folder, sizes)
    tail = (rows, tokenizer, MASK_ROWS, sizes.seconds)
    collator = PEERS / "mlm_collator.py"
    programs = [
        Program("ours, tokens", (OURS, "mask", "token", *tail)),
        Program("DataCollatorForLanguageModeling", (collator, "token", *tail), 10),
        Program("its numpy_mask_tokens alone, whole batch and mask ready", (collator, "token_alone", *tail)),
        Program("ours, whole words", (OURS, "mask", "word", *tail)),
        Program("DataCollatorForLanguageModeling(whole_word_mask)", (collator, "word", *tail), 20),
        Program("its numpy_mask_tokens alone, whole batch and mask ready", (collator, "word_alone", *tail)),
    ]
    if quick:
        programs = [program for program in programs if program.command[0] == OURS or program.required]
    return rates(programs, "rows/s", repeats)


def waiting_table(tokens: Tokens, run: Path, sizes: Sizes, repeats: int) -> list[Row]:
    program = Program("a consumer of 1,000,000 tokens/s", (OURS, "waiting", tokens.shards, BATCH, 3 * sizes.seconds))
    (figures,) = in_turns([program], repeats)
    rows = [
        row("a consumer of 1,000,000 tokens/s waits", figures, "waited_percent", "% of time", allowed=0.5),
        row("on paper: 1,000,000 tokens/s take of one core", figures, "core_percent", "% of it", allowed=100.0),
    ]
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        steps = [step for line in metrics.read_text().splitlines() if "step_seconds" in (step := json.loads(line))]
        share = sum(step["data_wait_seconds"] for step in steps) / sum(step["step_seconds"] for step in steps)
        rows.append(Row(f"{run.name} waited, {len(steps)} steps", 100 * share, "% of time", allowed=0.5))
    else:
        print(f"{metrics} is not there: no waiting of a real run (make it with `make pretrain`, or name one: --run)")
    return rows


TITLES = {
    "first": "first: from nothing to the first 8 samples of 1,024 tokens (MB: memory beyond the imports, at its peak)",
    "rate": "rate: batches of 64 samples of 1,024 tokens, random order, page cache warm, one thread",
    "masks": "masks: batches of 32 rows of 512 tokens, one thread",
    "waiting": "waiting: one process, one loader thread",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="tables to make (default: all)")
    parser.add_argument("--repeats", type=int, help="runs of each program (default: 3; with --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes and the required rows; exit status 0")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo-gpt", help="a run's folder (%(default)s)")
    parser.add_argument(
        "--json", nargs="?", type=Path, const=RESULTS, help=f"write the figures too (default: {RESULTS})"
    )
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    machine = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()})"
    print(f"{machine}, Python {platform.python_version()}, {repeats} repeats", flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        tokens = write_tokens(folder, sizes.tokens) if {"rate", "waiting"} & set(arguments.only) else None
        for group in arguments.only:
            if group == "first":
                rows = first_table(folder, sizes, repeats)
            elif group == "masks":
                rows = masks_table(folder, sizes, repeats, arguments.quick)
            elif group == "rate":
                assert tokens is not None
                rows = rate_table(tokens, folder, sizes, repeats, arguments.quick)
            else:
                assert tokens is not None
                rows = waiting_table(tokens, arguments.run, sizes, repeats)
            tables[group] = rows
            print("\n" + describe(TITLES[group], rows), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {group: [asdict(one) | {"missed": one.missed} for one in rows] for group, rows in tables.items()}
        arguments.json.write_text(json.dumps({"machine": machine, "tables": figures}, indent=1) + "\n")
        print(f"\n{arguments.json}")
    if not arguments.quick and any(one.missed for rows in tables.values() for one in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
