"""A job's parts: in order, kept when done, done again when their input has changed, in a folder that is theirs."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.documents import EMPTY
from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_prep.parts import (
    PARTS_FOLDER,
    Execution,
    available_cores,
    fraction,
    megabytes,
    positive_integer,
    working,
)

JOB = {"command": "test", "seed": 1}


@pytest.fixture
def functions(monkeypatch):
    """The module of part functions, as worker processes import it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import part_functions

    yield part_functions
    sys.modules.pop("part_functions")


class Interruption(Exception):  # noqa: N818
    pass


def run(output_dir, function, parts, inputs=None, job=JOB, sizes=None, **execution):
    """One phase of a job that is then interrupted: its results; raises what the phase raises."""
    found = []

    with contextlib.suppress(Interruption), working(output_dir, job, [], Execution(**execution)) as work:
        found += work.run(
            function,
            parts,
            part_inputs=inputs or [[] for _ in parts],
            part_bytes=sizes or [1] * len(parts),
            description="test phase",
        )
        raise Interruption
    return found


def notes(folder) -> dict[str, int]:
    """How often each part was begun."""
    return {path.name[6:]: len(path.read_text().splitlines()) for path in sorted(Path(folder).glob("calls-*"))}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def test_results_are_in_the_order_of_the_parts(output, tmp_path, functions):
    calls = [(number, str(tmp_path)) for number in range(7)]
    assert run(output, functions.double, calls, workers=2) == [{"value": 2 * number} for number in range(7)]


def test_no_parts_give_no_results(output):
    assert run(output, max, []) == []


def test_a_done_part_is_kept_unless_its_input_has_changed(output, tmp_path, functions):
    inputs = [tmp_path / name for name in ("in-0", "in-1")]
    for path in inputs:
        path.write_text("before")
    calls = [(number, str(tmp_path)) for number in range(2)]
    names = [[str(path)] for path in inputs]
    run(output, functions.double, calls, names)
    inputs[1].write_text("after, longer")
    assert run(output, functions.double, calls, names) == [{"value": 0}, {"value": 2}]
    assert notes(tmp_path) == {"0": 1, "1": 2}


def test_a_remote_input_that_has_changed_is_read_again(output, tmp_path, functions):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    names = [["memory://parts/a"], ["memory://parts/b"]]
    for name in ("a", "b"):
        memory.pipe(f"/parts/{name}", b"before")
    calls = [(number, str(tmp_path)) for number in range(2)]
    run(output, functions.double, calls, names)
    memory.pipe("/parts/b", b"other!")  # of the same length
    run(output, functions.double, calls, names)
    assert notes(tmp_path) == {"0": 1, "1": 2}


def test_an_input_that_changes_while_it_is_read_is_an_error(output, tmp_path, functions):
    (tmp_path / "in").write_text("before")
    with pytest.raises(UserError, match="in changed while it was read"):
        run(output, functions.touch, [(str(tmp_path / "in"),)], [[str(tmp_path / "in")]])


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "notes").mkdir()
    for number in range(7):
        (tmp_path / "in" / f"{number}.txt").write_text(f"content {number}\n" * (number + 1))
    return tmp_path / "in"


def two_phases(functions, corpus, output, **execution):
    return functions.two_phases(sorted(corpus.iterdir()), output, corpus.parent / "notes", Execution(**execution))


def test_a_finished_job_leaves_its_files_and_manifest_alone(corpus, output, tmp_path, functions):
    assert two_phases(functions, corpus, output, workers=2)
    assert sorted(path.name for path in output.iterdir()) == [MANIFEST_NAME, "result-0", "result-1", "result-2"]
    assert not two_phases(functions, corpus, output)
    assert notes(tmp_path / "notes") == {
        **{f"1-{number}.txt": 1 for number in range(7)},
        **{f"2-result-{number}": 1 for number in range(3)},
    }


