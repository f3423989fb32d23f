"""A Slurm cluster of the two hosts: munge and slurmd on both, slurmctld on the first. It ends with them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.hosts import SEARCHED, Host
from tests.distributed.ranks import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "srun")
_CONFIG = """\
ClusterName=two
SlurmctldHost={first.name}-itself({first.address})
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
_NODE = "NodeName={host.name} NodeHostname={host.name}-itself NodeAddr={host.address} CPUs={cores}\n"


def start_slurm(hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    """Starts the daemons and returns the environment in which the first host's `srun` and `sbatch` find them."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]:
        pytest.skip(f"Slurm needs {', '.join(missing)} (munge, slurmctld, slurmd, slurm-client)")
    configuration, key = folder / "slurm.conf", folder / "munge.key"
    nodes = "".join(_NODE.format(host=host, cores=os.cpu_count()) for host in hosts)
    configuration.write_text(_CONFIG.format(first=hosts[0], folder=folder) + nodes)
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for host in hosts:
        host.run("mkdir", "/run/munge")
        host.run("munged", "--force", f"--key-file={key}", f"--log-file={folder}/munged-{host.name}.log")
    hosts[0].run("slurmctld", "-f", configuration)
    for host in hosts:
        host.run("slurmd", "-f", configuration)
    environment = hosts[0].environment(SLURM_CONF=str(configuration))

    def idle() -> bool:
        found = subprocess.run(
            hosts[0].command("sinfo", "--noheader", "--format=%t %D"), env=environment, capture_output=True, text=True
        )
        return found.stdout.split() == ["idle", str(len(hosts))]

    wait_until(idle)
    return environment
