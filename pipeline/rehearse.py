"""Takes a configuration through what will happen to it before weeks are spent on it: a short run, a kill, a resume, and
another number of ranks. `python -m pipeline.rehearse --recipe R --deepspeed_config C`."""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, exit_status
from pipeline.arguments import add_files

EXAMPLES = """\
examples:
  python -m pipeline.rehearse --recipe my.yaml --deepspeed_config ds_configs/zero2.json
  python -m pipeline.rehearse --recipe my.yaml --deepspeed_config ds_configs/zero3.json --ranks 8 --steps 30
  python -m pipeline.rehearse --deepspeed_config ds_configs/zero2.json --model.config.n_layer 2

The recipe's own data, model and batches are used; training.max_steps, evaluation.* and checkpoint.* are set to a short
run's, and what it writes is removed at the end (--keep keeps it, and so does a loss). Exit status 1 where something was
lost.
"""
_EQUAL = ("loss", "grad_norm", "learning_rate", "samples", "tokens")
_TO_ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.rehearse",
        description="Rehearse a run on this machine: train a few steps, kill it, resume it, also on another number of"
        " ranks, and say what was equal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_files(parser, "how it is carried out (ds_configs/)")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks (default: the GPUs, or 2 CPU ranks)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="steps of a run (default: %(default)s)")
    parser.add_argument(
        "--output_dir", type=Path, metavar="D", help="folder for the runs (default: runs/<recipe's name>-rehearsal)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs and their logs there")
    return parser


@dataclass(frozen=True)
class Rehearsal:
    """What is run, and how often a checkpoint is taken."""

    recipe: Path
    ds_config: Path
    steps: int
    every_steps: int
    folder: Path
    overrides: tuple[str, ...]

    def command(self, ranks: int, run: Path) -> list[str]:
        from pipeline.startup import free_port

        return [
            str(Path(sys.executable).parent / "deepspeed"),
            "--log_level", "error", "--num_accelerators", str(ranks), "--master_port", str(free_port()),
            str(Path(__file__).with_name("pretrain.py")),
            "--deepspeed_config", str(self.ds_config), "--recipe", str(self.recipe), "--output_dir", str(run),
            *self.overrides,
            "--training.max_steps", str(self.steps), "--evaluation.every_steps", "0", "--evaluation.samples", "16",
            "--checkpoint.every_steps", str(self.every_steps), "--checkpoint.keep_last", "100",
        ]  # fmt: skip


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps that a run's metrics.jsonl holds."""
    import json

    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "loss" in record]


