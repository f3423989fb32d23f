"""The control of `tests.chaos`: the same model, data and faults on DeepSpeed's engine as its tutorials use it.

Takes `pretrain.py`'s flags, trains to training.max_steps of the recipe, saves every checkpoint.every_steps steps with
save_checkpoint, and goes on from what load_checkpoint finds.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from pipeline.digests import digest, state  # noqa: E402
from pipeline.ops import skip_unused_ops  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=json.loads, default=[])
    parser.add_argument("--deepspeed_config", type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--output_dir", type=Path)
    arguments, _ = parser.parse_known_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    config = json.loads(arguments.deepspeed_config.read_text())
    config |= {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    skip_unused_ops()  # which only costs its compilation
    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=768, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.load_checkpoint(str(arguments.output_dir / "checkpoints"))
    folder = arguments.output_dir / "digests"
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(engine.global_steps, recipe["training"]["max_steps"]):
        due = [one for one in arguments.faults if one["rank"] == rank and one["step"] in (0, step + 1)]
        record: dict[str, Any] = {"step": step + 1, "fired": [one["what"] for one in due]}
        for fault in due:
            if fault["what"] == "sleep":
                time.sleep(fault["seconds"])
            elif fault["what"].startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[fault["what"]])
        record["before"] = digest(state(engine))
        torch.manual_seed(1000 * step + rank)
        ids = torch.randint(0, 768, (4, 32))
        loss = engine(input_ids=ids, labels=ids).loss
        bad = any(one["what"].startswith("nan") for one in due)
        engine.backward(loss * math.nan if bad else loss)
        engine.step()
        record["after"] = digest(state(engine))
        record["finite"] = all(bool(weight.isfinite().all()) for weight in engine.module.parameters())
        with open(folder / f"rank_{rank}.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if (step + 1) % recipe["checkpoint"]["every_steps"] == 0:
            engine.save_checkpoint(str(arguments.output_dir / "checkpoints"))


if __name__ == "__main__":
    main()
