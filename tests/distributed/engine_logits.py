"""Run by the launcher: restores a run's newest checkpoint into an engine and saves its logits on fixed input."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json  # noqa: E402

import torch  # noqa: E402

from pipeline import checkpoint  # noqa: E402
from pipeline.checkpointer import Checkpointer  # noqa: E402
from pipeline.ds_config import precision, zero_stage  # noqa: E402
from pipeline.engine import Engine  # noqa: E402
from pipeline.model import build_model  # noqa: E402
from pipeline.recipe import check_recipe  # noqa: E402
from pipeline.startup import init_distributed, leave, set_environment  # noqa: E402
from pipeline.vocabulary import pad_vocabulary  # noqa: E402


def main() -> None:
    run_dir, output = Path(sys.argv[-2]), Path(sys.argv[-1])
    set_environment()
    world = init_distributed()
    from transformers import AutoConfig

    run = json.loads((run_dir / "run.json").read_text())
    recipe, values = check_recipe(run["recipe"], "run.json"), dict(run["model_config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    # Another seed than the run's: the weights have to come from the checkpoint.
    model = build_model(config, recipe.objective, 99)
    pad_vocabulary(model, recipe.model.pad_vocab_to_multiple_of)
    engine = Engine(model, recipe.optimizer, run["deepspeed_config"], world, 0)
    folder = checkpoint.list_checkpoints(run_dir)[-1]
    checkpointer = Checkpointer(
        engine,
        run_dir,
        recipe.checkpoint,
        zero_stage=zero_stage(run["deepspeed_config"]),
        precision=precision(run["deepspeed_config"]),
        sources=checkpoint.read_info(folder).sources,
        say=print,
    )
    checkpointer.load(folder)
    engine.deepspeed.eval()
    with torch.no_grad():
        logits = engine.deepspeed(input_ids=torch.arange(96).view(3, 32)).logits
    if world.is_first:
        torch.save(logits, output)
    world.close()
    leave(0)


if __name__ == "__main__":
    main()
