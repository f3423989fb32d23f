"""Plans: hand-worked numbers, packings against slow ones written out, and a held-out split that never moves."""

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import packing
from data_prep.durable import write_json
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.pack import measure
from data_prep.plan import PackSettings, Split, make_plan, plan_folder, read_plan, split_documents, write_plan
from data_prep.sentences import SentencesWriter
from data_prep.shards import ShardSet, ShardWriter


def shard_set(folder, lengths: list[list[int]], sentence: int = 5) -> ShardSet:
    """Shards of documents of these lengths (tokens, the end among them), with a sentence every `sentence` tokens."""
    files, shards = {}, []
    for index, documents in enumerate(lengths):
        starts = SentencesWriter(folder / str(index))
        with ShardWriter(folder / str(index), np.dtype("<u2")) as writer:
            for length in documents:
                writer.append(np.array([7] * (length - 1) + [0], dtype=np.uint16))
                begins = np.arange(sentence, length - 1, sentence, dtype=np.int32)
                starts.append_batch(np.array([0, len(begins)]), begins)
        files |= writer.files | starts.write()
        shards.append({"name": str(index), "documents": writer.documents, "tokens": writer.tokens})
    tokenizer = {"fingerprint": "", "vocab_size": 9, "end_of_document": 0}
    Manifest("shards", {"command": "test"}, files, {"shards": shards, "tokenizer": tokenizer}).write(folder)
    return ShardSet.open(folder)


def planned(shards: ShardSet, *values, **named):
    return write_plan(shards, PackSettings(*values, **named))


def samples_of(plan, split="train") -> list[list[tuple[int, int, bool]]]:
    """(first token, tokens, whether it continues a document) of each piece of each sample."""
    first, pieces = plan.pieces(split)
    return [[(int(s), int(n), bool(c)) for s, n, c in pieces[a:b]] for a, b in itertools.pairwise(first)]


