"""The last step of an export: does the folder compute what the checkpoint computes?

Held-out samples of the run go through the model as it is trained, built from `run.json` and the checkpoint. The folder
is then opened by transformers alone, in another process that has none of our code (`plain_transformers.py`), and its
outputs have to be the same bits. Whatever could be wrong with a folder (weights, names, ties, configuration, precision,
tokenizer) shows there, at the price of some forward passes.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import Encoder
from data_prep.errors import UserError
from pipeline import plain_transformers
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAMPLES = 8
_SAMPLE_TOKENS = 1024
_LOGITS_BYTES = 1 << 28  # of all samples together
_TEXT_CHARACTERS = 2000


@dataclass(frozen=True)
class HeldOut:
    """What the gate feeds a model.

    source: what it is, in words. input_ids [samples, sequence], int64; token_types likewise, where there are pairs.
    labels: what positions are to predict, -100 where nothing [samples, sequence]; None where that is not known.
    """

    source: str
    input_ids: NDArray[np.int64]
    token_types: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None

    def arguments(self, sample: int) -> "dict[str, torch.Tensor]":
        """Of the model's forward, for a batch of this one sample."""
        import torch

        row = slice(sample, sample + 1)
        arguments = {"input_ids": torch.from_numpy(self.input_ids[row])}
        if self.token_types is not None:
            arguments["token_type_ids"] = torch.from_numpy(self.token_types[row])
        return arguments


@dataclass(frozen=True)
class Passed:
    """What was compared. loss: of the samples in nats a target, without keeping their documents apart; None for ids
    that are made up. texts: that the tokenizer was tried on."""

    samples: int
    source: str
    loss: float | None
    texts: int


def held_out(recipe: Recipe, run_dir: Path, tokenizer: Path, vocab_size: int, bytes_a_number: int) -> HeldOut:
    """Some of the run's validation samples, or made-up ids where its data are gone, have changed, or hold none out.

    tokenizer: the run's. vocab_size, bytes_a_number: of logits, whose size bounds the number of samples.
    """
    from pipeline.data import open_data
    from pipeline.provenance import check_data

    length = min(recipe.data.sequence_length, _SAMPLE_TOKENS)
    samples = max(1, min(_SAMPLES, _LOGITS_BYTES // (length * vocab_size * bytes_a_number)))
    try:
        section = recipe.data.model_copy(update={"tokenizer": str(tokenizer)})
        data = open_data(recipe.model_copy(update={"data": section}))
        check_data(run_dir, data)
    except (UserError, OSError) as error:
        reason = str(error).split(";")[0]
    else:
        if data.validation.size:
            batch = data.validation.batch_at(data.validation.held_out(samples))
            token_types = None if batch.token_types is None else batch.token_types[:, :length].astype(np.int64)
            input_ids = batch.input_ids[:, :length].astype(np.int64)
            return HeldOut("held-out samples", input_ids, token_types, batch.labels[:, :length])
        reason = "the run holds nothing out"
    ids = np.random.default_rng(0).integers(vocab_size, size=(samples, length))
    return HeldOut(f"samples of made-up ids ({reason})", ids)


@dataclass(frozen=True)
class Expected:
    """What the checkpoint's model computes. samples: safetensors files with a sample's arguments and outputs. digests:
    of its weights. loss: in nats a target, where there are targets."""

    samples: list[str]
    digests: dict[str, str]
    loss: float | None


def compute_expected(model: "PreTrainedModel", samples: HeldOut, outputs: int, folder: Path) -> Expected:
    """Writes a file a sample with the model's first `outputs` outputs into `folder`."""
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional

    total, targets, files = 0.0, 0, []
    for sample in range(len(samples.input_ids)):
        arguments = samples.arguments(sample)
        with torch.no_grad():
            found = model(**arguments, return_dict=False)[:outputs]
        tensors = {f"output_{index}": output.contiguous() for index, output in enumerate(found)}
        files.append(str(folder / f"sample_{sample}.safetensors"))
        save_file(arguments | tensors, files[-1])
        if samples.labels is not None:
            labels = torch.from_numpy(samples.labels[sample])
            total += float(functional.cross_entropy(found[0][0].float(), labels, reduction="sum"))
            targets += int((labels >= 0).sum())
    return Expected(files, plain_transformers.digests(model), total / targets if targets else None)


def check_folder(
    folder: Path, expected: Expected, samples: HeldOut, *, auto_class: str, dtype: str, encoder: Encoder
) -> Passed:
    """Raises UserError unless plain transformers has, in `dtype`, the expected weights and outputs, and makes the
    encoder's ids of held-out text."""
    import torch

    texts = _texts(samples, encoder)
    job = {
        "folder": str(folder),
        "auto_class": auto_class,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "samples": expected.samples,
        "digests": expected.digests,
        "texts": texts,
        "ids": [ids.tolist() for ids in encoder.encode_batch(texts)],
    }
    refuse_differences(_in_a_process_of_its_own(job), folder)
    return Passed(len(samples.input_ids), samples.source, expected.loss, len(texts))


def refuse_differences(findings: dict[str, Any], folder: Path) -> None:
    """Raises UserError saying what differs, by the findings of `plain_transformers.main`."""
    if findings["modules"]:
        raise UserError(f"{folder}: transformers alone imported {', '.join(findings['modules'])}; not exported")
    if wrong := findings["weights"]:
        raise UserError(
            f"the exported weights read back differently ({len(wrong)}: {', '.join(wrong[:3])}); nothing is exported"
        )
    for number, sample in enumerate(findings["samples"]):
        if not sample["equal"]:
            found = (
                f"{sample['share']:.1%} of its outputs differ, by up to {sample['largest']:g}"
                if sample["largest"] is not None
                else f"its outputs have the shapes {sample['shapes']} (found, expected)"
            )
            raise UserError(
                f"transformers computes something else from the exported folder than the checkpoint does: sample"
                f" {number}: {found}; nothing is exported"
            )
    if not all(findings["texts"]):
        raise UserError(
            f"AutoTokenizer makes other ids than the run's tokenizer of {findings['texts'].count(False)} of"
            f" {len(findings['texts'])} held-out texts; nothing is exported"
        )


def _texts(samples: HeldOut, encoder: Encoder) -> list[str]:
    """The samples' text, without texts in which a masked LM's tokenizer would recognise a special token."""
    names = encoder.special_tokens()
    texts = []
    for row in samples.input_ids:
        text = encoder.decode(row)[:_TEXT_CHARACTERS]
        for name in names:
            text = text.replace(name, " ")
        texts.append(text)
    return texts


def _in_a_process_of_its_own(job: dict[str, Any]) -> dict[str, Any]:
    """plain_transformers.main(job) without PYTHONPATH, working directory and network."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-I", plain_transformers.__file__, file.name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()[-1]
        raise UserError(f"transformers cannot open the exported folder ({reason}); nothing is exported")
    findings: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return findings
