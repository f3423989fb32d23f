"""An export is put together from any ZeRO stage's files, costs one copy of the model, and passes a gate that sees what
could be wrong with it. (Checkpoints that DeepSpeed itself has written: tests/distributed/test_export.py.)"""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import durable
from data_prep.encoding import load_tokenizer_info, tokenizer_files
from data_prep.errors import UserError
from data_prep.manifest import FileRecord
from data_prep.plan import prepare_plan
from data_prep.shards import ShardSet
from pipeline import checkpoint, export_gate, plain_transformers
from pipeline.checkpoint_weights import read_weights
from pipeline.export import export, main
from pipeline.model import build_model, make_model_config
from pipeline.recipe import check_recipe
from tests.made_models import SIZES

ROOT = Path(__file__).parents[2]


class LossScaler:
    """Stands for the class of DeepSpeed's that its ZeRO 3 files hold an object of."""

    def __init__(self):
        self.cur_scale = 1.0


def made_run(folder, objective, shards, tokenizer, *, zero_stage=0, precision="bf16", ranks=3, model=None, **data):
    """A run's folder with one checkpoint whose files are laid out as DeepSpeed's, around a model that was not trained.
    Returns (folder, weights in the training precision by name)."""
    model = SIZES[objective] if model is None else model
    recipe = {
        "objective": objective,
        "model": {"config": {**model, "initializer_range": 0.3}},
        "data": {
            "shards": str(shards), "tokenizer": str(tokenizer), "sequence_length": 32, "validation_fraction": 0.1,
            **data,
        },
        "training": {"global_batch_size": 8, "max_steps": 4},
        "optimizer": {"lr": 1e-3},
        "schedule": {"type": "constant"},
    }  # fmt: skip
    checked = check_recipe(recipe, "recipe")
    info = load_tokenizer_info(tokenizer)
    config = make_model_config(checked, info)
    pairs = checked.pack_settings.is_pairs
    built = build_model(config, objective, 7, pairs=pairs)
    # Nothing stays as it was initialised: biases of 0 and norms of 1 would hide mistakes.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    state = built.to(dtype).state_dict()
    step = folder / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (write_zero_3 if zero_stage == 3 else write_whole)(step, built, ranks)
    files = {path.name: FileRecord.of(path) for path in step.iterdir()}
    sources = checkpoint.Sources("", info.fingerprint, {})
    made = checkpoint.CheckpointInfo(4, 32, 1e-3, ranks, zero_stage, precision, sources, (), files)
    (step / checkpoint.MANIFEST_NAME).write_bytes(checkpoint.manifest_bytes(made))
    shutil.copytree(tokenizer, folder / "tokenizer")
    prepare_plan(ShardSet.open(shards), checked.pack_settings)
    durable.write_json(
        folder / "run.json",
        {
            "recipe": json.loads(checked.model_dump_json()),
            "deepspeed_config": {},
            "model_config": config.to_dict(),
            "corpora": {"corpus": ShardSet.open(shards).fingerprint},
            "tokenizer_fingerprint": info.fingerprint,
            "versions": {"torch": torch.__version__},
            "git_commit": None,
        },
    )
    (folder / "metrics.jsonl").write_text('{"step": 0, "validation": {"loss": 7.5}}\n{"step": 4, "loss": 7.0}\n')
    return folder, state


def write_whole(folder, model, ranks):
    """ZeRO 0 to 2's file of the model."""
    torch.save({"module": model.state_dict(), "buffer_names": []}, folder / "mp_rank_00_model_states.pt")


def write_zero_3(folder, model, ranks):
    """ZeRO 3's files: parameters flat in two groups, of which the first is cut once more (sub_group_size), each in
    equal parts of which the last rank's is filled up; and optimizer states that nobody is to read."""
    named = dict(model.named_parameters())
    shapes = [
        {name: parameter.shape for name, parameter in named.items() if (parameter.dim() > 1) is matrices}
        for matrices in (True, False)
    ]
    first = {id(parameter): name for name, parameter in named.items()}
    state = model.state_dict(keep_vars=True)
    shared = {name: first[id(value)] for name, value in state.items() if first.get(id(value), name) != name}
    for rank in range(ranks):
        flat = []
        for group in shapes:
            parts = []
            for name in group:
                values = named[name].detach().float().flatten()
                part = -(-values.numel() // ranks)
                filled = torch.cat([values, torch.full((part * ranks - values.numel(),), torch.nan)])
                parts.append(filled[rank * part : (rank + 1) * part])
            flat.append(torch.cat(parts))
        cut = len(flat[0]) // 3
        flat = [flat[0][:cut].clone(), flat[0][cut:].clone(), flat[1]]
        optimizer = {"fp32_flat_groups": flat, "loss_scaler": LossScaler(), "optimizer_state_dict": [*flat, *flat]}
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)
        states = {
            "module": {name: torch.empty(0) for name in state},
            "buffer_names": [],
            "param_shapes": shapes,
            "shared_params": shared,
        }
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_shards):
    """A copy, since plans are written beside the shards."""
    return shutil.copytree(tiny_shards, tmp_path_factory.mktemp("shards") / "shards")


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory, shards, tiny_tokenizer):
    return made_run(tmp_path_factory.mktemp("gpt") / "run", "causal", shards, tiny_tokenizer)[0]


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory, shards, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("bert") / "run"
    return made_run(folder, "mlm", shards, tiny_tokenizer, packing="sop")[0]


