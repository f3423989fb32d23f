"""The shipped recipes and models are the published ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.encoding import SpecialTokens, TokenizerInfo
from pipeline.model import MODELS, build_model, make_model_config, measure_model, read_model_config
from pipeline.recipe import RECIPES, Recipe, check_recipe, override, read_recipe_file
from pipeline.schedule import learning_rate

RECIPE_FILES = sorted(RECIPES.glob("*.yaml"))
MODEL_FILES = sorted(MODELS.glob("*.json"))
PAPERS = ["bert-base", "bert-large", "gpt-7b", "gpt2-1.5b", "gpt2-124m", "gpt2-350m", "gpt2-774m"]


def load(name: str) -> Recipe:
    path = RECIPES / f"{name}.yaml"
    return check_recipe(read_recipe_file(path), str(path))


def build(name: str, **changes: Any) -> Any:
    """The model with the vocabulary that its file names, on the meta device: shapes without weights."""
    import torch
    from transformers import AutoConfig

    values = {**read_model_config(name), **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return build_model(config, load(name).objective, seed=0)


def size_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_recipe_is_shipped_for_every_paper_and_both_demos() -> None:
    assert [path.stem for path in RECIPE_FILES] == sorted([*PAPERS, "demo-bert", "demo-gpt"])
    models = {load(path.stem).model.config for path in RECIPE_FILES}
    assert {path.stem for path in MODEL_FILES} == models | {"demo-bert"}


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_names_a_shipped_model_that_fits(path: Path) -> None:
    recipe = load(path.stem)
    config = read_model_config(recipe.model.config)
    positions = config.get("n_positions", config.get("max_position_embeddings"))
    assert recipe.data.sequence_length == positions
    assert recipe.objective == ("mlm" if config["model_type"] in ("bert", "modernbert") else "causal")


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_shipped_recipes_rate_starts_low_peaks_once_and_ends_at_its_minimum(path: Path) -> None:
    recipe = load(path.stem)
    warmup, last = recipe.schedule.warmup_steps, recipe.max_steps - 1
    assert 0 < warmup < recipe.max_steps
    assert learning_rate(recipe, 0) == pytest.approx(recipe.optimizer.lr / warmup)
    assert learning_rate(recipe, warmup) == pytest.approx(recipe.optimizer.lr)
    assert learning_rate(recipe, last) == pytest.approx(recipe.schedule.min_lr, abs=1e-18)


# Of the released weights, tied matrices once.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt-7b": 6_738_415_616,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_causal_model_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert size_of(build(name)) == parameters


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "literature"), [("bert-base", 12, 768, 110e6), ("bert-large", 24, 1024, 340e6)]
)
def test_a_bert_has_the_number_of_parameters_that_its_architecture_gives(
    name: str, layers: int, hidden: int, literature: float
) -> None:
    vocabulary, positions, segments, inner = 30_522, 512, 2, 4 * hidden
    norm = 2 * hidden
    dense = hidden * hidden + hidden
    embeddings = (vocabulary + positions + segments) * hidden + norm
    attention = 4 * dense + norm
    feed_forward = hidden * inner + inner + inner * hidden + hidden + norm
    head = dense + norm + vocabulary  # the output matrix is the input embedding's
    expected = embeddings + layers * (attention + feed_forward) + head
    model = build(name)
    assert size_of(model) == expected
    # The paper's round figures (section 3) hold the pooler (one dense layer) besides, which masked LM does not have.
    assert expected + dense == pytest.approx(literature, rel=0.015)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1  # appendix A.2


@pytest.mark.parametrize(("name", "objective"), [("demo-bert", "mlm"), ("demo-gpt", "causal")])
def test_a_demo_model_is_small_with_the_demo_vocabulary(name: str, objective: str) -> None:
    import torch

    special = SpecialTokens(end_of_document=0, padding=1, classification=2, separator=3, mask=4, unknown=5)
    tokenizer = TokenizerInfo(folder=Path("tokenizer"), fingerprint="0", vocab_size=8192, special=special)
    raw = read_recipe_file(RECIPES / "demo-gpt.yaml")
    override(raw, "model.config", name)
    override(raw, "objective", objective)
    override(raw, "data.sequence_length", "128")
    recipe = check_recipe(raw, "demo-gpt.yaml")
    with torch.device("meta"):
        model = build_model(make_model_config(recipe, tokenizer), objective, seed=0)
    assert 9e6 < size_of(model) < 11e6


def test_flops_of_a_model_are_six_a_matrix_parameter_and_attention() -> None:
    size = measure_model(build("gpt2-124m"), "causal", 1024)
    layers, hidden, vocabulary = 12, 768, 50_257
    norms_and_biases = layers * (4 + 9) * hidden + 2 * hidden
    assert size.matrix_parameters == 124_439_808 - 1024 * hidden
    assert size.matrix_parameters == layers * 12 * hidden**2 + vocabulary * hidden + norms_and_biases
    assert size.flops_a_token == 6 * size.matrix_parameters + 6 * layers * hidden * 1024


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_every_key_of_a_model_file_is_one_that_transformers_reads(path: Path) -> None:
    from transformers import AutoConfig

    values = json.loads(path.read_text())
    known = AutoConfig.for_model(values["model_type"]).to_dict()
    assert values.keys() <= known.keys()


def test_gpt_7b_rotates_with_the_published_base() -> None:
    config = build("gpt-7b", num_hidden_layers=1).config
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert config.head_dim == 128


@pytest.mark.parametrize(
    ("name", "tokens", "lr", "run_tokens", "warmup_tokens"),
    [
        ("gpt2-124m", 2**19, 6.0e-4, 300e9, 375e6),
        ("gpt2-350m", 2**19, 3.0e-4, 300e9, 375e6),
        ("gpt2-774m", 2**19, 2.5e-4, 300e9, 375e6),
        ("gpt2-1.5b", 2**20, 2.0e-4, 300e9, 375e6),
        ("gpt-7b", 2**22, 3.0e-4, 1e12, 2000 * 2**22),
        ("bert-base", 256 * 512, 1.0e-4, 256 * 512e6, 256 * 512e4),
        ("bert-large", 256 * 512, 1.0e-4, 256 * 512e6, 256 * 512e4),
    ],
)
def test_batch_rate_length_and_warm_up_are_the_published_ones(
    name: str, tokens: int, lr: float, run_tokens: float, warmup_tokens: float
) -> None:
    recipe = load(name)
    assert recipe.training.global_batch_size * recipe.data.sequence_length == tokens
    assert recipe.optimizer.lr == lr
    assert 0 <= recipe.max_steps * tokens - run_tokens < tokens
    assert abs(recipe.schedule.warmup_steps * tokens - warmup_tokens) <= tokens / 2


@pytest.mark.parametrize("name", PAPERS)
def test_optimizer_and_shape_of_the_schedule_are_the_published_ones(name: str) -> None:
    recipe = load(name)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    found = (schedule.type, optimizer.betas, optimizer.weight_decay)
    if name.startswith("bert"):
        assert found == ("linear", (0.9, 0.999), 0.01)
        assert schedule.min_lr == 0.0
        masking = recipe.masking
        assert (masking.probability, masking.mask, masking.random) == (0.15, 0.8, 0.1)
    else:
        assert found == ("cosine", (0.9, 0.95), 0.1)
        assert schedule.min_lr == pytest.approx(0.1 * optimizer.lr)
    assert optimizer.eps == {"bert": 1e-6, "gpt2": 1e-8, "gpt": 1e-5}[name.split("-")[0]]
    assert optimizer.gradient_clipping == 1.0