def test_a_changed_input_redoes_its_part_and_the_phases_after_it(corpus, output, tmp_path, functions):
    with pytest.raises(TypeError):  # interrupted after both phases
        functions.Manifest, kept = None, functions.Manifest
        try:
            two_phases(functions, corpus, output)
        finally:
            functions.Manifest = kept
    (corpus / "1.txt").write_text("Content 1\n" * 2)
    two_phases(functions, corpus, output)
    assert notes(tmp_path / "notes") == {
        **{f"1-{number}.txt": 2 if number == 1 else 1 for number in range(7)},
        **{f"2-result-{number}": 2 for number in range(3)},
    }


def test_overwrite_begins_anew(corpus, output, tmp_path, functions):
    two_phases(functions, corpus, output)
    (output / "result-9").write_text("of yesterday")
    two_phases(functions, corpus, output, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == [MANIFEST_NAME, "result-0", "result-1", "result-2"]
    assert notes(tmp_path / "notes")["1-0.txt"] == 2


def test_a_phase_name_stands_once(output, tmp_path, functions):
    with pytest.raises(ValueError, match="called 'again' already"), working(output, JOB, [], Execution()) as work:
        for _ in range(2):
            work.run(functions.double, [], part_inputs=[], part_bytes=[], description="again")


def test_unfinished_work_of_another_job_is_refused(output, tmp_path, functions):
    run(output, functions.double, [(1, str(tmp_path))])
    with pytest.raises(UserError, match="unfinished work of another job"):
        run(output, functions.double, [(1, str(tmp_path))], job={**JOB, "seed": 2})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    Manifest(kind="tokenizer", job={"command": "train_tokenizer"}, files={}).write(tmp_path / "tokenizer")
    for name, message in [
        ("mine", "is not empty and holds nothing of ours"),
        ("file", "is a file, expected a folder"),
        ("tokenizer", "is not empty and holds a result of 'train_tokenizer'"),
    ]:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=message), working(tmp_path / name, JOB, [], Execution(overwrite=overwrite)):
            raise AssertionError("not reached")
        assert sorted(tmp_path.rglob("*")) == before
    inputs = [InputFile.of(str(tmp_path / "mine" / "thesis.tex"))]
    with (
        pytest.raises(UserError, match=r"holds the input .*thesis"),
        working(tmp_path / "mine", JOB, inputs, Execution(overwrite=overwrite)),
    ):
        raise AssertionError("not reached")


def test_a_result_whose_input_has_changed_is_refused_without_overwrite(corpus, output, functions):
    two_phases(functions, corpus, output)
    (corpus / "8.txt").write_text("another")
    os.utime(corpus / "8.txt", (0, 0))  # an old time stamp does not hide it
    with pytest.raises(UserError, match="its inputs have changed since; give --overwrite"):
        two_phases(functions, corpus, output)


def test_what_a_run_killed_at_its_very_end_left_is_removed(corpus, output, functions):
    two_phases(functions, corpus, output)
    (output / PARTS_FOLDER / "scratch").mkdir(parents=True)
    assert not two_phases(functions, corpus, output)
    assert not (output / PARTS_FOLDER).exists()


def test_a_damaged_record_is_named(output, tmp_path, functions):
    run(output, functions.double, [(1, str(tmp_path))])
    (output / PARTS_FOLDER / "test_phase" / "000000.json").write_text("{")
    with pytest.raises(UserError, match=r"000000\.json is damaged"):
        run(output, functions.double, [(1, str(tmp_path))])


# ------------------------------------------------------------------------------------------------------- bad input


def rejecting(output, functions, bads, documents=1000, sizes=None, **execution):
    parts = [(number, documents, bad) for number, bad in enumerate(bads)]
    return run(output, functions.reject, parts, sizes=sizes, **execution)


def test_as_many_bad_documents_as_are_allowed_pass(output, functions):
    """2 of 2,000, the bad ones included; documents without text do not count."""
    assert len(rejecting(output, functions, [2, 0], documents=999)) == 2
    assert not (output / "rejected.jsonl").exists()


