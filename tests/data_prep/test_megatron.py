"""Megatron-Core opens our shards and gives the same samples; its shards are read here as if they were ours."""

import itertools
import shutil
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import __main__ as data_prep_main
from data_prep.encoding import load_tokenizer_info
from data_prep.errors import UserError
from data_prep.plan import PackSettings
from data_prep.shards import Shard, ShardSet, dtype_for, is_foreign, survey
from pipeline.data import adopt, is_missing, open_data, open_shards, plan_samples
from pipeline.recipe import DataSection, check_recipe
from tests.data_prep.test_shards import write_shard, write_shard_set
from tests.made_samples import made_samples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it looks for CUDA libraries that a test of file formats does not need
    from megatron.core.datasets import gpt_dataset, indexed_dataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

SEQUENCE_LENGTH = 16


def megatron_writes(prefix: Path, documents: list[list[int]], dtype: type = np.uint16, sentences: int = 1) -> None:
    """One shard by Megatron's own builder, every document in `sentences` sequences (its --split-sentences)."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        lengths = [len(part) for part in np.array_split(np.arange(len(ids)), sentences)]
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


def rewritten_by_megatron(shards: ShardSet, folder: Path, **options) -> Path:
    for name in shards.names:
        shard = Shard(shards.folder / name)
        documents = [shard.document(index).tolist() for index in range(shard.documents)]
        megatron_writes(folder / f"{name}_text_document", documents, **options)
    return folder


def random_documents(vocab_size: int, count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 1 to 60 ids, each ending with id 0."""
    generator = np.random.default_rng(seed)
    return [[*generator.integers(1, vocab_size, generator.integers(0, 60)).tolist(), 0] for _ in range(count)]


def megatron_samples(folder: Path, prefix: Path) -> GPTDataset:
    """Megatron's GPT samples of one epoch of a shard."""
    # What the configuration asks of a tokenizer; no text is tokenized.
    tokenizer = types.SimpleNamespace(vocab_size=1000, eod=0, pad=-1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = GPTDataset.build_low_level_dataset(str(prefix), config)
    indices = np.arange(GPTDataset.numel_low_level_dataset(dataset), dtype=np.int32)
    return GPTDataset(dataset, str(prefix), indices, None, Split.train, config)


@pytest.mark.parametrize("vocab_size", [1000, 65_499, 65_500, 65_536, 128_000])
def test_megatron_opens_our_shards_and_reads_every_token(tmp_path, vocab_size):
    documents = random_documents(vocab_size, 50)
    write_shard(tmp_path / "s", documents, dtype_for(vocab_size))
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "s"))
    assert len(theirs) == 50
    assert theirs.index.dtype == dtype_for(vocab_size) == indexed_dataset.DType.optimal_dtype(vocab_size)
    assert theirs.document_indices.tolist() == list(range(51))
    assert theirs.sequence_lengths.tolist() == [len(document) for document in documents]
    assert [theirs[index].tolist() for index in range(50)] == documents
    assert theirs.get(7, offset=0, length=1).tolist() == documents[7][:1]


def test_megatrons_gpt_dataset_gives_the_samples_that_we_train_on(tmp_path, tiny_shards, tiny_tokenizer, monkeypatch):
    """Unshuffled, sample by sample: Megatron's index over documents and our stretches of the stream are one thing."""

    class Unshuffled:
        def __init__(self, seed):
            pass

        def shuffle(self, array):
            pass

    monkeypatch.setattr(gpt_dataset.numpy.random, "RandomState", Unshuffled)
    whole = ShardSet.open(tiny_shards)
    for name in whole.names:
        folder = tmp_path / name
        folder.mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(tiny_shards / (name + suffix), folder)
        shards, _ = adopt(ShardSet.open(folder), load_tokenizer_info(tiny_tokenizer))
        ours = made_samples({name: shards}, tiny_tokenizer, PackSettings("causal", SEQUENCE_LENGTH, "concatenate", 0.0))
        theirs = megatron_samples(tmp_path / "cache", folder / name)
        assert len(theirs) == ours.size > 20
        epoch = ours.batch(np.arange(ours.size))
        for row, place in enumerate(ours.order.place(np.arange(ours.size)).sample):
            assert theirs[int(place)]["tokens"].tolist() == epoch.input_ids[row].tolist()
            assert theirs[int(place)]["labels"].tolist() == epoch.labels[row].tolist()


