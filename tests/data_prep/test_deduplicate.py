"""`python -m data_prep deduplicate`: the same bytes however it is run, what it counts and what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import __main__ as data_prep_main
from data_prep.errors import UserError

REPOSITORY = Path(data_prep_main.__file__).parents[1]
DOCUMENTS, UNIQUE = 600, 200


def run(*arguments: object) -> None:
    data_prep_main.run_stage("deduplicate", list(map(str, arguments)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files of documents that stand three times each: once in capitals, once with one word of 80 changed."""
    generator = random.Random(21)
    texts = []
    for number in range(UNIQUE):
        words = [f"w{generator.randrange(10**9)}".replace("0", "o").translate(LETTERS) for _ in range(80)]
        texts += [" ".join(words), " ".join(words).upper(), " ".join([*words[:-1], f"changed {chr(97 + number % 26)}"])]
    generator.shuffle(texts)
    folder = tmp_path_factory.mktemp("duplicates")
    for name, chosen in (("a.jsonl", texts[:350]), ("b.jsonl", texts[350:])):
        (folder / name).write_text("".join(json.dumps({"id": text[:9], "text": text}) + "\n" for text in chosen))
    return folder


LETTERS = str.maketrans("123456789", "abcdefghi")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def deduplicated(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("once") / "out"
    run("--input", f"{corpus}/*.jsonl", "--output_dir", output, "--part_megabytes", 0.02, "--workers", 2)
    return output


def test_one_of_each_three_stays_and_the_rest_is_counted(deduplicated):
    content = manifest(deduplicated)["content"]
    assert content["duplicates"]["documents"] == DOCUMENTS
    assert content["documents"] == UNIQUE == content["duplicates"]["clusters"]
    removed = content["steps"]["deduplicate"]["removed"]
    assert removed == content["duplicates"]["removed"]
    assert sum(removed.values()) == DOCUMENTS - UNIQUE
    assert content["duplicates"]["cluster_sizes"] == {"3-4": UNIQUE}
    assert not (deduplicated / ".parts").exists()


def test_the_documents_that_stay_are_the_first_in_order(corpus, deduplicated):
    lines = [line for name in ("a.jsonl", "b.jsonl") for line in (corpus / name).read_text().splitlines()]
    seen: set[str] = set()
    expected = []
    for line in lines:
        family = " ".join(json.loads(line)["text"].lower().split()[:70])
        if family not in seen:
            expected.append(json.loads(line))
        seen.add(family)
    written = [
        json.loads(line)
        for path in sorted(deduplicated.glob("documents-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert written == expected


def test_samples_are_kept_of_each_reason(corpus, deduplicated):
    samples = json.loads((deduplicated / "samples.json").read_bytes())["deduplicate"]
    assert set(samples) == {"exact", "near"}
    for sample in samples["exact"] + samples["near"]:
        removed, kept = (line_at(sample[key])["text"] for key in ("place", "kept"))
        assert removed.startswith(sample["text"])
        assert removed.lower().split()[:70] == kept.lower().split()[:70]
        assert sample["similarity"] > 0.6


def line_at(place: str) -> dict:
    path, line = place.rsplit(":", 1)
    return json.loads(Path(path).read_text().splitlines()[int(line) - 1])


def test_bytes_are_the_same_with_one_worker(corpus, deduplicated, tmp_path):
    run("--input", f"{corpus}/*.jsonl", "--output_dir", tmp_path / "out", "--part_megabytes", 0.02, "--workers", 1)
    assert contents(tmp_path / "out") == contents(deduplicated)
    assert manifest(tmp_path / "out") == manifest(deduplicated)


def test_documents_are_the_same_in_parts_of_another_size(corpus, deduplicated, tmp_path):
    run("--input", f"{corpus}/*.jsonl", "--output_dir", tmp_path / "out", "--workers", 1)
    joined = [
        b"".join(path.read_bytes() for path in sorted(folder.glob("documents-*.jsonl")))
        for folder in (tmp_path / "out", deduplicated)
    ]
    assert joined[0] == joined[1]
    assert len(list(deduplicated.glob("documents-*.jsonl"))) > 2 == len(list((tmp_path / "out").glob("documents-*")))


@pytest.mark.parametrize("reached", ["signatures-000000.bin", "pairs-exact-000000.bin", "drops-000000.bin"])
def test_a_job_killed_in_any_phase_continues_to_the_same_bytes(corpus, deduplicated, tmp_path, reached):
    output = tmp_path / "out"
    arguments = [f"--input={corpus}/*.jsonl", "--output_dir", str(output), "--part_megabytes", "0.02", "--workers", "1"]
    code = f"from data_prep.__main__ import run_stage; run_stage('deduplicate', {arguments!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not (output / ".parts/scratch" / reached).exists():
        time.sleep(0.005)
    with_manifest = (output / "manifest.json").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not with_manifest
    run("--input", f"{corpus}/*.jsonl", "--output_dir", output, "--part_megabytes", 0.02, "--workers", 1)
    assert contents(output) == contents(deduplicated)
    assert manifest(output) == manifest(deduplicated)


def test_evaluation_data_goes_before_duplicates_are_sought(corpus, tmp_path):
    first = json.loads((corpus / "a.jsonl").read_text().splitlines()[0])["text"]
    (tmp_path / "evaluation.txt").write_text(f"Question: {' '.join(first.split()[:20])}?\n")
    run(
        "--input", f"{corpus}/*.jsonl", "--output_dir", tmp_path / "out", "--workers", 1,
        "--decontaminate", tmp_path / "evaluation.txt", "--methods", "exact",
    )  # fmt: skip
    content = manifest(tmp_path / "out")["content"]
    assert content["steps"]["decontaminate"]["removed"] == {"contaminated": 3}
    assert content["duplicates"]["documents"] == DOCUMENTS - 3
    assert content["duplicates"]["removed"] == {"exact": UNIQUE - 1}
    assert content["documents"] == 2 * (UNIQUE - 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "0.8", "--bands", "9"], "either it or --bands and --rows"),
        (["--threshold", "1.5"], "between 0 and 1"),
        (["--bands", "1000", "--rows", "1000"], "1000000 hashes"),
        (["--ngram", "65"], "at most 64"),
        (["--decontaminate_ngram", "65"], "at most 64"),
        (["--decontaminate", "/nowhere/*.json"], "matches no file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(corpus, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run("--input", f"{corpus}/*.jsonl", "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
