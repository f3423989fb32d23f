"""data_prep beside the tools people use: one run, same input, same tokenizer, same cores, whole processes end to end.

python benchmarks/data_prep.py                                    all of it, on Debian's documentation (about 410 MB)
python benchmarks/data_prep.py --input corpus.jsonl --only bpe clean
python benchmarks/data_prep.py --megabytes 8 --repeats 1 --no_peers     a minute, ours alone

Every program is a process that reads JSONL and leaves a result, timed from outside, importing and starting included;
the programs of a table take turns, `--repeats` times. "after start" is the rate between a quarter of the input and all
of it, the fastest runs of each, so what a program takes to start cancels. MB are 10^6 bytes of text, not of JSON.
Peers run in an environment of their own (benchmarks/.peers, made from benchmarks/peers.txt on the first run), but for
gigatoken, which is the project's own dependency. The programs that peers run are in benchmarks/peers/.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
PEERS_ENVIRONMENT = ROOT / "benchmarks" / ".peers"
WORK = ROOT / "build" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results" / "data_prep.json"
GROUPS = ("bpe", "wordpiece", "unigram", "clean")
TRAINING_BYTES = 20_000_000
END = "<|endoftext|>"


@dataclass(frozen=True)
class Slice:
    """A stretch of the corpus in files: one each worker could take. bytes: of text."""

    files: tuple[Path, ...]
    documents: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """One row of a table. arguments(slice, output): its command line without the interpreter.

    required: ours must be this many times as fast; None: for information, or ours itself.
    """

    name: str
    python: str
    arguments: Callable[[Slice, Path], list[str]]
    cores: int
    slow: bool = False
    required: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One process, from its start to its end."""

    seconds: float
    peak_bytes: int
    first_byte_seconds: float | None
    counted: dict[str, Any]


@dataclass
class Row:
    """What a table shows of a program: medians over the repeats."""

    name: str
    cores: int
    megabytes: float
    seconds: float
    spread: float
    rate: float
    rate_after_start: float | None
    peak_megabytes: float
    peak_megabytes_quarter: float
    first_byte_seconds: float | None
    counted: dict[str, Any]
    required: float | None


def python_of_peers(given: Path | None) -> str:
    """The peers' interpreter; makes their environment the first time."""
    if given is not None:
        return str(given)
    python = PEERS_ENVIRONMENT / "bin" / "python"
    if not (PEERS_ENVIRONMENT / "installed").exists():
        print(f"making {PEERS_ENVIRONMENT} ...", flush=True)
        venv.create(PEERS_ENVIRONMENT, with_pip=True, clear=True)
        requirements = ROOT / "benchmarks" / "peers.txt"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)], check=True)
        (PEERS_ENVIRONMENT / "installed").touch()
    return str(python)


def make_slice(corpus: Path, megabytes: float, folder: Path, files: int) -> Slice:
    """The first `megabytes` of text of the corpus, in `files` files of about equal size."""
    folder.mkdir(parents=True)
    limit, documents, size = megabytes * 1e6, 0, 0
    paths = [folder / f"{number}.jsonl" for number in range(files)]
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(open(corpus, "rb"))
        outputs = [stack.enter_context(open(path, "wb")) for path in paths]
        sizes = [0] * files
        for line in lines:
            if size >= limit:
                break
            record = json.loads(line)
            size += len(record["text"].encode())
            documents += 1
            smallest = sizes.index(min(sizes))
            sizes[smallest] += outputs[smallest].write(line)
    return Slice(tuple(path for path in paths if path.stat().st_size), documents, size)


