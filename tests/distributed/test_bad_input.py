"""A user's mistake gets one clear line and a non-zero status, before anything is built or written."""

import json
import os
import subprocess
import sys

import pytest

from pipeline import pretrain as pretrain_module
from tests.distributed.ranks import ROOT, Finished, ds_config_with, pretrain

pytestmark = pytest.mark.ranks
FP32 = str(ROOT / "ds_configs" / "zero2_fp32.json")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(arguments...) -> the one error line of a start in this process that must fail before ranks exist."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        status = pretrain_module.main([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert status == 1
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert not (tmp_path / "runs").exists()
        return lines[0]

    return run


def alone(*arguments: object) -> Finished:
    """The program as a world of one rank, without the launcher."""
    command = [sys.executable, "pipeline/pretrain.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


def only_error(finished: Finished) -> str:
    assert finished.status == 1
    assert "Traceback" not in finished.stderr
    assert len(finished.error_lines) == 1, finished.stderr
    return finished.error_lines[0]


def test_an_unknown_recipe_key_names_file_key_and_nearest(refused, write_recipe):
    recipe = write_recipe("causal", optimizer={"wieght_decay": 0.1})
    line = refused("--deepspeed_config", FP32, "--recipe", recipe)
    assert str(recipe) in line and "optimizer.wieght_decay" in line and "weight_decay" in line


def test_an_unknown_flag_names_the_nearest(refused, write_recipe):
    line = refused("--deepspeed_config", FP32, "--recipe", write_recipe("causal"), "--training.max_step", 5)
    assert "--training.max_step;" in line and "--training.max_steps" in line


def test_an_unknown_ds_config_key_names_file_key_and_nearest(refused, write_recipe, tmp_path):
    config = ds_config_with(tmp_path / "ds.json", "zero2.json", zero_optimisation={"stage": 3})
    line = refused("--deepspeed_config", config, "--recipe", write_recipe("causal"))
    assert "ds.json" in line and '"zero_optimisation"' in line and '"zero_optimization"' in line


def test_a_nested_unknown_ds_config_key_is_named_with_its_path(refused, write_recipe, tmp_path):
    config = ds_config_with(tmp_path / "ds.json", "zero2.json", zero_optimization={"stage": 2, "overlap_com": True})
    line = refused("--deepspeed_config", config, "--recipe", write_recipe("causal"))
    assert "zero_optimization.overlap_com" in line and "overlap_comm" in line


def test_a_ds_config_that_contradicts_the_recipe_names_both(refused, write_recipe, tmp_path):
    config = ds_config_with(tmp_path / "ds.json", "zero2.json", train_batch_size=64)
    recipe = write_recipe("causal")
    line = refused("--deepspeed_config", config, "--recipe", recipe)
    assert "train_batch_size is 64" in line and "training.global_batch_size is 8" in line
    assert "ds.json" in line and str(recipe) in line


def test_a_missing_recipe_lists_the_shipped_ones(refused, tmp_path):
    line = refused("--deepspeed_config", FP32, "--recipe", tmp_path / "none.yaml")
    assert "none.yaml" in line and "gpt2-124m" in line


def test_missing_shards_say_how_to_make_them(write_recipe, tmp_path):
    recipe = write_recipe("causal", data={"shards": str(tmp_path / "nowhere")})
    line = only_error(alone("--deepspeed_config", FP32, "--recipe", recipe, "--output_dir", tmp_path / "run"))
    assert "nowhere" in line and "python -m data_prep tokenize" in line
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_tokenizer_is_refused_naming_both_fingerprints(write_recipe, tiny_tokenizer, tiny_shards, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in tiny_tokenizer.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    made_with = json.loads((tiny_shards / "manifest.json").read_text())["content"]["tokenizer"]["fingerprint"]
    recipe = write_recipe("causal", data={"tokenizer": str(other)})
    line = only_error(alone("--deepspeed_config", FP32, "--recipe", recipe, "--output_dir", tmp_path / "run"))
    assert made_with[:12] in line and str(other) in line and line.count("fingerprint") == 1


def test_samples_longer_than_the_models_positions_are_refused(write_recipe, tmp_path):
    recipe = write_recipe("causal", data={"sequence_length": 65})
    line = only_error(alone("--deepspeed_config", FP32, "--recipe", recipe, "--output_dir", tmp_path / "run"))
    assert "sequence_length is 65" in line and "64 positions" in line


def test_fp16_on_cpu_ranks_is_refused(write_recipe, tmp_path):
    config = ROOT / "ds_configs" / "zero2_fp16.json"
    arguments = ("--deepspeed_config", config, "--recipe", write_recipe("causal"), "--output_dir", tmp_path / "run")
    assert "fp16 needs a GPU" in only_error(alone(*arguments))


def test_an_indivisible_batch_is_one_line_under_the_launcher_too(write_recipe, tmp_path):
    recipe = write_recipe("causal", training={"global_batch_size": 7})
    finished = pretrain(2, FP32, recipe, tmp_path / "run", check=False)
    assert finished.status != 0 and "Traceback" not in finished.stderr
    assert len(finished.error_lines) == 1
    assert "global_batch_size is 7" in finished.error_lines[0] and "2 ranks" in finished.error_lines[0]


def test_help_answers_without_importing_torch():
    script = "import sys; from pipeline import pretrain; pretrain.main(['--help'])"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {script}"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--optimizer.lr VALUE" in done.stdout and "peak learning rate" in done.stdout
    assert done.stdout.rstrip().endswith("False")
