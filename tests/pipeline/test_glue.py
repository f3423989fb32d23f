"""GLUE's files are read as given out, its metrics are the benchmark's, its submissions are what the server takes."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.encoding import Encoder, load_tokenizer_info
from data_prep.errors import UserError
from pipeline.tasks import metrics
from pipeline.tasks.encoding import encode, load_tokenizer
from pipeline.tasks.glue import TASKS, Example, find_folder, read_local, splits_of_hub, write_submission
from tests.made_models import made_model

# A few lines of each file as the benchmark's archive has them: columns, quotation marks, line separators in texts.
_MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
)
_MNLI_CELLS = "31193n\tgovernment\t( a )\t( b )\t(ROOT a)\t(ROOT b)"
_STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
FILES = {
    "cola": {
        "train": 'gj04\t1\t\tOur friends won\'t buy "this analysis.\ngj04\t0\t*\tThe more\u2028we study verbs.\n',
        "dev": "gj04\t1\t\tThe sailors rode the breeze.\n",
        "test": "index\tsentence\n0\tBill whistled past the house.\n1\tThe car honked.\n",
    },
    "sst2": {
        "train": 'sentence\tlabel\nhide new secretions \t0\n" quoted and never closed \t1\n',
        "dev": "sentence\tlabel\nit 's a charming journey . \t1\n",
        "test": "index\tsentence\n0\tuneasy mishmash .\n",
    },
    "mrpc": {
        "train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tAmrozi did \"it\".\tHe\x85too.\n",
        "dev": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t13\t14\tHe said.\tShe said.\n",
        "test": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t10\t11\tPCCW's chief.\tCurrent chief.\n",
    },
    "stsb": {
        "train": f"{_STSB}\tscore\n0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA plane is off.\tAn air plane.\t5.000\n",
        "dev": f"{_STSB}\tscore\n0\tmain\tMSRvid\t2012\t0000\tnone\tnone\tA man.\tA cat.\t0.25\n",
        "test": f"{_STSB}\n7\tmain\tMSRvid\t2012\t0024\tnone\tnone\tA girl.\tA dog.\n",
    },
    "qqp": {
        "train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n13\t21\t22\tHow is \"this\"?\tHow?\t0\n"
        "torn\tapart\n14\t23\t24\tWhy?\tWhy so?\t1\n",
        "dev": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n20\t1\t2\tWhen?\tAt what time?\t1\n",
        "test": "id\tquestion1\tquestion2\n5\tWould Trump?\tWhat would?\n",
    },
    "mnli": {
        "train": f"{_MNLI}\tsentence1\tsentence2\tlabel1\tgold_label\n"
        f"0\t31193\t{_MNLI_CELLS}\tCream skimming.\tProduct.\tneutral\tneutral\n",
        "dev_matched": f"{_MNLI}\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
        f"0\t1\t{_MNLI_CELLS}\tThe new rights.\tEveryone.\tneutral\tentailment\tneutral\tneutral\tneutral\tneutral\n",
        "dev_mismatched": f"{_MNLI}\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
        f"0\t1\t{_MNLI_CELLS}\tYour gift.\tNot.\tcontradiction\tx\tx\tx\tx\tcontradiction\n",
        "test_matched": f"{_MNLI}\tsentence1\tsentence2\n0\t31493\t{_MNLI_CELLS}\tHierbas.\tA kind.\n",
        "test_mismatched": f"{_MNLI}\tsentence1\tsentence2\n9847\t1\t{_MNLI_CELLS}\tWhat.\tThat.\n",
    },
    "qnli": {
        "train": "index\tquestion\tsentence\tlabel\n0\tWhen did \"it?\tIt did.\tentailment\n",
        "dev": "index\tquestion\tsentence\tlabel\n0\tWhat came?\tThen.\tnot_entailment\n",
        "test": "index\tquestion\tsentence\n0\tWhat?\tHere.\n",
    },
    "rte": {
        "train": "index\tsentence1\tsentence2\tlabel\n0\tNo weapons.\tWeapons.\tnot_entailment\n",
        "dev": "index\tsentence1\tsentence2\tlabel\n0\tDana Reeve.\tReeve.\tentailment\n",
        "test": "index\tsentence1\tsentence2\n0\tMangla.\tHe.\n",
    },
    "wnli": {
        "train": "index\tsentence1\tsentence2\tlabel\n0\tI stuck a pin.\tThe carrot had a hole.\t1\n",
        "dev": "index\tsentence1\tsentence2\tlabel\n0\tThe drain.\tIt.\t0\n",
        "test": "index\tsentence1\tsentence2\n0\tMaude and Dora.\tHorses.\n",
    },
}  # fmt: skip
# (first text, second text, label) of the first training example and of the first of each dev set.
EXPECTED = {
    "cola": [("Our friends won't buy \"this analysis.", None, 1), ("The sailors rode the breeze.", None, 1)],
    "sst2": [("hide new secretions ", None, 0), ("it 's a charming journey . ", None, 1)],
    "mrpc": [('Amrozi did "it".', "He\x85too.", 1), ("He said.", "She said.", 0)],
    "stsb": [("A plane is off.", "An air plane.", 5), ("A man.", "A cat.", 0.25)],
    "qqp": [('How is "this"?', "How?", 0), ("When?", "At what time?", 1)],
    "mnli": [("Cream skimming.", "Product.", 1), ("The new rights.", "Everyone.", 1), ("Your gift.", "Not.", 2)],
    "qnli": [('When did "it?', "It did.", 0), ("What came?", "Then.", 1)],
    "rte": [("No weapons.", "Weapons.", 1), ("Dana Reeve.", "Reeve.", 0)],
    "wnli": [("I stuck a pin.", "The carrot had a hole.", 1), ("The drain.", "It.", 0)],
}
SUBMISSIONS = {
    "CoLA": ["0", "1"], "SST-2": ["0"], "MRPC": ["0"], "STS-B": ["7"], "QQP": ["5"], "MNLI-m": ["0"],
    "MNLI-mm": ["9847"], "QNLI": ["0"], "RTE": ["0"], "WNLI": ["0"], "AX": ["0", "1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """A folder as the benchmark's archives leave it, with a few lines in every file."""
    folder = tmp_path_factory.mktemp("glue")
    for name, files in FILES.items():
        (folder / TASKS[name].folder).mkdir()
        for stem, content in files.items():
            (folder / TASKS[name].folder / f"{stem}.tsv").write_bytes(content.encode())
    (folder / "diagnostic").mkdir()
    (folder / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tA cat.\tIt.\n1\tB.\tC.\n")
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_read_from_the_files_of_the_benchmark(name, glue):
    splits = read_local(TASKS[name], glue)
    found = [splits.train[0], *(examples[0] for examples in splits.dev.values())]
    assert [(example.first, example.second, example.label) for example in found] == EXPECTED[name]
    assert len(splits.train) == (2 if name in ("cola", "sst2", "qqp") else 1)
    assert splits.left_out == (name == "qqp")
    indices = {file: [example.index for example in examples] for file, examples in splits.test.items()}
    assert indices == {file: SUBMISSIONS[file] for file in indices}
    assert len(indices) == (3 if name == "mnli" else 1), "MNLI's model predicts the diagnostic set too"
    assert all(example.label is None for examples in splits.test.values() for example in examples)
    # The task's own folder will do as well.
    assert read_local(TASKS[name], glue / TASKS[name].folder).train == splits.train


def test_a_line_separator_within_a_text_ends_no_line(glue):
    assert read_local(TASKS["cola"], glue).train[1] == Example("2", "The more\u2028we study verbs.", None, 0.0)


@pytest.mark.parametrize("name", TASKS)
def test_the_hubs_rows_give_the_examples_of_the_files(name, glue):
    """The hub's data set has the same texts and labels under other column names (classes are the files' numbers)."""
    from datasets import Dataset

    task, local = TASKS[name], read_local(TASKS[name], glue)
    splits = {"train": local.train} | {
        stem.replace("dev", "validation"): local.dev[split] for split, stem in task.dev.items()
    }
    splits |= {stem: local.test[file] for file, stem in task.submissions.items()}
    loaded = {}
    for split, examples in splits.items():
        texts = [[example.first, example.second][: len(task.hub_texts)] for example in examples]
        rows = [dict(zip(task.hub_texts, pair, strict=True)) for pair in texts]
        for row, example in zip(rows, examples, strict=True):
            row["label"] = -1 if example.label is None else example.label
            row["idx"] = int(example.index)
        loaded[split] = Dataset.from_list(rows)
    found = splits_of_hub(task, loaded)
    assert found.train == local.train and found.dev == local.dev
    assert found.test == {file: local.test[file] for file in task.submissions}


def test_what_is_wrong_with_a_file_is_said_with_its_line(glue, tmp_path):
    task = TASKS["rte"]
    header = "index\tsentence1\tsentence2\tlabel\n"

    def failure(train: str) -> str:
        (tmp_path / "train.tsv").write_text(train)
        (tmp_path / "dev.tsv").write_text(header + "0\ta\tb\tentailment\n")
        with pytest.raises(UserError) as caught:
            read_local(task, tmp_path)
        return str(caught.value)

    assert "line 3: label is 'maybe', expected one of entailment, not_entailment" in failure(
        header + "0\ta\tb\tentailment\n1\tc\td\tmaybe\n"
    )
    assert "line 2: fewer cells than its columns" in failure(header + "0\ta\tb\n")
    assert "has no column 'sentence2'" in failure("index\tsentence1\tlabel\n0\ta\tentailment\n")
    assert "holds no examples" in failure(header)
    with pytest.raises(UserError, match=r"holds no STS-B: expected train\.tsv, dev\.tsv"):
        read_local(TASKS["stsb"], glue / "RTE" / "nowhere")
    assert find_folder(TASKS["stsb"], tmp_path) is not None, "any folder with the two files may be the task's own"
    (tmp_path / "train.tsv").write_text(FILES["stsb"]["train"].replace("5.000", "5.5"))
    with pytest.raises(UserError, match=r"score is '5\.5', expected a number from 0 to 5"):
        read_local(TASKS["stsb"], tmp_path)


def test_a_submission_has_the_servers_columns_labels_and_numbers(glue, tmp_path):
    def written(task: str, name: str, outputs: list[list[float]]) -> str:
        examples = read_local(TASKS[task], glue).test[name]
        return write_submission(TASKS[task], name, examples, np.array(outputs), tmp_path).read_text()

    assert written("mnli", "MNLI-mm", [[0.1, -2, 0.3]]) == "index\tprediction\n9847\tcontradiction\n"
    assert written("qnli", "QNLI", [[2, 1]]) == "index\tprediction\n0\tentailment\n"
    assert written("cola", "CoLA", [[0, 1], [1, 0]]) == "index\tprediction\n0\t1\n1\t0\n"
    assert written("stsb", "STS-B", [[5.7]]) == "index\tprediction\n7\t5.000\n", "scores stay within 0 and 5"
    assert written("stsb", "STS-B", [[3.14159]]) == "index\tprediction\n7\t3.142\n"
    assert (tmp_path / "MNLI-mm.tsv").exists()


@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_a_pairs_texts_are_kept_apart_in_the_rows_of_an_exported_model(objective, tiny_tokenizer, tmp_path):
    """A GPT's tokenizer, which frames nothing, gets the end of document behind each text; saved, it still does so."""
    special = load_tokenizer_info(tiny_tokenizer).special
    tokenizer = load_tokenizer(made_model(tmp_path / "model", objective, tiny_tokenizer))
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = ("the function returns", "a list of names in order")
    one, two = (ids.tolist() for ids in Encoder(tiny_tokenizer).encode_batch(list(texts)))
    before, after = [], [special.end_of_document]
    if objective == "mlm":
        before, after = [special.classification], [special.separator]
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        (pair,) = encode(found, texts[:1], texts[1:], [(1.0,)], 64)
        (single,) = encode(found, texts[:1], None, [(1.0,)], 64)
        assert single.input_ids.tolist() == [*before, *one, *(after if objective == "mlm" else [])]
        assert pair.input_ids.tolist() == [*before, *one, *after, *two, *after]
        assert pair.token_types.tolist() == [0] * len([*before, *one, *after]) + [1] * len([*two, *after])
    (cut,) = encode(tokenizer, texts[:1], [texts[1] * 20], [(1.0,)], 32)
    assert (
        len(cut.input_ids) == 32 and cut.input_ids.tolist()[: len(one) + 1] == [*before, *one, *after][: len(one) + 1]
    )


def test_metrics_of_a_case_worked_by_hand():
    """Five pairs: 2 true positives, 1 false positive, 1 false negative, 1 true negative."""
    labels = np.array([1, 1, 1, 0, 0])
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=float)
    found = metrics.compute(("accuracy", "f1", "matthews"), labels, logits)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    # Scores 1, 2, 3, 4 and their guesses: ranks 1, 3, 2, 4, so Spearman is 1 - 6 (0 + 1 + 1 + 0) / (4 (16 - 1)).
    scores, guesses = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[0.0], [2.0], [1.0], [9.0]])
    found = metrics.compute(("pearson", "spearman"), scores, guesses)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / 60)
    # Deviations from the means 2.5 and 3: (-1.5, -0.5, 0.5, 1.5) and (-3, -1, -2, 6).
    assert found["pearson"] == pytest.approx((4.5 + 0.5 - 1 + 9) / math.sqrt(5 * 50))


