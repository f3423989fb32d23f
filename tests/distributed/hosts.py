"""Two hosts on one machine: namespaces of network, processes, mounts and host name, joined by a wire, an sshd in each.

Each host is a tree of processes below its first one (PID 1 of its namespace), which reads from this process: when the
test ends, however it ends, that read ends, and the kernel takes the processes, mounts and the network with it. Nothing
of this machine's is changed: what ssh reads from a home folder and from /etc is put in place inside alone.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import ROOT, wait_until

SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_ADDRESSES = {"node-1": "10.77.0.1", "node-2": "10.77.0.2"}
_SSHD_CONFIG = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
# A dead host is noticed by ssh, and so by pdsh, after three silent intervals; without these lines never.
_SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
    LogLevel ERROR
    ConnectTimeout 20
    ServerAliveInterval 3
    ServerAliveCountMax 3
"""
# As Debian installs it, a host's own name is an address of its loopback: of no use to other hosts.
_HOSTS = """\
127.0.0.1 localhost
127.0.1.1 {name}-itself
10.77.0.1 node-1
10.77.0.2 node-2
"""
# What a host does until its standard input ends. Its loopback is up before the wire is there.
_FIRST_PROCESS = """\
set -e
hostname {name}-itself
mount --bind {folder}/{name}/hosts /etc/hosts
mount --bind {folder}/passwd /etc/passwd
mount -t tmpfs none /run
mkdir /run/sshd
ip link set lo up
echo up
read -r wired
ip addr add {address}/24 dev eth0
ip link set eth0 up
{sshd} -f {folder}/{name}/sshd_config -E {folder}/{name}/sshd.log
echo started
read -r end
"""


@dataclass(frozen=True)
class Host:
    """A running host: its name in the other's and its own /etc/hosts, its address, its first process."""

    name: str
    address: str
    home: Path
    first_process: subprocess.Popen[str]

    def command(self, *arguments: object) -> list[str]:
        """The command that runs this one on the host."""
        (inside,) = psutil.Process(self.first_process.pid).children()
        return ["nsenter", "--target", str(inside.pid), *_NAMESPACES, f"--wdns={ROOT}", *map(str, arguments)]

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment with the host's home folder, and no mark of another launcher's."""
        return {**os.environ, "HOME": str(self.home), "PATH": SEARCHED, **more}

    def run(self, *arguments: object) -> str:
        """What a short command says there; fails the test with the command's error when that is one."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{arguments} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def wire_cut(self) -> Iterator[None]:
        """While the block runs the host's end of the wire is down: the other one's packets are lost without a word."""
        self.run("ip", "link", "set", "eth0", "down")
        try:
            yield
        finally:
            self.run("ip", "link", "set", "eth0", "up")


def _expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    assert found == line, f"the host said {found!r}, expected {line!r}: {process.stdout.read()}"


def _proceed(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def skip_without_namespaces() -> None:
    """Skips the test, saying why, where a host cannot be made: programs that are missing, or no right to namespaces."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]:
        pytest.skip(f"two hosts need {', '.join(missing)} (iproute2, openssh-server, openssh-client, pdsh)")
    tried = subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"two hosts need the right to make namespaces: {tried.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts `node-1` and `node-2`, 10.77.0.1 and 10.77.0.2, each with the other's ssh key; they share all files.

    folder: for keys, configuration and logs.
    """
    sshd = shutil.which("sshd", path=SEARCHED)
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in _ADDRESSES))
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text(_SSH_CONFIG.format(folder=folder))
    users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    users = [[*user[:5], str(home), "/bin/sh"] if user[2] == str(os.getuid()) else user for user in users]
    (folder / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in _ADDRESSES.items():
            values = {"name": name, "address": address, "folder": folder, "sshd": sshd}
            (folder / name).mkdir()
            (folder / name / "hosts").write_text(_HOSTS.format(**values))
            (folder / name / "sshd_config").write_text(_SSHD_CONFIG.format(**values))
            process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "sh", "-c", _FIRST_PROCESS.format(**values)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(_end, process)
            _expect(process, "up")
            hosts.append(Host(name, address, home, process))
        one, two = ((psutil.Process(host.first_process.pid).children()[0]).pid for host in hosts)
        wire = f"ip link add eth0 netns {one} type veth peer name eth0 netns {two}"
        subprocess.run(wire.split(), check=True)
        for host in hosts:
            _proceed(host.first_process)
            _expect(host.first_process, "started")
        wait_until(lambda: all(_can_reach(one, two) for one in hosts for two in hosts))
        yield hosts[0], hosts[1]


def _can_reach(one: Host, two: Host) -> bool:
    """Whether ssh gets there: the wire is up, and the sshd listens."""
    command = one.command("ssh", two.name, "hostname")
    done = subprocess.run(command, env=one.environment(), capture_output=True, text=True, timeout=60)
    return done.stdout.strip() == f"{two.name}-itself"


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a host: with its first process every other one there ends."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.wait()
    process.stdout.close()