def test_megatrons_shuffled_samples_are_slices_of_our_documents(tmp_path):
    documents = random_documents(1000, 200)
    write_shard(tmp_path / "s", documents, np.dtype("<u2"))
    theirs, ours = megatron_samples(tmp_path / "cache", tmp_path / "s"), Shard(tmp_path / "s")
    order = theirs.document_index
    assert sorted(order.tolist()) == list(range(200)) != order.tolist()
    stream = np.concatenate([ours.document(int(number)) for number in order])
    assert len(theirs) == (len(stream) - 1) // SEQUENCE_LENGTH
    for number in range(len(theirs)):
        start = int(theirs.shuffle_index[number]) * SEQUENCE_LENGTH
        expected = stream[start : start + SEQUENCE_LENGTH + 1].tolist()
        sample = theirs[number]
        assert [*sample["tokens"].tolist(), int(sample["labels"][-1])] == expected
        document, offset = theirs.sample_index[int(theirs.shuffle_index[number])]
        first = ours.document(int(order[document]))[offset : offset + SEQUENCE_LENGTH + 1].tolist()
        assert expected[: len(first)] == first


def test_our_files_are_byte_for_byte_megatrons(tmp_path):
    documents = random_documents(1000, 40)
    write_shard(tmp_path / "ours", documents, np.dtype("<u2"))
    megatron_writes(tmp_path / "theirs", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", list(indexed_dataset.DType), ids=lambda dtype: dtype.name)
def test_every_dtype_code_means_what_it_means_to_megatron(tmp_path, dtype):
    """GPT-NeoX swaps 6 and 7 (float64, float32); token shards hold neither."""
    number = indexed_dataset.DType.dtype_from_code(dtype.value)
    megatron_writes(tmp_path / "s", [[1, 2, 3], [4]], dtype=number)
    shard = Shard(tmp_path / "s")
    assert shard.dtype == number
    assert shard.tokens.tolist() == [1, 2, 3, 4]
    if np.issubdtype(number, np.integer):
        assert ShardSet.open(tmp_path).tokens == (4,)
    else:
        with pytest.raises(UserError, match=rf"s\.bin holds {dtype.name} values, not token ids"):
            ShardSet.open(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("sentences", [1, 3])
def test_shards_of_megatron_are_a_shard_set_in_the_order_of_their_names(tmp_path, dtype, sentences):
    parts = [random_documents(1000, count, seed=count) for count in (3, 30, 17)]
    for name, documents in zip(("b", "a.1", "c"), parts, strict=True):
        megatron_writes(tmp_path / f"{name}_text_document", documents, dtype, sentences)
    shards = ShardSet.open(tmp_path)
    assert shards.names == ("a.1_text_document", "b_text_document", "c_text_document")
    assert shards.documents == (30, 3, 17)
    assert shards.tokens == tuple(sum(map(len, parts[index])) for index in (1, 0, 2))
    assert (shards.vocab_size, shards.tokenizer_fingerprint, shards.end_of_document) == (None, None, None)
    shard = shards.shard(0)
    assert [shard.document(index).tolist() for index in range(30)] == parts[1]
    bounds = list(itertools.accumulate(map(len, parts[1]), initial=0))
    assert shard.document_offsets.tolist() == [shard.document_offset(i) for i in range(31)] == bounds


def test_empty_documents_have_no_tokens_wherever_they_stand(tmp_path):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    for ids in ([], [1, 2], [], [3], []):
        for token in ids:
            builder.add_item(torch.tensor([token]))
        builder.end_document()  # Megatron gives a document without items no sequence
    builder.finalize(str(tmp_path / "s.idx"))
    shard = ShardSet.open(tmp_path).shard(0)
    assert [shard.document(index).tolist() for index in range(shard.documents)] == [[], [1, 2], [], [3], []]
    assert shard.document_offsets.tolist() == [0, 0, 2, 2, 3, 3]


def test_an_unfinished_folder_of_ours_is_not_taken_for_another_programs(tmp_path):
    write_shard(tmp_path / "000000", [[1, 0]], np.dtype("<u2"))
    assert is_foreign(tmp_path)
    (tmp_path / ".parts").mkdir()
    assert not is_foreign(tmp_path)
    section = DataSection(shards=str(tmp_path), tokenizer="t", sequence_length=8, prepare="job.yaml")
    assert is_missing(section)
    with pytest.raises(UserError, match="holds no finished shards"):
        open_shards(section)


def damaged(prefix: Path, offset: int, values: bytes) -> None:
    content = bytearray(prefix.with_suffix(".idx").read_bytes())
    content[offset : offset + len(values)] = values
    prefix.with_suffix(".idx").write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "fmt", "values", "message"),
    [
        (34 + 3 * 4, "<q", [2], "sequences do not lie one after the other"),
        (34 + 3 * 4 + 8, "<q", [40], "sequences do not lie one after the other"),
        (34 + 3 * 12, "<q", [1], "documents do not follow one another"),
        (34 + 3 * 12, "<4q", [0, 2, 1, 3], "documents do not follow one another"),
        (34 + 3 * 12 + 24, "<q", [2], "documents do not follow one another"),
    ],
)
def test_an_index_that_does_not_fit_together_is_refused(tmp_path, offset, fmt, values, message):
    megatron_writes(tmp_path / "s", [[1, 2], [3], [4, 5]])
    damaged(tmp_path / "s", offset, struct.pack(fmt, *values))
    with pytest.raises(UserError, match=message):
        ShardSet.open(tmp_path)