def make_tokenizer(kind: str, corpus: Slice, folder: Path) -> Path:
    """A tokenizer folder of 32,000 pieces (WordPiece: 30,522), trained on the first 20 MB."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts, size = [], 0
    for path in corpus.files:
        with open(path, "rb") as lines:
            for line in lines:
                texts.append(json.loads(line)["text"])
                size += len(texts[-1])
                if size > TRAINING_BYTES // len(corpus.files):
                    size = 0
                    break
    if kind == "unigram":
        sample = folder.with_name("unigram_sample.jsonl")
        sample.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        vocabulary = 32_000 if sum(map(len, texts)) > 8e6 else 2_000
        command = f"-m data_prep train_tokenizer --type unigram --vocab_size {vocabulary} --input {sample}".split()
        subprocess.run([sys.executable, *command, "--output_dir", str(folder)], cwd=ROOT, check=True)
        return folder
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=32_000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        named = {"eos_token": END}
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=30_522, special_tokens=special, show_progress=False)
        named = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def measure(program: Program, corpus: Slice, scratch: Path) -> Run:
    """Runs a program once, on an empty output folder; exits with what it said when it fails."""
    output = scratch / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = [program.python, *program.arguments(corpus, output)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "huggingface"), "PYTHONPATH": ""}
    seen = Seen()
    with open(scratch / "stdout", "w+b") as stdout, open(scratch / "stderr", "w+b") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **offline, **program.environment},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        watchers = [
            threading.Thread(target=_watch_output, args=(output, process, seen), daemon=True),
            threading.Thread(target=_watch_memory, args=(process, seen), daemon=True),
        ]
        for watcher in watchers:
            watcher.start()
        try:
            process.wait()
        except BaseException:  # Ctrl-C does not reach another session
            os.killpg(process.pid, signal.SIGTERM)
            raise
        seconds = time.perf_counter() - started
        for watcher in watchers:
            watcher.join()
    if process.returncode:
        said = (scratch / "stderr").read_text(errors="replace")[-3000:]
        sys.exit(f"{program.name}: exit status {process.returncode}\n{' '.join(command)}\n{said}")
    counted = _counted(scratch / "stdout", output)
    shutil.rmtree(output, ignore_errors=True)
    first_byte = None if seen.first_byte is None else seen.first_byte - started
    return Run(seconds, seen.peak_bytes, first_byte, counted)


@dataclass
class Seen:
    """What was seen of a process while it ran."""

    first_byte: float | None = None
    peak_bytes: int = 0


def _watch_output(output: Path, process: "subprocess.Popen[bytes]", seen: Seen) -> None:
    """Notes when the first byte of data stands in a file below `output` (records of the job are no data)."""
    while process.returncode is None:
        for folder, _, names in os.walk(output):
            for name in names:
                if name.endswith((".json", ".log", "lock")) or ".json." in name:
                    continue
                try:
                    if os.stat(os.path.join(folder, name)).st_size:
                        seen.first_byte = time.perf_counter()
                        return
                except FileNotFoundError:  # renamed in between
                    continue
        time.sleep(0.005)


def _watch_memory(process: "subprocess.Popen[bytes]", seen: Seen) -> None:
    """Keeps the largest peak (VmHWM) of any process of the session, fork servers' children included."""
    strangers: set[str] = set()
    while process.returncode is None:
        for pid in os.listdir("/proc"):
            if not pid.isdigit() or pid in strangers:
                continue
            try:
                if os.getsid(int(pid)) != process.pid:
                    strangers.add(pid)
                    continue
                status = Path("/proc", pid, "status").read_text()
            except (ProcessLookupError, FileNotFoundError):
                continue
            peak = status.partition("VmHWM:")[2].split()
            if peak:
                seen.peak_bytes = max(seen.peak_bytes, int(peak[0]) * 1024)
        time.sleep(0.05)


def _counted(stdout: Path, output: Path) -> dict[str, Any]:
    """What a peer counted (its last line), or what our manifest says."""
    manifests = [output / name / "manifest.json" for name in ("", "shards", "unique")]
    for path in manifests:
        if path.exists():
            content = json.loads(path.read_bytes())["content"]
            keys = ("tokens", "documents", "encoder") if "tokens" in content else ("documents",)
            return {key: content[key] for key in keys if key in content}
    counted: dict[str, Any] = json.loads(stdout.read_text().splitlines()[-1])
    return counted


