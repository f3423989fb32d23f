"""The recipe: what is trained. A YAML file and `--section.field value` flags, checked once into frozen objects.

Validation is pydantic's (DeepSpeed brings it along): types, ranges and unknown keys; the messages are ours.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from data_prep.errors import UserError, nearest
from data_prep.packing import OF_SENTENCES, PACKINGS, PAIRS
from data_prep.plan import DEFAULT_SHORT_SEQ_PROB, PackSettings
from pipeline.stages import BatchSizes

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "demo-gpt.yaml"

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Step = Annotated[int, Field(ge=0)]
Weights = dict[str, Annotated[float, Field(ge=0)]]
CORPUS = "corpus"
"""The name of a run's one corpus where the recipe names none."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            # pydantic would read it as 0 or 1
            raise ValueError(f"found the truth value {str(value).lower()}, which this field does not take")
        return value


class ModelSection(_Section):
    config: str | dict[str, Any] = Field(
        description="a shipped name (pipeline/models), the path of a transformers config.json, or a mapping with `base`"
        " (one of these) and the values to change; --model.config.KEY VALUE changes one"
    )
    init_from: str | None = Field(None, description="Hugging Face model folder whose weights training starts from")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="what the backward pass computes again instead of keeping: nothing, every layer, or all but its"
        " matrix products",
    )
    pad_vocab_to_multiple_of: Positive = Field(
        64, description="rows of zeros fill the embeddings up to a multiple of so many, until export; 1: none"
    )


class DataSection(_Section):
    shards: str | dict[str, str] = Field(
        description="folder of token shards or of a mixture, or a mapping of corpora to such folders of shards"
    )
    weights: Weights | dict[Step, Weights] | None = Field(
        None,
        description="share of the samples drawn from each corpus: corpus to number, or step to such a mapping from that"
        " step on (null: the mixture's own, else as their tokens)",
    )
    tokenizer: str = Field(description="tokenizer folder that made the shards")
    sequence_length: Positive = Field(description="tokens of a sample")
    packing: Literal["concatenate", "best_fit", "document", "full_sentences", "nsp", "sop"] = Field(
        "concatenate",
        description="how documents become samples (`python -m data_prep pack --help`); nsp and sop add that objective",
    )
    short_seq_prob: Probability | None = Field(
        None, description=f"share of shorter samples (null: {DEFAULT_SHORT_SEQ_PROB} for nsp and sop, else 0)"
    )
    document_attention: bool = Field(
        True, description="documents in one sample do not see each other, and positions restart in each"
    )
    validation_fraction: float = Field(0.005, ge=0, lt=1, description="share of the documents that is held out")
    prepare: str | None = Field(None, description="data_prep job file to run first when the shards are missing")

    @property
    def folders(self) -> dict[str, str]:
        """The folders that the recipe names, by corpus."""
        return self.shards if isinstance(self.shards, dict) else {CORPUS: self.shards}

    @property
    def weight_stages(self) -> dict[int, Weights] | None:
        """The weights from each step on, the first at 0."""
        if self.weights is None or all(isinstance(key, int) for key in self.weights):
            return self.weights  # type: ignore[return-value]
        return {0: self.weights}  # type: ignore[dict-item]

    @model_validator(mode="after")
    def _weights_fit(self) -> "DataSection":
        for step, weights in (self.weight_stages or {}).items():
            if isinstance(self.shards, dict):
                for name in weights:
                    if name not in self.shards:
                        raise ValueError(f"data.weights names {name!r}; {nearest(name, self.shards)}")
            if not any(weights.values()):
                raise ValueError(f"data.weights at step {step} has no corpus with a weight above 0")
        if self.weights is not None and 0 not in (self.weight_stages or {}):
            raise ValueError("data.weights has no stage for step 0, where the run begins")
        return self


