"""`python -m pipeline.export`: a checkpoint of any ZeRO stage to an ordinary Hugging Face folder.

Read the weights, write the folder, and let it pass the gate (`export_gate`) before it gets its name. The weights are
the very numbers that the engine computed with, and are there once at a time.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_prep import durable
from data_prep.encoding import Encoder, load_tokenizer_info, tokenizer_files
from data_prep.errors import UserError, exit_status
from pipeline import checkpoint
from pipeline.ds_config import TORCH_DTYPES
from pipeline.ema import ema_weights
from pipeline.metrics import read_validation
from pipeline.model import auto_class, longest_input
from pipeline.ops import silence_accelerator_notice
from pipeline.provenance import RUN_NAME, TOKENIZER_FOLDER, read_run
from pipeline.recipe import Recipe, check_recipe
from pipeline.text_lines import bar
from pipeline.vocabulary import strip_padding

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from pipeline.export_gate import Passed

EXAMPLES = """\
examples:
  python -m pipeline.export --checkpoint runs/demo-gpt --output_dir exported/demo-gpt
  python -m pipeline.export --checkpoint runs/demo-gpt/checkpoints/step-00000100 --output_dir step100 --dtype fp32
"""

_STAGES = 3
SHARD_SIZE = "5GB"
"""Larger models are written as several files of at most this size, as the hub's are."""


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


@dataclass(frozen=True)
class Exported:
    """What an export has done. parameters: tied ones once. validation: (step, loss in nats a token) of the run's last
    evaluation up to the checkpoint, where there is one."""

    checkpoint: Path
    parameters: int
    dtype: str
    validation: tuple[int, float] | None
    passed: "Passed"


def export(
    checkpoint_dir: Path,
    output_dir: Path,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    averaged: bool = False,
) -> Exported:
    """Writes the Hugging Face folder `output_dir`, of the last weights or, `averaged`, of their moving average.

    It gets its name when it has passed the gate; a model that `overwrite` replaces is kept until then. Raises UserError
    for a missing or damaged checkpoint, an output folder that holds something else, or a model without `overwrite`, and
    for a folder that does not compute what the checkpoint does.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    from pipeline.model_card import model_card

    logging.disable_progress_bar()
    silence_accelerator_notice()  # transformers imports DeepSpeed where accelerate is installed
    if overwrite and output_dir.exists() and not (output_dir / "config.json").exists():
        raise UserError(f"--overwrite: {output_dir} is no exported model (it has no config.json); remove it yourself")
    run_dir, folder = find_checkpoint(checkpoint_dir)
    run, info = read_run(run_dir), checkpoint.read_info(folder)
    recipe = check_recipe(run["recipe"], str(run_dir / RUN_NAME))
    values = dict(run["model_config"])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    evaluations = read_validation(run_dir, "ema_loss" if averaged else "loss")
    losses = [evaluation for evaluation in evaluations if evaluation[0] <= info.step]
    written = dtype or info.precision
    # Where the folder keeps the training precision exactly, that is what is compared; else what it was rounded to.
    compared = info.precision if written == "fp32" else written
    with torch.device("meta"):
        model = auto_class(recipe.objective, recipe.pack_settings.is_pairs).from_config(config)

    def weights_in(precision: str) -> "dict[str, torch.Tensor]":
        model.to(getattr(torch, TORCH_DTYPES[precision]))
        return model_weights(folder, info.zero_stage, model, recipe, averaged=averaged)

    try:
        with (
            durable.replacing_folder(output_dir, overwrite=overwrite) as temporary,
            bar("export: checksums", "stage", _STAGES) as stages,
        ):
            checkpoint.verify(folder, info)
            _next(stages, "weights")
            write_model(temporary, model, weights_in(written), recipe.objective)
            write_tokenizer(run_dir / TOKENIZER_FOLDER, temporary, recipe.objective, longest_input(config))
            card = model_card(run, recipe, info.step, info.samples, losses, info.precision)
            durable.write_bytes(temporary / "README.md", card.encode())
            _next(stages, "comparison")
            passed = pass_gate(temporary, run_dir, config, recipe, weights_in(compared), compared)
            _next(stages, "done")
    except FileExistsError:
        raise UserError(f"--output_dir {output_dir} is not empty; give another folder or --overwrite") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Exported(folder, parameters, written, losses[-1] if losses else None, passed)


def _next(stages: "tqdm[Any]", name: str) -> None:
    stages.set_description(f"export: {name}", refresh=False)
    stages.update()


def model_weights(
    folder: Path, zero_stage: int, model: "PreTrainedModel", recipe: Recipe, *, averaged: bool
) -> "dict[str, torch.Tensor]":
    """A checkpoint's weights, or their average, as `model` (on the meta device) has them: in its precision, without
    the padding of the vocabulary. Raises UserError when they are another model's."""
    from pipeline.checkpoint_weights import read_weights

    weights = read_weights(folder, zero_stage, model.dtype)
    own = model.state_dict()
    if different := own.keys() ^ weights.keys():
        raise UserError(f"{folder} holds another model than {RUN_NAME} describes: {', '.join(sorted(different)[:3])}")
    if averaged:
        found = ema_weights(folder, zero_stage, model, recipe.optimizer)
        weights |= {name: tensor.to(model.dtype) for name, tensor in found.items()}
    return strip_padding(weights, own)