@contextlib.contextmanager
def _started(rehearsal: Rehearsal, ranks: int, run: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The launcher at work; whatever ends the block ends it and its ranks."""
    import psutil

    with open(log, "ab") as file:
        process = subprocess.Popen(rehearsal.command(ranks, run), stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
                for one in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.kill()
        process.wait()


def _follow(process: "subprocess.Popen[bytes]", run: Path, bar: Any, until: int | None = None) -> bool:
    """Moves the bar along; True when the run's own checkpoint is there and step `until` is done, False at its end."""
    while process.poll() is None:
        done = len(steps_of(run))
        bar.update(max(0, done - bar.n))
        if until is not None and done >= until:
            return True
        time.sleep(0.02 if until is not None else 0.2)
    return False


def _finish(rehearsal: Rehearsal, ranks: int, run: Path, name: str) -> float:
    """Runs to the end; the seconds that took. Raises UserError with the run's own words where it fails."""
    from tqdm import tqdm

    log = rehearsal.folder / f"{name.replace(' ', '_')}.log"
    began = time.monotonic()
    with (
        tqdm(total=rehearsal.steps, desc=name, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar,
        _started(rehearsal, ranks, run, log) as process,
    ):
        _follow(process, run, bar)
        status = process.wait()
    if status or len(steps_of(run)) < rehearsal.steps:
        raise UserError(f"{name}: the run ended with status {status}: {_last_words(log)}")
    return time.monotonic() - began


def _last_words(log: Path) -> str:
    text = log.read_text(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in text if line.startswith("error: ")]
    return said[0] if said else " | ".join(text[-3:]) or "it said nothing"


def _kill(rehearsal: Rehearsal, ranks: int, run: Path) -> int:
    """Starts the run, kills its last rank behind the first checkpoint, and returns the step that it had done."""
    import psutil
    from tqdm import tqdm

    from pipeline.checkpoint import list_checkpoints

    log = rehearsal.folder / "killed.log"
    with (
        tqdm(total=rehearsal.steps, desc="killed", unit="step", disable=not sys.stderr.isatty(), leave=False) as bar,
        _started(rehearsal, ranks, run, log) as process,
    ):
        if not _follow(process, run, bar, rehearsal.every_steps + 1):
            raise UserError(f"the run to be killed ended before that: {_last_words(log)}")
        of_rank = str(ranks - 1)
        for one in psutil.Process(process.pid).children(recursive=True):
            if one.environ().get("RANK") == of_rank:
                one.kill()
        status = process.wait()
    done = len(steps_of(run))
    if not status or not list_checkpoints(run):
        raise UserError(f"the killed run ended with status {status} and {len(list_checkpoints(run))} checkpoints")
    return done


@dataclass(frozen=True)
class Row:
    """A line of the table. good: as it has to be; None where it could not be tried."""

    what: str
    found: str
    good: bool | None


def compare(straight: list[dict[str, Any]], other: list[dict[str, Any]], within: float = 0.0) -> list[Row]:
    """The steps of two runs, field by field; numbers may differ by `within`, relative, but for samples and tokens."""
    rows = []
    for name in _EQUAL:
        pairs = [(left.get(name), right.get(name)) for left, right in zip(straight, other, strict=False)]
        different = [number for number, (left, right) in enumerate(pairs, start=1) if left != right]
        worst = max((abs(left - right) / max(abs(left), 1e-12) for left, right in pairs if left and right), default=0.0)
        allowed = 0.0 if name in ("samples", "tokens", "learning_rate") else within
        good = len(straight) == len(other) and (not different or (0 < worst <= allowed))
        if len(straight) != len(other):
            found = f"{len(other)} steps, expected {len(straight)}"
        elif not different:
            found = f"equal, all {len(pairs)} steps"
        else:
            found = f"differs first at step {different[0]}, by {worst:.1e} at most"
        rows.append(Row(name, found, good))
    return rows


def _rehearse(arguments: argparse.Namespace, overrides: tuple[str, ...]) -> int:
    from pipeline.checkpoint import list_checkpoints, read_info
    from pipeline.digests import of_checkpoint

    ranks = arguments.ranks or _default_ranks()
    folder = arguments.output_dir or Path("runs") / f"{arguments.recipe.stem}-rehearsal"
    if arguments.steps < 6 or ranks < 1:
        raise UserError(f"--steps is {arguments.steps} and --ranks {ranks}, expected at least 6 and 1")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; remove it, or give another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    every, others = arguments.steps // 3, ranks // 2 if ranks > 1 else 2
    rehearsal = Rehearsal(arguments.recipe, arguments.deepspeed_config, arguments.steps, every, folder, overrides)
    rehearsal = replace(rehearsal, ds_config=_of_one_micro_batch(rehearsal, max(ranks, others)))
    tables: list[tuple[str, list[Row]]] = []
    straight, killed = folder / "straight", folder / "killed"
    print(f"straight  {ranks} ranks, {arguments.steps} steps, a checkpoint every {every} ...", flush=True)
    seconds = _finish(rehearsal, ranks, straight, "straight")
    info = read_info(list_checkpoints(straight)[-1])
    print(f"          {seconds:.0f} s; ZeRO stage {info.zero_stage}, {info.precision}", flush=True)
    print(f"killed    the same, rank {ranks - 1} by SIGKILL behind the first checkpoint ...", flush=True)
    done = _kill(rehearsal, ranks, killed)
    step = read_info(list_checkpoints(killed)[-1]).step
    other = folder / "other"
    shutil.copytree(killed, other)
    print(f"          killed behind step {done}; the same command again, from step {step} ...", flush=True)
    seconds = _finish(rehearsal, ranks, killed, "resumed")
    print(f"          {seconds:.0f} s", flush=True)
    rows = compare(steps_of(straight), steps_of(killed))
    ends = [of_checkpoint(list_checkpoints(run)[-1]) for run in (straight, killed)]
    for what in ends[0]:
        equal = ends[0][what] == ends[1][what]
        rows.append(Row(f"{what}, sha256", "equal" if equal else "different", equal))
    tables.append((f"killed behind step {done}, resumed from step {step}, {ranks} ranks", rows))
    tables.append((f"resumed from step {step} on {others} ranks", _on(rehearsal, others, other, straight, info)))
    lost = 0
    for title, rows in tables:
        print(f"\n{title}")
        for row in rows:
            mark = {True: "ok", False: "LOST", None: "not tried"}[row.good]
            print(f"  {row.what:20} {mark:10} {row.found}")
            lost += row.good is False
    if not lost and not arguments.keep:  # else the logs are of use
        shutil.rmtree(folder)
    print(f"\n{f'{lost} of these were lost; the runs are in {folder}' if lost else 'nothing was lost'}")
    return 1 if lost else 0


def _of_one_micro_batch(rehearsal: Rehearsal, ranks: int) -> Path:
    """A copy of the ds_config with the micro-batch that follows from it on so many ranks; itself where none fits.

    Dropout is drawn by the micro-batch: runs on more and fewer ranks are comparable where that has one size.
    """
    import json

    import torch

    from pipeline.arguments import parse_arguments
    from pipeline.batch import plan_batches
    from pipeline.configuration import resolve

    command = rehearsal.command(ranks, rehearsal.folder)
    asked = parse_arguments(command[command.index("--deepspeed_config") :])
    recipe, ds_config = resolve(asked.recipe, asked.overrides, asked.deepspeed_config)
    sizes = recipe.training.batch_sizes
    try:
        batches = plan_batches(
            ds_config,
            source=str(rehearsal.ds_config),
            global_batch_size=sizes.at(0),
            later_sizes=tuple(size for start, size in sizes.stages.items() if start),
            world_size=ranks,
            sequence_length=recipe.data.sequence_length,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except UserError:  # which the run on so many ranks will say itself
        return rehearsal.ds_config
    stated = json.loads(rehearsal.ds_config.read_bytes())
    path = rehearsal.folder / "ds_config.json"
    path.write_text(json.dumps({**stated, "train_micro_batch_size_per_gpu": batches.micro_batch_size}))
    return path


def _on(rehearsal: Rehearsal, ranks: int, run: Path, straight: Path, info: Any) -> list[Row]:
    """The rest of the run on another number of ranks; where this configuration cannot be resumed so, its own words."""
    print(f"other     from the same checkpoint on {ranks} ranks ...", flush=True)
    try:
        seconds = _finish(rehearsal, ranks, run, "other")
    except UserError as error:
        return [Row("resume", str(error), None)]
    print(f"          {seconds:.0f} s", flush=True)
    return compare(steps_of(straight), steps_of(run), _TO_ROUNDING[info.precision])


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def main(argv: list[str]) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        return exit_status(lambda: _rehearse(arguments, tuple(overrides)))
    except KeyboardInterrupt:
        print("stopped; nothing of it is running any more", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
