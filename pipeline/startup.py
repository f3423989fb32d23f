"""What happens before the run: threads, process group, logs, and where the time of it goes."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

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


class RankError(UserError):
    """What this rank may have met alone, such as a shard that it cannot read: it says so itself."""


def use_deterministic_algorithms() -> None:
    """Leaves torch the kernels whose results do not vary from run to run; before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's notes on reproducibility
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Interruption:
    """Ctrl-C, and SIGTERM, the launcher's way to stop its ranks: each raises KeyboardInterrupt where the process is.

    Python drops an exception that comes while it runs a finalizer, so the loop asks as well. A signal that a shell has
    had ignored, as SIGINT of background jobs, stays ignored.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)

    def _received(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        raise KeyboardInterrupt(self._signal.name)

    def check(self) -> None:
        """Raises KeyboardInterrupt when one has come."""
        if self._signal is not None:
            raise KeyboardInterrupt(self._signal.name)


@dataclass
class Timings:
    """Seconds of each phase of the start, in order; the first counts from the start of the process."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=lambda: time.time())

    @staticmethod
    def since_process_start() -> "Timings":
        import psutil

        return Timings(_last=psutil.Process().create_time())

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
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
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
