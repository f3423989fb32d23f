"""inspect shows what folders hold, with numbers that are the data's own."""

import json
import re
import shutil

import numpy as np
import pytest

from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.findings import (
    bin_bounds,
    fertility_of_documents,
    fertility_of_shards,
    funnel,
    gaps,
    human_bytes,
    look_at,
    token_counts,
    token_lengths,
    visible,
)
from data_prep.inspect import histogram
from data_prep.manifest import Manifest, read_manifest
from data_prep.shards import ShardSet
from tests.data_prep.made_folders import EVIL, make_documents, make_shards, make_tokenizer

READ = [f"Number {n}: {'some words of it ' * (n % 9)}the end." for n in range(60)]
CLEAN = [text for n, text in enumerate(READ) if n % 5]
DEDUPLICATED = [text for n, text in enumerate(CLEAN) if n % 6]
STEPS = {
    "normalize": {"removed": {}, "changed": {"NFC": 3}},
    "rules": {"removed": {"gopher": {"too short": 7, "symbols": 2}, "language": 3, "never": 0}, "changed": {}},
}
SAMPLES = {
    "rules": {
        "gopher: too short": [
            {"key": 5, "place": "raw/a.jsonl:17", "id": "x1", "value": 0.25, "threshold": 50, "text": "Too short."},
            {"key": 9, "place": "raw/b.jsonl:3", "value": 12, "threshold": 50, "text": EVIL},
        ]
    }
}
REJECTED = [
    {"file": f"raw/{n % 2}.jsonl", "line": n + 1, "category": ["json", "empty", "json"][n % 3], "reason": f"bad {n}"}
    for n in range(9)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """clean -> dedup -> shards, and the tokenizer of these texts."""
    root = tmp_path_factory.mktemp("inspect")
    tokenizer = make_tokenizer(root / "tokenizer", READ)
    make_documents(root / "clean", READ, CLEAN, steps=STEPS, samples=SAMPLES, rejected=REJECTED)
    steps = {"near": {"removed": {"near duplicate": len(CLEAN) - len(DEDUPLICATED)}, "bands": 14}}
    make_documents(root / "dedup", CLEAN, DEDUPLICATED, steps=steps, command="deduplicate")
    sources = {f"dedup/{n}.jsonl": {"documents": n, "tokens": 100 * n} for n in range(1, 31)}
    encoder = {"name": "quick", "versions": ["quick 1.2"], "checked_during": {"documents": 7, "tokens": 812}}
    make_shards(root / "shards", DEDUPLICATED, tokenizer, sources=sources, encoder=encoder)
    return root


def shown_rows(stdout: str, heading: str) -> list[list[str]]:
    """The lines below a heading, up to the next empty one, cut at two or more spaces."""
    below = stdout.split(f"\n{heading}\n")[1].split("\n\n")[0]
    return [re.split(r"\s{2,}", line.strip()) for line in below.splitlines()]


def test_inspect_shows_the_way_of_the_documents_through_the_steps(made, data_prep):
    stdout = data_prep("inspect", made / "clean").stdout
    rows = shown_rows(stdout, "documents through the steps:")
    assert rows == [
        ["in the input", "69", "100.00%"],
        ["readable, with text", "60", "86.96%", "-9"],
        ["json", "-6", "8.70%"],
        ["empty", "-3", "4.35%"],
        ["normalize", "60", "86.96%"],
        ["rules", "48", "69.57%", "-12"],
        ["gopher: too short", "-7", "11.67%"],
        ["language", "-3", "5.00%"],
        ["gopher: symbols", "-2", "3.33%"],
    ]
    assert "normalize: NFC" in stdout.split("documents changed:\n")[1]


def test_several_folders_give_one_funnel(made, data_prep):
    found = [look_at(made / name) for name in ("clean", "dedup", "shards")]
    assert [(row.folder, row.label, row.documents, row.removed) for row in funnel(found)] == [
        ("clean", "in the input", 69, 0),
        ("clean", "readable, with text", 60, 9),
        ("clean", "normalize", 60, 0),
        ("clean", "rules", 48, 12),
        ("dedup", "near", 40, 8),
        ("shards", "encoded", 40, 0),
    ]
    assert gaps(found) == []
    stdout = data_prep("inspect", *(made / name for name in ("clean", "dedup", "shards"))).stdout
    assert shown_rows(stdout, "documents through the steps:")[0] == ["in the input", "69", "100.00%"]
    assert "  dedup: near " in stdout and "  shards: encoded " in stdout


def test_a_folder_that_was_not_given_all_of_the_one_before_is_noted(made, data_prep):
    stdout = data_prep("inspect", made / "clean", made / "shards").stdout
    assert f"note: {made}/clean left 48 documents, {made}/shards was given 40" in stdout


def test_rejected_documents_are_counted_and_the_first_named(made, data_prep):
    stdout = data_prep("inspect", made / "clean").stdout
    assert shown_rows(stdout, "rejected, 9 documents:") == [
        ["empty", "3"],
        ["json", "6"],
        *([f"raw/{n % 2}.jsonl:{n + 1}: bad {n}"] for n in range(5)),
        [f"more in {made}/clean/rejected.jsonl"],
    ]


def test_removed_shows_samples_with_what_was_measured(made, data_prep):
    assert "Too short." not in data_prep("inspect", made / "clean").stdout
    stdout = data_prep("inspect", made / "clean", "--removed").stdout
    assert "\nrules, gopher: too short: raw/a.jsonl:17, measured 0.25, threshold 50, id x1\n  | Too short.\n" in stdout
    assert "no samples of removed documents" in data_prep("inspect", made / "dedup", "--removed").stdout


def test_no_document_commands_the_terminal(made, data_prep):
    stdout = data_prep("inspect", made / "clean", "--removed", "--characters", 1000).stdout
    assert "<script>alert(1)</script>" in stdout and "\\u0000\\u001b[31m\\u202egnp.exe \\ud800 שלום" in stdout
    assert not set("\x00\x1b\u202e") & set(stdout)
    assert visible("tab\tline\r\nnext\rback") == "tab\tline\nnext\\u000dback"


def test_sources_are_shown_with_their_tokens_largest_first(made, data_prep):
    rows = shown_rows(data_prep("inspect", made / "shards").stdout, "tokens a source:")
    assert rows[0] == ["documents", "tokens", "share", "file"]
    total = sum(100 * n for n in range(1, 31))
    assert rows[1] == ["30", "3,000", f"{3000 / total:.2%}", "dedup/30.jsonl"]
    assert rows[-1] == ["55", "5,500", f"{5500 / total:.2%}", "10 more files"] and len(rows) == 22


def test_the_encoder_and_its_check_are_shown(made, data_prep):
    stdout = data_prep("inspect", made / "shards").stdout
    assert stdout.split("how it was checked:\n")[1].startswith(
        "  name: quick\n  versions: quick 1.2\n  checked during:\n    documents: 7\n    tokens: 812\n"
    )


def test_documents_are_shown_spread_over_the_files(made, data_prep):
    shown = data_prep("inspect", made / "clean", "--documents", 4, "--characters", 20).stdout
    assert f"\ndocument 0 of documents-000000.jsonl, {len(CLEAN[0])} characters:\n  | {CLEAN[0][:20]}" in shown
    assert f"\ndocument 1 of documents-000001.jsonl, {len(CLEAN[25])} characters:\n  | {CLEAN[25][:20]}" in shown


def test_another_text_field_is_read_as_the_job_says(tmp_path, data_prep):
    folder = make_documents(tmp_path / "d", ["one", "two"], ["one", "two"])
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"text"', '"body"'))
    manifest = read_manifest(folder)
    Manifest("documents", {"command": "clean", "reading": {"text_field": "body"}}, manifest.files, {}).write(folder)
    assert "  | one\n" in data_prep("inspect", folder).stdout


def test_inspect_shows_shards_as_text(made, data_prep):
    shown = data_prep("inspect", made / "shards", "--tokenizer", made / "tokenizer", "--characters", 60)
    assert shown.status == 0
    assert f"  | {DEDUPLICATED[0][:60]}" in shown.stdout and f"  | {DEDUPLICATED[-1][:60]}" in shown.stdout
    content = read_manifest(made / "shards").content
    assert f"{content['tokens']:,}" in shown.stdout and "nats a token" in shown.stdout
    assert content["tokenizer"]["fingerprint"][:12] in shown.stdout
    rows = shown_rows(shown.stdout, "documents by length:")
    counts = [int(re.search(r" tokens +([\d,]+)", " ".join(row))[1].replace(",", "")) for row in rows]
    assert sum(counts) == len(DEDUPLICATED)


def test_a_tokenizer_among_the_folders_is_the_tokenizer(made, data_prep):
    shown = data_prep("inspect", made / "shards", made / "tokenizer").stdout
    assert "the tokenizer on this text:" in shown and f"  | {DEDUPLICATED[0][:40]}" in shown
    assert shown.count("longest pieces") == 2


def test_inspect_refuses_another_tokenizer_than_the_shards(made, tmp_path, data_prep):
    shutil.copytree(made / "tokenizer", tmp_path / "t")
    (tmp_path / "t/added_tokens.json").write_text("{}")
    outcome = data_prep("inspect", made / "shards", "--tokenizer", tmp_path / "t")
    assert "name the tokenizer that made them" in outcome.error
    assert str(tmp_path / "t") in outcome.error and str(made / "shards") in outcome.error


@pytest.mark.parametrize("unknown", [False, True])
def test_fertility_is_that_of_a_count_by_hand(unknown, tmp_path):
    texts = [*CLEAN, "unheard-of words, twice: zyzzyva zyzzyva"]
    tokenizer = make_tokenizer(tmp_path / "t", CLEAN, vocab_size=30 if unknown else 400, unknown=unknown)
    folder = make_documents(tmp_path / "d", texts, texts)
    shards = make_shards(tmp_path / "s", texts, tokenizer)
    info, encoder = load_tokenizer_info(tokenizer), Encoder(tokenizer)
    ids = [encoder.encode_batch([text])[0].tolist() for text in texts]
    flat = [token for document in ids for token in document]
    for found in (
        fertility_of_documents(look_at(folder), info, encoder),
        fertility_of_shards(shards, info, encoder),
    ):
        assert (found.documents, found.tokens, found.counted) == (len(texts), len(flat), len(flat))
        assert (found.used, found.vocab_size) == (len(set(flat)), info.vocab_size)
        assert found.unknown == (flat.count(info.special.unknown) if unknown else None)
        assert not unknown or found.unknown > 0
        if not unknown:  # what an unknown token stood for is not decoded
            assert found.words == sum(len(text.split()) for text in texts)
            assert found.text_bytes == sum(len(text.encode()) for text in texts)
        _, count = found.frequent[0]
        assert count == max(flat.count(token) for token in set(flat) if encoder.decode([token]).strip())
        assert len(found.longest[0][0]) == max(len(encoder.decode([token])) for token in set(flat))


def test_counts_and_lengths_of_shards_are_those_of_their_tokens(made):
    shards = ShardSet.open(made / "shards")
    mapped = [shards.shard(index) for index in range(2)]
    flat = np.concatenate([shard.tokens for shard in mapped])
    assert token_counts(shards).tolist() == np.bincount(flat).tolist()
    assert 0 < token_counts(shards, max_tokens=100).sum() <= 102
    lengths = [len(shard.document(n)) for shard in mapped for n in range(shard.documents)]
    bits = [length.bit_length() for length in lengths]
    assert token_lengths(shards) == {value: bits.count(value) for value in sorted(set(bits))}


def test_a_histogram_counts_by_powers_of_two():
    lines = histogram({1: 1, 2: 3, 3: 2, 5: 1}, "tokens").splitlines()
    found = [(line.split()[0], line.split()[2], line.split()[4], line.count("█")) for line in lines]
    assert found == [
        ("1", "1", "1", 13),
        ("2", "3", "3", 40),
        ("4", "7", "2", 27),
        ("8", "15", "0", 0),
        ("16", "31", "1", 13),
    ]
    for number in (0, 1, 2, 3, 4, 255, 256, 10**9):
        first, last = bin_bounds(number.bit_length())
        assert first <= number <= last


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_999, "1.00 MB"),
        (9994, "9.99 kB"),
        (9996, "10.0 kB"),
        (99_960, "100 kB"),
        (3.5e12, "3.50 TB"),
        (2e15, "2,000 TB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rejected.jsonl", lambda raw: raw[:-5]),
        ("samples.json", lambda raw: raw[:-5]),
        ("samples.json", lambda raw: b"[]"),
    ],
)
def test_a_damaged_file_beside_the_manifest_is_one_error(made, tmp_path, data_prep, name, change):
    shutil.copytree(made / "clean", tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(change((tmp_path / "d" / name).read_bytes()))
    assert str(tmp_path / "d") in data_prep("inspect", tmp_path / "d").error


def test_a_manifest_with_counts_that_are_no_counts_is_one_error(made, tmp_path, data_prep):
    shutil.copytree(made / "clean", tmp_path / "d")
    raw = json.loads((tmp_path / "d/manifest.json").read_text())
    for key, value in [("steps", {"a": 3}), ("lengths", {"read": {"x": 1}}), ("read", 7), ("documents", "many")]:
        changed = raw | {"content": raw["content"] | {key: value}}
        (tmp_path / "d/manifest.json").write_text(json.dumps(changed))
        assert "python -m data_prep verify" in data_prep("inspect", tmp_path / "d").error


def test_folders_of_nothing_are_one_error(tmp_path, data_prep):
    assert "manifest.json is missing" in data_prep("inspect", tmp_path).error
    assert "manifest.json is missing" in data_prep("inspect", tmp_path / "absent").error
