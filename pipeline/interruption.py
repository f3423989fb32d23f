"""How a run is told to end or to save: Ctrl-C, signals, and files in its folder."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

EXIT_INTERRUPTED = 130
"""Ctrl-C, or SIGTERM before the first step: what has a final name is whole, and nothing was saved."""
EXIT_SAVED = 75
"""Asked to end: the step was finished and saved, and the same command goes on (sysexits.h: EX_TEMPFAIL)."""

EXIT_HUNG = 124
"""Without progress for too long (as timeout(1) has it)."""
EXIT_CRASHED = 70
"""An error that is no user's mistake; its traceback was shown (sysexits.h: EX_SOFTWARE)."""
SUPERVISED = "PRETRAIN_SUPERVISED"
"""In the environment of a rank whose parent is a supervisor (pipeline.supervisor)."""

_LOOK_SECONDS = 1.0
SAVE, STOP = "save", "stop"


class Interruption:
    """SIGINT raises KeyboardInterrupt where the process is. So do SIGTERM, the launcher's way to stop its ranks, and
    SIGUSR1, until `finish_steps`; from then on they ask for the step to be finished and saved.

    Python drops an exception that comes while it runs a finalizer, so the loop asks as well. A signal that a shell has
    had ignored, as SIGINT of background jobs, stays ignored.
    """

    def __init__(self) -> None:
        self._interrupted: str | None = None
        self._finishes_steps = False
        self.wanted: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._received)

    def _received(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number != signal.SIGINT and self._finishes_steps:
            self.wanted = name
            return
        self._interrupted = name
        raise KeyboardInterrupt(name)

    def finish_steps(self) -> None:
        """From now on the run can be asked to end behind a step."""
        self._finishes_steps = True

    def ask(self, why: str) -> bool:
        """Asks for that; False where it cannot be done yet."""
        if self._finishes_steps:
            self.wanted = self.wanted or why
        return self._finishes_steps

    def check(self) -> None:
        """Raises KeyboardInterrupt when one has come."""
        if self._interrupted is not None:
            raise KeyboardInterrupt(self._interrupted)


class Requests:
    """What a run is asked for from outside: a checkpoint (the file `save` in its folder), or one and the end (the file
    `stop`, or a signal). One rank's being asked is enough: the ranks tell each other with the token counts of a step.
    """

    def __init__(self, output_dir: Path, interruption: Interruption, *, is_first: bool) -> None:
        self._files = {name: output_dir / name for name in (SAVE, STOP)} if is_first else {}
        self._interruption = interruption
        self._looked = 0.0
        self._found: set[str] = set()
        self.done()  # what is left there was said to a run that is over

    def mine(self) -> tuple[bool, bool]:
        """Whether this rank was asked to (save, stop)."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._found = {name for name, path in self._files.items() if path.exists()}
        return SAVE in self._found, STOP in self._found or self._interruption.wanted is not None

    def done(self) -> None:
        """Forgets what was asked by files."""
        self._found = set()
        for path in self._files.values():
            path.unlink(missing_ok=True)

    def reason(self) -> str:
        """Why this rank ends, as far as it knows."""
        return self._interruption.wanted or "a request"


_LAUNCHERS = (b"deepspeed.launcher.launch", b"torch.distributed", b"torchrun")


def launcher_is_gone() -> bool:
    """Waits for the end of the launcher that started this process, and returns True then.

    The launcher is the parent, and where that is DeepSpeed's launch.py, its parent too (`deepspeed` itself, which
    leaves it and the ranks behind when it is killed). False at once where no launcher is the parent: a shell may go and
    leave a run of one rank behind.
    """
    parent = os.getppid()
    command = _command_of(parent)
    if SUPERVISED not in os.environ and not any(launcher in command for launcher in _LAUNCHERS):
        return False
    above = _parent_of(parent) if _LAUNCHERS[0] in command else None
    while os.getppid() == parent and (above is None or _parent_of(parent) == above):
        time.sleep(_LOOK_SECONDS / 2)
    return True


def follow_launcher(interruption: Interruption, grace_seconds: float) -> None:
    """Ends this process when its launcher has gone, however that came about. A run that is under way gets
    `grace_seconds` to finish its step and to save."""
    if launcher_is_gone():
        if interruption.ask("its launcher was gone"):
            time.sleep(grace_seconds)
        os._exit(EXIT_INTERRUPTED)


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
