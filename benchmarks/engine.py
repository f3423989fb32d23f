"""Training steps beside the bare engine's and those of transformers' Trainer, in one run.

python benchmarks/engine.py                      all of it; a quarter of an hour on two cores
python benchmarks/engine.py --only loop bert     some tables
python benchmarks/engine.py --models bert-base gpt2-124m
                                                 whole models in place of the small ones; on two cores an hour
python benchmarks/engine.py --quick              tiny models, to see that it runs: nothing is judged
python benchmarks/engine.py --json               the figures in benchmarks/results/engine.json too

loop     a step through pretrain.py's loop against the engine's forward, backward and step on the same tensors
bert     masked LM at 512 tokens: pretrain.py and the Trainer with the same ds_config, model, samples and threads
gpt      causal LM at 1,024 tokens, the same
text     whole documents, padded to the longest of their batch by the Trainer, packed by us: tokens that are no padding
gpu      where there is one: models at their papers' lengths, with MFU of the data sheet's peak and of the card's own

Every measurement is a process of its own. The programs of a table take turns, `--repeats` times; a row shows the median
and the spread, (largest - smallest) / median. On CPUs, rates are per second of processor time, of all threads together.
The exit status is 1 when something required is missed.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.samples import Row, describe, row

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "benchmarks" / "our_engine.py"
TRAINER = ROOT / "benchmarks" / "peers" / "trainer_steps.py"
WORK = ROOT / "build" / "benchmarks" / "engine"
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"
DS_CONFIG = ROOT / "ds_configs" / "zero2.json"
CPU_TABLES = ("loop", "bert", "gpt", "text")
GPU_MODELS = ("gpt2-124m", "gpt2-350m", "gpt2-1.5b", "bert-base", "bert-large")
VOCABULARIES = {"mlm": 30_522, "causal": 50_257}


@dataclass(frozen=True)
class Model:
    """A shipped recipe, with changes of its model's configuration.

    rows: of a batch. text_rows: of one where the Trainer pads.
    """

    name: str
    recipe: str
    changes: dict[str, int]
    rows: int
    text_rows: int

    @property
    def objective(self) -> str:
        return "mlm" if self.recipe.startswith("bert") else "causal"

    @property
    def length(self) -> int:
        return 512 if self.objective == "mlm" else 1024


# BERT-Small of Turc et al. 2019 ("Well-Read Students Learn Better"), and a GPT-2 of its width and depth.
SMALL = {
    "bert": Model(
        "BERT-Small (4 x 512)",
        "bert-base",
        {"num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
        4,
        8,
    ),
    "gpt": Model("GPT-2 of 4 x 512", "gpt2-124m", {"n_layer": 4, "n_embd": 512, "n_head": 8}, 2, 4),
}
TINY = {
    "bert": Model(
        "tiny",
        "bert-base",
        {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128},
        1,
        2,
    ),
    "gpt": Model("tiny", "gpt2-124m", {"n_layer": 1, "n_embd": 64, "n_head": 1}, 1, 2),
}


@dataclass(frozen=True)
class Settings:
    """steps: of a run, of which the first does not count. threads: of a program."""

    steps: int
    repeats: int
    threads: int
    quick: bool


def run(command: list[object], settings: Settings, results: Path) -> dict[str, Any]:
    """Runs a program that writes `results`; exits with what it said when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    results.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode or not results.exists():
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def prepare(objective: str, quick: bool) -> Path:
    """A folder with the built-in corpus as `tokenizer` and `shards`, in a vocabulary of the paper's size; kept."""
    work = WORK / "quick" if quick else WORK
    folder, documents = work / objective, work / "documents"
    megabytes, vocabulary = (1, 2_000) if quick else (8, VOCABULARIES[objective])
    stages = (
        (documents, f"builtin_corpus --output_dir {documents} --max_megabytes {megabytes}"),
        (
            folder / "tokenizer",
            f"train_tokenizer --input {documents}/*.jsonl --output_dir {folder / 'tokenizer'} --type bpe"
            f" --vocab_size {vocabulary}",
        ),
        (
            folder / "shards",
            f"tokenize --input {documents}/*.jsonl --tokenizer {folder / 'tokenizer'} --output_dir {folder / 'shards'}",
        ),
    )
    for made, stage in stages:
        if not (made / "manifest.json").exists():
            print(f"preparing: data_prep {stage}", file=sys.stderr, flush=True)
            subprocess.run(
                [sys.executable, "-m", "data_prep", *stage.split()],
                check=True,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    return folder


def our_arguments(model: Model, settings: Settings, rows: int, apart: bool) -> list[str]:
    """Of pretrain.py: every row is full of text, whose documents see each other or not; nothing but steps."""
    data = prepare(model.objective, settings.quick)
    config = json.dumps({"base": model.recipe, **model.changes})
    values = {
        "model.config": config,
        "data.shards": data / "shards",
        "data.tokenizer": data / "tokenizer",
        "data.validation_fraction": 0,
        "data.packing": "concatenate",
        "data.document_attention": str(apart).lower(),
        "training.global_batch_size": rows,
        "training.max_steps": settings.steps,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    recipe = ROOT / "pipeline" / "recipes" / f"{model.recipe}.yaml"
    return ["--deepspeed_config", str(DS_CONFIG), "--recipe", str(recipe), *flags]


def ours(model: Model, settings: Settings, rows: int, apart: bool, mode: str = "steps") -> dict[str, Any]:
    output_dir = WORK / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    arguments = our_arguments(model, settings, rows, apart)
    return run([OURS, mode, WORK / "ours.json", *arguments, "--output_dir", output_dir], settings, WORK / "ours.json")


def trainer_job(model: Model, settings: Settings, rows: int, padded: bool) -> Path:
    """What the Trainer is to do, after `ours` has run: the same samples, or the corpus's documents to be padded."""
    import numpy as np
    import torch

    from pipeline.arguments import parse_arguments
    from pipeline.configuration import resolve
    from pipeline.data import open_data

    record = json.loads((WORK / "run" / "run.json").read_text())
    parsed = parse_arguments(our_arguments(model, settings, rows, apart=False))
    recipe, _ = resolve(parsed.recipe, parsed.overrides, parsed.deepspeed_config)
    data = open_data(recipe)
    special = data.tokenizer.special
    made: list[dict[str, torch.Tensor]] = []
    if padded:
        shards = data.corpora[0].shards
        places = [(shard, number) for shard, count in enumerate(shards.documents) for number in range(count)]
        for place in np.random.default_rng(1).permutation(len(places))[: settings.steps * rows]:
            shard, number = places[place]
            ids = shards.shard(shard).document(number)[: model.length].astype(np.int64)
            made.append({"input_ids": torch.from_numpy(ids)})
    else:
        batch = data.train.batch(np.arange(settings.steps * rows))
        ids, labels = torch.from_numpy(batch.input_ids.astype(np.int64)), torch.from_numpy(batch.labels)
        for one, label in zip(ids, labels, strict=True):
            shifted = {"shift_labels": label} if model.objective == "causal" else {}
            made.append({"input_ids": one, "labels": label, **shifted})
    job = {
        "config": record["model_config"],
        "objective": model.objective,
        "seed": recipe.seed,
        "ds_config": record["deepspeed_config"],
        "optimizer": {name: getattr(recipe.optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")},
        "steps": settings.steps,
        "rows": made,
        "padding": special.end_of_document if special.padding is None else special.padding,
        "masking": (special.mask, 10) if model.objective == "mlm" else None,
    }
    torch.save([job], WORK / "job.pt")
    return WORK / "job.pt"


def theirs(job: Path, settings: Settings) -> dict[str, Any]:
    results = WORK / "trainer.json"
    (found,) = run([TRAINER, job, results], settings, results)  # a list with one job's
    return dict(found)


def figures(found: dict[str, Any], clock: str = "processor") -> dict[str, float]:
    """Rates of a run behind its first step, and its peak: `rate` of the median step, `text` of all of them."""
    seconds = [end - start for start, end in itertools.pairwise(found[clock])]
    useful = found["useful"][1 : len(found[clock])]
    return {
        "rate": statistics.median(tokens / taken for tokens, taken in zip(useful, seconds, strict=True)),
        "text": sum(useful) / sum(seconds),
        "megabytes": found["peak"] / 1e6,
    }


def said(name: str, found: dict[str, float]) -> dict[str, float]:
    shown = ", ".join(f"{key} {value:,.4g}" for key, value in found.items())
    print(f"  {name:<56} {shown}", file=sys.stderr, flush=True)
    return found


def beside(model: Model, settings: Settings, required: float | None, *, padded: bool = False) -> list[Row]:
    """Rows of ours and of the Trainer's, in turns."""
    rows = model.text_rows if padded else model.rows
    name, unit = ("text", "tokens/s") if padded else ("rate", "tokens/s")
    mine, other, walls = [], [], []
    job = None
    for _ in range(settings.repeats):
        found = ours(model, settings, rows, apart=padded)
        if job is None:
            job = trainer_job(model, settings, rows, padded)
        mine.append(said(f"ours, {model.name}", figures(found)))
        of_trainer = theirs(job, settings)
        other.append(said(f"Trainer, {model.name}", figures(of_trainer)))
        walls.append(figures(found, "wall")[name] / figures(of_trainer, "wall")[name])
    first = row(f"ours, {model.name}, {rows} rows", mine, name, unit, megabytes=_median(mine, "megabytes"))
    second = row("transformers' Trainer", other, name, unit, megabytes=_median(other, "megabytes"))
    ratio = first.median / second.median
    made = [
        first,
        Row(second.name, second.median, unit, second.spread, second.megabytes, ratio, required),
        Row("the same by the clock, ours over the Trainer's", statistics.median(walls), "x"),
    ]
    if padded:
        share = sum(of_trainer["useful"]) / sum(_padded_sizes(job, rows))
        made.append(Row("of the Trainer's tokens are no padding", 100 * share, "%"))
    else:
        assert first.megabytes is not None and second.megabytes is not None
        made.append(
            Row("peak memory of ours, of the Trainer's", 100 * first.megabytes / second.megabytes, "%", allowed=100)
        )
    return made


def _median(figures: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in figures)


def _padded_sizes(job: Path, rows: int) -> list[int]:
    """Tokens of each batch of a job, padding included."""
    import torch

    (made,) = torch.load(job, weights_only=False)
    lengths = [len(one["input_ids"]) for one in made["rows"]]
    return [rows * max(lengths[first : first + rows]) for first in range(0, len(lengths), rows)]


def loop_table(models: dict[str, Model], settings: Settings) -> list[Row]:
    """Steps of both kinds are neighbours in one process, and change places from step to step."""
    rows = []
    steps = Settings(3 * settings.steps, settings.repeats, settings.threads, settings.quick)
    for model in models.values():
        costs = []
        for _ in range(settings.repeats):
            found = ours(model, steps, model.rows, apart=False, mode="loop")
            pairs = list(zip(found["ours"], found["bare"], strict=True))[1:-1]  # the last has no loop behind it
            cost = 100 * (statistics.median(mine / bare for mine, bare in pairs) - 1)
            seconds = statistics.median(bare for _, bare in pairs)
            costs.append(said(f"loop, {model.name}", {"percent": cost, "milliseconds": 10 * cost * seconds}))
        rows.append(row(f"{model.name}: the loop costs", costs, "percent", "% more", allowed=3))
        rows.append(row("in processor time", costs, "milliseconds", "ms"))
    return rows


def gpu_table(names: list[str], settings: Settings) -> list[Row]:
    """By the clock; MFU is of the FLOPs that pipeline.model counts."""
    import torch

    from pipeline.hardware import peak_flops

    name = torch.cuda.get_device_name()
    peak, ceiling = peak_flops(name), _matmul_flops()
    rows = [Row(f"{name}: measured matrix product of 8,192, bfloat16", ceiling / 1e12, "TFLOP/s")]
    for recipe in names:
        model = Model(recipe, recipe, {}, 16, 16)
        size = run(
            [OURS, "sizes", WORK / "sizes.json", *our_arguments(model, settings, model.rows, apart=False)],
            settings,
            WORK / "sizes.json",
        )
        for one in beside(model, settings, None):
            rows.append(one)
            if one.unit == "tokens/s":
                reached = one.median * size["flops_a_token"]
                if peak:
                    rows.append(Row("  MFU of the data sheet's peak", 100 * reached / peak, "%"))
                rows.append(Row("  MFU of the measured product", 100 * reached / ceiling, "%"))
    return rows


def _matmul_flops(size: int = 8192, repeats: int = 50) -> float:
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(repeats + 10):
        if number == 10:
            start.record()
        left @ right
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1e3)


TITLES = {
    "loop": "loop: a step through our loop, over the engine's forward, backward and step",
    "bert": "bert: masked LM, samples of 512 tokens, {threads} threads, bfloat16, ZeRO 2, dropout 0.1",
    "gpt": "gpt: causal LM, samples of 1,024 tokens, {threads} threads, bfloat16, ZeRO 2, dropout 0.1",
    "text": "text: documents, padded by the Trainer, packed by us; tokens that are no padding",
    "gpu": "gpu: by the clock",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CPU_TABLES, "gpu"], help="tables to make (default: all)")
    parser.add_argument("--models", nargs="+", choices=GPU_MODELS, help="whole models of these recipes")
    parser.add_argument("--steps", type=int, help="steps of a run (default: 8; with --quick: 3)")
    parser.add_argument("--repeats", type=int, help="runs of each program (default: 3; with --quick: 1)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a program (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny models; exit status 0")
    parser.add_argument(
        "--json", nargs="?", type=Path, const=RESULTS, help=f"write the figures too (default: {RESULTS})"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    settings = Settings(
        arguments.steps or (3 if quick else 8), arguments.repeats or (1 if quick else 3), arguments.threads, quick
    )
    models = TINY if quick else SMALL
    if arguments.models:
        whole = [Model(name, name, {}, 2 if name.startswith("bert") else 1, 8) for name in arguments.models]
        models = {"bert" if model.objective == "mlm" else "gpt": model for model in whole}
    import torch

    on_gpu = torch.cuda.is_available()
    groups = arguments.only or (
        ["gpu"] if on_gpu else [name for name in CPU_TABLES if name in ("loop", "text", *models)]
    )
    machine = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()})"
    print(f"{machine}, torch {torch.__version__}, {settings.repeats} repeats of {settings.steps} steps", flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], list[Row]]] = {
        "loop": lambda: loop_table(models, settings),
        "bert": lambda: beside(models["bert"], settings, 1.5),
        "gpt": lambda: beside(models["gpt"], settings, 1.2),
        "text": lambda: [one for model in models.values() for one in beside(model, settings, 2.5, padded=True)],
        "gpu": lambda: gpu_table(arguments.models or list(GPU_MODELS), settings),
    }
    tables: dict[str, list[Row]] = {}
    for group in groups:
        tables[group] = makers[group]()
        print("\n" + describe(TITLES[group].format(threads=settings.threads), tables[group]), flush=True)
    if arguments.json:
        rows = {group: [asdict(one) | {"missed": one.missed} for one in found] for group, found in tables.items()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "tables": rows}, indent=1) + "\n")
        print(f"\n{arguments.json}")
    if not quick and any(one.missed for found in tables.values() for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