def test_one_more_stops_the_job_and_names_file_line_and_reason(output, functions):
    with pytest.raises(UserError) as error:
        rejecting(output, functions, [1, 2], documents=999)
    assert str(error.value).startswith(
        "test phase: 3 of the 2,001 documents read so far cannot be used, more than --max_bad_fraction 0.001 allows:"
        " in-0:1: oops; in-1:1: oops; in-1:2: oops; "
    )
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [("in-0", 1), ("in-1", 1), ("in-1", 2)]
    assert all(line["category"] != EMPTY for line in lines)


def test_the_only_document_may_not_be_bad(output, functions):
    with pytest.raises(UserError, match="1 of the 1 documents"):
        rejecting(output, functions, [1], documents=0)
    assert len(rejecting(output, functions, [1], documents=0, max_bad_fraction=1.0)) == 1


def test_a_hopeless_input_stops_before_its_end(output, functions):
    with pytest.raises(UserError, match=r"cannot be used.*; \.\.\.; .*rejected.jsonl has them all"):
        rejecting(output, functions, [0, 30, *[0] * 60], documents=100, workers=1, sizes=[1] * 62)
    assert len(list(output.glob(f"{PARTS_FOLDER}/test_phase/*.json"))) < 10


def test_a_bad_beginning_of_a_long_input_does_not_stop_it(output, functions):
    """30 bad of the first 130 documents is more than 0.2, but not of the whole input, which is 601 times as long."""
    results = rejecting(output, functions, [30, 0], documents=100, sizes=[1, 600], workers=1, max_bad_fraction=0.2)
    assert len(results) == 2


def test_a_higher_limit_goes_on_from_where_the_job_stopped(corpus, output, functions):
    with pytest.raises(UserError, match="cannot be used"):
        rejecting(output, functions, [3, 0], workers=1)
    records = sorted(output.glob(f"{PARTS_FOLDER}/test_phase/*.json"))
    before = {path: path.stat().st_mtime_ns for path in records}
    with working(output, JOB, [], Execution(max_bad_fraction=0.01)) as work:
        parts = [(0, 1000, 3), (1, 1000, 0)]
        work.run(functions.reject, parts, part_inputs=[[], []], part_bytes=[1, 1], description="test phase")
        assert {path: path.stat().st_mtime_ns for path in records} == before
        assert work.finishes()
        assert not (output / "rejected.jsonl").exists()  # of the run that stopped
        Manifest(kind="test", job=work.job, files={}).write(output)
    assert [path.name for path in output.iterdir()] == [MANIFEST_NAME]


# ----------------------------------------------------------------------------------------------------------- flags


def test_available_cores_are_those_of_this_process():
    assert available_cores() == len(os.sched_getaffinity(0)) >= 1


def test_flag_values_are_checked_with_their_units():
    assert (positive_integer("3"), megabytes("0.5"), megabytes("1e-6"), fraction("1e-3")) == (3, 500_000, 1, 0.001)
    for parse, bad in [
        (positive_integer, ["0", "-1", "1.5", "x", ""]),
        (megabytes, ["0", "-1", "nan", "inf", "x"]),
        (fraction, ["-0.1", "1.1", "nan", "x"]),
    ]:
        for text in bad:
            with pytest.raises(Exception, match="expected a"):
                parse(text)


def test_the_manifest_says_what_was_read(corpus, output, functions):
    two_phases(functions, corpus, output)
    inputs = read_manifest(output).job["inputs"]
    assert inputs["files"] == 7 and inputs["bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    copy = corpus.with_name("copy")
    shutil.copytree(corpus, copy)
    shutil.rmtree(output)
    two_phases(functions, copy, output)
    assert read_manifest(output).job["inputs"]["sha256"] != inputs["sha256"]  # other names
