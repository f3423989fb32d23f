"""Causes what happens to runs of weeks, and counts what was lost: `make chaos`, or `python -m tests.chaos --help`."""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from tqdm import tqdm

from tests.conftest import english_like
from tests.distributed.ranks import DROPOUT, MODELS, ROOT, ds_config_with
from tests.distributed.started import FAULTY_RUN, Started, last_digests, last_step, lines

EXAMPLES = """\
examples:
  python -m tests.chaos --output_dir /tmp/chaos                              a slice of at most 80 minutes
  python -m tests.chaos --output_dir /tmp/chaos                              the next one, from where the last stopped
  python -m tests.chaos --output_dir /tmp/short --kills 5 --nans 1 --hangs 2 --control 1

A trial is a run on two CPU ranks. Its faults follow from --seed and its number; `trials.jsonl` has what happened.
"""
BARE = "tests/chaos/bare.py"
STAGES = ("zero0_fp32.json", "zero1.json", "zero2.json", "zero3.json")
STEPS, EVERY = 48, 3
HANG_SECONDS = 15
_BARE_PATIENCE = 90.0  # a bare engine would wait for its group's 30 minutes


@dataclass(frozen=True)
class Bench:
    """What all trials share."""

    folder: Path
    seed: int

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def config(self, stage: str) -> str:
        return str(ds_config_with(self.folder / stage, stage, train_micro_batch_size_per_gpu=4))


