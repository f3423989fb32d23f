"""`python -m data_prep` as a user meets it: help at once, one line for an error, status 0, 1 or 2."""

import re
import subprocess
import sys

import pytest

from data_prep.__main__ import STAGES

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "pandas")


def test_help_names_every_stage_and_no_arguments_are_a_usage_error(data_prep):
    for arguments, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        outcome = data_prep(*arguments)
        assert outcome.status == status
        for stage in STAGES:
            assert re.search(rf"^  {stage} ", outcome.stdout, re.MULTILINE)


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_has_an_example_and_nothing_left_unfilled(stage, data_prep):
    outcome = data_prep(stage, "--help")
    assert outcome.status == 0
    assert f"python -m data_prep {stage} " in outcome.stdout.split("examples:")[1]
    assert "%(" not in outcome.stdout and "==SUPPRESS==" not in outcome.stdout


def test_help_imports_nothing_heavy(tmp_path, start_data_prep):
    """All stages in one process, as a superset of what any of them imports."""
    code = (
        "import sys\nfrom data_prep import __main__ as main\n"
        f"for stage in {['', *STAGES]!r}:\n"
        "    sys.argv = ['data_prep', *([stage] if stage else []), '--help']\n"
        "    try: main.main()\n"
        "    except SystemExit: pass\n"
        f"print('imported', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "imported []\n"


def test_a_mistyped_stage_suggests_the_nearest(data_prep):
    outcome = data_prep("tokenise", "--help")
    assert outcome.status == 2
    assert outcome.stderr == "error: unknown stage 'tokenise'; did you mean tokenize?\n"
    assert "expected one of: builtin_corpus" in data_prep("xyzzy").stderr


def test_an_error_is_one_line_also_from_a_real_process(tmp_path, start_data_prep):
    process = start_data_prep("verify", tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == ""
    assert stderr.startswith(f"error: {tmp_path}/manifest.json is missing") and stderr.count("\n") == 1


def test_an_error_of_the_system_names_the_file(tmp_path, data_prep):
    (tmp_path / "manifest.json").mkdir()
    outcome = data_prep("inspect", tmp_path)
    assert outcome.error.startswith(f"error: Is a directory ({tmp_path}/manifest.json)")


def test_a_reader_that_goes_away_is_no_traceback(tiny_shards, start_data_prep):
    process = start_data_prep("inspect", tiny_shards)
    process.stdout.close()  # as `| head -1` does
    process.stdout = None
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode in (0, 1)
