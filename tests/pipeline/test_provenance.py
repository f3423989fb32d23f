"""What may change when a run goes on, and what is said of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline.arguments import parse_arguments
from pipeline.provenance import NO_CHANGES, RUN_NAME, Changes, check_data, continue_recipe
from pipeline.recipe import Recipe, check_recipe

RECIPE: dict[str, Any] = {
    "objective": "causal",
    "model": {"config": "demo-gpt"},
    "data": {"shards": "shards", "tokenizer": "tokenizer", "sequence_length": 32},
    "training": {"global_batch_size": 8, "max_steps": 4},
    "optimizer": {"lr": 0.01},
}


def recipe(**sections: dict[str, Any]) -> Recipe:
    raw = {
        name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value
        for name, value in RECIPE.items()
    }
    return check_recipe(raw, "recipe")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    content = {
        "recipe": json.loads(recipe().model_dump_json()),
        "corpora": {"left": "a" * 64, "right": "b" * 64},
        "tokenizer_fingerprint": "c" * 64,
    }
    (tmp_path / RUN_NAME).write_text(json.dumps(content))
    return tmp_path


def data(tokenizer: str = "c", **corpora: str) -> Any:
    def corpus(name: str, letter: str) -> Any:
        return SimpleNamespace(name=name, shards=SimpleNamespace(fingerprint=letter * 64))

    found = {"left": "a", "right": "b", **corpora}
    return SimpleNamespace(
        corpora=[corpus(name, letter) for name, letter in found.items()],
        tokenizer=SimpleNamespace(fingerprint=tokenizer * 64),
    )


def test_a_change_is_refused_by_name_and_taken_over_where_it_is_named(run):
    changed = recipe(optimizer={"lr": 0.5, "eps": 1e-6})
    with pytest.raises(UserError, match=r"optimizer.eps was 1e-08, now 1e-06; optimizer.lr was 0.01, now 0.5") as error:
        continue_recipe(run, changed, 2, NO_CHANGES)
    assert "--allow_changed optimizer.eps optimizer.lr" in str(error.value)
    with pytest.raises(UserError, match=r"optimizer.eps was") as error:
        continue_recipe(run, changed, 2, Changes(("optimizer.lr",)))
    assert "optimizer.lr" not in str(error.value)
    for allowed in (("optimizer.lr", "optimizer.eps"), ("optimizer",)):
        said: list[str] = []
        assert continue_recipe(run, changed, 2, Changes(allowed, said.append)).optimizer.lr == 0.5
        assert said == [
            "changed   optimizer.eps was 1e-08, now 1e-06",
            "changed   optimizer.lr was 0.01, now 0.5",
        ]


def test_what_does_not_alter_a_step_may_change_without_a_word(run):
    changed = recipe(checkpoint={"keep_last": 7}, training={"max_steps": 9}, data={"tokenizer": "moved"})
    said: list[str] = []
    assert continue_recipe(run, changed, 2, Changes((), said.append)).max_steps == 9
    assert said == []


def test_an_optimizer_of_another_type_is_refused_whatever_is_allowed(run):
    with pytest.raises(UserError, match=r"optimizer.type was 'AdamW', now 'Lion'") as error:
        continue_recipe(run, recipe(optimizer={"type": "Lion"}), 2, Changes(("optimizer.type", "optimizer")))
    assert "allow_changed" not in str(error.value)


def test_changed_data_or_tokenizer_is_refused_unless_it_is_named(run):
    check_data(run, data(joined="d"))
    with pytest.raises(UserError, match=r"fingerprint of left was 'a+', now 'x+'.*--allow_changed data.shards"):
        check_data(run, data(left="x"), Changes(("data.tokenizer",)))
    with pytest.raises(UserError, match=r"tokenizer's fingerprint was 'c+', now 'y+'.*--allow_changed data.tokenizer"):
        check_data(run, data(tokenizer="y"), Changes(("data.shards",)))
    said: list[str] = []
    check_data(run, data(tokenizer="y", left="x"), Changes(("data.tokenizer", "data.shards"), said.append))
    assert len(said) == 2


def test_a_field_that_is_none_is_found_on_the_command_line():
    flags = ["--deepspeed_config", "ds.json", "--allow_changed", "optimizer.lr", "data", "--optimizer.lr", "0.5"]
    arguments = parse_arguments(flags)
    assert arguments.allow_changed == ("optimizer.lr", "data") and arguments.overrides == (("optimizer.lr", "0.5"),)
    with pytest.raises(UserError, match=r"--allow_changed optimizer.rate is no field of a recipe"):
        parse_arguments(["--deepspeed_config", "ds.json", "--allow_changed", "optimizer.rate"])
