"""The benchmark runs on a small corpus, and its tables say what they should. (Peers are no part of the tests.)"""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import english_like

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "data_prep.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """About 300 kB of text."""
    generator = random.Random(5)
    path = tmp_path_factory.mktemp("benchmark") / "corpus.jsonl"
    texts = [english_like(generator, generator.randint(8, 60)) for _ in range(150)]
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_data_prep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(corpus: Path, figures: Path, *flags: str) -> tuple[str, dict]:
    command = [sys.executable, SCRIPT, "--input", corpus, "--repeats", "1", "--no_peers", "--json", figures, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(figures.read_bytes())


def test_the_tokenizing_table_has_rates_peaks_and_equal_tokens(corpus, tmp_path):
    shown, figures = run(corpus, tmp_path / "figures.json", "--only", "bpe", "--megabytes", "0.2")
    assert figures["input_megabytes"] == pytest.approx(0.2, rel=0.1)
    rows = figures["tables"]["bpe"]
    assert [row["name"] for row in rows[:2]] == ["data_prep tokenize --workers 2", "data_prep tokenize --workers 1"]
    assert len({row["counted"]["tokens"] for row in rows}) == 1, "gigatoken's ids are ours"
    for row in rows:
        assert row["rate"] == pytest.approx(row["megabytes"] / row["seconds"])
        assert 5 < row["peak_megabytes"] < 1000
        assert f"  {row['name']:<44} {row['cores']:>5} {row['megabytes']:>6.1f}" in shown
    assert 0 < rows[0]["first_byte_seconds"] <= rows[0]["seconds"]
    assert f"tokens, of every program on this input: {rows[0]['counted']['tokens']:,}" in shown


def test_the_cleaning_table_runs_clean_and_deduplicate_as_one_job(corpus, tmp_path):
    _, figures = run(corpus, tmp_path / "figures.json", "--only", "clean", "--rules", "gopher_quality")
    rows = figures["tables"]["clean"]
    assert len(rows) == 3 and all(row["rate"] > 0 for row in rows)
    assert 0 < rows[0]["counted"]["documents"] <= 150
    assert rows[1]["counted"]["documents"] == rows[2]["counted"]["documents"] == rows[0]["counted"]["documents"]


def test_simulated_parts_are_all_done_and_their_efficiency_is_shown():
    script = ROOT / "benchmarks" / "simulated_parts.py"
    flags = ["--workers", "1", "3", "--parts", "2", "--seconds", "0.05"]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "3"]
    assert all(0 < float(row[-1].rstrip("%")) <= 100 and float(row[2]) >= 0.1 for row in rows)


def test_a_slice_holds_every_document_once_in_files_of_about_equal_size(benchmark, corpus, tmp_path):
    whole = benchmark.make_slice(corpus, 1e9, tmp_path / "whole", 3)
    lines = corpus.read_bytes().splitlines(keepends=True)
    assert sorted(line for path in whole.files for line in path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert whole.documents == len(lines)
    assert whole.bytes == sum(len(json.loads(line)["text"].encode()) for line in lines)
    sizes = [path.stat().st_size for path in whole.files]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= max(map(len, lines))


def test_a_table_names_what_is_missed_and_tokens_that_differ(benchmark):
    def row(name: str, seconds: float, tokens: int, required: float | None) -> object:
        return benchmark.Row(name, 2, 10.0, seconds, 0.1, 10 / seconds, None, 50, 40, 0.5, {"tokens": tokens}, required)

    rows = [row("ours", 1.0, 7, None), row("slow", 30.0, 7, 20), row("fast", 0.5, 8, 0.7)]
    lines = benchmark.describe("title", rows).splitlines()
    assert "30.00x" in lines[3] and "missed" not in lines[3]
    assert "0.50x" in lines[4] and lines[4].endswith("missed")
    assert "tokens differ: ours: 7, slow: 7, fast: 8" in lines[5]
    assert "first byte of output after 0.50 s" in lines[6]
