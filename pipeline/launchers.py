"""Who started this process: its rank by the launcher's variables, the hosts that were asked for, the way to the others.

DeepSpeed's launcher and torchrun say RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun and mpirun say the
same in words of their own.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import UserError

_FIRST_PORT, _PORTS = 15_000, 15_000  # a Slurm job's, below those that Linux gives to clients (from 32,768)
_ELSEWHERE = "192.0.2.1"  # no host has it (RFC 5737): what the default route is asked for
_RUNNERS = ("deepspeed.launcher.runner", "deepspeed", "ds", "deepspeed.pt")


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT of this process, as far as the environment
    lacks them; without a launcher it is a world of one rank.

    Raises UserError where an MPI launcher does not say which host has rank 0.
    """
    if "RANK" in environment:
        # Kubernetes' PyTorchJob without torchrun says no more: a pod is a rank.
        local_size = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", "1"))
        found = {"LOCAL_RANK": "0", "LOCAL_SIZE": local_size}
    elif "SLURM_STEP_NUM_TASKS" in environment:
        found = _of_slurm(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        found = _of_mpi(environment)
    else:
        found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return found  # whatever address and port are set, nobody else listens there
    return {name: value for name, value in found.items() if name not in environment}


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """A task of a job step ("OUTPUT ENVIRONMENT VARIABLES" of srun's manual); rank 0 is on the step's first node."""
    tasks = _repeated(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS),
    }


def _of_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """A rank of Open MPI's mpirun, which says where its own ranks are and nothing of the others' addresses."""
    found = {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_SIZE": environment["OMPI_COMM_WORLD_LOCAL_SIZE"],
        "MASTER_PORT": "29500",  # torch's and DeepSpeed's
    }
    if found["LOCAL_SIZE"] == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in environment:
        raise UserError(
            f"mpirun started {found['WORLD_SIZE']} ranks on several hosts, and MASTER_ADDR does not say which one has"
            " rank 0; add `-x MASTER_ADDR=HOST` with the first host of the hostfile"
        )
    return found


def _repeated(counts: str) -> list[int]:
    """Slurm's "4(x2),1" as [4, 4, 1]."""
    found: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found


def _first_host(hosts: str) -> str:
    """The first of a Slurm list such as "gpu[007-010,12],login": gpu007."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None, f"SLURM_STEP_NODELIST is {hosts!r}"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def number_of_hosts(environment: Mapping[str, str]) -> int:
    """The hosts of the world as its launcher made it, or as they follow from equal numbers of ranks on each."""
    if "CROSS_SIZE" in environment:  # DeepSpeed's
        return int(environment["CROSS_SIZE"])
    return -(-int(environment["WORLD_SIZE"]) // int(environment["LOCAL_SIZE"]))


def check_hosts_asked_for(environment: Mapping[str, str], runner: Sequence[str]) -> None:
    """Raises UserError when the world has fewer hosts than its start has asked for, by a hostfile or of Slurm.

    runner: the arguments of the `deepspeed` command that started this process on its own host, none if no such did.
    Without its hostfile that command warns and goes on with the local devices.
    """
    hosts, ranks = number_of_hosts(environment), int(environment["WORLD_SIZE"])
    there = f"{hosts} host{'s' if hosts > 1 else ''} with {ranks} rank{'s' if ranks > 1 else ''} in all would train"
    if runner:
        from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

        asked = parse_args(list(runner))
        path = Path(asked.hostfile)
        if asked.hostfile != DLTS_HOSTFILE and not path.is_file():
            raise UserError(
                f"`deepspeed --hostfile {asked.hostfile}` found no file {path.absolute()}, and {there}; name the file"
                " that lists the hosts (as hostfile.example does), or leave --hostfile out to train on this machine"
                " alone"
            )
        if asked.num_nodes > hosts:
            raise UserError(
                f"`deepspeed --num_nodes {asked.num_nodes}` asked for {asked.num_nodes} hosts, but {there}; list"
                f" {asked.num_nodes} hosts in {asked.hostfile}, or lower --num_nodes"
            )
    # In a step the batch script's numbers are there as well, and count for the whole job.
    of_slurm = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_JOB_NUM_NODES", "1"))
    if int(of_slurm) > hosts:
        raise UserError(
            f"Slurm has given this job {of_slurm} hosts, but {there}; start the ranks with `srun python"
            " pipeline/pretrain.py ...`, or with `srun --nodes=1 --ntasks=1 ...` to train on one host alone"
        )


def runner_arguments() -> list[str]:
    """The arguments of the `deepspeed` command among this process's ancestors; none where a host was reached by ssh."""
    import psutil

    for process in psutil.Process().parents():
        try:
            command = process.cmdline()
        except psutil.Error:  # another user's, or gone
            return []
        for position, word in enumerate(command[:4]):
            if (Path(word).name if position < 2 else word) in _RUNNERS:
                return command[position + 1 :]
    return []


def interface_towards(address: str) -> str | None:
    """The network interface by which this host and the one of that address reach each other; None if that is unclear.

    address: rank 0's. Its own host often knows it by a loopback address (Debian's 127.0.1.1): there, the interface of
    the default route counts, or the only one that is up.
    """
    import psutil

    names = {
        found.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family in (socket.AF_INET, socket.AF_INET6)
    }
    loopback = {name for found, name in names.items() if found in ("127.0.0.1", "::1")}
    for target in (address, _ELSEWHERE):
        if (name := names.get(_source_address(target))) and name not in loopback:
            return name
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    others = (set(names.values()) & up) - loopback
    return others.pop() if len(others) == 1 else None


def _source_address(target: str) -> str:
    """The address from which this host would send to that one; "" where there is no way. Nothing is sent."""
    try:
        family, kind, _, _, found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(found)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def choose_interface(environment: Mapping[str, str]) -> str | None:
    """What GLOO_SOCKET_IFNAME has to be for ranks on several hosts; None where it is set or one host is all.

    gloo takes the interface that has the address of the host's own name; on Debian that is the loopback, and the
    others fail with "Gloo connectFullMesh failed ... Connection refused, remote=[127.0.1.1]". Raises UserError where
    the interface is unclear.
    """
    if "GLOO_SOCKET_IFNAME" in environment or number_of_hosts(environment) == 1:
        return None
    name = interface_towards(environment["MASTER_ADDR"])
    if name is None:
        raise UserError(
            f"it is unclear by which network interface this host ({socket.gethostname()}) reaches the others (rank 0"
            f" is at MASTER_ADDR={environment['MASTER_ADDR']}); set GLOO_SOCKET_IFNAME to one that `ip addr` shows"
        )
    return name
