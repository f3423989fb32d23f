"""A recipe is checked once, at the edge: what is wrong with it is one line that names file, key and what to do.

The learning rate is a pure function of recipe and step, and equals transformers' where the definitions coincide.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.arguments import parse_arguments
from pipeline.model import make_model_config, read_model_config
from pipeline.recipe import Recipe, check_recipe, fields, override, read_recipe_file
from pipeline.schedule import learning_rate

GOOD = """\
objective: causal
model: {config: gpt2-124m}
data: {shards: s, tokenizer: t, sequence_length: 1024}
training: {global_batch_size: 8, max_steps: 110}
optimizer: {lr: 1.0e-3}
schedule: {type: cosine, warmup_steps: 10, min_lr: 1.0e-4}
"""


def good() -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(GOOD)
    return raw


def overridden(*flags: tuple[str, str]) -> Recipe:
    raw = good()
    for name, text in flags:
        override(raw, name, text)
    return check_recipe(raw, "r.yaml")


def fault_in(tmp_path: Path, text: str) -> str:
    """The one line on a recipe file with this text, without the folder."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        check_recipe(read_recipe_file(path), str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


def fault_of_flags(*flags: tuple[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        overridden(*flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_recipe_passes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    assert check_recipe(read_recipe_file(path), str(path)) == overridden()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1.0e-3", "lr: 1, weight_deacy: 0.1", "unknown key 'optimizer.weight_deacy'; did you mean weight_decay?"),
        ("schedule:", "scheduel:", "unknown key 'scheduel'; did you mean schedule?"),
        (
            "min_lr: 1.0e-4",
            "zzz: 1",
            "unknown key 'schedule.zzz'; expected one of: type, warmup_steps, min_lr",
        ),
        ("{lr: 1.0e-3}", "1.0e-3", "optimizer: expected a mapping, found 0.001"),
        ("{lr: 1.0e-3}", "", "optimizer: expected a mapping, found None"),
        ("max_steps: 110", "max_steps: many", "training.max_steps is 'many': expected a valid integer"),
        ("max_steps: 110", "max_steps: 1.5", "training.max_steps is 1.5: expected a valid integer"),
        (
            "max_steps: 110",
            "max_steps: yes",
            "training.max_steps: found the truth value true, which this field does not take",
        ),
        ("lr: 1.0e-3", "lr: [1]", "optimizer.lr is [1]: expected a valid number"),
        ("shards: s", "shards: 5", "data.shards is 5: expected a valid string"),
        ("lr: 1.0e-3", "lr: 0", "optimizer.lr is 0: expected greater than 0"),
        ("lr: 1.0e-3", "lr: .inf", "optimizer.lr is inf: expected a finite number"),
        ("lr: 1.0e-3", "lr: .nan", "optimizer.lr is nan: expected"),
        ("lr: 1.0e-3", "lr: 1, betas: [0.9, 1.0]", "optimizer.betas.1 is 1.0: expected less than 1"),
        ("lr: 1.0e-3", "lr: 1, betas: [0.9]", "optimizer.betas: value 2 is missing"),
        ("sequence_length: 1024", "sequence_length: 0", "data.sequence_length is 0: expected greater than 0"),
        ("objective: causal", "objective: clm", "objective is 'clm': expected 'causal' or 'mlm'"),
        ("lr: 1.0e-3", "type: AdamW", "optimizer.lr is missing; give it in the file or as --optimizer.lr"),
        ("objective: causal\n", "", "objective is missing; give it in the file or as --objective"),
        ("data: {shards: s, tokenizer: t, sequence_length: 1024}\n", "", "data is missing"),
        ("min_lr: 1.0e-4", "min_lr: 1.0e-2", "schedule.min_lr is 0.01, above optimizer.lr 0.001"),
        ("max_steps: 110", "max_steps: 110, max_tokens: 9", "training: give either max_steps or max_tokens"),
        ("max_steps: 110", "max_steps: null", "training: give either max_steps or max_tokens"),
        ("model:", "masking: {mask: 0.9, random: 0.2}\nmodel:", "masking: mask + random is 1.1, expected at most 1"),
    ],
)
def test_a_fault_is_one_line_that_names_file_key_and_value(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert fault_in(tmp_path, GOOD.replace(old, new)).startswith(f"r.yaml: {message}")


def test_several_faults_are_counted(tmp_path: Path) -> None:
    text = GOOD.replace("lr: 1.0e-3", "lr: 0").replace("max_steps: 110", "max_steps: 0")
    assert fault_in(tmp_path, text) == "r.yaml: training.max_steps is 0: expected greater than 0 (and 1 more)"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("seed: 1\nseed: 2\n", "r.yaml, line 8: not YAML (key 'seed' is given twice)"),
        ("checkpoint: {keep_last: 1, keep_last: 2}\n", "r.yaml, line 7: not YAML (key 'keep_last' is given twice)"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, extra: str, message: str) -> None:
    assert fault_in(tmp_path, GOOD + extra) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "r.yaml: expected a mapping of sections (objective, model, data, ...)"),
        ("", "r.yaml: expected a mapping of sections (objective, model, data, ...)"),
        ("objective: [causal\n", "r.yaml, line 2: not YAML ("),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert fault_in(tmp_path, text).startswith(message)


def test_a_missing_file_names_the_shipped_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; shipped in recipes/: .*demo-gpt.*gpt2-124m"):
        read_recipe_file(tmp_path / "gpt2.yaml")


def test_a_short_trial_of_a_recipe_with_a_longer_warm_up_is_allowed() -> None:
    assert overridden(("training.max_steps", "5")).max_steps == 5


def test_the_run_covers_max_tokens_and_not_a_step_more() -> None:
    tokens_a_step = 8 * 1024
    for tokens, steps in ((1, 1), (tokens_a_step, 1), (tokens_a_step + 1, 2), (100 * tokens_a_step, 100)):
        assert overridden(("training.max_tokens", str(tokens))).max_steps == steps


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("training.max_steps", "7", 7),
        ("training.global_batch_size", "1_024", 1024),
        ("optimizer.lr", "6e-4", 6e-4),
        ("optimizer.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("schedule.type", "linear", "linear"),
        ("objective", "mlm", "mlm"),
        ("seed", "0", 0),
        ("data.shards", "2024", "2024"),
        ("data.prepare", "null", None),
        ("model.init_from", "some/folder", "some/folder"),
        ("model.config", "gpt2-350m", "gpt2-350m"),
        ("model.config", "{base: gpt2-124m, n_layer: 6}", {"base": "gpt2-124m", "n_layer": 6}),
        ("checkpoint.keep_last", "1", 1),
    ],
)
def test_a_flag_overrides_the_file(flag: str, text: str, value: object) -> None:
    found: Any = overridden((flag, text))
    for name in flag.split("."):
        found = getattr(found, name)
    assert found == value