@pytest.fixture
def here(monkeypatch):
    """The gate opens folders in this process, which saves a start of transformers."""
    monkeypatch.setattr(export_gate, "_in_a_process_of_its_own", open_here)


def open_here(job):
    return plain_transformers.main(job) | {"modules": []}


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_zero_3s_parts_are_put_together_parameter_by_parameter(ranks, dtype, tmp_path, shards, tiny_tokenizer):
    run, expected = made_run(tmp_path / "run", "causal", shards, tiny_tokenizer, zero_stage=3, ranks=ranks)
    weights = read_weights(run / "checkpoints" / "step-00000004", 3, dtype)
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name].to(dtype)) for name in expected)
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]


def test_parts_of_another_world_size_are_refused(tmp_path, shards, tiny_tokenizer):
    run, _ = made_run(tmp_path / "run", "causal", shards, tiny_tokenizer, zero_stage=3, ranks=3)
    folder = run / "checkpoints" / "step-00000004"
    (folder / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="the ranks' parts do not add up to the parameters"):
        read_weights(folder, 3, torch.float32)
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"optimizer states of ranks \[1\], expected them from rank 0 on"):
        read_weights(folder, 3, torch.float32)


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_files_pickle_runs_no_code(tmp_path, shards, tiny_tokenizer):
    run, expected = made_run(tmp_path / "run", "causal", shards, tiny_tokenizer)
    path = run / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
    attack = Attack()
    attack.path = str(tmp_path / "touched")
    torch.save({"module": torch.load(path)["module"], "more": attack}, path)
    assert torch.load(path, weights_only=False) and (tmp_path / "touched").exists(), "the attack works"
    (tmp_path / "touched").unlink()
    try:
        weights = read_weights(path.parent, 0, torch.bfloat16)
    except pickle.UnpicklingError:
        pass
    else:
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not (tmp_path / "touched").exists()


def test_the_summary_says_what_was_compared(gpt_run, tmp_path, capsys):
    assert main(["--checkpoint", str(gpt_run), "--output_dir", str(tmp_path / "exported")]) == 0
    said = capsys.readouterr().out.splitlines()[-3:]  # where accelerate is installed, it imports DeepSpeed, which talks
    assert "a Hugging Face model of 0.1 M parameters in bf16" in said[0]
    assert said[1] == "  validation    loss 7.5000 nats a token after step 0"
    assert said[2].startswith("  checked       with transformers alone: logits of 8 held-out samples (loss ")
    assert said[2].endswith("equal the checkpoint's bit for bit, ids of 8 texts the run's")
    exported = tmp_path / "exported"
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    for path in tokenizer_files(exported):
        assert path.read_bytes() == (gpt_run / "tokenizer" / path.name).read_bytes()
    assert (exported / "model.safetensors").stat().st_mode & 0o777 == (exported / "README.md").stat().st_mode & 0o777
    assert "lm_head.weight" not in load_file(exported / "model.safetensors"), "tied weights are there once"
    card = (exported / "README.md").read_text()
    assert "| 0 | 7.5000 |" in card and '"global_batch_size": 8' in card
    shards = ShardSet.open(Path(json.loads((gpt_run / "run.json").read_text())["recipe"]["data"]["shards"]))
    assert f"| corpus | {sum(shards.documents):,} | {sum(shards.tokens):,} | " in card
    for path in exported.iterdir():
        assert str(gpt_run) not in path.read_text(errors="replace"), "no path of the run leaves with the model"


