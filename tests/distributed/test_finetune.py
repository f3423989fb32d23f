"""Fine-tuning learns, keeps the best model as an ordinary folder, and has one rank's numbers on several."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.tasks.glue import TASKS, read_local
from pipeline.tuning import Steps
from tests.distributed.ranks import ROOT, launch
from tests.made_tasks import (
    BAD,
    FILLERS,
    GOOD,
    NAMES,
    NUMBERS,
    json_lines,
    make_model,
    review,
    write_reviews,
)

pytestmark = pytest.mark.ranks
TUNE = ROOT / "tests" / "distributed" / "tune.py"


def write_glue(folder: Path) -> Path:
    """SST-2, STS-B and MNLI with some 40 examples each: classes, scores, and two held-out sets."""
    generator = random.Random(5)
    write_reviews(folder, 42, 12, 5)
    for name, header, cells in (
        ("stsb", "index\tsentence1\tsentence2\tscore", lambda first, second: f"{2.5 * (first + second):.3f}"),
        (
            "mnli",
            "index\tsentence1\tsentence2\tgold_label",
            lambda first, second: TASKS["mnli"].classes[first + second],
        ),
    ):
        task = TASKS[name]
        (folder / task.folder).mkdir()
        for stem in ("train", *task.dev.values(), *task.submissions.values()):
            lines = [header if not stem.startswith("test") else header.rpartition("\t")[0]]
            for index in range(42 if stem == "train" else 12):
                (one, first), (two, second) = review(generator), review(generator)
                row = [str(index), one, two] + ([] if stem.startswith("test") else [cells(first, second)])
                lines.append("\t".join(row))
            (folder / task.folder / f"{stem}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_squad(folder: Path, name: str, count: int, seed: int) -> None:
    """Contexts with a word of praise and one of blame, and questions for one of them; every third has no such word."""
    generator = random.Random(seed)
    paragraphs = []
    for index in range(count):
        words = generator.choices(FILLERS, k=generator.randint(8, 20))
        asked = generator.randrange(2)
        for side, kind in enumerate((BAD, GOOD)):
            if side != asked or index % 3:
                words.insert(generator.randint(0, len(words)), generator.choice(kind))
        answers = [
            {"text": word, "answer_start": len(" ".join([*words[:place], ""]))}
            for place, word in enumerate(words)
            if word in (BAD, GOOD)[asked]
        ]
        question = f"is {'not ' * (1 - asked)}?"
        qa = {"id": f"{name}{index}", "question": question, "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": " ".join(words), "qas": [qa]})
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))


def write_pairs(folder: Path) -> Path:
    """A language with two words for every number."""
    generator = random.Random(2)
    folder.mkdir()
    for name, count in (("train", 300), ("dev", 20), ("test", 3)):
        places = [generator.randrange(len(NUMBERS)) for _ in range(count)]
        rows = [{"source": NUMBERS[place], "target": f"{NAMES[place]} {FILLERS[place]}"} for place in places]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Any]:
    """Folders of finished runs by name, and what was printed: one process for all of one rank, one launch of two."""
    base = tmp_path_factory.mktemp("finetune")
    bert = make_model(base / "bert", "bert", initializer_range=0.1)
    gpt = make_model(base / "gpt2", "gpt2", n_positions=32)
    glue = write_glue(base / "glue")
    reviews = write_reviews(base / "reviews", 480, 100, 20, seed=3)
    for name, seed in (("train", 0), ("dev", 1), ("test", 2)):
        write_squad(base / "squad", f"{name}-v2.0", {"train": 200, "dev": 40, "test": 4}[name], seed)
    pairs = write_pairs(base / "pairs")
    micro = {"train_micro_batch_size_per_gpu": 8}
    (base / "one.json").write_text(json.dumps(micro))
    (base / "zero3.json").write_text(json.dumps({**micro, "zero_optimization": {"stage": 3}}))

    def flags(task: str, model: Path, data_dir: Path, name: str, *more: object) -> list[str]:
        given = ["--task", task, "--model", model, "--data_dir", data_dir, "--output_dir", base / name, *more]
        return [str(flag) for flag in given]

    equal = ("--batch_size", 16, "--epochs", 1, "--lr", 1e-3)
    alone = [
        flags("glue", bert, glue, "glue1", *equal, "--deepspeed_config", base / "one.json"),
        flags("sst2", bert, reviews, "bert", "--lr", 1e-3, "--epochs", 10, "--seeds", 1, 2),
        flags("sst2", gpt, reviews, "gpt2", "--lr", 2e-3, "--epochs", 8, "--patience", 2,
              "--evaluations_per_epoch", 2),
        flags("squad_v2", bert, base / "squad", "squad", "--lr", 1e-3, "--epochs", 50, "--doc_stride", 4,
              "--max_length", 24, "--batch_size", 32, "--evaluations_per_epoch", 1),
        flags("text_to_text", gpt, pairs, "pairs", "--lr", 5e-3, "--epochs", 8, "--separator", " = ",
              "--max_new_tokens", 5),
        flags("text_to_text", gpt, pairs, "bf16", *equal, "--separator", " = ", "--max_new_tokens", 5,
              "--deepspeed_config", ROOT / "ds_configs" / "zero2.json"),
        # A second call finds the results of the first.
        flags("glue", bert, glue, "glue1", *equal, "--deepspeed_config", base / "one.json"),
    ]  # fmt: skip
    (base / "alone.json").write_text(json.dumps(alone))
    done = subprocess.run(
        [sys.executable, str(TUNE), str(base / "alone.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # such small matrices are slower on two
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    launch(
        2, "pipeline/finetune.py", *flags("glue", bert, glue, "glue2", *equal),
        "--deepspeed_config", base / "zero3.json",
    )  # fmt: skip
    return {"base": base, "stdout": done.stdout, "glue": glue, "reviews": reviews}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in json_lines(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("task", ["sst2", "stsb", "mnli"])
def test_two_ranks_at_zero_3_have_the_losses_of_one_rank_with_accumulation(finished, task):
    """Dropout and the short last batch included: 42 samples are 16, 16 and 10 of 2 x 8."""
    one, two = (steps_of(finished["base"] / name / task) for name in ("glue1", "glue2"))
    assert [record["step"] for record in one] == [1, 2, 3]
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        assert left["learning_rate"] == right["learning_rate"]
    results = [json.loads((finished["base"] / name / task / "results.json").read_text()) for name in ("glue1", "glue2")]
    assert results[0]["best"]["metrics"] == pytest.approx(results[1]["best"]["metrics"], abs=1e-4)
    for name in TASKS[task].submissions:
        texts = [
            (finished["base"] / run / task / "predictions" / f"{name}.tsv").read_text() for run in ("glue1", "glue2")
        ]
        assert len(texts[0].splitlines()) == (6 if task == "sst2" else 13)
        if task != "stsb":
            assert texts[0] == texts[1]


def test_losses_of_a_step_are_those_of_plain_transformers(finished):
    """The first step's loss with dropout off cannot be had from the run, but the untrained model's on its batch can:
    the mean over the samples that `Steps.numbers` names, which dropout moves little."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = finished["base"]
    steps = Steps(42, 16, 1, 0.1)
    examples = read_local(TASKS["stsb"], finished["glue"]).train
    chosen = [examples[number] for number in steps.numbers(0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(base / "bert")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base / "bert", num_labels=1).eval()
    inputs = tokenizer([e.first for e in chosen], [e.second for e in chosen], padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = model(**inputs, labels=torch.tensor([e.label for e in chosen])).loss
    assert steps_of(base / "glue1" / "stsb")[0]["loss"] == pytest.approx(float(loss), rel=0.02)


def test_the_glue_command_prints_all_nine_tasks_and_the_average(finished):
    lines = finished["stdout"].splitlines()
    table = [line.split() for line in lines[[line.startswith("task          metric") for line in lines].index(True) :]]
    assert table[0] == ["task", "metric", "median", "best", "of", "seeds"]
    whole = json.loads((finished["base"] / "glue1" / "results.json").read_text())
    shown = {row[0] for row in table[1:] if row}
    assert {task.folder for task in TASKS.values()} <= shown, "tasks without files have a line, too"
    medians = {name: found["median"] for name, found in whole["tasks"].items()}
    assert set(medians) == {"sst2", "stsb", "mnli"}
    assert set(medians["mnli"]) == {"accuracy_matched", "accuracy_mismatched"}
    means = [np.mean(list(found.values())) for found in medians.values()]
    assert whole["average"] == pytest.approx({"all": np.mean(means), "without_wnli": np.mean(means)})
    assert "sst2: " in finished["stdout"] and "made with these settings" in finished["stdout"]
    assert finished["stdout"].count(f"run       {finished['base'] / 'glue1' / 'sst2'}") == 1, "not run twice"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_small_model_learns_and_plain_transformers_reads_the_best(finished, kind):
    """More than 0.9 on reviews; the folder's predictions by transformers' own pipeline are those of the submission."""
    from transformers import pipeline

    folder = finished["base"] / kind
    results = json.loads((folder / "results.json").read_text())
    assert results["best"]["metrics"]["accuracy"] > 0.9
    assert results["saved_model"] == results["best"]["metrics"], "the folder is what was evaluated"
    classifier = pipeline("text-classification", model=str(folder / "model"), device="cpu")
    splits = read_local(TASKS["sst2"], finished["reviews"])
    for examples, answers in (
        (splits.dev["validation"], None),
        (splits.test["SST-2"], (folder / "predictions" / "SST-2.tsv").read_text().splitlines()[1:]),
    ):
        found = [answer["label"] for answer in classifier([example.first for example in examples])]
        if answers is None:
            right = [label == str(int(example.label)) for label, example in zip(found, examples, strict=True)]
            assert np.mean(right) == results["best"]["metrics"]["accuracy"]
        else:
            assert answers == [f"{index}\t{label}" for index, label in enumerate(found)]


def test_the_best_of_several_seeds_is_kept(finished):
    folder = finished["base"] / "bert"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["seeds"]) == {"1", "2"}
    of_seeds = {seed: found["metrics"]["accuracy"] for seed, found in results["seeds"].items()}
    assert results["best"]["metrics"]["accuracy"] == max(of_seeds.values())
    assert results["median"]["accuracy"] == pytest.approx(np.median(list(of_seeds.values())))
    records = json_lines(folder / "metrics.jsonl")
    for seed, found in results["seeds"].items():
        evaluations = [record for record in records if "dev" in record and str(record["seed"]) == seed]
        scores = [record["dev"]["accuracy"] for record in evaluations]
        assert [record["epoch"] for record in evaluations] == list(range(1, 11))
        assert found["metrics"]["accuracy"] == max(scores)
        assert found["step"] == evaluations[int(np.argmax(scores))]["step"], "the first of equal ones"


def test_a_seed_ends_when_two_evaluations_bring_nothing_better(finished):
    records = [record for record in json_lines(finished["base"] / "gpt2" / "metrics.jsonl") if "dev" in record]
    assert [record["step"] for record in records[:4]] == [8, 15, 23, 30], "the halves of epochs of 15 steps"
    scores = [record["dev"]["accuracy"] for record in records]
    assert len(scores) == int(np.argmax(scores)) + 3 < 16
    assert "SST-2, seed 1: no better evaluation since step" in finished["stdout"]


def test_squad_2_is_learned_with_windows_and_a_threshold(finished):
    from pipeline.tasks.squad import read_squad
    from pipeline.tasks.squad_metrics import evaluate_v2

    folder = finished["base"] / "squad"  # the data and the run
    results = json.loads((folder / "results.json").read_text())
    best = results["best"]["metrics"]
    assert best["f1"] > 80 and best["HasAns_f1"] > 70, "35 % is what no answers at all would have"
    assert results["saved_model"] == pytest.approx(best)
    predictions, odds, candidates = (
        json.loads((folder / "predictions" / f"{name}.json").read_text())
        for name in ("predictions", "null_odds", "nbest_predictions")
    )
    questions = read_squad(folder / "dev-v2.0.json", answered=False)
    golds = {question.id: [text for text, _ in question.answers] for question in questions}
    texts = {name: next(c["text"] for c in answers if c["text"]) for name, answers in candidates.items()}
    assert evaluate_v2(golds, texts, odds) == pytest.approx(best)
    for name, text in predictions.items():
        assert text == ("" if odds[name] > best["best_f1_thresh"] else texts[name])
        assert sum(candidate["probability"] for candidate in candidates[name]) == pytest.approx(1.0)
    assert set(json.loads((folder / "predictions" / "test_predictions.json").read_text())) == {
        f"test-v2.0{index}" for index in range(4)
    }


def test_targets_alone_are_learned_and_generated(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished["base"] / "pairs"
    results = json.loads((folder / "results.json").read_text())
    assert results["saved_model"]["exact_match"] >= 0.8
    rows = json_lines(folder / "predictions" / "generations.jsonl")
    assert results["saved_model"]["exact_match"] == np.mean([row["target"] == row["prediction"] for row in rows])
    assert len(json_lines(folder / "predictions" / "test_generations.jsonl")) == 3
    # The loss is that of plain transformers with the source's labels left out.
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    nats = tokens = 0.0
    for row in rows:
        prompt = tokenizer(row["source"] + " = ", add_special_tokens=False)["input_ids"]
        target = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss
        nats, tokens = nats + float(loss) * len(target), tokens + len(target)
    assert results["saved_model"]["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_zero_2_in_bf16_keeps_what_it_evaluated(finished):
    from safetensors.torch import load_file

    folder = finished["base"] / "bf16"
    results = json.loads((folder / "results.json").read_text())
    best = results["best"]["metrics"]
    assert {name: results["saved_model"][name] for name in best} == pytest.approx(best, rel=1e-6)
    assert len(json_lines(folder / "predictions" / "generations.jsonl")) == 20
    weights = load_file(folder / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    losses = [record["loss"] for record in steps_of(folder)]
    assert len(losses) == 19 and losses[-1] < losses[0] - 0.3


def test_mistakes_are_one_line(tmp_path):
    model = make_model(tmp_path / "bert", "bert")

    def error(*flags: object) -> str:
        command = [sys.executable, "-m", "pipeline.finetune", *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line

    assert "--task is 'sst'; did you mean sst2?" in error("--task", "sst", "--model", model)
    assert "is no Hugging Face model folder" in error("--task", "sst2", "--model", tmp_path / "none")
    assert "reads local files" in error("--task", "squad", "--model", model)
    assert "holds none of GLUE's folders" in error("--task", "glue", "--model", model, "--data_dir", tmp_path)