def make_data(folder: Path) -> None:
    """A small corpus, tokenizer, shards and the recipe on them."""
    generator = random.Random(1)
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": english_like(generator, generator.randint(4, 16))}) + "\n" for _ in range(600))
    )
    common = ["--input", f"{folder}/documents.jsonl"]
    tokenizer, shards = str(folder / "tokenizer"), str(folder / "shards")
    for stage in (
        ["train_tokenizer", *common, "--output_dir", tokenizer, "--type", "bpe", "--vocab_size", "768"],
        ["tokenize", *common, "--tokenizer", tokenizer, "--output_dir", shards],
    ):
        subprocess.run([sys.executable, "-m", "data_prep", *stage], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    recipe = {
        "objective": "causal",
        "model": {"config": {**MODELS["causal"], **DROPOUT["causal"]}},
        "data": {"shards": shards, "tokenizer": tokenizer, "sequence_length": 32, "validation_fraction": 0.05},
        "training": {"global_batch_size": 8, "max_steps": STEPS},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "schedule": {"type": "cosine", "warmup_steps": 2, "min_lr": 1e-3},
        "evaluation": {"every_steps": 0, "samples": 8},
        "checkpoint": {"every_steps": EVERY, "keep_last": 3},
        "faults": {"hang_seconds": HANG_SECONDS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def straight(bench: Bench, stage: str, script: str) -> Path:
    """The run to which nothing happens, made once."""
    run = bench.folder / f"straight-{Path(script).stem}-{stage}"
    if last_step(run, 0) < STEPS:
        shutil.rmtree(run, ignore_errors=True)
        with Started(bench.config(stage), bench.recipe, run, [], script=script) as started:
            started.process.wait(1200)
        assert last_step(run, 0) == last_step(run, 1) == STEPS, started.output.read_text()
    return run


def same_end(run: Path, other: Path) -> bool:
    """Weights, optimizer, and of every step the samples, loss, norm and learning rate."""
    if last_step(run, 0) != STEPS or last_step(run, 1) != STEPS:
        return False
    ends = [[(one["step"], one["after"]) for one in last_digests(folder)] for folder in (run, other)]
    steps = [
        [[step.get(name) for name in ("step", "samples", "loss", "grad_norm", "learning_rate")] for step in found]
        for found in (lines(folder / "metrics.jsonl") for folder in (run, other))
    ]
    return ends[0] == ends[1] and steps[0] == steps[1]


def kills(bench: Bench, number: int, script: str) -> Iterator[dict[str, Any]]:
    """One run, killed again and again until it is through; the last record says whether it came to the same end."""
    draw = random.Random(f"{bench.seed} kills {number}")
    stage = STAGES[number % len(STAGES)]
    reference, run = straight(bench, stage, script), bench.folder / f"kills-{Path(script).stem}-{number}"
    shutil.rmtree(run, ignore_errors=True)
    slowly = [{"rank": 0, "step": 0, "what": "sleep", "seconds": 0.1}]
    problem = None
    for _ in range(30):
        victim, in_save = draw.choice(("rank 0", "rank 1", "ranks", "launcher", "front")), draw.random() < 0.4
        steps, pause = draw.randint(1, 8), draw.random() * 0.3
        with Started(bench.config(stage), bench.recipe, run, slowly, script=script) as started:
            if not started.wait_for_steps(steps):
                if started.process.wait(1200) != 0 or last_step(run, 0) < STEPS:
                    problem = _last_line(started.output)
                break
            if in_save:
                in_save = _wait_for_save(run, started)
            else:
                time.sleep(pause)
            step = last_step(run, 0)
            for process in _victims(started, victim):
                with contextlib.suppress(psutil.NoSuchProcess):  # the run was at its end
                    process.kill()
            status, left = started.finish(300 if script == FAULTY_RUN else _BARE_PATIENCE)
        held = left == 0 and (status not in (0, None) or victim in ("launcher",) or step >= STEPS)
        yield {"fault": "kill", "of": victim, "in_save": in_save, "step": step, "status": status, "left": left,
               "fired": True, "held": held}  # fmt: skip
    equal = problem is None and same_end(run, reference)
    yield {"fault": "end after kills", "stage": stage, "fired": True, "held": equal, "problem": problem}


def _victims(started: Started, victim: str) -> list[Any]:
    named = {"ranks": started.ranks, "launcher": [started.launcher], "front": [started.front]}
    return named.get(victim) or [started.ranks[int(victim[-1])]]


def _wait_for_save(run: Path, started: Started) -> bool:
    """Returns when files of a save that is not committed are there; False if the run ended first."""
    parent = run / "checkpoints"
    before = set(os.listdir(parent)) if parent.exists() else set()
    while started.process.poll() is None:
        new = (set(os.listdir(parent)) if parent.exists() else set()) - before
        if new:
            return True
        time.sleep(0.002)
    return False


def _last_line(path: Path) -> str:
    said = [line for line in path.read_text(errors="replace").splitlines() if "rror" in line]
    return said[-1] if said else "ended without a word"


def nans(bench: Bench, number: int, script: str) -> Iterator[dict[str, Any]]:
    """A run with four steps whose loss or gradient is NaN on one rank."""
    draw = random.Random(f"{bench.seed} nans {number}")
    stage = STAGES[number % len(STAGES)]
    run = bench.folder / f"nans-{Path(script).stem}-{number}"
    shutil.rmtree(run, ignore_errors=True)
    faults = [
        {"rank": draw.randrange(2), "step": step, **site}
        for step in sorted(draw.sample(range(2, STEPS, 2), 4))
        for site in [draw.choice(({"what": "nan loss"}, {"what": "nan gradient", "parameter": draw.randrange(-9, 9)}))]
    ]
    with Started(bench.config(stage), bench.recipe, run, faults, script=script) as started:
        status = started.process.wait(1200)
    for fault in faults:
        found = [
            [one for one in lines(run / "digests" / f"rank_{rank}.jsonl") if one["step"] == fault["step"]]
            for rank in (0, 1)
        ]
        fired = bool(found[fault["rank"]]) and found[fault["rank"]][0]["fired"] == [fault["what"]]
        untouched = all(one and one[0]["before"] == one[0]["after"] for one in found)
        yield {"fault": "nan", "stage": stage, "site": fault["what"], "rank": fault["rank"], "fired": fired,
               "held": status == 0 and untouched and _is_recorded(run, fault, script)}  # fmt: skip


def _is_recorded(run: Path, fault: dict[str, Any], script: str) -> bool:
    if script != FAULTY_RUN:
        return True  # nothing of the kind is asked of the bare engine
    return any(one["step"] == fault["step"] for one in lines(run / "incidents.jsonl"))


def hangs(bench: Bench, number: int, script: str) -> Iterator[dict[str, Any]]:
    """A run in which a rank is stopped, sleeps, or gets no samples."""
    draw = random.Random(f"{bench.seed} hangs {number}")
    stage, rank, step = STAGES[number % len(STAGES)], number % 2, draw.randint(2, 9)
    kinds = ["SIGSTOP", "sleep"] + (["no samples"] if script == FAULTY_RUN else [])
    what = kinds[number % len(kinds)]
    run = bench.folder / f"hangs-{Path(script).stem}-{number}"
    shutil.rmtree(run, ignore_errors=True)
    fault = {"rank": rank, "step": step, "what": what, "seconds": 3600}
    with Started(bench.config(stage), bench.recipe, run, [fault], script=script) as started:
        fired = started.wait_for_steps(step - 1)
        began = time.monotonic()
        status, left = started.finish(300 if script == FAULTY_RUN else _BARE_PATIENCE)
        seconds = time.monotonic() - began
    named = f"rank {rank}" in started.output.read_text().rpartition("error: no progress")[2]
    yield {"fault": "hang", "what": what, "stage": stage, "rank": rank, "status": status, "left": left,
           "seconds": round(seconds, 1), "fired": fired, "named": named,
           "held": fired and status not in (0, None) and left == 0 and named}  # fmt: skip


Trial = Callable[[Bench, int, str], Iterator[dict[str, Any]]]
TRIALS: dict[str, Trial] = {"kills": kills, "nans": nans, "hangs": hangs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Cause kills, NaNs and hangs in real runs and count what was lost, beside DeepSpeed's bare engine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the trials")
    parser.add_argument("--seed", type=int, default=13, help="of what happens when (default: %(default)s)")
    for name, count, of in (("kills", 300, "kills"), ("nans", 64, "steps"), ("hangs", 48, "hangs")):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{of}, at least (default: %(default)s)")
    parser.add_argument("--control", type=int, default=8, help="trials of each kind on the bare engine (default: 8)")
    parser.add_argument("--minutes", type=float, default=80, help="no trial begins later (default: %(default)s)")
    return parser


def table(records: list[dict[str, Any]]) -> str:
    """Of each kind of fault: how many, how many fired, and how many held, here and on the bare engine."""
    rows = [f"{'fault':20} {'ours: fired':>12} {'held':>6} {'bare: fired':>12} {'held':>6}"]
    for fault in dict.fromkeys(record["fault"] for record in records):
        cells = []
        for script in (FAULTY_RUN, BARE):
            found = [record for record in records if (record["fault"], record["script"]) == (fault, script)]
            cells += [sum(record["fired"] for record in found), sum(record["held"] for record in found)]
        rows.append(f"{fault:20} {cells[0]:>12} {cells[1]:>6} {cells[2]:>12} {cells[3]:>6}")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    folder = arguments.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, arguments.seed)
    print(f"seed {arguments.seed}; trials in {folder / 'trials.jsonl'}", flush=True)
    if not bench.recipe.exists():
        make_data(folder)
    until = time.monotonic() + 60 * arguments.minutes
    path = folder / "trials.jsonl"
    complete = True
    for script in (FAULTY_RUN, BARE):
        for kind, trial in TRIALS.items():
            wanted = getattr(arguments, kind) if script == FAULTY_RUN else arguments.control
            name = kind if script == FAULTY_RUN else f"{kind}, bare engine"
            with tqdm(total=wanted, desc=name, unit="fault", disable=not sys.stderr.isatty()) as bar:
                while True:
                    mine = [one for one in lines(path) if (one["kind"], one["script"]) == (kind, script)]
                    faults = sum(not one["fault"].startswith("end") for one in mine)
                    bar.update(faults - bar.n)
                    if faults >= wanted:
                        break
                    if time.monotonic() > until:
                        complete = False
                        break
                    number = 1 + max((one["number"] for one in mine), default=-1)
                    found = [
                        {"kind": kind, "script": script, "number": number, **one}
                        for one in trial(bench, number, script)
                    ]
                    with open(path, "a") as file:  # a trial that was interrupted is made again
                        file.writelines(json.dumps(one) + "\n" for one in found)
                    for leftover in folder.glob(f"{kind}-*"):
                        if leftover.is_dir() and all(one["held"] for one in found):
                            shutil.rmtree(leftover)
    records = lines(path)
    print(table(records))
    if not complete:
        print("not complete: the same command goes on")
    lost = [one for one in records if one["script"] == FAULTY_RUN and not (one["held"] and one["fired"])]
    for one in lost:
        print(json.dumps(one))
    return 1 if lost else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
