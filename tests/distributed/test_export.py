"""What is exported computes what the engine computed, and is an ordinary Hugging Face model."""

import subprocess
import sys

import pytest
import torch

from pipeline.export import export
from pipeline.metrics import read_validation
from tests.distributed.ranks import ROOT, launch, pretrain

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("objective", "ds_config"), [("causal", "zero3.json"), ("mlm", "zero0.json")])
def test_exported_logits_are_bitwise_the_engines(objective, ds_config, write_recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    run, exported = tmp_path / "run", tmp_path / "exported"
    # 768 words, padded to 800.
    recipe = write_recipe(objective)
    pretrain(2, f"ds_configs/{ds_config}", recipe, run, "--model.pad_vocab_to_multiple_of", 100)
    launch(2, ROOT / "tests" / "distributed" / "engine_logits.py", run, tmp_path / "logits.pt")
    assert export(run, exported).passed.source == "held-out samples"
    auto = AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM
    model = auto.from_pretrained(exported, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(input_ids=torch.arange(96).view(3, 32)).logits
    expected = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert expected.shape[-1] == 800 and logits.shape[-1] == model.config.vocab_size == 768
    expected = expected[..., :768]
    assert expected.std() > 0
    assert torch.equal(logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "the model reads text"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    if objective == "mlm":
        ids = tokenizer("a [MASK] b")["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert ids.count(tokenizer.mask_token_id) == 1
    else:
        command = [sys.executable, "-m", "pipeline.generate", "--model", str(exported), "--prompt", text]
        done = subprocess.run([*command, "--max_new_tokens", "5"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(text) and len(done.stdout.strip()) > len(text)


def test_training_goes_on_from_an_exported_model(write_recipe, tmp_path):
    first, second, exported = tmp_path / "first", tmp_path / "second", tmp_path / "exported"
    recipe = write_recipe("causal")
    pretrain(1, "ds_configs/zero2_fp32.json", recipe, first)
    export(first, exported)
    flags = ("--model.init_from", exported, "--training.max_steps", 1, "--seed", 99)
    pretrain(1, "ds_configs/zero2_fp32.json", recipe, second, *flags)
    (_, untrained), *_, (_, trained) = read_validation(first)
    (step, continued), *_ = read_validation(second)
    assert step == 0 and trained < untrained - 0.1
    # The held-out samples are the same documents, drawn in another order by the other seed.
    assert abs(continued - trained) < 0.3 * (untrained - trained)