def test_a_plan_has_the_numbers_worked_by_hand(tmp_path):
    # A quarter is held out: of 5 documents 1 (int 1.25), of 5 + 4 in all 2 (int 2.25), so 1 of each shard.
    shards = shard_set(tmp_path, [[10, 20, 5, 7, 11], [30, 2, 9, 14]])
    plan = planned(shards, "causal", 16, validation_fraction=0.25)
    # Training: 10 + 20 + 5 + 7 = 42 and 30 + 2 + 9 = 41 tokens; a causal sample is 16 and one more for the last target.
    assert plan.train == Split((0, 0), (4, 3), (0, 0), (42, 41), samples=(83 - 1) // 16)
    assert plan.validation == Split((4, 3), (5, 4), (42, 41), (11, 14), samples=(25 - 1) // 16)
    assert (plan.settings.stride, plan.train.samples, plan.validation.samples) == (16, 5, 1)
    # A masked-LM sample of 16 takes 14 tokens, between [CLS] and [SEP].
    masked = planned(shards, "mlm", 16, validation_fraction=0.25)
    assert (masked.settings.stride, masked.train.samples, masked.validation.samples) == (14, 83 // 14, 25 // 14)
    assert masked.train.tokens == plan.train.tokens


def test_the_last_causal_sample_has_its_last_target(tmp_path):
    assert planned(shard_set(tmp_path, [[16]]), "causal", 15, validation_fraction=0).train.samples == 1
    with pytest.raises(UserError, match="16 training tokens give no sample of 16 tokens"):
        planned(ShardSet.open(tmp_path), "causal", 16, validation_fraction=0)


def test_best_fit_worked_by_hand(tmp_path):
    """Capacity 10. Pieces by size: 10 (of the 23), 10, 8, 6, 4, 3 (the rest of the 23), 2. The 4 goes to the 6; the 3
    finds no room but a new bin; the 2 fits the 8 exactly."""
    shards = shard_set(tmp_path, [[8, 23, 4, 2, 6]])
    plan = planned(shards, "causal", 10, "best_fit", 0.0)
    assert sorted(samples_of(plan)) == sorted(
        [
            [(8, 10, False)],
            [(18, 10, True)],
            [(0, 8, False), (35, 2, False)],
            [(31, 4, False), (37, 6, False)],
            [(28, 3, True)],
        ]
    )
    usage = measure(shards, plan, "train")
    assert (usage.whole, usage.cut, usage.padding, usage.left_out) == (20, 23, 7, 0)
    assert (usage.documents, usage.cut_documents, usage.needless) == (5, 1, 0)


def slow_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing by the book."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [found for found in bins if sum(found) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60), capacity=st.integers(3, 70))
@settings(max_examples=60, deadline=None)
def test_best_fit_needs_as_many_samples_as_the_textbook_and_cuts_no_document_that_fits(lengths, capacity):
    ends = np.cumsum(lengths)
    begins = ends - lengths
    pieces, counts = packing.best_fit(begins, ends, capacity, 0)
    cut = [capacity] * sum(n // capacity for n in lengths) + [n % capacity for n in lengths if n % capacity]
    expected = slow_best_fit(cut, capacity)
    bins = np.split(pieces["length"], np.cumsum(counts)[:-1])
    # Which of two equally full bins is taken is free, and changes no sum.
    assert sorted(int(found.sum()) for found in bins) == sorted(map(sum, expected))
    covered = np.sort(np.concatenate([np.arange(s, s + n) for s, n, _ in pieces.tolist()]))
    assert np.array_equal(covered, np.arange(ends[-1])), "every token once"
    whole = {(int(s), int(s + n)) for s, n, _ in pieces.tolist()}
    assert all((b, e) in whole for b, e in zip(begins.tolist(), ends.tolist(), strict=True) if e - b <= capacity)


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_a_document_a_sample(tmp_path, objective):
    shards = shard_set(tmp_path, [[9, 30], [12]])
    plan = planned(shards, objective, 14, "document", 0.0)
    if objective == "causal":
        expected = [[(0, 9, False)], [(9, 14, False)], [(23, 14, True)], [(37, 2, True)], [(39, 12, False)]]
    else:  # [CLS] and [SEP] take 2 of 14; the end of a document is no token, for [SEP] stands in its place
        expected = [[(0, 8, False)], [(9, 12, False)], [(21, 12, True)], [(33, 5, True)], [(39, 11, False)]]
    assert samples_of(plan) == expected


def test_full_sentences_worked_by_hand(tmp_path):
    """Sentences of 5 tokens; 14 positions. Each document's part takes 2 more, so two sentences of one document fit (12)
    and a third does not; the 3 tokens left of the first document and 5 of the next take 3 + 2 + 5 + 2 = 12."""
    shards = shard_set(tmp_path, [[14, 11, 22]], sentence=5)
    plan = planned(shards, "mlm", 14, "full_sentences", 0.0)
    assert samples_of(plan) == [
        [(0, 10, False)],
        [(10, 3, True), (14, 5, False)],
        [(19, 5, True), (25, 5, False)],
        [(30, 10, True)],
        [(40, 6, True)],
    ]
    usage = measure(shards, plan, "train")
    assert usage.left_out == 0 and usage.whole + usage.cut == 13 + 10 + 21
    assert usage.frame == 2 * 7 and usage.padding == 5 * 14 - usage.frame - 44


def test_a_sentence_longer_than_a_sample_is_cut(tmp_path):
    plan = planned(shard_set(tmp_path, [[26]], sentence=100), "mlm", 12, "full_sentences", 0.0)
    assert samples_of(plan) == [[(0, 10, False)], [(10, 10, True)], [(20, 5, True)]]


lengths_of_shards = st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=12), min_size=1, max_size=3)


@given(lengths=lengths_of_shards, sentence=st.integers(1, 25), short=st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_full_sentences_use_every_token_once_and_cut_only_where_a_sentence_starts(
    lengths, sentence, short, tmp_path_factory
):
    shards = shard_set(tmp_path_factory.mktemp("s"), lengths, sentence)
    plan = planned(shards, "mlm", 16, "full_sentences", 0.0, short)
    bases = np.cumsum([0, *(n for shard in lengths for n in shard)])
    tokens = [list(range(b, e - 1)) for b, e in itertools.pairwise(bases)]
    pieces = [piece for sample in samples_of(plan) for piece in sample]
    assert [t for s, n, _ in pieces for t in range(s, s + n)] == [t for document in tokens for t in document]
    for sample in samples_of(plan):
        assert sum(n + 2 for _, n, _ in sample) <= 16
        for start, length, continues in sample:
            document = int(np.searchsorted(bases, start, side="right")) - 1
            assert continues == (start != bases[document])
            end = start + length - bases[document]
            at_end = end == bases[document + 1] - bases[document] - 1
            if sentence <= 14 and not short:  # a short sample may be too short for a sentence
                assert at_end or end % sentence == 0


@given(lengths=lengths_of_shards, sentence=st.integers(1, 25), short=st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_pairs_are_two_stretches_of_one_document_that_follow_on_one_another(lengths, sentence, short, tmp_path_factory):
    shards = shard_set(tmp_path_factory.mktemp("s"), [[40, 40], *lengths], sentence)
    settings_ = PackSettings("mlm", 19, "sop", 0.0, short)
    plan = write_plan(shards, settings_)
    bases = np.cumsum([0, 40, 40, *(n for shard in lengths for n in shard)])
    seen = Counter()
    for (a, m, _), (b, n, continues) in samples_of(plan):
        assert b == a + m and m > 0 and n > 0 and m + n + 3 <= 19 and continues
        document = int(np.searchsorted(bases, a, side="right")) - 1
        assert b + n <= bases[document + 1] - 1
        if sentence <= 8:  # longer ones are cut into halves of a sample
            assert (b - bases[document]) % sentence == 0
        seen.update(range(a, b + n))
    assert max(seen.values()) == 1
    # Only what cannot make a pair is left out: less than two sentences (or halves of a sample) at a document's end.
    for first, end in itertools.pairwise(bases):
        left = [t for t in range(first, end - 1) if t not in seen]
        assert len(left) <= 8 and left == list(range(end - 1 - len(left), end - 1))


def test_short_samples_have_the_share_that_was_asked_for(tmp_path):
    """A long document of one-token sentences fills every sample to what it is meant to have."""
    plan = planned(shard_set(tmp_path, [[200_000]], sentence=1), "mlm", 50, "full_sentences", 0.0, 0.3)
    sizes = np.array([sum(n + 2 for _, n, _ in sample) for sample in samples_of(plan)[:-1]])
    # 1 of 47 short ones is as long as the others.
    share = 0.3 * 46 / 47
    assert abs((sizes < 50).mean() - share) < 3.5 * np.sqrt(share * (1 - share) / len(sizes))
    short = sizes[sizes < 50]
    assert short.min() >= 4
    counts = np.bincount(short, minlength=50)[4:50]
    expected = counts.sum() / 46
    assert ((counts - expected) ** 2 / expected).sum() < 80.1, "evenly spread: chi-square, 45 degrees, 99.9 %"


def test_the_second_stretch_begins_at_any_sentence_alike(tmp_path):
    plan = planned(shard_set(tmp_path, [[120_000]], sentence=4), "mlm", 43, "sop", 0.0)
    whole = [(a, b) for (a, m, _), (b, n, _) in samples_of(plan) if m + n == 40]
    counts = np.bincount([(b - a) // 4 for a, b in whole], minlength=10)[1:10]
    expected = counts.sum() / 9
    assert len(whole) > 2_000 and ((counts - expected) ** 2 / expected).sum() < 26.1  # 8 degrees, 99.9 %


shard_lengths = st.lists(st.lists(st.integers(1, 30), max_size=12), min_size=1, max_size=6)


@given(lengths=shard_lengths, more=shard_lengths, fraction=st.floats(0, 0.9))
@settings(max_examples=25, deadline=None)
def test_training_and_held_out_documents_are_disjoint_complete_and_stay_when_shards_join(
    lengths, more, fraction, tmp_path_factory
):
    lengths = [[100], *lengths]
    train, validation = split_documents(shard_set(tmp_path_factory.mktemp("a"), lengths), fraction)
    for split in (train, validation):
        for index, documents in enumerate(lengths):
            first, end = split.first_document[index], split.end_document[index]
            assert split.first_token[index] == sum(documents[:first])
            assert split.tokens[index] == sum(documents[first:end])
    assert train.first_document == (0,) * len(lengths)
    assert train.end_document == validation.first_document
    assert validation.end_document == tuple(map(len, lengths))
    held_out = sum(validation.end_document) - sum(validation.first_document)
    assert held_out == int(sum(map(len, lengths)) * fraction)

    longer = split_documents(shard_set(tmp_path_factory.mktemp("b"), lengths + more), fraction)
    for name in ("first_document", "end_document", "first_token", "tokens"):
        for before, after in zip((train, validation), longer, strict=True):
            assert getattr(after, name)[: len(lengths)] == getattr(before, name)


@pytest.mark.parametrize("name", ["best_fit", "document", "full_sentences", "nsp"])
def test_samples_stay_when_shards_join_and_hold_no_held_out_document(tmp_path, name):
    generator = np.random.default_rng(1)
    lengths = [generator.integers(2, 60, 30).tolist() for _ in range(3)]
    plans = []
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        plans.append(planned(shard_set(folder, lengths[:count]), "mlm", 32, name, 0.2))
    before, after = (samples_of(plan) for plan in plans)
    assert after[: len(before)] == before and len(after) > len(before)
    held_out = samples_of(plans[1], "validation")
    bases = np.cumsum([0, *map(sum, lengths)])
    for samples, split in ((after, plans[1].train), (held_out, plans[1].validation)):
        for start, length, _ in (piece for sample in samples for piece in sample):
            shard = int(np.searchsorted(bases, start, side="right")) - 1
            first = bases[shard] + split.first_token[shard]
            assert first <= start and start + length <= first + split.tokens[shard]


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_concatenated_tokens_are_counted_as_a_slow_count_does(tmp_path, objective):
    generator = np.random.default_rng(2)
    lengths = [generator.integers(1, 40, 50).tolist() for _ in range(3)]
    shards = shard_set(tmp_path, lengths)
    plan = planned(shards, objective, 16, validation_fraction=0.0)
    first = 1 if objective == "causal" else 0
    sample_of = {}
    for sample in range(plan.train.samples):
        for token in range(first + sample * plan.settings.stride, first + (sample + 1) * plan.settings.stride):
            sample_of[token] = sample
    at = whole = cut = cut_documents = needless = left = 0
    for length in (n for shard in lengths for n in shard):
        samples = {sample_of.get(token) for token in range(at, at + length)}
        used = sum(token in sample_of for token in range(at, at + length))
        if len(samples) == 1 and used == length:
            whole += length
        elif used:
            cut, cut_documents = cut + used, cut_documents + 1
            needless += length <= (16 if objective == "causal" else 14)
        left += length - used
        at += length
    usage = measure(shards, plan, "train")
    assert (usage.whole, usage.cut, usage.cut_documents) == (whole, cut, cut_documents)
    assert (usage.needless, usage.left_out, usage.padding) == (needless, left, 0)


def test_a_plan_is_read_back_for_its_own_shards_and_settings_only(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    shards, other = shard_set(tmp_path / "one", [[50, 50]]), shard_set(tmp_path / "other", [[50, 49]])
    wanted = PackSettings("causal", 8, "best_fit", 0.5)
    assert read_plan(shards, wanted) is None
    plan = write_plan(shards, wanted)
    assert read_plan(shards, wanted) == plan
    for settings_ in (("mlm", 8), ("causal", 9, "best_fit", 0.5), ("causal", 8, "best_fit", 0.50000001)):
        assert read_plan(shards, PackSettings(*settings_)) is None
    shutil.copytree(plan.folder, plan_folder(other.folder, wanted))
    assert read_plan(other, wanted) is None


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}"])
def test_a_damaged_plan_is_an_error_naming_it(tmp_path, damage):
    shards = shard_set(tmp_path, [[50, 50]])
    wanted = PackSettings("causal", 8, "best_fit", 0.5)
    path = write_plan(shards, wanted).folder / "plan.json"
    path.write_bytes(damage)
    with pytest.raises(UserError, match="is damaged") as error:
        read_plan(shards, wanted)
    assert str(path) in str(error.value)
    write_json(path, {"version": 2, "shards_fingerprint": shards.fingerprint, "train": [], "validation": {}})
    with pytest.raises(UserError, match="is damaged"):
        read_plan(shards, wanted)


def test_a_cut_or_missing_index_is_an_error_naming_it(tmp_path):
    plan = planned(shard_set(tmp_path, [[50, 50, 3]]), "causal", 8, "best_fit", 0.0)
    path = plan.folder / "train.pieces"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(UserError, match=r"train\.pieces has \d+ bytes, expected \d+: remove .* and run"):
        plan.pieces("train")
    path.unlink()
    with pytest.raises(UserError, match=r"train\.pieces is missing"):
        plan.pieces("train")


def test_a_plan_that_fails_leaves_nothing(tmp_path):
    shards = shard_set(tmp_path, [[50, 50]])
    (tmp_path / "0.sentences").unlink()
    with pytest.raises(UserError, match=r"0\.sentences is missing: tokenize again, without --no-sentences"):
        planned(shards, "mlm", 16, "full_sentences", 0.0)
    assert not any((tmp_path / "samples").iterdir())


def test_windows_of_documents_make_one_plan(tmp_path, monkeypatch):
    generator = np.random.default_rng(3)
    shards = shard_set(tmp_path, [generator.integers(1, 40, 50).tolist()])
    whole = samples_of(planned(shards, "causal", 16, "document", 0.0))
    monkeypatch.setattr("data_prep.plan._WINDOW", 7)
    assert samples_of(planned(shards, "causal", 16, "document", 0.0)) == whole
    packed = [piece for sample in samples_of(planned(shards, "causal", 16, "best_fit", 0.0)) for piece in sample]
    assert sorted(t for s, n, _ in packed for t in range(s, s + n)) == list(range(sum(shards.tokens)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("causal", 4), "sequence_length is 4, expected at least 8"),
        (("causal", 64, "concatenate", 1), "validation_fraction is 1, expected 0 <= fraction < 1"),
        (("causal", 64, "concatenate", -0.1), "validation_fraction is -0.1"),
        (("causal", 64, "concatenate", float("nan")), "validation_fraction is nan"),
        (
            ("causal", 64, "sop"),
            "packing is sop, which objective causal has not; expected one of concatenate, best_fit",
        ),
        (("mlm", 64, "best_fit", 0.1, 0.1), "short_seq_prob is 0.1, but packing best_fit is not of sentences"),
        (("mlm", 64, "nsp", 0.1, 1.5), "short_seq_prob is 1.5, expected 0 <= probability <= 1"),
    ],
)
def test_settings_that_make_no_plan_are_refused(values, message):
    with pytest.raises(UserError) as error:
        PackSettings(*values)
    assert message in str(error.value)


def test_too_long_samples_are_refused_by_the_command_and_leave_nothing(tiny_shards, tmp_path, data_prep):
    shutil.copytree(tiny_shards, tmp_path / "s", ignore=shutil.ignore_patterns("samples"))
    flags = ["--objective", "causal", "--sequence_length", 100_000]
    message = "training tokens give no sample of 100000 tokens; take a smaller sequence_length or more text"
    assert message in data_prep("pack", "--shards", tmp_path / "s", *flags).error
    assert not any((tmp_path / "s/samples").iterdir())


def test_the_command_writes_the_plan_once_and_prints_its_numbers(tiny_shards, tmp_path, data_prep):
    shutil.copytree(tiny_shards, tmp_path / "s", ignore=shutil.ignore_patterns("samples"))
    command = ["pack", "--shards", tmp_path / "s", "--objective", "mlm", "--sequence_length", 66]
    command += ["--validation_fraction", 0.05]
    first = data_prep(*command)
    (folder,) = (tmp_path / "s/samples").iterdir()
    path = folder / "plan.json"
    plan = json.loads(path.read_bytes())
    assert plan["train"]["samples"] == sum(plan["train"]["tokens"]) // 64
    assert sum(plan["validation"]["end_document"]) - sum(plan["validation"]["first_document"]) == 12
    assert f"{plan['train']['samples']:,} samples" in first.stdout and "12 documents" in first.stdout
    modified = path.stat().st_mtime_ns
    assert "up to date" in data_prep(*command).stdout
    assert path.stat().st_mtime_ns == modified


def test_packings_are_compared_in_numbers_and_in_a_picture(tiny_shards, tmp_path, data_prep):
    shutil.copytree(tiny_shards, tmp_path / "s", ignore=shutil.ignore_patterns("samples"))
    shown = data_prep(
        "pack", "--shards", tmp_path / "s", "--objective", "mlm", "--sequence_length", 64, "--compare"
    ).stdout
    for name in ("concatenate", "best_fit", "document", "full_sentences", "nsp"):
        assert f"samples/mlm-{name}-64" in shown
    picture = (tmp_path / "s/samples/mlm-64-compared.svg").read_text()
    assert picture.count("<title>padding: ") == 5 and "<title>padding: 0</title>" in picture
    assert data_prep("verify", tmp_path / "s").status == 0


def test_making_a_plan_twice_gives_the_same_bytes(tmp_path):
    shards = shard_set(tmp_path, [[50, 50, 3, 20]])
    wanted = PackSettings("mlm", 16, "nsp", 0.0, 0.5)
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        make_plan(shards, wanted, folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 5
