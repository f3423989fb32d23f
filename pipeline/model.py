"""Models from transformers configurations: which one, its size, its cost."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.encoding import TokenizerInfo
from data_prep.errors import UserError, nearest
from pipeline.attention import check_supported, first_position, register
from pipeline.initialization import initialize
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

MODELS = Path(__file__).parent / "models"
# Names under which configurations keep the number of positions that the model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def read_model_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """The transformers configuration that a recipe's `model.config` names, as a dict with `model_type`.

    Raises UserError for an unknown name, an unreadable file, or a file without model_type.
    """
    if isinstance(config, dict):
        changes = dict(config)
        base = changes.pop("base", None)
        known = read_model_config(base) if base is not None else {}
        if base is not None:
            from transformers import AutoConfig

            valid = sorted({*known, *AutoConfig.for_model(known["model_type"]).to_dict()})
            for key in changes:
                if key not in valid:
                    raise UserError(f"model.config: {base} has no {key!r}; {nearest(key, valid)}")
        merged = {**known, **changes}
        if "model_type" not in merged:
            raise UserError("model.config: give `base` (a shipped name or a config.json) or `model_type`")
        return merged
    shipped = sorted(path.stem for path in MODELS.glob("*.json"))
    path = MODELS / f"{config}.json" if config in shipped else Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"model.config is {config!r}: no such file, and not shipped; {nearest(config, shipped)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.config: {path} cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise UserError(f"model.config: {path} has no model_type; expected a transformers config.json")
    return found


def make_model_config(recipe: Recipe, tokenizer: TokenizerInfo) -> "PretrainedConfig":
    """The transformers configuration of a recipe's model, with the tokenizer's vocabulary and special tokens.

    Raises UserError when transformers does not know the model type or has no such objective for it, or when a sample
    is longer than the model's positions.
    """
    from transformers import AutoConfig

    values = read_model_config(recipe.model.init_from or recipe.model.config)
    model_type = values.pop("model_type")
    special = tokenizer.special
    padding = special.padding if special.padding is not None else special.end_of_document
    values.update(bos_token_id=special.end_of_document, eos_token_id=special.end_of_document, pad_token_id=padding)
    if recipe.model.init_from is None:
        values["vocab_size"] = tokenizer.vocab_size
    try:
        config = AutoConfig.for_model(model_type, **values)
    except ValueError:
        raise UserError(f"model.config: transformers knows no model_type {model_type!r}") from None
    except TypeError as error:
        raise UserError(f"model.config: {error}") from None
    if type(config) not in auto_class(recipe.objective)._model_mapping:
        raise UserError(f"objective is {recipe.objective}, which transformers has no {model_type} model for")
    if recipe.objective == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True  # an encoder's model would see what it is to predict
    pairs = recipe.pack_settings.is_pairs
    if pairs and not _has_pair_head(config):
        raise UserError(f"data.packing is {recipe.data.packing}, which transformers has no {model_type} model for")
    if recipe.has_boundaries:
        check_supported(config)
    longest, first = longest_input(config), first_position(config)
    if recipe.data.sequence_length > longest:
        kept = f", of which it keeps the first {first} for padding" if first else ""
        raise UserError(
            f"data.sequence_length is {recipe.data.sequence_length}, but the model has {longest + first}"
            f" positions{kept} ({model_type}); shorten the samples or raise the model's positions"
        )
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.init_from has a vocabulary of {config.vocab_size}, the tokenizer {tokenizer.vocab_size}: use the"
            " tokenizer that the model came with"
        )
    return config


def longest_input(config: "PretrainedConfig") -> int:
    """Tokens that a model of this configuration takes at once; 2^30 where its positions have no end."""
    text = config.get_text_config()
    positions = next((getattr(text, name) for name in _POSITIONS if getattr(text, name, None)), 1 << 30)
    return int(positions) - first_position(config)


def _has_pair_head(config: "PretrainedConfig") -> bool:
    """Whether transformers' model for pretraining has a head for sentence pairs beside masked LM's."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING

    of_albert = config.model_type == "albert"
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and (
        of_albert or type(config) in MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING
    )


def auto_class(objective: str, pairs: bool = False) -> Any:
    """transformers' class that makes the model of an objective: AutoModelForCausalLM, AutoModelForMaskedLM, or
    AutoModelForPreTraining for masked LM with pairs."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

    if pairs:
        return AutoModelForPreTraining
    return AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM


def build_model(
    config: "PretrainedConfig",
    objective: str,
    seed: int,
    init_from: str | None = None,
    *,
    pairs: bool = False,
    has_boundaries: bool = True,
) -> "PreTrainedModel":
    """The model in float32 with initial weights drawn from `seed`, or the weights of `init_from`.

    pairs: with a head for sentence pairs. has_boundaries: able to keep the documents of a sample apart. The model's
    configuration is a copy.
    """
    import torch

    heads = auto_class(objective, pairs)
    attention = register() if has_boundaries else "sdpa"
    options = {"config": copy.deepcopy(config), "dtype": torch.float32, "attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init_from is not None:
            return heads.from_pretrained(init_from, **options)
        model = heads.from_config(**options)
        initialize(model)
        return model


def model_with_weights(
    config: "PretrainedConfig",
    objective: str,
    weights: "dict[str, torch.Tensor]",
    dtype: "torch.dtype",
    *,
    pairs: bool = False,
    has_boundaries: bool = True,
) -> "PreTrainedModel":
    """The model that `build_model` makes, in `dtype` and eval mode, with these weights: the very tensors where they are
    of that type. Raises UserError when they are not all and only the model's."""
    model_class = auto_class(objective, pairs)._model_mapping[type(config)]
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        dtype=dtype,
        attn_implementation=register() if has_boundaries else "sdpa",
        output_loading_info=True,
    )
    if wrong := {name: sorted(found)[:3] for name, found in loading.items() if found}:
        raise UserError(f"the weights are not those of the {config.model_type} that the run describes: {wrong}")
    return model


@dataclass(frozen=True)
class ModelSize:
    """parameters: all of them, tied ones once. matrix_parameters: those that each token is multiplied with (all but
    the position and input embeddings; a tied input embedding counts, being the output matrix as well).

    flops_a_token: of forward and backward, 6 a matrix parameter and 12 x layers x hidden x sequence for attention,
    halved by the causal mask (Narayanan et al. 2021, section 5.1; PaLM, Chowdhery et al. 2022, appendix B).
    """

    parameters: int
    matrix_parameters: int
    flops_a_token: float


def measure_model(model: "PreTrainedModel", objective: str, sequence_length: int) -> ModelSize:
    from torch import nn

    parameters = sum(parameter.numel() for parameter in model.parameters())
    output = model.get_output_embeddings()
    tied = None if output is None else output.weight
    looked_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not tied
    )
    text = model.config.get_text_config()
    attention = 12.0 * text.num_hidden_layers * text.hidden_size * sequence_length
    matrix = parameters - looked_up
    return ModelSize(parameters, matrix, 6.0 * matrix + (attention / 2 if objective == "causal" else attention))
