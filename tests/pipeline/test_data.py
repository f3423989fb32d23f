"""From a recipe to samples: shard sets, mixtures and weights."""

import shutil

import numpy as np
import pytest

from data_prep import __main__ as data_prep_main
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.shards import ShardSet, ShardWriter
from pipeline.data import open_data, plan_samples, resolve_weights
from pipeline.provenance import continue_weights, record_run
from pipeline.recipe import check_recipe


@pytest.fixture
def opened(tiny_tokenizer):
    """opened(shards, **data) -> the Data of a recipe."""

    def make(shards, **data):
        recipe = check_recipe(
            {
                "objective": "causal",
                "model": {"config": "demo-gpt"},
                "data": {
                    "shards": {name: str(folder) for name, folder in shards.items()}
                    if isinstance(shards, dict)
                    else str(shards),
                    "tokenizer": str(tiny_tokenizer),
                    "sequence_length": 32,
                    "validation_fraction": 0.1,
                    **data,
                },
                "training": {"global_batch_size": 8, "max_steps": 4},
                "optimizer": {"lr": 1e-3},
            },
            "test",
        )
        plan_samples(recipe)
        return open_data(resolve_weights(recipe))

    return make


@pytest.fixture
def two(tiny_shards, tmp_path):
    """Two corpora; the second is the first shard of the first."""
    small = tmp_path / "small"
    small.mkdir()
    whole = ShardSet.open(tiny_shards)
    with ShardWriter(small / "0", whole.shard(0).dtype) as writer:
        for document in range(whole.documents[0]):
            writer.append(whole.shard(0).document(document))
    shards = [{"name": "0", "documents": writer.documents, "tokens": writer.tokens}]
    tokenizer = {
        "fingerprint": whole.tokenizer_fingerprint,
        "vocab_size": whole.vocab_size,
        "end_of_document": whole.end_of_document,
    }
    Manifest("shards", {"command": "test"}, writer.files, {"shards": shards, "tokenizer": tokenizer}).write(small)
    return {"large": shutil.copytree(tiny_shards, tmp_path / "large"), "small": small}


def shares(data, samples=10_000):
    return data.train.order.consumed(samples) / samples


def test_without_weights_every_document_is_seen_equally_often(opened, two):
    data = opened(two)
    tokens = [sum(corpus.shards.tokens) for corpus in data.corpora]
    assert shares(data) == pytest.approx(np.array(tokens) / sum(tokens), abs=1e-4)
    epochs = data.train.order.consumed(100_000) / np.array(data.train.sizes)
    assert epochs[0] == pytest.approx(epochs[1], rel=0.1), "but for what is held out of so few documents"


def test_weights_are_those_of_the_recipe_and_may_change_by_step(opened, two):
    assert shares(opened(two, weights={"large": 3, "small": 1})).tolist() == [0.75, 0.25]
    staged = opened(two, weights={0: {"large": 1}, 100: {"small": 1}}).train.order
    assert staged.consumed(800).tolist() == [800, 0] and staged.consumed(900).tolist() == [800, 100]


def test_a_mixture_brings_its_weights(opened, two, tmp_path):
    command = f"--shards {two['large']} {two['small']} --weights 0.9 0.1 --output_dir {tmp_path}/mixture"
    data_prep_main.run_stage("mix", command.split())
    data_prep_main.run_stage("pack", f"--shards {tmp_path}/mixture --objective causal --sequence_length 32".split())
    assert all(
        (folder / "samples/causal-concatenate-32-validation-0.005/plan.json").exists() for folder in two.values()
    )
    data = opened(tmp_path / "mixture")
    assert [corpus.name for corpus in data.corpora] == ["large", "small"]
    assert shares(data).tolist() == [0.9, 0.1]
    assert shares(opened(tmp_path / "mixture", weights={"small": 1.0})).tolist() == [0.0, 1.0]


def test_corpora_that_join_leave_the_held_out_documents_and_the_order_of_the_others(opened, two):
    alone, both = opened({"large": two["large"]}), opened(two)
    assert both.corpora[0].plan == alone.corpora[0].plan
    numbers = np.arange(200)
    first, second = alone.train.order.place(numbers), both.train.order.place(np.arange(400))
    assert np.array_equal(second.sample[second.corpus == 0][:200], first.sample[: (second.corpus == 0).sum()][:200])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": {"larg": 1.0}}, "data.weights names 'larg'; did you mean large?"),
        ({"weights": {"large": 0.0}}, "data.weights at step 0 has no corpus with a weight above 0"),
        ({"weights": {10: {"large": 1.0}}}, "data.weights has no stage for step 0, where the run begins"),
        ({"weights": {"large": -1.0}}, "data.weights"),
    ],
)
def test_weights_that_mean_nothing_are_refused(opened, two, data, message):
    with pytest.raises(UserError) as error:
        opened(two, **data)
    assert message in str(error.value)


def test_corpora_of_several_dtypes_or_inside_a_mixture_are_refused(opened, two, tmp_path):
    command = f"--shards {two['large']} {two['small']} --output_dir {tmp_path}/mixture"
    data_prep_main.run_stage("mix", command.split())
    with pytest.raises(UserError, match="is a mixture; name the shard sets in it one by one"):
        opened({"all": tmp_path / "mixture", "small": two["small"]})
    small = ShardSet.open(two["small"])
    with ShardWriter(two["small"] / "0", np.dtype("<i4")) as writer:
        writer.append_batch(small.shard(0).tokens.astype(np.int32), np.diff(small.shard(0).document_offsets))
    with pytest.raises(UserError, match=r"holds uint16, .* int32: corpora of one run have one dtype"):
        opened(two)


def test_weights_that_a_run_goes_on_with_leave_what_came_before(two, tmp_path, tiny_tokenizer):
    """Also those that nobody stated: a mixture made anew, a corpus that joins."""
    raw = {
        "objective": "causal",
        "model": {"config": "demo-gpt"},
        "data": {"shards": str(two["large"]), "tokenizer": str(tiny_tokenizer), "sequence_length": 32},
        "training": {"global_batch_size": 8, "max_steps": 4},
        "optimizer": {"lr": 1e-3},
    }
    alone = resolve_weights(check_recipe(raw, "test"))
    assert alone.data.weights is None
    plan_samples(alone)
    record_run(tmp_path / "run", alone, {}, open_data(alone), {})
    raw["data"]["shards"] = {"corpus": str(two["large"]), "small": str(two["small"])}
    joined = continue_weights(tmp_path / "run", resolve_weights(check_recipe(raw, "test")), 10)
    tokens = {name: float(sum(ShardSet.open(folder).tokens)) for name, folder in two.items()}
    assert joined.data.weights == {0: {"corpus": 1.0}, 10: {"corpus": tokens["large"], "small": tokens["small"]}}
    plan_samples(joined)
    record_run(tmp_path / "run", joined, {}, open_data(joined), {})
    again = continue_weights(tmp_path / "run", resolve_weights(check_recipe(raw, "test")), 30)
    assert again.data.weights == joined.data.weights, "nothing changed"
    raw["data"]["weights"] = {"small": 1.0}
    later = continue_weights(tmp_path / "run", resolve_weights(check_recipe(raw, "test")), 30)
    assert later.data.weights == {**joined.data.weights, 30: {"small": 1.0}}
