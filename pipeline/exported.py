"""Exported models, and other Hugging Face folders of language models, as the commands that use them open them.

The tokenizer is `data_prep.encoding`'s where text becomes ids as in training: no special token is added, and none is
recognised in the text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.encoding import Encoder, TokenizerInfo, load_tokenizer_info
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "config.json"
DTYPES = ("auto", "bf16", "fp16", "fp32")
_CAUSAL = ("LMHeadModel", "ForCausalLM")
_MASKED = ("ForMaskedLM", "ForPreTraining")
_KINDS = {"causal": "a causal language model (GPT)", "mlm": "a masked language model (BERT)"}


@dataclass(frozen=True)
class Exported:
    """A model in eval mode on the GPU where there is one, and its tokenizer. objective: "causal" or "mlm"."""

    folder: Path
    objective: str
    model: "PreTrainedModel"
    tokenizer: TokenizerInfo
    encoder: Encoder


def objective_of(folder: Path, expected: str | None = None) -> str:
    """ "causal" or "mlm", by the class that the folder's config.json names; nothing heavy is imported.

    Raises UserError where there is no such model, or it is not the `expected` one.
    """
    path = folder / CONFIG_NAME
    try:
        config: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"--model {folder} is no Hugging Face model folder (it has no {CONFIG_NAME}); make one with `python -m"
            " pipeline.export`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: {path} cannot be read as JSON ({error})") from None
    names = config.get("architectures") if isinstance(config, dict) else None
    name = str(names[0]) if names else "no architecture"
    found = "causal" if name.endswith(_CAUSAL) else "mlm" if name.endswith(_MASKED) else None
    if found is None or expected not in (None, found):
        kind = _KINDS[expected] if expected else "a causal or masked language model"
        raise UserError(f"--model {folder} holds {name}, expected {kind}")
    return found


def load_exported(folder: Path, objective: str | None = None, dtype: str = "auto") -> Exported:
    """Opens a folder, whose model has to be of this objective (None: either).

    dtype: bf16, fp16, fp32, or auto: as the weights are kept. Raises UserError when it holds no such model or no
    tokenizer.
    """
    found = objective_of(folder, objective)
    info = load_tokenizer_info(folder)
    return Exported(folder, found, load_model(folder, found, dtype), info, Encoder(folder))


def load_model(folder: Path, objective: str, dtype: str = "auto", **options: Any) -> "PreTrainedModel":
    """The folder's model in eval mode, on the GPU where there is one; options: of from_pretrained."""
    import torch
    from transformers.utils import logging

    from pipeline.ds_config import TORCH_DTYPES
    from pipeline.model import auto_class

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = auto_class(objective).from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, TORCH_DTYPES[dtype]), **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder} cannot be loaded ({str(error).splitlines()[0]})") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
