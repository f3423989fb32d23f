"""A torch profiler trace of some steps: `--profile 11:15` writes `profile/rank_N.json.gz`, for Perfetto or
chrome://tracing."""

import re
from pathlib import Path
from typing import Any

from data_prep.errors import UserError


def parse_steps(text: str) -> range:
    """Steps "A:B", both included, as metrics.jsonl counts them; raises UserError for another text."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile is {text!r}, expected A:B with 1 <= A <= B: the first and the last step to trace")
    return range(int(found[1]), int(found[2]) + 1)


class Profiler:
    """Traces `steps` on this rank; `before` and `after` stand around every step of the run."""

    def __init__(self, steps: range, output_dir: Path, rank: int) -> None:
        self._steps, self._path = steps, output_dir / "profile" / f"rank_{rank}.json.gz"
        self._profile: Any = None

    def before(self, step: int) -> None:
        if step in self._steps and self._profile is None:
            from torch.profiler import profile

            self._profile = profile(record_shapes=True, profile_memory=True)
            self._profile.__enter__()

    def after(self, step: int, last_step: int) -> Path | None:
        """The trace's path, once the last of its steps is done (or the last of the run)."""
        if self._profile is None or step < min(self._steps[-1], last_step):
            return None
        self._profile.__exit__(None, None, None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile, self._steps = None, range(0)
        return self._path