def test_a_multimodal_data_set_is_named_as_one(tmp_path):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "s.idx"))
    with pytest.raises(UserError, match="multimodal"):
        ShardSet.open(tmp_path)


def test_the_fingerprint_follows_tokens_boundaries_dtype_and_order_and_nothing_else(tmp_path):
    documents = [[1, 2, 0], [3, 0]]
    variants = {
        "first": {"a": documents},
        "same": {"a": documents},
        "token": {"a": [[1, 4, 0], [3, 0]]},
        "boundary": {"a": [[1, 2], [0, 3, 0]]},
        "name": {"b": documents},
        "two": {"a": documents[:1], "b": documents[1:]},
    }
    found = {}
    for variant, shards in variants.items():
        for name, content in shards.items():
            megatron_writes(tmp_path / variant / name, content)
        found[variant] = ShardSet.open(tmp_path / variant).fingerprint
    megatron_writes(tmp_path / "dtype" / "a", documents, dtype=np.int32)
    found["dtype"] = ShardSet.open(tmp_path / "dtype").fingerprint
    assert found.pop("same") == found["first"]
    assert len(set(found.values())) == len(found)


def test_a_survey_sees_everything_of_a_small_set_and_stretches_of_a_large_one(tmp_path):
    parts = [random_documents(900, 300, seed) for seed in range(3)]
    parts[2][150][0] = 950
    parts[1][3][-1] = 7
    shards = write_shard_set(tmp_path, parts, vocab_size=1000)
    tokens = [token for part in parts for document in part for token in document]
    whole = survey(shards)
    assert (whole.tokens, whole.smallest, whole.largest) == (len(tokens), 0, 950)
    assert (whole.documents, whole.last, whole.last_share) == (900, 0, pytest.approx(899 / 900))
    some = survey(shards, max_tokens=1000, max_documents=90)
    assert some.tokens <= 1000 and some.documents == 90 and some.last == 0
    in_stretches = survey(shards, max_tokens=1 << 14)
    assert in_stretches.tokens == 1 << 14


def recipe_for(shards: Path, tokenizer: Path, objective: str = "causal"):
    return check_recipe(
        {
            "objective": objective,
            "model": {"config": "demo-gpt"},
            "data": {"shards": str(shards), "tokenizer": str(tokenizer), "sequence_length": 32},
            "training": {"global_batch_size": 8, "max_steps": 2},
            "optimizer": {"lr": 1e-3},
        },
        "test",
    )


