"""The Ray executor on a real local cluster: the same bytes as worker processes, and one line when there is none."""

import argparse
import functools
import os
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.manifest import MANIFEST_NAME
from data_prep.parts import Execution, add_work_arguments, working

ray = pytest.importorskip("ray")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two cores; this process is connected to it, as a user's driver may be."""
    folder = Path("/tmp" if len(str(tmp_path_factory.getbasetemp())) > 60 else tmp_path_factory.getbasetemp()) / "ray"
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", path)
        context = ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80_000_000,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        yield context
        ray.shutdown()


@pytest.fixture
def functions(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import part_functions

    yield part_functions
    sys.modules.pop("part_functions")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_ray(output, function, parts):
    with working(output, {"command": "test"}, [], Execution(executor="ray")) as work:
        return work.run(
            function, parts, part_inputs=[[] for _ in parts], part_bytes=[1] * len(parts), description="test"
        )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_no_cluster_is_one_error(tmp_path, functions, monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    none = functools.lru_cache(set)  # whatever else runs on this machine
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", none)
    assert not ray.is_initialized()
    with pytest.raises(UserError, match=rf"--ray_address {address}: no Ray cluster could be reached .*ray start"):
        execution = Execution(executor="ray", ray_address=address)
        with working(tmp_path / "out", {"command": "test"}, [], execution) as work:
            work.run(functions.double, [(1, "")], part_inputs=[[]], part_bytes=[1], description="test")


def test_ray_that_is_not_installed_is_one_error(tmp_path, functions, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs the package ray: pip install"):
        on_ray(tmp_path / "out", functions.double, [(1, "")])


def test_the_cluster_makes_the_bytes_of_one_worker(tmp_path, functions, cluster):
    (tmp_path / "in").mkdir()
    (tmp_path / "notes").mkdir()
    inputs = [tmp_path / "in" / f"{number:02d}.txt" for number in range(12)]
    for number, path in enumerate(inputs):
        path.write_text(f"content {number}\n" * (number + 1))
    functions.two_phases(inputs, tmp_path / "local", tmp_path / "notes", Execution())
    shutil.rmtree(tmp_path / "notes")
    (tmp_path / "notes").mkdir()
    parser = argparse.ArgumentParser()
    add_work_arguments(parser)
    execution = Execution.of(parser.parse_args(["--executor", "ray"]))
    assert functions.two_phases(inputs, tmp_path / "out", tmp_path / "notes", execution)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    notes = list((tmp_path / "notes").glob("calls-*"))
    assert len(notes) == 15 and all(int(path.read_text().split()[0]) != os.getpid() for path in notes)
    assert not functions.two_phases(inputs, tmp_path / "out", tmp_path / "notes", execution)


def test_errors_of_remote_parts_are_those_of_local_ones(tmp_path, functions, cluster):
    with pytest.raises(OSError, match="No space left on device: 'the/file'"):
        on_ray(tmp_path / "out", functions.fail, [(0, ""), (1, "")])
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_remote_worker_that_dies_is_replaced(tmp_path, functions, cluster):
    parts = [(number, str(tmp_path)) for number in range(4)]
    assert on_ray(tmp_path / "out", functions.die_once, parts) == [{"value": number} for number in range(4)]
    assert len((tmp_path / "calls-2").read_text().splitlines()) == 2
    assert list((tmp_path / "out").iterdir()) == []  # neither records nor the dead worker's half file
