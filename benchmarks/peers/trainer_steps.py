"""transformers' Trainer with a DeepSpeed configuration, over samples made beforehand.

[deepspeed] trainer_steps.py JOBS.pt RESULTS.json

JOBS.pt: torch.save of a list of dicts, which run one after the other in this process:
    config      a transformers configuration as a dict; attention is "sdpa"
    objective   causal or mlm
    seed        of dropout, and of the weights that transformers draws
    weights     a state dict instead of those (optional)
    ds_config   complete: batch sizes and clipping are read from it
    optimizer   lr, betas, eps, weight_decay; the learning rate stays what it is
    steps       of the optimizer
    rows        samples in their order, dicts of tensors; `labels` are aligned with positions, -100 for none; rows
                without labels are documents of any length, padded by the collator to the longest of their batch
    padding     the id of padding, for those
    masking     (mask id, first ordinary id), where the collator masks such rows for masked LM

RESULTS.json, by rank 0: for each job `losses` and `norms` step by step, `processor` and `wall`, seconds at the end of
every step, `useful`, tokens that are no padding of every step of this rank, and `peak`, bytes resident at most from
the end of the first step on.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # in place of this folder
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from pipeline.startup import leave, set_environment  # noqa: E402


def peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def collate(rows: list[dict[str, torch.Tensor]], job: dict[str, Any], useful: list[int]) -> dict[str, torch.Tensor]:
    """Stacks rows that have labels; pads and, for masked LM, masks the others, as BERT's paper has it."""
    if "labels" in rows[0]:
        useful.append(sum(row["input_ids"].numel() for row in rows))
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ids = [row["input_ids"] for row in rows]
    useful.append(sum(len(one) for one in ids))
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=job["padding"])
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    labels = torch.where(real == 1, padded, -100)
    if job.get("masking") is not None:
        mask_id, ordinary = job["masking"]
        chosen = (torch.rand(padded.shape) < 0.15) & (real == 1) & (padded >= ordinary)
        labels = torch.where(chosen, padded, -100)
        draw = torch.rand(padded.shape)
        padded = torch.where(chosen & (draw < 0.8), mask_id, padded)
        random = torch.randint(ordinary, job["config"]["vocab_size"], padded.shape)
        padded = torch.where(chosen & (draw >= 0.9), random, padded)
    return {"input_ids": padded, "attention_mask": real, "labels": labels}


def sum_over_items(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """BertForMaskedLM ignores num_items_in_batch, which makes the loss of several micro-batches a sum of means."""
    logits = outputs.logits.float().flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def run(job: dict[str, Any], folder: str) -> dict[str, Any]:
    from accelerate.state import AcceleratorState, PartialState
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    ds_config, optimizer = job["ds_config"], job["optimizer"]
    on_cpu = not torch.cuda.is_available()
    AcceleratorState._reset_state(reset_partial_state=True)
    if on_cpu:  # accelerate would ask for another backend than gloo
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    values = dict(job["config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto = AutoModelForCausalLM if job["objective"] == "causal" else AutoModelForMaskedLM
    torch.manual_seed(job["seed"])
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if "weights" in job:
        model.load_state_dict(job["weights"])
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=ds_config,
        per_device_train_batch_size=ds_config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=ds_config["gradient_accumulation_steps"],
        max_steps=job["steps"],
        learning_rate=optimizer["lr"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=ds_config["gradient_clipping"],
        lr_scheduler_type="constant",
        bf16=ds_config.get("bf16", {}).get("enabled", False),
        use_cpu=on_cpu,
        seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        train_sampling_strategy="sequential",
        accelerator_config={"use_configured_state": on_cpu},
    )
    useful: list[int] = []
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "processor": [], "wall": []}

    class Record(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["processor"].append(time.process_time())
            found["wall"].append(time.perf_counter())
            if len(found["wall"]) == 1:
                Path("/proc/self/clear_refs").write_text("5")

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                found["losses"].append(logs["loss"])
                found["norms"].append(float(logs["grad_norm"]))

    several = ds_config["gradient_accumulation_steps"] > 1 or int(os.environ["WORLD_SIZE"]) > 1
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=job["rows"],
        data_collator=lambda rows: collate(rows, job, useful),
        callbacks=[Record()],
        compute_loss_func=sum_over_items if job["objective"] == "mlm" and several else None,
    )
    trainer.train()
    return {**found, "useful": useful, "peak": peak_bytes()}


def main() -> None:
    jobs, results = sys.argv[-2:]
    set_environment()
    from pipeline.ops import skip_unused_ops

    skip_unused_ops()  # DeepSpeed's own communication op, which takes g++ half a minute
    found = [run(job, f"{results}.folder") for job in torch.load(jobs, weights_only=False)]
    if os.environ["RANK"] == "0":
        Path(results).write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
