"""The sample path's benchmark runs, and says of every program what it did."""

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