def test_metrics_of_constant_answers_are_numbers():
    labels = np.array([0, 1, 1])
    found = metrics.compute(("f1", "matthews"), labels, np.array([[1.0, 0.0]] * 3))
    assert found == {"f1": 0.0, "matthews": 0.0}
    assert metrics.compute(("pearson", "spearman"), labels, np.ones((3, 1))) == {"pearson": 0.0, "spearman": 0.0}


def test_metrics_are_those_of_their_formulas_on_random_answers():
    """Against the definitions written out, on many random cases with ties."""
    generator = random.Random(1)

    def ranks(values: list[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    def pearson(left: list[float], right: list[float]) -> float:
        left, right = ([value - sum(side) / len(side) for value in side] for side in (left, right))
        scale = math.sqrt(sum(v * v for v in left) * sum(v * v for v in right))
        return sum(a * b for a, b in zip(left, right, strict=True)) / scale if scale else 0.0

    for _ in range(100):
        count = generator.randint(3, 30)
        labels = [generator.randrange(2) for _ in range(count)]
        guesses = [generator.randrange(2) for _ in range(count)]
        of_pair = [(a, b) for a, b in zip(labels, guesses, strict=True)]
        tp, tn, fp, fn = (of_pair.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0)))
        found = metrics.compute(("accuracy", "f1", "matthews"), np.array(labels), np.eye(2)[guesses])
        assert found["accuracy"] == pytest.approx((tp + tn) / count)
        assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
        assert found["matthews"] == pytest.approx(pearson(labels, guesses)), "the correlation of two-valued variables"
        scores = [float(generator.randint(0, 5)) for _ in range(count)]
        answers = [round(generator.uniform(0, 5), 0) for _ in range(count)]
        found = metrics.compute(("pearson", "spearman"), np.array(scores), np.array(answers)[:, None])
        assert found["pearson"] == pytest.approx(pearson(scores, answers))
        assert found["spearman"] == pytest.approx(pearson(ranks(scores), ranks(answers)))
