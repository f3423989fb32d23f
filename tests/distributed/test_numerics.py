"""The losses and weights of the engine are those of a plain PyTorch loop, however the batch is spread."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pipeline.data import open_data
from pipeline.export import export
from pipeline.model import build_model, make_model_config
from pipeline.recipe import check_recipe, read_recipe_file
from tests.distributed.ranks import NO_DROPOUT, ds_config_with, metrics, pretrain, relative_difference

pytestmark = pytest.mark.ranks
STEPS = 20
EMA_DECAY = 0.9
BOUND = 2e-5  # relative difference of float32 losses; at lr 1e-2 Adam blows rounding up, 1.01e-5 at step 20


@pytest.fixture(scope="module", params=["causal", "mlm"])
def one_rank(request, write_recipe, tmp_path_factory):
    """(objective, recipe, run) of STEPS steps in fp32 on one rank, the whole batch at once."""
    objective = request.param
    recipe = write_recipe(
        objective, model=NO_DROPOUT[objective], training={"max_steps": STEPS}, optimizer={"ema_decay": EMA_DECAY}
    )
    folder = tmp_path_factory.mktemp(f"one-rank-{objective}")
    whole = ds_config_with(folder / "ds.json", "zero0_fp32.json", train_micro_batch_size_per_gpu=8)
    pretrain(1, whole, recipe, folder / "run")
    return objective, recipe, folder / "run"


def plain_loop(recipe_path: Path) -> tuple[list[float], list[float], torch.nn.Module, dict[str, torch.Tensor]]:
    """(losses, gradient norms, model, averages of its weights) of a training loop of torch's own AdamW over the
    recipe's samples."""
    recipe = check_recipe(read_recipe_file(recipe_path), str(recipe_path))
    data = open_data(recipe)
    config = make_model_config(recipe, data.tokenizer)
    model = build_model(config, recipe.objective, recipe.seed, has_boundaries=False)  # transformers' own attention
    model.train()
    special = data.tokenizer.special
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False,
    )  # fmt: skip
    losses, norms, packed, objective = [], [], 0, recipe.objective
    averages: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        # Warm-up over 2 steps to 1e-2, then half a cosine down to 1e-3 at step 19.
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 17))
        rate = 1e-2 * (step + 1) / 2 if step < 2 else 1e-3 + 9e-3 * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = data.train.batch(torch.arange(step * 8, step * 8 + 8).numpy())
        ids = torch.from_numpy(batch.input_ids.astype("int64"))
        # Documents by their own ids, another way than boundaries: a GPT's begins at an end of document, a BERT's behind
        # a separator but for the last one of a row.
        if objective == "causal":
            begins = ids == special.end_of_document
        else:
            begins = torch.zeros_like(ids, dtype=torch.bool)
            begins[:, 1:-1] = ids[:, :-2] == special.separator
        document = begins.cumsum(1)
        seen = document[:, None, :, None] == document[:, None, None, :]
        if objective == "causal":
            seen = seen & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        column = torch.arange(ids.shape[1]).expand_as(ids)
        position = column - torch.where(begins, column, 0).cummax(1).values
        packed += int(document.max(1).values.sum())
        logits = model(input_ids=ids, attention_mask=seen, position_ids=position).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            weight = parameter.detach()
            averages[name] = EMA_DECAY * averages[name] + (1 - EMA_DECAY) * weight if step else weight.clone()
    assert packed > STEPS, "rows have to hold several documents for the comparison to mean something"
    return losses, norms, model, averages


def test_one_rank_in_fp32_equals_a_plain_pytorch_adamw_loop(one_rank, tmp_path):
    objective, recipe, run = one_rank
    losses, norms, model, averages = plain_loop(recipe)
    steps = metrics(run)
    assert len(steps) == STEPS
    assert losses[-1] < losses[0] - 0.2, "the loop has to learn for the comparison to mean something"
    for step, loss, norm in zip(steps, losses, norms, strict=True):
        assert relative_difference(step["loss"], loss) < BOUND
        assert relative_difference(step["grad_norm"], norm) < 1e-4
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM
    exports = {"last": dict(model.named_parameters())}
    if objective == "causal":  # one is enough: an export's gate takes a process of its own
        exports["averaged"] = averages
    for folder, expected in exports.items():
        export(run, tmp_path / folder, averaged=folder == "averaged")
        exported = dict(auto.from_pretrained(tmp_path / folder, dtype=torch.float32).named_parameters())
        for name, parameter in expected.items():
            if parameter.ndim < 2:
                continue  # a key's bias has no gradient but rounding, which Adam blows up to whole steps
            torch.testing.assert_close(exported[name], parameter, rtol=1e-3, atol=1e-5)
    word = next(name for name in averages if "wte" in name or "word_embeddings" in name)
    assert (averages[word] - model.get_parameter(word)).abs().max() > 1e-2, "the two have to differ"


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_with_accumulation_equal_one_rank_with_the_whole_batch(one_rank, stage, tmp_path):
    _, recipe, run = one_rank
    spread = ds_config_with(tmp_path / "ds.json", f"zero{stage}_fp32.json", train_micro_batch_size_per_gpu=2)
    finished = pretrain(2, spread, recipe, tmp_path / "run")
    assert "global batch 8 = micro-batch 2 x accumulation 2 x 2 ranks" in finished.stdout
    for ours, whole in zip(metrics(tmp_path / "run"), metrics(run), strict=True):
        assert ours["tokens"] == whole["tokens"]
        assert ours["learning_rate"] == whole["learning_rate"]
        assert relative_difference(ours["loss"], whole["loss"]) < BOUND
        assert relative_difference(ours["grad_norm"], whole["grad_norm"]) < 1e-4


def test_masked_counts_differ_between_micro_batches(one_rank):
    """What makes a mean of means wrong: the test above would not see it if all counts were equal."""
    objective, recipe_path, _ = one_rank
    recipe = check_recipe(read_recipe_file(recipe_path), str(recipe_path))
    samples = open_data(recipe).train
    counts = {samples.batch(torch.arange(first, first + 2).numpy()).target_count for first in range(0, 16, 2)}
    assert (len(counts) > 1) == (objective == "mlm")


def test_run_json_says_what_the_run_was_made_of(one_rank):
    objective, _, run = one_rank
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["objective"] == objective
    assert record["deepspeed_config"]["gradient_accumulation_steps"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["corpora"]["corpus"]) == 64