def test_every_field_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, (section, attribute) in fields().items():
        assert f"--{name} VALUE" in text
        assert section.model_fields[attribute].description


def test_a_flag_of_the_model_changes_that_value_alone() -> None:
    recipe = overridden(("model.config.n_layer", "6"), ("model.config.resid_pdrop", "0.0"))
    published = read_model_config("gpt2-124m")
    assert read_model_config(recipe.model.config) == {**published, "n_layer": 6, "resid_pdrop": 0.0}


def test_a_mistyped_key_of_the_model_names_the_nearest() -> None:
    recipe = overridden(("model.config.n_layers", "6"))
    with pytest.raises(UserError, match=r"^model\.config: gpt2-124m has no 'n_layers'; did you mean n_layer\?$"):
        read_model_config(recipe.model.config)


def test_samples_longer_than_the_models_positions_are_refused() -> None:
    from data_prep.encoding import SpecialTokens, TokenizerInfo

    special = SpecialTokens(
        end_of_document=0, padding=None, classification=None, separator=None, mask=None, unknown=None
    )
    tokenizer = TokenizerInfo(Path("t"), "f", 8192, special)
    with pytest.raises(UserError, match=r"^data\.sequence_length is 2048, but the model has 1024 positions"):
        make_model_config(overridden(("data.sequence_length", "2048")), tokenizer)


def test_a_flag_for_one_length_replaces_the_files_other() -> None:
    recipe = overridden(("training.max_tokens", "1_000_000"))
    assert (recipe.training.max_steps, recipe.training.max_tokens) == (None, 1_000_000)


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("optimizer.lrr", "1", "unknown flag --optimizer.lrr; did you mean --optimizer.lr?"),
        ("training.max_step", "1", "unknown flag --training.max_step; did you mean --training.max_steps?"),
        ("optimizer.betas", "[0.9", "--optimizer.betas [0.9: not YAML (expected ',' or ']', but got '<stream end>')"),
        ("model.config.n_layer", "{", "--model.config.n_layer {: not YAML"),
        ("model.config", "{a: 1, a: 2}", "--model.config {a: 1, a: 2}: not YAML (key 'a' is given twice)"),
        ("seed", "-1", "r.yaml: seed is -1: expected greater than or equal to 0"),
        ("optimizer.lr", "on", "r.yaml: optimizer.lr: found the truth value true, which this field does not take"),
    ],
)
def test_a_wrong_flag_is_one_line(flag: str, text: str, message: str) -> None:
    assert fault_of_flags((flag, text)).startswith(message)


