"""What happens before the run and at its end: threads, process group, logs, and where the time of it goes."""

import contextlib
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from data_prep.errors import UserError
from pipeline.launchers import choose_interface, rank_variables

if TYPE_CHECKING:
    import torch


def set_environment() -> None:
    """Fills in what the launcher and the user have left open; must run before torch is imported.

    Each rank gets its share of the cores: without a limit every rank's thread pool takes all of them, and two ranks
    on two cores run about seven times slower.
    """
    os.environ.update(rank_variables(os.environ))
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["LOCAL_SIZE"]))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


_STARTED_AGAIN = "PRETRAIN_STARTED_AGAIN"


class StartAgain(Exception):  # noqa: N818 - no error
    """Every rank is to start from the newest checkpoint, as the same process of the launcher's.

    port: where the ranks are to find each other; the old one may still be held.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port


def start_again(port: int) -> NoReturn:
    """Replaces this process by the command that it was started with, going on from the newest checkpoint."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ[_STARTED_AGAIN] = str(time.time())
    resume = ["--resume", "auto"]
    command = sys.orig_argv if sys.orig_argv[-2:] == resume else [*sys.orig_argv, *resume]
    os.execv(sys.executable, command)


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def hold(output_dir: Path) -> IO[str]:
    """Keeps other runs out of a run's folder for as long as the file returned is open; the kernel frees it with us.

    Raises UserError naming the process that is at work there. Where the file system has no locks there is no
    protection.
    """
    path = output_dir / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - held by the caller
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{output_dir}: {holder} is at work there; wait for it, stop it, or give another --output_dir"
            ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def seed_generators(seed: int) -> None:
    """Starts every global generator of this process alike in every run. Nothing of ours draws from them, but a library
    may, and checkpoints keep them."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


class RankError(UserError):
    """What this rank may have met alone, such as a shard that it cannot read: it says so itself."""


def use_deterministic_algorithms() -> None:
    """Leaves torch the kernels whose results do not vary from run to run; before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's notes on reproducibility
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@dataclass
class Timings:
    """Seconds of each phase of the start, in order; the first counts from the start of the process."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=lambda: time.time())

    @staticmethod
    def since_process_start() -> "Timings":
        import psutil

        # A process that has started itself again (`start_again`) is older than its start.
        return Timings(_last=float(os.environ.pop(_STARTED_AGAIN, psutil.Process().create_time())))

    def finished(self, phase: str) -> None:
        """Ends a phase that began when the one before ended."""
        now = time.time()
        self.seconds[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({phases})"


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device."""

    rank: int
    local_rank: int
    size: int
    device: "torch.device"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """As the maker calls it; "cpu" for a CPU rank."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def memory_bytes(self) -> int:
        """The most memory of the GPU that tensors took so far; of a CPU rank, what the process takes now."""
        import psutil
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return int(psutil.Process().memory_info().rss)

    def describe(self) -> str:
        return f"{self.size} x {self.device_name}, {os.environ['OMP_NUM_THREADS']} threads each"

    def barrier(self) -> None:
        import deepspeed.comm

        deepspeed.comm.barrier()

    def agreed_port(self) -> int:
        """A free port of rank 0's host."""
        return int(self.from_first(free_port() if self.is_first else None))

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch

        holder = [value]
        torch.distributed.broadcast_object_list(holder, 0, device=self.device)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, by rank; called on all of them."""
        from torch import distributed

        gathered: list[Any] = [None] * self.size
        distributed.all_gather_object(gathered, value)
        return gathered

    def close(self) -> None:
        """Ends the process group on every rank together."""
        import deepspeed.comm

        self.barrier()
        deepspeed.comm.destroy_process_group()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[bool]:
        """Yields True on rank 0 and False elsewhere; the others leave the block when rank 0 has left it.

        Raises on every rank when rank 0 raised: a mistake that only rank 0 met must not leave the others waiting.
        """
        import torch

        failed = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            yield self.is_first
        except BaseException:
            failed += 1
            raise
        finally:
            torch.distributed.broadcast(failed, 0)
        if failed.item():
            raise UserError("rank 0 could not go on; its own error says why")


def init_distributed() -> World:
    """Starts the process group over the launcher's environment (NCCL on GPUs, gloo on CPUs)."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from pipeline.ops import skip_unused_ops

    skip_unused_ops()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if (interface := choose_interface(os.environ)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    name = accelerator.device_name()
    device = torch.device(name if name == "cpu" else f"{name}:{local_rank}")
    return World(rank, local_rank, torch.distributed.get_world_size(), device)


def leave(status: int) -> NoReturn:
    """Ends the process at once, once everything that was written has been flushed.

    gloo's worker threads may hold tensors with references into Python; when they let go of them while the interpreter
    is being taken down, the process aborts ("terminate called without an active exception", pytorch/pytorch#179291):
    1 in 25 ends of a ZeRO-3 run on two CPU ranks, after destroy_process_group too.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def open_log(output_dir: Path, rank: int) -> logging.Logger:
    """The run's logger: everything to `logs/rank_N.log`, rank 0's to the terminal as well.

    What DeepSpeed and transformers log goes to the file alone.
    """
    folder = output_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(folder / f"rank_{rank}.log")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("DeepSpeed", "transformers", "py.warnings"):
        library = logging.getLogger(name)
        library.handlers[:] = [to_file]
        library.propagate = False
    logging.captureWarnings(True)
    logger = logging.getLogger("pretrain")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers[:] = [to_file]
    if rank == 0:
        to_terminal = logging.StreamHandler(sys.stdout)
        to_terminal.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(to_terminal)
    return logger