class TrainingSection(_Section):
    global_batch_size: Positive | dict[Step, Positive] = Field(
        description="samples of one optimizer step, over all ranks; a mapping ramps it: step to size from that step on"
    )
    max_steps: Positive | None = Field(None, description="optimizer steps of the run")
    max_tokens: Positive | None = Field(None, description="tokens of the run, instead of max_steps")
    skip_samples: dict[Step, Positive] | None = Field(
        None,
        description="samples that are passed over before a step takes its own: step, from 0, to number; what a rollback"
        " skips is added to it (null: none)",
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give either max_steps or max_tokens")
        if 0 not in self.batch_sizes.stages:
            raise ValueError("training.global_batch_size has no size for step 0, where the run begins")
        return self

    @property
    def batch_sizes(self) -> BatchSizes:
        size = self.global_batch_size
        return BatchSizes(size if isinstance(size, dict) else {0: size}, self.skip_samples or {})


class OptimizerSection(_Section):
    type: Literal["AdamW", "Lamb", "Lion", "Muon"] = Field(
        "AdamW",
        description="AdamW (Loshchilov & Hutter 2019), Lamb (You 2020; ZeRO stage 0), Lion (Chen 2023; lr 3 to 10 times"
        " below AdamW's), or Muon (Jordan 2024) for the layers' matrices and AdamW for the rest, at AdamW's lr",
    )
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="decay rates of the moments")
    momentum: DecayRate = Field(0.95, description="decay rate of Muon's moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment (not Lion)")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay; not on biases and norms")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay a step of a moving average of the weights, which evaluations report beside the last ones and"
        " `export --ema` writes (null: none)",
    )

    @field_validator("type", mode="before")
    @classmethod
    def _is_offered(cls, value: Any) -> Any:
        if str(value).lower() in ("onebitadam", "zerooneadam", "onebitlamb"):
            raise ValueError(
                f"found {value}, which DeepSpeed no longer has (0.19.8 is without its 1-bit optimizers); expected"
                " AdamW, Lamb, Lion or Muon"
            )
        return value


class ScheduleSection(_Section):
    type: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "one_cycle"] = Field(
        "cosine",
        description="shape after warm-up: half a cosine, a line, none, warm-up-stable-decay (Hu 2024), the inverse"
        " square root (Vaswani 2017) or one cycle (Smith 2018)",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of warm-up from 0 (linear; one_cycle: a cosine from lr / 25)")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step (inverse_sqrt: the smallest)")
    warmup_tokens: Positive | None = Field(None, description="tokens of warm-up, instead of warmup_steps")
    decay_steps: Positive | None = Field(None, description="steps of the decay of wsd")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the run's steps that they are, instead of decay_steps (null, without these: 0.2)"
    )
    decay_shape: Literal["1-sqrt", "linear"] = Field(
        "1-sqrt", description="of the decay of wsd: 1 minus a square root (Haegele 2024), or a line"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleSection":
        if self.warmup_steps and self.warmup_tokens:
            raise ValueError("give either schedule.warmup_steps or schedule.warmup_tokens")
        if self.decay_steps and self.decay_fraction:
            raise ValueError("give either schedule.decay_steps or schedule.decay_fraction")
        of_decay = ("decay_steps", "decay_fraction", "decay_shape")
        for name in of_decay if self.type != "wsd" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"schedule.{name} does nothing for type {self.type}; leave it out, or take wsd")
        if self.type in ("inverse_sqrt", "one_cycle") and not (self.warmup_steps or self.warmup_tokens):
            raise ValueError(f"schedule.type {self.type} needs a warm-up; give warmup_steps or warmup_tokens")
        return self