def write_model(folder: Path, model: "PreTrainedModel", weights: "dict[str, torch.Tensor]", objective: str) -> None:
    """Writes config.json, generation_config.json and safetensors of a model on the meta device with these weights,
    which it takes out of `weights`."""
    from transformers import GenerationConfig

    model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    if objective == "causal":
        config = model.config
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            do_sample=True,
        ).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        os.chmod(path, 0o666 & ~_umask())  # safetensors' own are for this user alone


def pass_gate(
    folder: Path,
    run_dir: Path,
    config: "PretrainedConfig",
    recipe: Recipe,
    weights: "dict[str, torch.Tensor]",
    precision: str,
) -> "Passed":
    """Raises UserError unless `folder`, opened by transformers alone, computes what the run's model computes with these
    weights; they are given up on the way."""
    import torch

    from pipeline.export_gate import check_folder, compute_expected, held_out
    from pipeline.model import model_with_weights

    pairs, tokenizer = recipe.pack_settings.is_pairs, run_dir / TOKENIZER_FOLDER
    dtype = getattr(torch, TORCH_DTYPES[precision])
    samples = held_out(recipe, run_dir, tokenizer, config.get_text_config().vocab_size, dtype.itemsize)
    with tempfile.TemporaryDirectory() as temporary:
        model = model_with_weights(
            config, recipe.objective, weights, dtype, pairs=pairs, has_boundaries=recipe.has_boundaries
        )
        expected = compute_expected(model, samples, 2 if pairs else 1, Path(temporary))
        del model
        weights.clear()
        return check_folder(
            folder,
            expected,
            samples,
            auto_class=auto_class(recipe.objective, pairs).__name__,
            dtype=TORCH_DTYPES[precision],
            encoder=Encoder(tokenizer),
        )


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def write_tokenizer(source: Path, target: Path, objective: str, longest: int) -> None:
    """Copies a run's tokenizer. For masked LM it gets BERT's frame ([CLS] text [SEP]), the mask token is
    recognised in text, as `fill-mask` needs, and texts may be cut to the `longest` tokens that the model takes."""
    for path in tokenizer_files(source):
        durable.write_bytes(target / path.name, path.read_bytes())
    if objective != "mlm":
        return
    special = load_tokenizer_info(source).special
    tokenizer_path, config_path = target / "tokenizer.json", target / "tokenizer_config.json"
    config = json.loads(config_path.read_bytes())
    config["split_special_tokens"] = False
    config["model_max_length"] = longest
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


def describe(output_dir: Path, done: Exported) -> str:
    """What was exported, in lines."""
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    passed = done.passed
    lines = [
        f"{output_dir}: a Hugging Face model of {done.parameters / 1e6:,.1f} M parameters in {done.dtype},"
        f" {size / 1e6:,.1f} MB, from {done.checkpoint}"
    ]
    if done.validation is not None:
        step, loss = done.validation
        lines.append(f"  validation    loss {loss:.4f} nats a token after step {step}")
    of_samples = "" if passed.loss is None else f" (loss {passed.loss:.4f})"
    lines.append(
        f"  checked       with transformers alone: logits of {passed.samples} {passed.source}{of_samples} equal the"
        f" checkpoint's bit for bit, ids of {passed.texts} texts the run's"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)

    def command() -> int:
        done = export(
            arguments.checkpoint,
            arguments.output_dir,
            arguments.dtype,
            overwrite=arguments.overwrite,
            averaged=arguments.ema,
        )
        print(describe(arguments.output_dir, done))
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
