"""Do our cleaning rules decide as datatrove's filters do? Agreement and speed, rule by rule, on a JSONL corpus.

    python benchmarks/rules_agreement.py --corpus corpus.jsonl --peer_python /path/with/datatrove/bin/python

The peers live in an environment of their own (datatrove[processing], spacy, nltk), which runs this same file with
--peer. Each filter sees the text as it is, ours what the clean stage
makes of it; "fineweb_order" is FineWeb's published chain Gopher repetition, Gopher quality,
C4 (filter_no_terminal_punct=False), FineWeb, each on what the last one left. `--decisions FILE` keeps datatrove's
answers, which take minutes. Speeds are of one process each, on the same documents, in this run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

RULES = ("gopher_repetition", "gopher_quality", "c4", "c4_fineweb", "fineweb", "fineweb_order")
BATCH_CHARACTERS = 1 << 20
TIMED = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


def documents(path: str, limit: int | None) -> Iterator[tuple[str, str]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and number > limit:
                return
            record = json.loads(line)
            yield str(record.get("id", number)), record["text"]


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run_peer(path: str, output: str, limit: int | None, timed_every: int) -> None:
    """In the peers' environment: one line a document, {rule: [reason or null, digest of the text left]}."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.text import split_into_parts

    filters = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "fineweb": FineWebQualityFilter(),
        "c4": C4QualityFilter(),
        "c4_fineweb": C4QualityFilter(filter_no_terminal_punct=False),
    }
    chain = ("gopher_repetition", "gopher_quality", "c4_fineweb", "fineweb")

    def decide(name: str, text: str) -> tuple[str | None, str]:
        document = Document(text=text, id="")
        answer = filters[name].filter(document)
        return (None if answer is True else str(answer[1]) if isinstance(answer, tuple) else "removed"), document.text

    seconds: dict[str, float] = defaultdict(float)
    timed_bytes = 0
    with open(output, "w") as file:
        for number, (_, text) in enumerate(documents(path, limit)):
            answers = {name: decide(name, text) for name in filters}
            split_into_parts.cache_clear()
            started = time.perf_counter()
            reason, left = None, text
            for name in chain:  # the words of one text are split once for all its filters, as in a pipeline
                reason, left = decide(name, left)
                if reason:
                    reason = f"{name.removesuffix('_fineweb')}.{reason}"
                    break
            if number % timed_every == 0:
                seconds["fineweb_order"] += time.perf_counter() - started
            answers["fineweb_order"] = (reason, left)
            if number % timed_every == 0:
                timed_bytes += len(text.encode())
                for name in TIMED:
                    split_into_parts.cache_clear()
                    started = time.perf_counter()
                    decide(name, text)
                    seconds[name] += time.perf_counter() - started
            record = {name: [reason, digest(left)] for name, (reason, left) in answers.items()}
            file.write(json.dumps(record) + "\n")
            file.flush()
        file.write(json.dumps({"seconds": seconds, "bytes": timed_bytes}) + "\n")


def ask_peer(arguments: argparse.Namespace, path: Path) -> None:
    print(f"asking datatrove about {arguments.corpus}: this takes minutes", file=sys.stderr, flush=True)
    command = [arguments.peer_python, __file__, "--corpus", arguments.corpus, "--peer", str(path)]
    command += ["--timed_every", str(arguments.timed_every)]
    subprocess.run(command + (["--limit", str(arguments.limit)] if arguments.limit else []), check=True)


