"""What a rehearsal says of two runs, and that it goes through one."""

import re
import subprocess
import sys

import pytest

from pipeline.rehearse import compare, main
from tests.distributed.ranks import ROOT

STEPS = [
    {"step": step, "loss": 3.0 - step / 10, "grad_norm": 1.0, "learning_rate": 0.1, "samples": 8 * step, "tokens": 256}
    for step in range(1, 5)
]


def marks(other, within=0.0):
    return {row.what: row.good for row in compare(STEPS, other, within)}


def test_equal_runs_are_equal_in_everything():
    assert set(marks([dict(step) for step in STEPS]).values()) == {True}


@pytest.mark.parametrize("name", ["loss", "grad_norm", "learning_rate", "samples", "tokens"])
def test_the_last_bit_of_one_step_is_seen(name):
    other = [dict(step) for step in STEPS]
    other[2][name] *= 1 + 2**-52 if isinstance(other[2][name], float) else 2
    assert [what for what, good in marks(other).items() if not good] == [name]
    found = {row.what: row.found for row in compare(STEPS, other)}
    assert "first at step 3" in found[name]


def test_rounding_is_allowed_to_losses_and_norms_alone():
    other = [
        {**step, **{name: step[name] * (1 + 1e-6) for name in ("loss", "grad_norm", "learning_rate")}} for step in STEPS
    ]
    assert marks(other, 1e-4) == {
        "loss": True, "grad_norm": True, "learning_rate": False, "samples": True, "tokens": True,
    }  # fmt: skip


def test_missing_steps_are_a_loss():
    assert not any(marks(STEPS[:3]).values())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "something").touch()
    command = ["--deepspeed_config", "ds_configs/zero2.json", "--output_dir", str(tmp_path), "--ranks", "1"]
    assert main(command) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} is not empty; remove it, or give another --output_dir\n"
    assert (tmp_path / "something").exists()


@pytest.mark.ranks
def test_a_rehearsal_of_a_recipe_kills_and_resumes_it_and_says_what_was_equal(write_recipe, tmp_path):
    command = [sys.executable, "-m", "pipeline.rehearse", "--recipe", str(write_recipe("mlm")), "--deepspeed_config"]
    command += ["ds_configs/zero2_fp32.json", "--ranks", "1", "--steps", "9", "--output_dir", str(tmp_path / "folder")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    step = int(re.search(r"resumed from step (\d+), 1 ranks", done.stdout)[1])
    assert step in (3, 6)
    table = done.stdout.split(f"resumed from step {step}, 1 ranks\n")[1].split("\n\n")[0]
    names = ["loss", "grad_norm", "learning_rate", "samples", "tokens"]
    assert [[line.split()[0], *line.split()[-3:]] for line in table.splitlines()[:5]] == [
        [name, "all", "9", "steps"] for name in names
    ]
    assert [line.split() for line in table.splitlines()[5:]] == [
        [what, "sha256", "ok", "equal"] for what in ("weights,", "optimizer,")
    ]
    assert f"resumed from step {step} on 2 ranks" in done.stdout and "\nnothing was lost\n" in done.stdout
    assert not (tmp_path / "folder").exists()
