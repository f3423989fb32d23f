"""Runs across two hosts with an address, a name, a home and an sshd each: by `deepspeed` through pdsh and ssh, by
torchrun, Slurm and Open MPI; what ends them; what is refused at their start."""

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.hosts import Host, skip_without_namespaces, two_hosts
from tests.distributed.ranks import launch, metrics, pretrain, wait_until
from tests.distributed.slurm import start_slurm

pytestmark = pytest.mark.ranks
FP32 = "ds_configs/zero2_fp32.json"
BOTH = {"node-1": 1, "node-2": 1}
NUMBERS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "samples")
CONSTANT = {"type": "constant", "warmup_steps": 2}  # the same numbers, however many steps there are to come


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    skip_without_namespaces()
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        # Both hosts share this machine's cores, and do not know of one another.
        (found[0].home / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
        yield found


class Run:
    """`deepspeed --hostfile ... pipeline/pretrain.py ARGUMENTS...` at work on the first host; `with` ends it."""

    def __init__(
        self,
        hosts: Sequence[Host],
        folder: Path,
        slots: dict[str, int],
        *arguments: object,
        launcher: Sequence[object] = (),
    ) -> None:
        self._hosts = hosts
        hostfile, self._output = folder / "hostfile", folder / "output"
        hostfile.write_text("".join(f"{name} slots={number}\n" for name, number in slots.items()))
        deepspeed = (Path(sys.executable).parent / "deepspeed", "--hostfile", hostfile, *launcher)
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                hosts[0].command(*deepspeed, "pipeline/pretrain.py", "--deepspeed_config", FP32, *arguments),
                env=hosts[0].environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            subprocess.run(host.command("pkill", "-KILL", "-f", "pretrain.py"))
        self._process.wait(timeout=60)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def output(self) -> str:
        return self._output.read_text()

    def status(self) -> int:
        """Waits for the end."""
        wait_until(self.is_over)
        return self._process.returncode


def numbers(run: Path) -> list[list[float]]:
    return [[record[name] for name in NUMBERS] for record in metrics(run)]


@pytest.fixture(scope="module")
def on_one_host(write_recipe, tmp_path_factory):
    """(recipe, run) of two ranks on one host."""
    recipe = write_recipe("causal", schedule=CONSTANT, checkpoint={"every_steps": 2})
    run = tmp_path_factory.mktemp("one") / "run"
    pretrain(2, FP32, recipe, run)
    return recipe, run


def test_a_run_on_two_hosts_has_the_numbers_of_one_host(hosts, on_one_host, tmp_path):
    recipe, expected = on_one_host
    run = tmp_path / "run"
    with Run(hosts, tmp_path, BOTH, "--recipe", recipe, "--output_dir", run) as process:
        assert process.status() == 0, process.output()
    output = process.output()
    assert "node-1: engine" in output and "1 threads each on 2 hosts" in output  # as ~/.deepspeed_env has it
    assert numbers(run) == numbers(expected) and len(numbers(run)) == 4
    assert (run / "logs" / "rank_1.log").exists()


def on_both(hosts: Sequence[Host], command: Sequence[object], variables: Sequence[dict[str, str]]) -> list[str]:
    """Runs a command on each host at once, with those variables, and returns what each has shown."""
    processes = [
        subprocess.Popen(
            host.command(*command),
            env=host.environment(OMP_NUM_THREADS="1", **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host, more in zip(hosts, variables, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for host in hosts:
            subprocess.run(host.command("pkill", "-KILL", "-f", "pretrain.py"))
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def test_torchrun_on_each_host_is_the_same_run(hosts, on_one_host, tmp_path):
    """As the pods of docs/kubernetes start it: the place of the host is in the environment."""
    recipe, expected = on_one_host
    torchrun = Path(sys.executable).parent / "torchrun"
    flags = ("--deepspeed_config", FP32, "--recipe", recipe, "--output_dir", tmp_path / "run")
    shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "node-1", "PET_MASTER_PORT": "29500"}
    places = [{**shared, "PET_NODE_RANK": place} for place in "01"]
    outputs = on_both(hosts, (torchrun, "pipeline/pretrain.py", *flags), places)
    assert "on 2 hosts" in outputs[0]
    assert numbers(tmp_path / "run") == numbers(expected)


def test_tasks_of_srun_are_the_same_run_and_end_on_a_signal_and_one_host_of_two_is_refused(
    hosts, on_one_host, tmp_path
):
    """A batch job of a real Slurm whose script first forgets `srun`, and which is told that its time is over."""
    recipe, expected = on_one_host
    environment = start_slurm(hosts, tmp_path)
    run, alone, script, output = (tmp_path / name for name in ("run", "alone", "job.sh", "output"))
    flags = f"pipeline/pretrain.py --deepspeed_config {FP32} --recipe {recipe} --training.max_steps 4000"
    script.write_text(
        "#!/bin/sh\nexport OMP_NUM_THREADS=1\n"
        f"{sys.executable} {flags} --output_dir {alone} && exit 99\n"
        f"srun {sys.executable} {flags} --output_dir {run}\n"
    )
    job = ("sbatch", "--wait", "--nodes=2", "--ntasks-per-node=1", f"--output={output}", script)
    process = subprocess.Popen(hosts[0].command(*job), env=environment)
    wait_until(lambda: (run / "checkpoints" / "step-00000004").exists() or process.poll() is not None)
    # As `--signal=USR1@300` does five minutes before the end.
    subprocess.run(hosts[0].command("scancel", "--signal=USR1", "--user=root"), env=environment, check=True)
    assert process.wait(timeout=300) == 75, output.read_text()
    said = output.read_text()
    assert "error: Slurm has given this job 2 hosts, but 1 host with 1 rank in all would train" in said
    assert not alone.exists()
    assert "2 x cpu, 1 threads each on 2 hosts" in said and "the same command goes on" in said
    found = numbers(run)
    assert found[:4] == numbers(expected)
    assert (run / "checkpoints" / f"step-{len(found):08d}").exists(), "saved where it ended"


def test_ranks_of_mpirun_are_the_same_run(hosts, on_one_host, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (openmpi-bin)")
    recipe, expected = on_one_host
    run = tmp_path / "run"
    more = "--allow-run-as-root --mca btl_tcp_if_include eth0 -x OMP_NUM_THREADS=1 -x MASTER_ADDR=node-1"
    launcher = ("--launcher", "openmpi", "--launcher_args", more)
    with Run(hosts, tmp_path, BOTH, "--recipe", recipe, "--output_dir", run, launcher=launcher) as process:
        assert process.status() == 0, process.output()
    assert "1 threads each on 2 hosts" in process.output()
    assert numbers(run) == numbers(expected)


def test_a_cut_wire_ends_the_run_and_the_host_that_is_left_goes_on(hosts, on_one_host, tmp_path):
    recipe, expected = on_one_host
    run = tmp_path / "run"
    arguments = ("--recipe", recipe, "--output_dir", run, "--faults.hang_seconds", 10)
    with Run(hosts, tmp_path, BOTH, *arguments, "--training.max_steps", 4000) as process:
        wait_until(lambda: (run / "checkpoints" / "step-00000002").exists() or process.is_over())
        assert not process.is_over(), process.output()
        with hosts[1].wire_cut():
            assert process.status() != 0
            # On the other side of the cut as well.
            wait_until(lambda: not any("pretrain.py" in host.run("ps", "-A", "-o", "args") for host in hosts))
    assert "pdsh@node-1-itself: node-2: ssh exited with exit code 255" in process.output()
    (said,) = [line for line in process.output().splitlines() if "error: no progress for" in line]
    assert said.startswith("node-1: ") and "rank 1 did not answer: stopped, or its machine is gone" in said

    done = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    with Run(hosts, tmp_path, {"node-1": 1}, *arguments, "--training.max_steps", done + 2) as process:
        assert process.status() == 0, process.output()
    output = process.output()
    assert f"resumed   from {run}/checkpoints/step-{done:08d}, after step {done}" in output and "hosts" not in output
    assert [record["step"] for record in metrics(run)] == list(range(1, done + 3))
    both = min(done, 4)  # steps that were taken on both hosts
    assert numbers(run)[:both] == numbers(expected)[:both]


def test_hosts_with_different_packages_are_named(hosts, on_one_host, tmp_path):
    """node-2 has a later version of sentencepiece, by its own metadata."""
    recipe, _ = on_one_host
    version = importlib.metadata.version("sentencepiece")
    (metadata,) = (
        path.locate()
        for path in importlib.metadata.files("sentencepiece")
        if path.match("sentencepiece-*.dist-info/METADATA")
    )
    (tmp_path / "METADATA").write_text(Path(metadata).read_text().replace(f"Version: {version}\n", "Version: 99.0.0\n"))
    run = tmp_path / "run"
    hosts[1].run("mount", "--bind", tmp_path / "METADATA", metadata)
    try:
        with Run(hosts, tmp_path, BOTH, "--recipe", recipe, "--output_dir", run) as process:
            assert process.status() != 0
    finally:
        hosts[1].run("umount", metadata)
    output = process.output()
    said = f"error: node-2-itself has sentencepiece 99.0.0, node-1-itself has {version}: bring the hosts to one commit"
    assert [line for line in output.splitlines() if "error: " in line and said in line], output
    assert not (run / "metrics.jsonl").exists()


def test_an_output_folder_that_the_hosts_do_not_share_is_refused(hosts, on_one_host, tmp_path):
    """node-2 has an empty file system where node-1 has the run."""
    recipe, _ = on_one_host
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    hosts[1].run("mount", "-t", "tmpfs", "none", run.parent)
    try:
        with Run(hosts, tmp_path, BOTH, "--recipe", recipe, "--output_dir", run) as process:
            assert process.status() != 0
    finally:
        hosts[1].run("umount", "--lazy", run.parent)
    said = f"error: node-2-itself does not see what node-1-itself writes to --output_dir {run}: put it on storage"
    assert [line for line in process.output().splitlines() if said in line], process.output()
    assert {path.name for path in run.iterdir()} == {"logs"}


def test_a_missing_hostfile_does_not_train_on_this_machine_alone(on_one_host, tmp_path):
    recipe, _ = on_one_host
    run, hostfile = tmp_path / "run", tmp_path / "hostfile"
    flags = ("--deepspeed_config", FP32, "--recipe", recipe, "--output_dir", run)
    finished = launch(2, "pipeline/pretrain.py", *flags, check=False, launcher=("--hostfile", hostfile))
    assert finished.status != 0
    assert finished.error_lines == [
        f"error: `deepspeed --hostfile {hostfile}` found no file {hostfile}, and 1 host with 2 ranks in all would"
        " train; name the file that lists the hosts (as hostfile.example does), or leave --hostfile out to train on"
        " this machine alone"
    ]
    assert "Unable to find hostfile, will proceed with training" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr and not run.exists()
