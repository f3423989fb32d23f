"""Whose process this is, by what launchers leave in the environment; hosts that are asked for and not there."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from data_prep.errors import UserError
from pipeline import launchers
from pipeline.launchers import (
    check_hosts_asked_for,
    choose_interface,
    interface_towards,
    number_of_hosts,
    rank_variables,
    runner_arguments,
)

SLURM = {
    # The second task on the second of three nodes, as `srun --nodes=3 --ntasks=7 --distribution=block` leaves it.
    "SLURM_JOB_ID": "31234",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,12]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def test_a_task_of_a_slurm_step_is_a_rank():
    assert rank_variables(SLURM) == {
        "RANK": "4",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "16234",
    }
    assert rank_variables({**SLURM, "SLURM_NODEID": "2"})["LOCAL_SIZE"] == "1"
    assert "MASTER_ADDR" not in rank_variables({**SLURM, "MASTER_ADDR": "10.0.0.7"}), "what the user has set stays"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node-1", "node-1"),
        ("node-1,node-2", "node-1"),
        ("gpu[3,5-7]", "gpu3"),
        ("gpu[010-012],login", "gpu010"),
        ("rack[1-2]n[04-05].example.org,x", "rack1n04.example.org"),
    ],
)
def test_the_first_host_of_a_slurm_list_has_rank_0(hosts, first):
    assert rank_variables({**SLURM, "SLURM_STEP_NODELIST": hosts})["MASTER_ADDR"] == first


def test_a_batch_script_itself_is_no_task_of_a_step():
    """Slurm gives it SLURM_PROCID=0 and the job's SLURM_NTASKS: taken for a rank, it would wait for the others."""
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert rank_variables(batch)["WORLD_SIZE"] == "1"


def test_a_rank_of_mpirun_needs_the_address_of_rank_0_where_there_are_several_hosts():
    with pytest.raises(UserError, match=r"started 4 ranks on several hosts.*add `-x MASTER_ADDR=HOST`"):
        rank_variables(MPI)
    found = rank_variables({**MPI, "MASTER_ADDR": "node-1"})
    assert found == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    assert rank_variables({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})["MASTER_ADDR"] == "127.0.0.1"


def test_what_torchrun_or_a_pod_says_is_completed_and_nothing_is_a_world_of_one():
    assert rank_variables(TORCHRUN) == {"LOCAL_SIZE": "4"}
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert rank_variables(pod) == {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone = rank_variables({})
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(alone["MASTER_PORT"]) > 0


def test_hosts_are_counted():
    assert number_of_hosts({"CROSS_SIZE": "3", "WORLD_SIZE": "5", "LOCAL_SIZE": "2"}) == 3
    assert number_of_hosts({"WORLD_SIZE": "8", "LOCAL_SIZE": "4"}) == 2
    assert number_of_hosts({"WORLD_SIZE": "1", "LOCAL_SIZE": "1"}) == 1


ONE_HOST = {"CROSS_SIZE": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}


def test_a_hostfile_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--hostfile", "hosts", "pipeline/pretrain.py", "--recipe", "r.yaml"]
    with pytest.raises(UserError, match=rf"--hostfile hosts` found no file {tmp_path}/hosts, and 1 host with 2 ranks"):
        check_hosts_asked_for(ONE_HOST, command)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    check_hosts_asked_for(ONE_HOST, command)
    check_hosts_asked_for(ONE_HOST, ["--num_accelerators", "2", "pipeline/pretrain.py", "--hostfile", "of the script"])


def test_fewer_hosts_than_num_nodes_are_refused(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    command = ["-H", str(tmp_path / "hosts"), "--num_nodes", "4", "pipeline/pretrain.py"]
    with pytest.raises(UserError, match=rf"asked for 4 hosts, but 1 host with 2 ranks .* list 4 hosts in {tmp_path}"):
        check_hosts_asked_for(ONE_HOST, command)
    check_hosts_asked_for({**ONE_HOST, "CROSS_SIZE": "4"}, command)


def test_fewer_hosts_than_slurm_gave_are_refused():
    """`deepspeed` without a hostfile in a batch script of four nodes; a step of one node is what it says."""
    batch = {**ONE_HOST, "SLURM_JOB_NUM_NODES": "4"}
    with pytest.raises(UserError, match=r"Slurm has given this job 4 hosts, but 1 host with 2 ranks.*srun python"):
        check_hosts_asked_for(batch, [])
    check_hosts_asked_for({**batch, "CROSS_SIZE": "4"}, [])
    check_hosts_asked_for({**batch, "SLURM_STEP_NUM_NODES": "1"}, [])
    check_hosts_asked_for({**SLURM, **rank_variables(SLURM)}, [])


@pytest.mark.parametrize("name", ["deepspeed", "runner.py"])
def test_the_arguments_of_the_deepspeed_command_are_found_above_a_rank(name, tmp_path):
    """Its stand-in starts a process that asks; a script of the same arguments and another name is not taken for it."""
    ask = "from pipeline.launchers import runner_arguments; print(runner_arguments())"
    (tmp_path / name).write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}])")
    command = [sys.executable, str(tmp_path / name), "--hostfile", "a b", "pipeline/pretrain.py"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == ("['--hostfile', 'a b', 'pipeline/pretrain.py']" if name == "deepspeed" else "[]")
    assert runner_arguments() == []


def test_the_interface_is_that_of_the_way_to_rank_0(monkeypatch):
    def interfaces(**addresses):
        made = {name: [SimpleNamespace(family=socket.AF_INET, address=found)] for name, found in addresses.items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: made)
        monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in made})

    def routes(**sources):
        monkeypatch.setattr(launchers, "_source_address", lambda target: sources.get(target, ""))

    interfaces(lo="127.0.0.1", eth0="10.0.0.5", ib0="10.9.0.5")
    routes(**{"node-1": "10.9.0.5", "192.0.2.1": "10.0.0.5"})
    assert interface_towards("node-1") == "ib0"
    routes(**{"node-1": "127.0.0.1", "192.0.2.1": "10.0.0.5"})  # rank 0's own host, as Debian names itself
    assert interface_towards("node-1") == "eth0"
    routes(**{"node-1": "127.0.0.1"})
    assert interface_towards("node-1") is None
    environment = {"CROSS_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "node-1"}
    with pytest.raises(UserError, match=r"unclear by which network interface .* set GLOO_SOCKET_IFNAME"):
        choose_interface(environment)
    assert choose_interface({**environment, "GLOO_SOCKET_IFNAME": "ib0"}) is None
    assert choose_interface({**environment, "CROSS_SIZE": "1"}) is None
    interfaces(lo="127.0.0.1", eth0="10.0.0.5")
    assert interface_towards("node-1") == "eth0", "the only one"
    assert choose_interface(environment) == "eth0"


def test_this_machine_reaches_itself_by_its_loopback():
    assert launchers._source_address("127.0.0.1") == "127.0.0.1"
    assert "RANK" not in os.environ