class Ours:
    """Our rules, on text that is made regular first, as the clean stage does."""

    def __init__(self) -> None:
        from data_prep.cleaning import regular_text
        from data_prep.rules import Rules, parameters_of

        published = list(parameters_of([]).values())
        lenient = list(parameters_of(["c4.terminal_punctuation=0"]).values())
        self._regular_text = regular_text
        self._rules = {name: Rules((name,), published) for name in RULES[:3] + RULES[4:5]}
        self._rules["c4_fineweb"] = Rules(("c4",), lenient)
        self._rules["fineweb_order"] = Rules(("gopher_repetition", "gopher_quality", "c4", "fineweb"), lenient)

    def decide(self, name: str, texts: list[str]) -> list[tuple[str | None, float, str]]:
        """(reason or None, what was measured, text left) of each document."""
        from data_prep.rules import REASONS

        found = self._rules[name]([self._regular_text(text) for text in texts])
        return [
            (None if parameter < 0 else REASONS[parameter], value, text)
            for parameter, value, text in zip(found.parameters, found.values, found.texts, strict=True)
        ]


def batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def compare(arguments: argparse.Namespace, decisions: Path) -> None:
    names, texts = zip(*documents(arguments.corpus, arguments.limit), strict=True)
    *peer, timing = [json.loads(line) for line in decisions.open()]
    assert len(peer) == len(texts), f"{decisions} holds {len(peer)} documents, {arguments.corpus} {len(texts)}"
    size = sum(len(text.encode()) for text in texts)
    ours = Ours()
    print(f"{arguments.corpus}: {len(texts):,} documents, {size / 1e6:.1f} MB")
    print(
        f"{'rule':<20}{'dropped':>9}{'theirs':>9}{'differ':>8}{'agree':>10}{'texts differ':>14}"
        f"{'MB/s':>8}{'theirs':>8}{'ratio':>7}"
    )
    for name in RULES:
        found: list[tuple[str | None, float, str]] = []
        started = time.perf_counter()
        for batch in batches(list(texts)):
            found += ours.decide(name, batch)
        speed = size / 1e6 / (time.perf_counter() - started)
        seconds = timing["seconds"].get(name, 0.0)
        their_speed = timing["bytes"] / 1e6 / seconds if seconds else 0.0
        differ = [
            i
            for i, (mine, theirs) in enumerate(zip(found, peer, strict=True))
            if bool(mine[0]) != bool(theirs[name][0])
        ]
        left = sum(
            mine[0] is None and theirs[name][0] is None and digest(mine[2]) != theirs[name][1]
            for mine, theirs in zip(found, peer, strict=True)
        )
        speeds = f"{speed:>8.0f}" + (f"{their_speed:>8.2f}{speed / their_speed:>7.0f}" if their_speed else "")
        print(
            f"{name:<20}{sum(bool(mine[0]) for mine in found):>9,}{sum(bool(theirs[name][0]) for theirs in peer):>9,}"
            f"{len(differ):>8,}{1 - len(differ) / len(texts):>10.3%}{left:>14,}{speeds}"
        )
        for index in differ[: arguments.shown]:
            reason, value, _ = found[index]
            print(f"    {names[index]}: ours {reason or 'kept'} ({value:.4f}), theirs {peer[index][name][0] or 'kept'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help='JSONL of {"id", "text"}')
    parser.add_argument("--peer_python", help="python of an environment with datatrove")
    parser.add_argument("--decisions", type=Path, help="keep datatrove's answers here, or use those that are there")
    parser.add_argument("--limit", type=int, help="look at this many documents only")
    parser.add_argument("--timed_every", type=int, default=16, help="time datatrove on one document in so many")
    parser.add_argument("--shown", type=int, default=20, help="differing documents listed a rule")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(arguments.corpus, str(arguments.peer), arguments.limit, arguments.timed_every)
        return
    with tempfile.TemporaryDirectory() as folder:
        decisions = arguments.decisions or Path(folder) / "decisions.jsonl"
        if not decisions.exists():
            if not arguments.peer_python:
                parser.error("--peer_python is needed, or --decisions of an earlier run")
            ask_peer(arguments, decisions)
        sys.path[0] = str(Path(__file__).parents[1])  # data_prep.py beside this file hides the package
        compare(arguments, decisions)


if __name__ == "__main__":
    main()