def test_the_command_line_hands_its_flags_to_the_recipe() -> None:
    line = ["--deepspeed_config", "x.json", "--training.max_steps", "9", "--model.config.n_layer=6"]
    arguments = parse_arguments([*line, "--optimizer.betas", "[0.9, 0.98]"])
    recipe = overridden(*arguments.overrides)
    assert (recipe.max_steps, recipe.optimizer.betas) == (9, (0.9, 0.98))
    assert recipe.model.config == {"base": "gpt2-124m", "n_layer": 6}


# The schedule.


def with_schedule(shape: str, *, warmup: int, steps: int, lr: float = 1e-3, min_lr: float = 0.0) -> Recipe:
    raw = good()
    raw["schedule"] = {"type": shape, "warmup_steps": warmup, "min_lr": min_lr}
    raw["training"]["max_steps"] = steps
    raw["optimizer"]["lr"] = lr
    return check_recipe(raw, "r.yaml")


@pytest.mark.parametrize(
    ("shape", "step", "rate"),
    [
        ("cosine", 0, 1e-4),  # a tenth of the way up
        ("cosine", 4, 5e-4),
        ("cosine", 9, 1e-3),  # the tenth update has the peak
        ("cosine", 10, 1e-3),
        ("cosine", 60, 5.5e-4),  # half-way: the mean of peak and minimum
        ("cosine", 35, 1e-4 + 9e-4 * 0.8535533905932737),  # a quarter: (1 + cos 45 degrees) / 2
        ("cosine", 110, 1e-4),
        ("cosine", 10_000, 1e-4),
        ("linear", 60, 5.5e-4),
        ("linear", 35, 7.75e-4),  # a quarter of the way down
        ("linear", 110, 1e-4),
        ("constant", 60, 1e-3),
        ("constant", 110, 1e-3),
    ],
)
def test_hand_worked_learning_rates(shape: str, step: int, rate: float) -> None:
    # 111 updates, 0 to 110: 10 of warm-up, and 100 intervals from peak to minimum.
    recipe = with_schedule(shape, warmup=10, steps=111, min_lr=1e-4)
    assert learning_rate(recipe, step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 2), (0, 50), (7, 40), (10, 12), (200, 1000)])
def test_learning_rates_are_those_of_transformers(shape: str, warmup: int, steps: int) -> None:
    """Theirs starts from 0 at update 0 and would reach 0 an update after the last; ours skips the update without effect
    and ends on the minimum: the same lines, warm-up one update on and decay over one interval fewer."""
    import torch
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = get_cosine_schedule_with_warmup if shape == "cosine" else get_linear_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=steps - 1)
    factor = scheduler.lr_lambdas[0]
    recipe = with_schedule(shape, warmup=warmup, steps=steps)
    for step in range(steps):
        theirs = factor(step + 1) if step < warmup else factor(step)
        assert learning_rate(recipe, step) == pytest.approx(1e-3 * theirs, rel=1e-12, abs=1e-18), step


@given(
    shape=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 60),
    steps=st.integers(1, 60),
    share=st.floats(0, 1),
)
def test_the_rate_rises_to_the_peak_and_never_leaves_its_bounds(
    shape: str, warmup: int, steps: int, share: float
) -> None:
    recipe = with_schedule(shape, warmup=warmup, steps=steps, min_lr=1e-3 * share)
    rates = [learning_rate(recipe, step) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rising)
    assert all(rate >= recipe.schedule.min_lr * (1 - 1e-12) for rate in falling)
    if falling:
        assert falling[0] == pytest.approx(1e-3)
    if len(falling) > 1 and shape != "constant":
        assert falling[-1] == pytest.approx(recipe.schedule.min_lr, abs=1e-18)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_rate_of_a_step_depends_on_nothing_that_came_before(shape: str) -> None:
    recipe = with_schedule(shape, warmup=5, steps=40, min_lr=1e-5)
    forwards = [learning_rate(recipe, step) for step in range(40)]
    assert [learning_rate(recipe, step) for step in reversed(range(40))] == forwards[::-1]
    other = recipe.model_copy(update={"seed": 9, "objective": "mlm"})
    assert [learning_rate(other, step) for step in range(40)] == forwards
    assert all(math.isfinite(rate) for rate in forwards)
