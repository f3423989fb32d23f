"""`--max_restarts N`: ranks that die are started again without leaving the launcher.

What the launcher starts is then a supervisor, which runs the rank as its child. The supervisors are connected to rank
0's, at the address that the launcher gave to the ranks; each generation of ranks gets a port of its own. When a rank
dies, or its watchdog ends it, all of that generation are killed and the next one goes on from the newest checkpoint.
A lost connection, that is a lost supervisor or machine, ends everything: no launcher starts that anew.
"""

import contextlib
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from data_prep.errors import UserError
from pipeline.interruption import EXIT_CRASHED, EXIT_HUNG, EXIT_SAVED, SUPERVISED, launcher_is_gone
from pipeline.startup import free_port

_CONNECT_SECONDS = 300.0
_GATHER_SECONDS = 5.0  # for the ranks that die of another's death, so that the first cause is known
_LOST = EXIT_CRASHED


def is_restartable(status: int) -> bool:
    """Whether starting again may help: a signal, a hang or a crash, but not a user's mistake or wish."""
    return status < 0 or status in (EXIT_HUNG, EXIT_CRASHED)


def supervise(command: Sequence[str], max_restarts: int, environment: Mapping[str, str]) -> int:
    """Runs this rank as a child, again and again where it has to be; returns the status to end with.

    command: of a rank; from the second start on with `--resume auto`. environment: the launcher's (RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT). Raises UserError where that port cannot be had.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise UserError("--max_restarts: torchrun keeps MASTER_PORT to itself; give its own --max-restarts instead")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank == 0:
        try:
            listener = socket.create_server(("", address[1]), backlog=size)
        except OSError as error:
            raise UserError(f"--max_restarts: MASTER_PORT {address[1]} is taken ({error.strerror})") from None
        threading.Thread(target=_coordinate, args=(listener, size, max_restarts), daemon=True).start()
    with _connected(address) as connection:
        _send(connection, {"rank": rank})
        return _Rank(command, environment, connection).follow()


def _connected(address: tuple[str, int]) -> socket.socket:
    until = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(address, timeout=None)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who reads finds the end of the connection
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, take: Callable[[dict[str, Any] | None], None]) -> None:
    """Hands on what comes, and None at the end of the connection."""
    with contextlib.suppress(OSError), connection.makefile("rb") as lines:
        for line in lines:
            take(json.loads(line))
    take(None)


class _Rank:
    """One rank's child, as rank 0's supervisor wants it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], connection: socket.socket) -> None:
        self._command, self._environment, self._connection = list(command), dict(environment), connection
        self._child: subprocess.Popen[bytes] | None = None
        self._orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._forward)
        # A terminal's Ctrl-C reaches the child as well. Not SIG_IGN, which the child would inherit.
        signal.signal(signal.SIGINT, lambda number, frame: None)

    def _forward(self, number: int, _: FrameType | None) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def follow(self) -> int:
        """Does what it is told until it is told to end."""
        threading.Thread(target=_read, args=(self._connection, self._orders.put), daemon=True).start()
        threading.Thread(target=self._follow_launcher, daemon=True).start()
        status = _LOST
        while (order := self._orders.get()) is not None:
            if "port" in order:
                self._start(order["port"], again=order["generation"] > 0)
            elif "end" in order:
                status = int(order["end"])
                break
            else:
                self._kill()
        self._kill()
        if self._child is not None:
            self._child.wait()
        return status

    def _start(self, port: int, *, again: bool) -> None:
        environment = {**self._environment, "MASTER_PORT": str(port), SUPERVISED: "1"}
        self._child = subprocess.Popen([*self._command, *(["--resume", "auto"] if again else [])], env=environment)
        threading.Thread(target=self._wait, args=(self._child,), daemon=True).start()

    def _wait(self, child: "subprocess.Popen[bytes]") -> None:
        _send(self._connection, {"exited": child.wait()})

    def _kill(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()

    def _follow_launcher(self) -> None:
        if launcher_is_gone():
            self._forward(signal.SIGTERM, None)


def _coordinate(listener: socket.socket, size: int, max_restarts: int) -> None:
    """Rank 0's: starts generations, and tells all supervisors how to end."""
    connections: dict[int, socket.socket] = {}
    inbox: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    with listener:
        while len(connections) < size:
            connection, _ = listener.accept()
            line = b""
            while not line.endswith(b"\n"):
                line += connection.recv(1) or b"{}\n"
            connections[int(json.loads(line)["rank"])] = connection
    for rank, connection in connections.items():
        threading.Thread(target=_read, args=(connection, _tagged(inbox, rank)), daemon=True).start()

    def tell(message: Mapping[str, Any]) -> None:
        for rank in sorted(connections, reverse=True):  # what rank 0 is told may end this process
            _send(connections[rank], message)

    for generation in range(max_restarts + 1):
        tell({"port": free_port(), "generation": generation})
        statuses, lost = _statuses(inbox, size, tell)
        first = next((status for status in statuses if status), 0)
        bad = next((status for status in statuses if is_restartable(status) and status != EXIT_CRASHED), None)
        status = first if bad is None else bad  # a rank that crashed may have died of one that was killed
        if lost or not is_restartable(status) or generation == max_restarts:
            tell({"end": _LOST if lost else status if status >= 0 else 128 - status})
            return
        print(
            f"restart   {generation + 1} of {max_restarts}: a rank ended with status {status}; all go on from the"
            " newest checkpoint",
            file=sys.stderr,
            flush=True,
        )


def _tagged(
    inbox: "queue.Queue[tuple[int, dict[str, Any] | None]]", rank: int
) -> Callable[[dict[str, Any] | None], None]:
    return lambda message: inbox.put((rank, message))


def _statuses(
    inbox: "queue.Queue[tuple[int, dict[str, Any] | None]]", size: int, tell: Callable[[Mapping[str, Any]], None]
) -> tuple[list[int], bool]:
    """The statuses of a generation, in the order in which its ranks ended without having been killed from here; and
    whether a supervisor was lost."""
    statuses: list[int] = []
    ended, killed, until = 0, False, float("inf")
    while ended < size:
        try:
            _, message = inbox.get(timeout=None if until == float("inf") else max(0.0, until - time.monotonic()))
        except queue.Empty:
            tell({"kill": True})
            killed, until = True, float("inf")
            continue
        if message is None:
            return statuses, True
        ended += 1
        if not killed:
            statuses.append(int(message["exited"]))
            if statuses[-1] and statuses[-1] != EXIT_SAVED and until == float("inf"):
                until = time.monotonic() + _GATHER_SECONDS
    return statuses, False
