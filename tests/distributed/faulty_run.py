"""Run by the launcher: `pretrain.py` with faults that are injected at stated steps of stated ranks.

Its first argument, `--faults JSON`, is a list of mappings: rank, step (from 1; 0: every step), and what.
`digests/rank_N.jsonl` in the run's folder has, of every step, the digest of this rank's state before and after it, and
the faults that fired.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

from pipeline import pretrain  # noqa: E402
from pipeline.startup import leave, set_environment  # noqa: E402


def inject(faults: list[dict[str, Any]], output_dir: Path, restarted: bool) -> None:
    """Wraps the engine's step."""
    import torch

    from pipeline import loader
    from pipeline.digests import digest, state
    from pipeline.engine import Engine

    plain_gradients = Engine.local_gradients
    plain_step, plain_losses, plain_batches = Engine.train_step, Engine._losses, loader.step_batches
    current: dict[str, Any] = {}

    def faulty_losses(self: Any, batch: Any, scale: float = 1.0) -> Any:
        of_batch, sums = plain_losses(self, batch, scale)
        if current.get("what") == "nan loss":
            object.__setattr__(of_batch, "trained", of_batch.trained * math.nan)
            sums[0] *= math.nan
        return of_batch, sums

    def faulty_batches(samples: Any, step: int, sizes: Any, batches: Any, rank: int, drop: Any = None) -> Any:
        for fault in faults:
            if (fault["rank"], fault["step"], fault["what"]) == (rank, step + 1, "no samples"):
                time.sleep(3600)
        return plain_batches(samples, step, sizes, batches, rank, drop)

    def faulty_gradients(self: Any, step: int, index: int, batch: Any) -> Any:
        found = plain_gradients(self, step, index, batch)
        for fault in faults:
            if (fault["rank"], fault["step"], fault["what"]) == (self.world.rank, step + 1, "flip gradient"):
                current["passes"] = current.get("passes", 0) + 1
                if current["passes"] == 2:  # it comes and goes
                    found[fault["parameter"]].view(torch.int32).view(-1)[0] ^= 1 << 7
        return found

    def faulty_step(self: Any, step: int, batches: Any, *rest: Any, **more: Any) -> Any:
        due = [
            fault
            for fault in faults
            if fault["rank"] == self.world.rank and fault["step"] in (0, step + 1)
            if not (fault.get("once") and restarted)
        ]
        record: dict[str, Any] = {"step": step + 1, "fired": [fault["what"] for fault in due]}
        hooks = []
        for fault in due:
            current.update(fault)
            if fault["what"] == "sleep":
                time.sleep(fault["seconds"])
            elif fault["what"].startswith("touch "):
                (output_dir / fault["what"].removeprefix("touch ")).touch()
            elif fault["what"].startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[fault["what"]])
            elif fault["what"] == "nan gradient":
                parameter = list(self.deepspeed.module.parameters())[fault["parameter"]]
                hooks.append(parameter.register_hook(lambda gradient: gradient * math.nan))
        record["before"] = digest(state(self.deepspeed))
        result = plain_step(self, step, batches, *rest, **more)
        record["after"] = digest(state(self.deepspeed))
        current.clear()
        for hook in hooks:
            hook.remove()
        folder = output_dir / "digests"
        folder.mkdir(exist_ok=True)
        with open(folder / f"rank_{self.world.rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        return result

    Engine.train_step, Engine._losses = faulty_step, faulty_losses  # type: ignore[method-assign]
    loader.step_batches = faulty_batches
    Engine.local_gradients = faulty_gradients  # type: ignore[method-assign]


def main() -> int:
    argv = sys.argv[1:]
    at = argv.index("--faults")
    faults = json.loads(argv[at + 1])
    del argv[at : at + 2]
    set_environment()  # before torch, which `inject` imports: its threads decide how sums are rounded
    inject(faults, Path(argv[argv.index("--output_dir") + 1]), argv[-2:] == ["--resume", "auto"])
    return pretrain.main(argv)


if __name__ == "__main__":
    leave(main())