@pytest.mark.parametrize("options", [{}, {"dtype": np.int32}, {"sentences": 4}], ids=["uint16", "int32", "sentences"])
@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_training_data_from_megatrons_shards_is_that_from_ours(
    tmp_path, tiny_shards, tiny_tokenizer, options, objective
):
    theirs = rewritten_by_megatron(ShardSet.open(tiny_shards), tmp_path / "theirs", **options)
    ours = shutil.copytree(tiny_shards, tmp_path / "ours")
    batches = []
    for folder in (theirs, ours):
        recipe = recipe_for(folder, tiny_tokenizer, objective)
        plan_samples(recipe)
        data = open_data(recipe)
        batches.append([data.train.batch(np.arange(64)), data.validation.batch(np.arange(1))])
        assert len(data.notes) == (folder is theirs)
    for left, right in zip(*batches, strict=True):
        assert np.array_equal(left.input_ids, right.input_ids) and np.array_equal(left.labels, right.labels)


def test_what_cannot_be_checked_is_said_in_one_line(tmp_path, tiny_shards, tiny_tokenizer):
    theirs = rewritten_by_megatron(ShardSet.open(tiny_shards), tmp_path / "theirs")
    info = load_tokenizer_info(tiny_tokenizer)
    shards, notes = adopt(ShardSet.open(theirs), info)
    assert (shards.vocab_size, shards.end_of_document) == (info.vocab_size, info.special.end_of_document)
    assert len(notes) == 1 and "could not be checked" in notes[0] and "all tokens seen" in notes[0]
    assert "\n" not in notes[0]


def test_documents_that_end_otherwise_than_the_tokenizers_do_are_warned_of(tmp_path, tiny_tokenizer):
    end = load_tokenizer_info(tiny_tokenizer).special.end_of_document
    other = end + 5
    megatron_writes(tmp_path / "none" / "s", [[other + 1, other]] * 4)
    megatron_writes(tmp_path / "some" / "s", [[other + 1, end]] * 3 + [[other, other + 1]])
    _, notes = adopt(ShardSet.open(tmp_path / "none"), load_tokenizer_info(tiny_tokenizer))
    assert f"100.0% of the documents end with id {other}" in notes[1] and f"{end}" in notes[1]
    _, notes = adopt(ShardSet.open(tmp_path / "some"), load_tokenizer_info(tiny_tokenizer))
    assert f"75.0% of the documents end with the tokenizer's end of document, {end}" in notes[1]


@pytest.mark.parametrize(("token", "dtype"), [(768, np.uint16), (70_000, np.int32), (-1, np.int32)])
def test_an_id_that_the_tokenizer_does_not_have_is_refused(tmp_path, tiny_tokenizer, token, dtype):
    megatron_writes(tmp_path / "s", [[5, token, 0], [7, 0]], dtype)
    with pytest.raises(UserError, match=rf"hold id {token}, but data\.tokenizer .* has 768 ids"):
        adopt(ShardSet.open(tmp_path), load_tokenizer_info(tiny_tokenizer))


def test_pack_inspect_and_verify_say_what_they_can(tmp_path, tiny_shards, tiny_tokenizer, capsys):
    ours = ShardSet.open(tiny_shards)
    theirs = rewritten_by_megatron(ours, tmp_path / "theirs")
    data_prep_main.run_stage("pack", f"--shards {theirs} --objective causal --sequence_length 32".split())
    assert "another program" in capsys.readouterr().out
    assert len(list((theirs / "samples").iterdir())) == 1
    data_prep_main.run_stage("inspect", [str(theirs), "--tokenizer", str(tiny_tokenizer), "--documents", "1"])
    shown = capsys.readouterr().out
    assert "another program" in shown and f"{sum(ours.tokens):,}" in shown and "documents end with" in shown
    data_prep_main.run_stage("verify", [str(theirs)])
    shown = capsys.readouterr().out
    assert "another program" in shown and "no checksum" in shown and f"{sum(ours.documents):,} documents" in shown
    (theirs / f"{ours.names[0]}_text_document.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"the shard is damaged"):
        data_prep_main.run_stage("verify", [str(theirs)])


def test_megatron_is_no_part_of_what_users_run():
    """It is here to compare with; nothing of ours may need it."""
    for package in ("data_prep", "pipeline"):
        for path in Path(sys.modules["data_prep"].__path__[0]).parent.joinpath(package).rglob("*.py"):
            assert "import megatron" not in path.read_text() and "from megatron" not in path.read_text()