class MaskingSection(_Section):
    """Each rate is a number, or a mapping of steps to numbers with straight lines between them."""

    unit: Literal["token", "word", "span"] = Field(
        "token", description="what is chosen: tokens (BERT), whole words, or spans of words (SpanBERT)"
    )
    probability: Probability | dict[Step, Probability] = Field(
        0.15, description="share of the tokens that are targets (BERT, section 3.1); steps to shares for a schedule"
    )
    mask: Probability | dict[Step, Probability] = Field(
        0.8, description="share of the targets shown as the mask token; may be a schedule"
    )
    random: Probability | dict[Step, Probability] = Field(
        0.1, description="share of the targets shown as a random token; the rest stay; may be a schedule"
    )

    @model_validator(mode="after")
    def _shares(self) -> "MaskingSection":
        values = [list(rate.values()) if isinstance(rate, dict) else [rate] for rate in (self.mask, self.random)]
        if max(values[0]) + max(values[1]) > 1:
            raise ValueError(f"mask + random is {max(values[0]) + max(values[1]):g}, expected at most 1")
        return self


class CausalSection(_Section):
    """What may be done to the samples of objective causal."""

    fim_rate: Probability = Field(
        0.0, description="share of the documents turned for fill-in-the-middle (Bavarian 2022)"
    )
    fim_spm_rate: Probability = Field(0.5, description="share of those in the order suffix, prefix, middle")
    fim_prefix: str = Field("<|fim_prefix|>", description="token before the prefix")
    fim_middle: str = Field("<|fim_middle|>", description="token before the middle")
    fim_suffix: str = Field("<|fim_suffix|>", description="token before the suffix")
    goldfish_k: int = Field(0, ge=0, description="leave one in k tokens out of the loss (Hans 2024); 0: none")
    goldfish_context: Positive = Field(13, description="tokens before it that decide whether a token is left out")
    loss_after_end: bool = Field(
        True, description="false: the token behind an end of document is no target (Megatron's eod_mask_loss)"
    )


class CurriculumSection(_Section):
    """Sequence-length warm-up: samples are read as stretches that do not see each other, ever longer ones. Random
    layer-token drop: middle layers see a part of the tokens, an ever larger one."""

    start_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="tokens of a stretch at step 0; null: whole samples from the start"
    )
    length_steps: Positive = Field(1000, description="steps until a stretch is a whole sample")
    length_multiple: Positive = Field(8, description="stretches are rounded down to a multiple of so many tokens")
    token_drop_start: Positive | None = Field(
        None, description="tokens of a sample that middle layers see at step 0 (random-LTD's min_value); null: all"
    )
    token_drop_steps: Positive = Field(1000, description="steps until they see all (its require_steps)")
    token_drop_multiple: Positive = Field(8, description="their number is rounded down so (its seq_per_step)")

    @model_validator(mode="after")
    def _multiples(self) -> "CurriculumSection":
        if (self.token_drop_start or 0) % self.token_drop_multiple:
            raise ValueError(
                f"curriculum.token_drop_start is {self.token_drop_start}, not a multiple of token_drop_multiple"
                f" {self.token_drop_multiple}"
            )
        return self


class LossSection(_Section):
    z_loss: float = Field(0.0, ge=0, description="times log^2 Z, added to a target's loss (PaLM, section 5: 1e-4)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the uniform distribution in the targets (Szegedy et al. 2016, section 7)"
    )


class EvaluationSection(_Section):
    every_steps: int = Field(1000, ge=0, description="steps between evaluations; 0: only before and after training")
    samples: Positive = Field(2048, description="held-out samples of an evaluation, at most")
    text_samples: int = Field(
        2, ge=0, description="held-out texts that an evaluation continues (mlm: fills in) for TensorBoard to show"
    )
    histograms_every_steps: int = Field(
        0, ge=0, description="steps between histograms of weights, their norms and their updates'; 0: none"
    )