def table(programs: list[Program], whole: Slice, peers: Slice, quarter_of: dict[int, Slice], repeats: int) -> list[Row]:
    """Measures the programs in turn; slow ones on the slice for peers."""
    runs: dict[str, list[tuple[Run, Run]]] = {program.name: [] for program in programs}
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        for repeat in range(repeats):
            for program in programs:
                corpus = peers if program.slow else whole
                pair = (
                    measure(program, quarter_of[corpus.bytes], Path(name)),
                    measure(program, corpus, Path(name)),
                )
                runs[program.name].append(pair)
                print(
                    f"  {repeat + 1}/{repeats}  {program.name:<44} {corpus.bytes / 1e6:6.1f} MB"
                    f" {pair[1].seconds:7.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    rows = []
    for program in programs:
        corpus = peers if program.slow else whole
        all_of_it = [run for _, run in runs[program.name]]
        quarter = [run for run, _ in runs[program.name]]
        seconds = [run.seconds for run in all_of_it]
        median = statistics.median(seconds)
        beyond = min(seconds) - min(run.seconds for run in quarter)  # the fastest: a difference doubles the noise
        more = corpus.bytes - quarter_of[corpus.bytes].bytes
        first = [run.first_byte_seconds for run in all_of_it if run.first_byte_seconds is not None]
        rows.append(
            Row(
                name=program.name,
                cores=program.cores,
                megabytes=corpus.bytes / 1e6,
                seconds=median,
                spread=(max(seconds) - min(seconds)) / median,
                rate=corpus.bytes / 1e6 / median,
                rate_after_start=more / 1e6 / beyond if beyond > 0.02 else None,
                peak_megabytes=max(run.peak_bytes for run in all_of_it) / 1e6,
                peak_megabytes_quarter=max(run.peak_bytes for run in quarter) / 1e6,
                first_byte_seconds=statistics.median(first) if first else None,
                counted=all_of_it[-1].counted,
                required=program.required,
            )
        )
    return rows


def describe(title: str, rows: list[Row]) -> str:
    """A table as text; the first row is ours, and the ratios are of its rate to the others'."""
    ours = rows[0]
    lines = [
        title,
        f"  {'':<44} {'cores':>5} {'MB':>6} {'s':>8} {'spread':>6} {'MB/s':>8} {'peak MB':>8} {'ours is':>8}"
        f" {'needed':>7}   after start: {'MB/s':>8} {'ours is':>8}",
    ]
    for row in rows:
        after = "-" if row.rate_after_start is None else f"{row.rate_after_start:.2f}"
        ratio = ratio_after = ""
        if row is not ours:
            ratio = f"{ours.rate / row.rate:.2f}x"
            if ours.rate_after_start and row.rate_after_start:
                ratio_after = f"{ours.rate_after_start / row.rate_after_start:.2f}x"
        needed = "" if row.required is None else f"{row.required:g}x"
        missed = row.required is not None and ours.rate / row.rate < row.required
        lines.append(
            f"  {row.name:<44} {row.cores:>5} {row.megabytes:>6.1f} {row.seconds:>8.2f} {row.spread:>6.0%}"
            f" {row.rate:>8.2f} {row.peak_megabytes:>8,.0f} {ratio:>8} {needed:>7} {'':>14} {after:>8} {ratio_after:>8}"
            + ("  missed" if missed else "")
        )
    same = {row.counted.get("tokens") for row in rows if row.megabytes == ours.megabytes and "tokens" in row.counted}
    if len(same) > 1:
        counts = ", ".join(f"{row.name}: {row.counted.get('tokens'):,}" for row in rows if "tokens" in row.counted)
        lines.append(f"  tokens differ: {counts}")
    elif same:
        lines.append(f"  tokens, of every program on this input: {same.pop():,}")
    first = "none seen" if ours.first_byte_seconds is None else f"{ours.first_byte_seconds:.2f} s"
    lines.append(
        f"  ours: first byte of output after {first}; largest process {ours.peak_megabytes_quarter:,.0f} MB on a"
        f" quarter of the input, {ours.peak_megabytes:,.0f} MB on all of it"
    )
    if "encoder" in ours.counted:
        lines.append(f"  ours: encoder {json.dumps(ours.counted['encoder'])[:200]}")
    return "\n".join(lines)


def files_of(corpus: Slice) -> list[str]:
    return [str(path) for path in corpus.files]


def tokenizing(kind: str, tokenizer: Path, workers: int, peers: str | None) -> list[Program]:
    """The programs of a tokenizer's table, ours first."""

    def ours(processes: int) -> Program:
        def arguments(corpus: Slice, output: Path) -> list[str]:
            flags = f"--tokenizer {tokenizer} --output_dir {output} --workers {processes}".split()
            return ["-m", "data_prep", "tokenize", "--input", *files_of(corpus), *flags]

        return Program(f"data_prep tokenize --workers {processes}", sys.executable, arguments, processes)

    def peer(name: str, script: str, required: float | None, **changes: Any) -> Program:
        def arguments(corpus: Slice, output: Path) -> list[str]:
            return [str(PEERS / script), str(tokenizer), str(output), str(workers), *files_of(corpus)]

        return Program(
            name, **{"python": peers, "arguments": arguments, "cores": workers, "required": required} | changes
        )

    programs = [ours(workers), ours(1)]
    if kind == "bpe":
        files = {"python": sys.executable, "required": 0.7}
        programs.append(peer("gigatoken encode_files, nothing written", "gigatoken_files.py", **files))
        files = {"python": sys.executable, "required": None, "environment": {"WRITE": "1"}}
        programs.append(peer("gigatoken encode_files, ids written", "gigatoken_files.py", **files))
    if peers is None:
        return programs
    if kind == "unigram":
        return [*programs, peer("sentencepiece, its own threads", "sentencepiece_threads.py", 0.9)]
    needed: dict[str, float | None] = dict.fromkeys(("megatron", "datatrove", "map", "tiktoken"))
    if kind == "bpe":
        needed = {"megatron": 40, "datatrove": 50, "map": 50, "tiktoken": 15}
        programs.append(peer("tiktoken loop", "tiktoken_loop.py", needed["tiktoken"], slow=True))
    else:
        needed["megatron"] = 10
    programs.append(peer("Megatron's preprocess_data loop", "megatron_loop.py", needed["megatron"], slow=True))
    programs.append(peer("datasets.map(batched, num_proc)", "datasets_map.py", needed["map"], slow=True))
    programs.append(peer("datatrove, tokenizer and merger", "datatrove_tokenize.py", needed["datatrove"], slow=True))
    return programs


def cleaning(tokenizer: Path, workers: int, rules: list[str] | None, peers: str | None, job: Path) -> list[Program]:
    """Ours: clean, exact and near deduplication in one process; the same and the shards; and in all cores."""

    def ours(name: str, processes: int, *, shards: bool) -> Program:
        def arguments(corpus: Slice, output: Path) -> list[str]:
            stages: list[dict[str, Any]] = [
                {"clean": {"input": files_of(corpus), "workers": processes} | ({"rules": rules} if rules else {})},
                {"deduplicate": {"workers": processes}},
            ]
            if shards:
                flags = {"tokenizer": str(tokenizer), "output_dir": str(output / "shards"), "workers": processes}
                stages.append({"tokenize": flags})
            else:
                stages[-1]["deduplicate"]["output_dir"] = str(output / "unique")
            job.write_text(json.dumps(stages))  # JSON is YAML
            return ["-m", "data_prep", "run", str(job)]

        return Program(name, sys.executable, arguments, processes)

    programs = [
        ours("data_prep clean -> deduplicate", 1, shards=False),
        ours("data_prep clean -> deduplicate -> shards", 1, shards=True),
        ours("data_prep clean -> deduplicate -> shards", workers, shards=True),
    ]
    if peers is not None:

        def arguments(corpus: Slice, output: Path) -> list[str]:
            return [str(PEERS / "datatrove_clean.py"), str(output), *files_of(corpus)]

        programs.append(Program("datatrove, same rules and MinHash", peers, arguments, 1, slow=True, required=20))
    return [Program(**{**vars(program), "name": f"{program.name}, {program.cores} proc."}) for program in programs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="JSONL with a text field (default: made by benchmarks/corpus.py)")
    parser.add_argument("--megabytes", type=float, default=math.inf, help="text to use (default: all)")
    parser.add_argument(
        "--peer_megabytes", type=float, default=40.0, help="text for the slow tokenizing peers (default: %(default)s)"
    )
    parser.add_argument(
        "--clean_peer_megabytes", type=float, default=8.0, help="text for datatrove's cleaning (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="tables to make (default: all)")
    parser.add_argument("--rules", nargs="+", help="rules of our clean (default: its own, FineWeb's, as the peer's)")
    parser.add_argument("--no_peers", action="store_true", help="ours alone (and gigatoken, which is installed)")
    parser.add_argument("--peers_python", type=Path, help="an interpreter that has benchmarks/peers.txt installed")
    parser.add_argument(
        "--json", nargs="?", type=Path, const=RESULTS, help=f"write the figures too (default: {RESULTS})"
    )
    arguments = parser.parse_args()
    peers = None if arguments.no_peers else python_of_peers(arguments.peers_python)
    corpus = arguments.input or WORK / "corpus.jsonl"
    if not corpus.exists():
        subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "corpus.py"), "--more", "--output", str(corpus)], check=True
        )
    WORK.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        # One file a worker, of which each program may make what it will.
        files = arguments.workers
        whole = make_slice(corpus, arguments.megabytes, folder / "whole", files)
        slices = {
            "tokenize": make_slice(corpus, min(arguments.peer_megabytes, whole.bytes / 1e6), folder / "peers", files)
        }
        slices["clean"] = make_slice(
            corpus, min(arguments.clean_peer_megabytes, whole.bytes / 1e6), folder / "clean", files
        )
        quarters = {
            corpus_slice.bytes: make_slice(corpus, corpus_slice.bytes / 4e6, folder / f"quarter_{number}", files)
            for number, corpus_slice in enumerate((whole, *slices.values()))
        }
        print(
            f"{corpus}: {whole.documents:,} documents, {whole.bytes / 1e6:.1f} MB of text; {os.cpu_count()} cores"
            f" ({platform.processor() or platform.machine()}), {arguments.workers} used, {arguments.repeats} repeats",
            flush=True,
        )
        tokenizers = {}
        for kind in arguments.only:
            base = "bpe" if kind == "clean" else kind
            if base not in tokenizers:
                tokenizers[base] = make_tokenizer(base, whole, folder / base)
            if kind == "clean":
                programs = cleaning(tokenizers[base], arguments.workers, arguments.rules, peers, folder / "job.yaml")
                rules = " ".join(arguments.rules or ["FineWeb's rules"])
                title = f"clean ({rules}), exact and near deduplication; and on to shards"
                rows = table(programs, whole, slices["clean"], quarters, arguments.repeats)
            else:
                programs = tokenizing(kind, tokenizers[base], arguments.workers, peers)
                title = f"JSONL to shards, {kind}"
                rows = table(programs, whole, slices["tokenize"], quarters, arguments.repeats)
            tables[kind] = rows
            print("\n" + describe(title, rows), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {kind: [asdict(row) for row in rows] for kind, rows in tables.items()}
        arguments.json.write_text(
            json.dumps({"input_megabytes": whole.bytes / 1e6, "tables": figures}, indent=1) + "\n"
        )
        print(f"\n{arguments.json}")


if __name__ == "__main__":
    main()