def test_a_bert_with_pairs_is_exported_with_both_heads(bert_run, tmp_path, here):
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

    done = export(bert_run, tmp_path / "exported", "fp32")
    assert done.passed.source == "held-out samples" and done.passed.loss is not None
    both = AutoModelForPreTraining.from_pretrained(tmp_path / "exported")
    assert both.dtype == torch.float32 and both.cls.seq_relationship.bias.abs().min() > 0
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(masked.eval()(ids).logits, both.eval()(ids).prediction_logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.model_max_length == 64
    assert len(tokenizer("word " * 500, truncation=True)["input_ids"]) == 64


def test_without_the_runs_data_ids_are_made_up_and_said_to_be(gpt_run, tmp_path, here):
    run = shutil.copytree(gpt_run, tmp_path / "run")
    described = json.loads((run / "run.json").read_text())
    described["recipe"]["data"]["shards"] = str(tmp_path / "gone")
    durable.write_json(run / "run.json", described)
    passed = export(run, tmp_path / "exported").passed
    assert passed.samples == 8 and passed.loss is None
    assert passed.source.startswith("samples of made-up ids (data.shards: ") and "gone" in passed.source


def test_a_large_model_is_cut_into_files(gpt_run, tmp_path, here, monkeypatch):
    monkeypatch.setattr("pipeline.export.SHARD_SIZE", "40KB")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    export(gpt_run, tmp_path / "exported", overwrite=True)
    files = sorted(path.name for path in (tmp_path / "exported").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)


BROKEN = {
    "a transposed weight": ("transformer.h.1.attn.c_proj.weight", "read back differently"),
    "another norm": ({"layer_norm_epsilon": 1e-2}, "computes something else"),
    "another activation": ({"activation_function": "relu"}, "computes something else"),
    "other heads": ({"n_head": 4}, "computes something else"),
    "a tie that was none": ({"tie_word_embeddings": False}, "read back differently|cannot open"),
    "a vocabulary with a row less": ({"vocab_size": 767}, "cannot open|read back differently"),
    "a tokenizer that adds a space": ("tokenizer.json", "AutoTokenizer makes other ids"),
    "a weight that no sample reaches": ("transformer.wpe.weight", "read back differently"),
}


@pytest.fixture(scope="module")
def gate(tmp_path_factory, gpt_run):
    """(exported folder, function that takes another folder through the same gate), in this process."""
    jobs: list[dict] = []
    folder = tmp_path_factory.mktemp("gate") / "exported"
    kept = tmp_path_factory.mktemp("expected")

    def keep(job):
        jobs.append({**job, "samples": [shutil.copy(path, kept) for path in job["samples"]]})
        return open_here(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_gate, "_in_a_process_of_its_own", keep)
        export(gpt_run, folder)

    def check(broken):
        try:
            findings = open_here({**jobs[0], "folder": str(broken)})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot open ({error})") from None
        export_gate.refuse_differences(findings, broken)

    return folder, check


@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_refuses(name, gate, tmp_path):
    folder, check = gate
    broken, (what, message) = shutil.copytree(folder, tmp_path / "broken"), BROKEN[name]
    check(broken)
    if isinstance(what, dict):
        config = json.loads((broken / "config.json").read_text())
        assert config.keys() & what.keys() or what.keys() == {"tie_word_embeddings"}
        (broken / "config.json").write_text(json.dumps(config | what))
    elif what == "tokenizer.json":
        tokenizer = json.loads((broken / what).read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (broken / what).write_text(json.dumps(tokenizer))
    else:
        weights = load_file(broken / "model.safetensors")
        if what == "transformer.wpe.weight":
            weights[what][-1] += 1  # position 63; samples have 32
        else:
            weights[what] = weights[what].T.contiguous()
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        check(broken)


def test_what_the_gate_refuses_does_not_get_the_name(gpt_run, gate, tmp_path, here, monkeypatch):
    """A folder is broken in the middle of an export, and the model before it stays."""
    output, check = shutil.copytree(gate[0], tmp_path / "exported"), export_gate.check_folder
    before = (output / "model.safetensors").stat().st_ino

    def broken(folder, *arguments, **options):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-2}))
        return check(folder, *arguments, **options)

    with pytest.raises(UserError, match="is not empty; give another folder or --overwrite"):
        export(gpt_run, output)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        export(tmp_path / "nowhere", output, overwrite=True)
    monkeypatch.setattr(export_gate, "check_folder", broken)
    with pytest.raises(UserError, match=r"sample 0: \d+\.\d% of its outputs differ, by up to .*nothing is exported"):
        export(gpt_run, output, overwrite=True)
    assert (output / "model.safetensors").stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]


MEASURED = """
import gc, sys, threading, time
from pathlib import Path
import torch, transformers
from pipeline import export_gate, model_card
from pipeline.export import export

torch.set_num_threads(1)
# What the other process of an export holds is its own.
export_gate._in_a_process_of_its_own = lambda job: {"modules": [], "weights": [], "samples": [], "texts": []}
small, *runs = sys.argv[1:]
export(Path(small), Path(small + "-exported"))  # all that is imported and allocated once

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def measure(run):
    gc.collect()
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    export(Path(run), Path(run + "-exported"))
    done.set()
    thread.join()
    return peak[0] - before

print("grown", *map(measure, runs))
"""


def test_the_peak_of_memory_is_about_one_copy_of_the_model(gpt_run, tmp_path, shards, tiny_tokenizer):
    large = {**SIZES["causal"], "n_embd": 768, "n_layer": 4, "n_head": 12}
    for stage in (2, 3):
        run = tmp_path / f"zero{stage}"
        _, weights = made_run(run, "causal", shards, tiny_tokenizer, zero_stage=stage, ranks=2, model=large)
    size = sum(tensor.nbytes for name, tensor in weights.items() if name != "lm_head.weight")
    assert size > 50e6
    small = shutil.copytree(gpt_run, tmp_path / "small")
    command = [sys.executable, "-c", MEASURED, str(small), str(tmp_path / "zero2"), str(tmp_path / "zero3")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    of_zero_2, of_zero_3 = map(int, done.stdout.split("grown")[1].split())
    assert of_zero_2 < 0.5 * size, "whole weights stay in the mapped file"
    assert 0.5 * size < of_zero_3 < 1.5 * size