class CheckpointSection(_Section):
    every_steps: int = Field(1000, ge=0, description="steps between checkpoints; 0: none by steps, only at the end")
    every_minutes: float | None = Field(None, gt=0, description="minutes between checkpoints, beside every_steps")
    keep_last: Positive = Field(3, description="newest checkpoints that are kept")
    keep_every: Positive | None = Field(None, description="checkpoints of every such step are kept as well, for good")
    background: bool = Field(True, description="write beside training, from a copy in host memory")
    max_failures: Positive = Field(3, description="failed checkpoints (a full disk) in a row that end the run")


class FaultsSection(_Section):
    """What a run does about what goes wrong in it."""

    max_skips: Positive = Field(
        10, description="steps in a row that may be left out because their loss or gradients are not finite"
    )
    on_skips: Literal["stop", "rollback"] = Field(
        "stop",
        description="after so many: end the run, or go back to the last checkpoint and pass over the samples since",
    )
    spike_zscore: Annotated[float, Field(gt=0)] | None = Field(
        10.0,
        description="a loss so many robust deviations (1.4826 x MAD) above the median of the last 64 is a spike"
        " (null: none is)",
    )
    on_spike: Literal["report", "rollback"] = Field("report", description="a line, or as on_skips")
    hang_seconds: float = Field(
        600.0,
        ge=0,
        description="without progress for so long a run ends, naming the rank that is behind; 4 times as long for the"
        " first step, an evaluation and a checkpoint (0: never)",
    )


