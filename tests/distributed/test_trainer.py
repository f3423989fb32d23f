"""Losses and gradient norms are, step by step, those of transformers' Trainer on the same batches and ds_config."""

import json

import numpy as np
import pytest
import torch

from pipeline.data import open_data
from pipeline.model import build_model, make_model_config
from pipeline.recipe import check_recipe, read_recipe_file
from pipeline.samples import Batch
from tests.distributed.ranks import NO_DROPOUT, ROOT, ds_config_with, launch, metrics, pretrain, relative_difference

pytestmark = pytest.mark.ranks
STEPS, RANKS, MICRO = 12, 2, 2
OBJECTIVES = ("causal", "mlm")
OPTIMIZER = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def rows_of(batch: Batch, objective: str) -> list[dict[str, torch.Tensor]]:
    """A batch as the Trainer's dataset: with a mask of who sees whom, position by position, made from boundaries."""
    ids = torch.from_numpy(batch.input_ids.astype(np.int64))
    length = ids.shape[1]
    document = torch.zeros(ids.numel(), dtype=torch.int64)
    document[torch.from_numpy(batch.boundaries[:-1].astype(np.int64))] = 1
    document = document.cumsum(0).view_as(ids)
    seen = document[:, :, None] == document[:, None, :]
    if objective == "causal":
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    column = torch.arange(length).expand_as(ids)
    begins = document != torch.cat([torch.zeros_like(document[:, :1]), document[:, :-1]], 1)
    position = column - torch.where(begins, column, 0).cummax(1).values
    labels = torch.from_numpy(batch.labels)
    made = []
    for row in range(len(ids)):
        one = {
            "input_ids": ids[row], "attention_mask": seen[row, None], "position_ids": position[row],
            "labels": labels[row],
        }  # fmt: skip
        made.append({**one, "shift_labels": labels[row]} if objective == "causal" else one)  # GPT-2's are not shifted
    return made


@pytest.fixture(scope="module")
def runs(write_recipe, tmp_path_factory):
    """(ours, the Trainer's) of each objective, steps as dicts of loss and grad_norm."""
    folder = tmp_path_factory.mktemp("trainer")
    spread = ds_config_with(folder / "ds.json", "zero2_fp32.json", train_micro_batch_size_per_gpu=MICRO)
    jobs, ours = [], []
    for objective in OBJECTIVES:
        path = write_recipe(
            objective,
            model=NO_DROPOUT[objective],
            training={"max_steps": STEPS},
            optimizer={**OPTIMIZER, "gradient_clipping": 1.0},
            schedule={"type": "constant", "warmup_steps": 0, "min_lr": 0.0},
            checkpoint={"every_steps": 0},
        )
        finished = pretrain(RANKS, spread, path, folder / objective)
        assert "global batch 8 = micro-batch 2 x accumulation 2 x 2 ranks" in finished.stdout
        ours.append(metrics(folder / objective))
        recipe = check_recipe(read_recipe_file(path), str(path))
        data = open_data(recipe)
        rows = rows_of(data.train.batch(np.arange(STEPS * 8)), objective)
        assert max(int(row["position_ids"].eq(0).sum()) for row in rows) > 1, "rows have to hold several documents"
        config = make_model_config(recipe, data.tokenizer)
        jobs.append(
            {
                "config": config.to_dict(),
                "weights": build_model(config, objective, recipe.seed, has_boundaries=False).state_dict(),
                "objective": objective,
                "seed": recipe.seed,
                "ds_config": json.loads((folder / objective / "run.json").read_text())["deepspeed_config"],
                "optimizer": OPTIMIZER,
                "steps": STEPS,
                "rows": rows,
            }
        )
    torch.save(jobs, folder / "jobs.pt")
    launch(RANKS, ROOT / "benchmarks/peers/trainer_steps.py", folder / "jobs.pt", folder / "results.json")
    theirs = [
        [{"loss": loss, "grad_norm": norm} for loss, norm in zip(job["losses"], job["norms"], strict=True)]
        for job in json.loads((folder / "results.json").read_text())
    ]
    return dict(zip(OBJECTIVES, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_norms_on_two_ranks_with_accumulation_are_the_trainers(runs, objective):
    ours, theirs = runs[objective]
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1, "the runs have to learn for the comparison to mean something"
    for step, expected in zip(ours, theirs, strict=True):
        assert relative_difference(step["loss"], expected["loss"]) < 1e-5
        assert relative_difference(step["grad_norm"], expected["grad_norm"]) < 1e-4
