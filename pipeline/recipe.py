"""The recipe: what is trained. A YAML file and `--section.field value` flags, checked once into frozen objects.

Validation is pydantic's (DeepSpeed brings it along): types, ranges and unknown keys; the messages are ours.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "demo-gpt.yaml"

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # no field takes one, and pydantic would read it as 0 or 1
            raise ValueError(f"found the truth value {str(value).lower()}, which no field takes")
        return value


class ModelSection(_Section):
    config: str | dict[str, Any] = Field(
        description="a shipped name (pipeline/models), the path of a transformers config.json, or a mapping with `base`"
        " (one of these) and the values to change; --model.config.KEY VALUE changes one"
    )
    init_from: str | None = Field(None, description="Hugging Face model folder whose weights training starts from")


class DataSection(_Section):
    shards: str = Field(description="folder of token shards")
    tokenizer: str = Field(description="tokenizer folder that made the shards")
    sequence_length: Positive = Field(description="tokens of a sample")
    validation_fraction: float = Field(0.005, ge=0, lt=1, description="share of the documents that is held out")
    prepare: str | None = Field(None, description="data_prep job file to run first when the shards are missing")


class TrainingSection(_Section):
    global_batch_size: Positive = Field(description="samples of one optimizer step, over all ranks")
    max_steps: Positive | None = Field(None, description="optimizer steps of the run")
    max_tokens: Positive | None = Field(None, description="tokens of the run, instead of max_steps")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give either max_steps or max_tokens")
        return self


class OptimizerSection(_Section):
    type: Literal["AdamW"] = Field("AdamW", description="AdamW (Loshchilov & Hutter 2019)")
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="decay rates of the moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay; not on biases and norms")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")


class ScheduleSection(_Section):
    type: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape of the decay after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step")


class MaskingSection(_Section):
    probability: Probability = Field(0.15, description="share of the tokens that are targets (BERT, section 3.1)")
    mask: Probability = Field(0.8, description="share of the targets shown as the mask token")
    random: Probability = Field(0.1, description="share of the targets shown as a random token; the rest stay")

    @model_validator(mode="after")
    def _shares(self) -> "MaskingSection":
        if self.mask + self.random > 1:
            raise ValueError(f"mask + random is {self.mask + self.random:g}, expected at most 1")
        return self


class EvaluationSection(_Section):
    every_steps: int = Field(1000, ge=0, description="steps between evaluations; 0: only before and after training")
    samples: Positive = Field(2048, description="held-out samples of an evaluation, at most")


class CheckpointSection(_Section):
    every_steps: int = Field(1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: Positive = Field(3, description="checkpoints that are kept")


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
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.training.max_steps is not None:
            return self.training.max_steps
        assert self.training.max_tokens is not None
        tokens_a_step = self.training.global_batch_size * self.data.sequence_length
        return -(-self.training.max_tokens // tokens_a_step)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr is {self.schedule.min_lr}, above optimizer.lr {self.optimizer.lr}")
        # A warm-up longer than the run is allowed: a short trial of a long recipe.
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
    # The two ways to give a run's length exclude each other: a flag for one replaces the file's other.
    other = {"training.max_steps": "max_tokens", "training.max_tokens": "max_steps"}.get(name)
    if other:
        raw[section].pop(other, None)


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
    location = [str(part) for part in fault["loc"] if part not in ("str", "dict[str,any]")]
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