class Recipe(_Section):
    """One run. The same recipe and seed give the same samples, masks and learning rates on any hardware."""

    objective: Literal["causal", "mlm"] = Field(description="causal (GPT) or mlm (BERT)")
    seed: int = Field(1234, ge=0, lt=1 << 63, description="of initial weights, sample order, masks and dropout")
    model: ModelSection
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    masking: MaskingSection = MaskingSection()
    causal: CausalSection = CausalSection()
    curriculum: CurriculumSection = CurriculumSection()
    loss: LossSection = LossSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    faults: FaultsSection = FaultsSection()

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.training.max_steps is not None:
            return self.training.max_steps
        assert self.training.max_tokens is not None
        samples = -(-self.training.max_tokens // self.data.sequence_length)
        return self.training.batch_sizes.steps_for(samples)

    @property
    def has_boundaries(self) -> bool:
        """Whether attention has to stop anywhere within a row: at documents, stretches or padding."""
        padded = self.objective == "mlm" and self.data.packing != "concatenate"
        return self.data.document_attention or padded or self.curriculum.start_length is not None

    @property
    def pack_settings(self) -> PackSettings:
        """How the samples are packed; raises UserError for what makes no plan."""
        data, short = self.data, self.data.short_seq_prob
        if short is None:
            short = DEFAULT_SHORT_SEQ_PROB if data.packing in PAIRS else 0.0
        return PackSettings(self.objective, data.sequence_length, data.packing, data.validation_fraction, short)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr is {self.schedule.min_lr}, above optimizer.lr {self.optimizer.lr}")
        # A warm-up longer than the run is allowed: a short trial of a long recipe.
        if self.data.packing not in PACKINGS[self.objective]:
            raise ValueError(
                f"data.packing is {self.data.packing}, which objective {self.objective} has not; expected one of"
                f" {', '.join(PACKINGS[self.objective])}"
            )
        if self.data.short_seq_prob and self.data.packing not in OF_SENTENCES:
            raise ValueError(f"data.short_seq_prob needs packing {', '.join(OF_SENTENCES)}; found {self.data.packing}")
        if self.objective != "causal" and self.causal != CausalSection():
            raise ValueError(f"the causal section does nothing for objective {self.objective}; leave it out")
        if self.objective != "mlm" and self.masking != MaskingSection():
            raise ValueError(f"the masking section does nothing for objective {self.objective}; leave it out")
        for name in ("start_length", "token_drop_start"):
            if (getattr(self.curriculum, name) or 0) > self.data.sequence_length:
                raise ValueError(
                    f"curriculum.{name} is {getattr(self.curriculum, name)}, above data.sequence_length"
                    f" {self.data.sequence_length}"
                )
        return self


def fields() -> dict[str, tuple[type[_Section], str]]:
    """Every field by its dotted name, with the section class and attribute that hold it."""
    found: dict[str, tuple[type[_Section], str]] = {}
    for name, info in Recipe.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            found.update({f"{name}.{field}": (section, field) for field in section.model_fields})
        else:
            found[name] = (Recipe, name)
    return found


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, unchecked; raises UserError when there is none."""
    try:
        raw = yaml.load(path.read_text(), _UniqueKeyLoader)
    except FileNotFoundError:
        shipped = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise UserError(f"--recipe {path}: no such file; shipped in {RECIPES.name}/: {', '.join(shipped)}") from None
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({_problem(error)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections (objective, model, data, ...)")
    for key, value in raw.items():
        section = Recipe.model_fields.get(str(key))
        if section is None:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), list(Recipe.model_fields))}")
        is_section = isinstance(section.annotation, type) and issubclass(section.annotation, _Section)
        if is_section and not isinstance(value, dict):
            raise UserError(f"{path}: {key}: expected a mapping, found {value!r}")
    return raw


_MEMBER = re.compile(r"str|int|float|constrained-\w+|dict\[.*\]|\[key\]")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML lets the last one win, silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def override(raw: dict[str, Any], name: str, text: str) -> None:
    """Sets one dotted field of an unchecked recipe from the text of a flag.

    Raises UserError for a name that no recipe has.
    """
    section, _, field = name.partition(".")
    if name.startswith("model.config."):
        model = raw.setdefault("model", {})
        if not isinstance(model.get("config"), dict):
            model["config"] = {"base": model.get("config")}
        model["config"][name.removeprefix("model.config.")] = _parse(name, text)
        return
    known = fields()
    if name not in known:
        raise UserError(f"unknown flag --{name}; {nearest(name, list(known), '--')}")
    owner, attribute = known[name]
    annotation = owner.model_fields[attribute].annotation
    textual = annotation is str or (str in get_args(annotation) and not text.lstrip().startswith("{"))
    value = text if textual and text not in ("null", "~") else _parse(name, text)
    if field:
        raw.setdefault(section, {})[field] = value
    else:
        raw[name] = value
    # Two ways to say one thing exclude each other: a flag for one replaces the file's other.
    if (other := _EITHER.get(name)) is not None:
        raw[section].pop(other, None)


_EITHER = {
    "training.max_steps": "max_tokens",
    "training.max_tokens": "max_steps",
    "schedule.warmup_steps": "warmup_tokens",
    "schedule.warmup_tokens": "warmup_steps",
    "schedule.decay_steps": "decay_fraction",
    "schedule.decay_fraction": "decay_steps",
}


def _parse(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--{name} {text}: not YAML ({_problem(error)})") from None


def _problem(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())


def check_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """The recipe of an unchecked mapping.

    source: names the file in messages. Raises UserError for the first fault, naming key, value and what was expected.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    fault = faults[0]
    # Members of unions add their own names to the location; they are no part of the key.
    location = [str(part) for part in fault["loc"] if not _MEMBER.fullmatch(str(part))]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = Recipe.model_fields[location[0]].annotation if len(location) > 1 else Recipe
        assert isinstance(section, type) and issubclass(section, BaseModel)
        message = f"unknown key {key!r}; {nearest(location[-1], list(section.model_fields))}"
    elif fault["type"] == "missing" and isinstance(fault["loc"][-1], int):
        message = f"{'.'.join(location[:-1])}: value {fault['loc'][-1] + 1} is missing"
    elif fault["type"] == "missing":
        message = f"{key} is missing; give it in the file or as --{key}"
    else:
        found = "" if fault["type"] == "value_error" else f" is {fault['input']!r}"
        reason = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = f"{key}{found}: {reason}" if key else reason
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise UserError(f"{source}: {message}{more}")
