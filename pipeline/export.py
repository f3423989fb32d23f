"""`python -m pipeline.export`: a checkpoint of any ZeRO stage to an ordinary Hugging Face folder.

ZeRO 0 to 2 keep whole weights in the training precision, which are taken as they are; ZeRO 3's are put together from
the ranks' float32 shards. Either way the folder holds the very numbers that the engine computed with.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import durable
from data_prep.encoding import load_tokenizer_info, tokenizer_files
from data_prep.errors import UserError
from pipeline import checkpoint
from pipeline.ds_config import TORCH_DTYPES
from pipeline.ema import ema_weights
from pipeline.metrics import read_validation
from pipeline.model import auto_class
from pipeline.provenance import RUN_NAME, TOKENIZER_FOLDER, read_run
from pipeline.recipe import check_recipe
from pipeline.vocabulary import strip_padding

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  python -m pipeline.export --checkpoint runs/demo-gpt --output_dir exported/demo-gpt
  python -m pipeline.export --checkpoint runs/demo-gpt/checkpoints/step-00000100 --output_dir step100 --dtype fp32
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export",
        description="Write a training checkpoint as a Hugging Face folder (config, safetensors, tokenizer).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="D",
        help="a run's folder (its newest checkpoint) or a checkpoint",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="H", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=TORCH_DTYPES,
        help="precision of the weights (default: the one that the model was trained in)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the weights (optimizer.ema_decay), not the last ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir if it is an exported model")
    return parser


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of a run or a checkpoint; raises UserError when there is none."""
    if (path / checkpoint.MANIFEST_NAME).exists():
        return path.parent.parent, path
    found = checkpoint.list_checkpoints(path)
    if not found:
        raise UserError(f"--checkpoint {path}: neither a checkpoint nor a run that has one")
    return path, found[-1]


def read_weights(folder: Path, zero_stage: int) -> dict[str, "torch.Tensor"]:
    """The model's whole weights by name, from a verified checkpoint folder."""
    import torch

    if zero_stage < 3:
        states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False, mmap=True)
        return dict(states["module"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its progress
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def export(
    checkpoint_dir: Path,
    output_dir: Path,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    averaged: bool = False,
) -> Path:
    """Writes the Hugging Face folder `output_dir` and returns the checkpoint that it came from.

    averaged: of the moving average of the weights.

    The folder is read back by plain transformers and compared, tensor by tensor, before it gets its name; a model
    that `overwrite` replaces is kept until then. Raises UserError for a missing or damaged checkpoint, or an output
    folder that holds something else, or a model without `overwrite`.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    if overwrite and output_dir.exists() and not (output_dir / "config.json").exists():
        raise UserError(f"--overwrite: {output_dir} is no exported model (it has no config.json); remove it yourself")
    run_dir, folder = find_checkpoint(checkpoint_dir)
    run, info = read_run(run_dir), checkpoint.read_info(folder)
    checkpoint.verify(folder, info)
    recipe = check_recipe(run["recipe"], str(run_dir / RUN_NAME))
    objective = recipe.objective
    auto = auto_class(objective, recipe.pack_settings.is_pairs)
    torch_dtype = getattr(torch, TORCH_DTYPES[dtype or info.precision])
    values = dict(run["model_config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch_dtype)
    read = read_weights(folder, info.zero_stage)
    if averaged:
        read |= ema_weights(folder, info.zero_stage, model, recipe.optimizer)
    stored = strip_padding(read, model.state_dict())
    weights = {name: tensor.to(torch_dtype) for name, tensor in stored.items()}
    try:
        with durable.replacing_folder(output_dir, overwrite=overwrite) as temporary:
            model.save_pretrained(temporary, state_dict=dict(weights))
            write_tokenizer(run_dir / TOKENIZER_FOLDER, temporary, objective)
            if objective == "causal":
                GenerationConfig(
                    bos_token_id=config.bos_token_id,
                    eos_token_id=config.eos_token_id,
                    pad_token_id=config.pad_token_id,
                    do_sample=True,
                ).save_pretrained(temporary)
            durable.write_bytes(temporary / "README.md", model_card(run, run_dir, info).encode())
            loaded = auto.from_pretrained(temporary, dtype=torch_dtype).state_dict()
            different = [name for name in weights if not torch.equal(loaded[name], weights[name])]
            if different or set(loaded) != set(weights):
                raise UserError(f"{folder}: the exported weights read back differently ({different[:3]}); not exported")
    except FileExistsError:
        raise UserError(f"--output_dir {output_dir} is not empty; give another folder or --overwrite") from None
    return folder


def write_tokenizer(source: Path, target: Path, objective: str) -> None:
    """Copies a run's tokenizer. For masked LM it gets BERT's frame ([CLS] text [SEP]), and the mask token is
    recognised in text, as `fill-mask` needs."""
    for path in tokenizer_files(source):
        durable.write_bytes(target / path.name, path.read_bytes())
    if objective != "mlm":
        return
    special = load_tokenizer_info(source).special
    tokenizer_path, config_path = target / "tokenizer.json", target / "tokenizer_config.json"
    config = json.loads(config_path.read_bytes())
    config["split_special_tokens"] = False
    durable.write_json(config_path, config)
    tokenizer = json.loads(tokenizer_path.read_bytes())
    frame = {}
    for role, token_id in (("cls_token", special.classification), ("sep_token", special.separator)):
        token = config[role]["content"] if isinstance(config[role], dict) else config[role]
        frame[role] = {"id": token, "ids": [token_id], "tokens": [token]}
    first, last = ({"SpecialToken": {"id": frame[role]["id"], "type_id": 0}} for role in ("cls_token", "sep_token"))
    second, end = {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {**last["SpecialToken"], "type_id": 1}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}, last],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, last, second, end],
        "special_tokens": {item["id"]: item for item in frame.values()},
    }
    durable.write_json(tokenizer_path, tokenizer)


def model_card(run: dict[str, Any], run_dir: Path, info: checkpoint.CheckpointInfo) -> str:
    """The folder's README.md: what the model is and how it was made."""
    losses = "\n".join(f"| {step} | {loss:.4f} |" for step, loss in read_validation(run_dir) if step <= info.step)
    recipe = run["recipe"]
    corpora = ", ".join(f"{name} {fingerprint[:12]}" for name, fingerprint in run["corpora"].items())
    return f"""---
library_name: transformers
pipeline_tag: {"text-generation" if recipe["objective"] == "causal" else "fill-mask"}
---
# {run["model_config"]["model_type"]}, {recipe["objective"]}, {info.step} steps

Pretrained from scratch on {info.samples:,} samples of {recipe["data"]["sequence_length"]} tokens
({corpora}, tokenizer {run["tokenizer_fingerprint"][:12]}, commit {run["git_commit"]}).

| step | validation loss (nats a token) |
|---|---|
{losses}

The recipe:
```json
{json.dumps(recipe, indent=2)}
```
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        folder = export(
            arguments.checkpoint,
            arguments.output_dir,
            arguments.dtype,
            overwrite=arguments.overwrite,
            averaged=arguments.ema,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in arguments.output_dir.iterdir())
    print(f"{arguments.output_dir}: a Hugging Face model of {size / 1e6:.1f} MB, from {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
