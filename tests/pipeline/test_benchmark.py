"""The benchmarks run, and say of every program what it did."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_samples_runs_on_small_sizes():
    command = [sys.executable, "benchmarks/samples.py", "--quick", "--repeats", "1", "--only", "rate", "masks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for program in ("ours: order, documents", "GPTDataset, default_collate", "Arrow, run_clm's Trainer"):
        (line,) = (line for line in done.stdout.splitlines() if program in line)
        assert float(line.split(" samples/s")[0].split()[-1].replace(",", "")) > 0
    assert "DataCollatorForLanguageModeling" in done.stdout and "whole" in done.stdout


def test_the_benchmark_of_the_engine_runs_on_a_tiny_model_beside_the_trainer():
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--only", "bert"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for program in ("ours, tiny, 1 rows", "transformers' Trainer"):
        (line,) = (line for line in done.stdout.splitlines() if program in line)
        assert float(line.split(" tokens/s")[0].split()[-1].replace(",", "")) > 0
    assert "peak memory of ours" in done.stdout


def test_the_benchmark_of_checkpoints_runs_on_a_small_model():
    command = [sys.executable, "benchmarks/checkpoint.py", "--quick", "--width", "64", "--layers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("DeepSpeed's save_checkpoint", "ours, not in the background", "ours: the call"):
        (found,) = (shown for shown in done.stdout.splitlines() if shown.startswith(line))
        assert float(found.split(" ms")[0].split()[-1]) > 0
    assert "stall, call and copy: 1/" in done.stdout
