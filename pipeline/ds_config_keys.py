"""A DeepSpeed config checked key by key against DeepSpeed's own readers.

DeepSpeed ignores a top-level key that it does not know (a misspelt `zero_optimization` trains at stage 0) and
drops the value "auto" without a word. Here either is an error that names the key. The names come from
DeepSpeed: its pydantic models (deepspeed/runtime/zero/config.py and others) are asked directly; where it
reads a section as a plain dict, its reader is run once on a dict that notes which keys it looks up.
"""

import contextlib
import copy
import difflib
import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

# What may stand at a key: a DeepSpeedConfigModel class; the keys of an object, each with its own schema; one
# plain value; or something that is not looked into.
SCALAR = "one value"
FREE = "anything"
Schema = Any
_AUTO = "auto"
_AUTO_RESOLVED_BY_US = "train_micro_batch_size_per_gpu"


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, its keys not yet checked (see `check_ds_config_keys`).

    Raises UserError for a file that is missing or unreadable, is not JSON, holds a key twice in one object,
    or does not hold an object.
    """

    def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise UserError(f'{path}: the key "{key}" stands twice in one object; keep one of them')
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the DeepSpeed config ({error.strerror}); give the path of a JSON file, "
            "such as ds_configs/zero2.json"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        config = json.loads(text, object_pairs_hook=object_without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            "JSON has no comments, no trailing commas, and double quotes only"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {_kind(config)} at the top level, expected an object {{...}}")
    return config


def check_ds_config_keys(config: Mapping[str, Any], source: str) -> None:
    """Refuses what DeepSpeed would ignore, drop or refuse later: unknown and removed keys, "auto", wrong types.

    `source` names the config in the message (its file). Raises UserError with one line on the first fault and
    the number of further ones. "auto" is accepted for train_micro_batch_size_per_gpu, which this project
    resolves before DeepSpeed sees it, and where "auto" is DeepSpeed's own default. Deprecated keys are
    accepted.
    """
    faults = list(_faults(config))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{source}: {faults[0]}{more}")


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    schema = top_level_schema()
    removed = dict(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}": reason for key, reason in _REMOVED_ZERO_CONFIG_KEYS.items()}
    yield from _faults_of_object(config, schema, "", removed)
    for section, faults_of_params in (("optimizer", _optimizer_faults), ("scheduler", _scheduler_faults)):
        value = config.get(section)
        if isinstance(value, dict):
            yield from faults_of_params(value)


def _faults_of_object(
    value: Mapping[str, Any],
    schema: Mapping[str, Schema],
    path: str,
    removed: Mapping[str, str],
    fate: str = "DeepSpeed would ignore it",
) -> Iterator[str]:
    for key, inner in value.items():
        where = f"{path}.{key}" if path else key
        if where in removed:
            yield f'"{where}" was removed from DeepSpeed: {removed[where].strip()}'
        elif key not in schema:
            yield f'unknown key "{where}"{_suggestion(key, list(schema), where)}; {fate}'
        else:
            yield from _faults_of_value(inner, schema[key], where, removed)


def _faults_of_value(value: Any, schema: Schema, where: str, removed: Mapping[str, str]) -> Iterator[str]:
    if schema is FREE:
        return
    if value == _AUTO:
        if where != _AUTO_RESOLVED_BY_US:
            yield f'{where}: "auto" is dropped by DeepSpeed without a word; give a value or leave the key out'
    elif schema is SCALAR:
        if isinstance(value, dict):
            yield f"{where}: found an object, expected one value"
    elif where == "zero_optimization" and isinstance(value, bool):
        return  # deprecated: true is stage 1
    elif not isinstance(value, dict):
        if value is not None or "." not in where:
            yield f"{where}: found {_kind(value)}, expected an object {{...}}"
    elif isinstance(schema, dict):
        yield from _faults_of_object(value, schema, where, removed)
    else:
        faults = list(_faults_of_object(value, _schema_of_model(schema), where, removed, "DeepSpeed refuses it"))
        yield from faults or _type_faults(schema, value, where)


def _schema_of_model(model: type[Any]) -> dict[str, Schema]:
    """The keys that a DeepSpeedConfigModel accepts (field names and aliases) with what may stand there."""
    schema: dict[str, Schema] = {}
    for name, field in model.model_fields.items():
        inner = FREE if field.default == _AUTO else SCALAR
        for annotation in (field.annotation, *typing.get_args(field.annotation)):
            if hasattr(annotation, "model_fields"):
                inner = annotation
            elif annotation is dict or typing.get_origin(annotation) is dict:
                inner = FREE
        schema[name] = inner
        if field.alias:
            schema[field.alias] = inner
    return schema


def _type_faults(model: type[Any], value: Mapping[str, Any], where: str) -> Iterator[str]:
    """What DeepSpeed's pydantic model says about the values of a section whose keys are all known."""
    import pydantic

    try:
        with _quiet_deepspeed():
            model(**copy.deepcopy(dict(value)))
    except pydantic.ValidationError as error:
        aliases = {field.alias: name for name, field in model.model_fields.items() if field.alias}
        for fault in error.errors():
            steps = [str(step) for step in fault["loc"]]
            if steps and steps[0] not in value:
                steps[0] = aliases.get(steps[0], steps[0])
            path = ".".join([where, *steps])
            message = fault["msg"]
            if fault["type"] in (
                "value_error",
                "assertion_error",
            ):  # DeepSpeed's own words, often on several keys
                found = f"found {_shown(fault['input'])}; " if steps else ""
                yield f"{path}: {found}{message.partition(', ')[2]}"
            else:
                expected = message.removeprefix("Input should be ")
                yield f"{path}: found {_shown(fault['input'])}, expected {expected}"
    except (AssertionError, ValueError, TypeError) as error:
        yield f"{where}: {error}"


@functools.cache
def top_level_schema() -> dict[str, Schema]:
    """Every top-level key that DeepSpeed reads from its config, with what may stand there.

    Source: DeepSpeedConfig in deepspeed/runtime/config.py; tests/pipeline/test_ds_config_keys.py fails,
    naming the key, when DeepSpeed reads one that is not here or no longer reads one that is.
    """
    from deepspeed.autotuning.config import DeepSpeedAutotuningConfig
    from deepspeed.autotuning.constants import (
        AUTOTUNING,
        AUTOTUNING_ARG_MAPPINGS,
        MODEL_INFO,
        MODEL_INFO_KEY_DEFAULT_DICT,
    )
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.comm.constants import COMMS_LOGGER
    from deepspeed.compile.config import CompileConfig
    from deepspeed.datastates.config import DATASTATES_CHECKPOINTING
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.profiling.constants import FLOPS_PROFILER
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import constants as c
    from deepspeed.runtime.activation_checkpointing.config import (
        ACT_CHKPT,
        DeepSpeedActivationCheckpointingConfig,
    )
    from deepspeed.runtime.data_pipeline.constants import DATA_EFFICIENCY
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.constants import AIO
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig
    from deepspeed.utils.config import TIMERS, TIMERS_THROUGHPUT, DeepSpeedThroughputTimerConfig

    scalars = (
        c.TRAIN_BATCH_SIZE,
        c.TRAIN_MICRO_BATCH_SIZE_PER_GPU,
        c.GRADIENT_ACCUMULATION_STEPS,
        c.MANAGED_GRADIENT_ACCUMULATION,
        c.STEPS_PER_PRINT,
        c.DUMP_STATE,
        c.DISABLE_PYTHON_GC,
        c.DISABLE_ALLGATHER,
        c.COMMUNICATION_DATA_TYPE,
        c.SEQ_PARALLEL_COMMUNICATION_DATA_TYPE,
        c.PRESCALE_GRADIENTS,
        c.GRADIENT_PREDIVIDE_FACTOR,
        c.GRADIENT_ALLREDUCE_OP,
        c.GRADIENT_CLIPPING,
        c.ZERO_ALLOW_UNTESTED_OPTIMIZER,
        c.ZERO_FORCE_DS_CPU_OPTIMIZER,
        c.WALL_CLOCK_BREAKDOWN,
        c.MEMORY_BREAKDOWN,
        c.USE_DATA_BEFORE_EXPERT_PARALLEL,
        c.DATALOADER_DROP_LAST,
        c.LOG_LEVEL,
        c.VOCABULARY_SIZE,
        # Two that DeepSpeed names only where it reads them (runtime/config.py, runtime/zero/config.py).
        "sequence_parallel_size",
        "allgather_size",
    )
    sections: dict[str, Schema] = {
        ZERO_OPTIMIZATION: DeepSpeedZeroConfig,
        c.FP16: DeepSpeedFP16Config,
        c.BFLOAT16: DeepSpeedBF16Config,
        c.BFLOAT16_OLD: DeepSpeedBF16Config,
        c.TORCH_AUTOCAST: dict.fromkeys(
            (
                c.TORCH_AUTOCAST_ENABLED,
                c.TORCH_AUTOCAST_DTYPE,
                c.TORCH_AUTOCAST_LOWER_PRECISION_SAFE_MODULES,
            ),
            SCALAR,
        ),
        c.DATA_TYPES: dict.fromkeys((c.GRAD_ACCUM_DTYPE, c.PARAM_DTYPE, c.BUFFER_DTYPE), SCALAR)
        | {c.KEEP_IN_FP32_MODULES: FREE},
        c.OPTIMIZER: {c.TYPE: SCALAR, c.OPTIMIZER_PARAMS: FREE, c.LEGACY_FUSION: SCALAR},
        c.SCHEDULER: {c.TYPE: SCALAR, c.SCHEDULER_PARAMS: FREE},
        COMMS_LOGGER: CommsLoggerConfig,
        **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
        FLOPS_PROFILER: _keys_read(lambda section: DeepSpeedFlopsProfilerConfig({FLOPS_PROFILER: section})),
        AUTOTUNING: _keys_read(lambda section: DeepSpeedAutotuningConfig({AUTOTUNING: section}))
        | {MODEL_INFO: dict.fromkeys(MODEL_INFO_KEY_DEFAULT_DICT, SCALAR), AUTOTUNING_ARG_MAPPINGS: FREE},
        ACT_CHKPT: _keys_read(lambda section: DeepSpeedActivationCheckpointingConfig({ACT_CHKPT: section})),
        AIO: _keys_read(lambda section: runtime.get_aio_config({AIO: section})),
        c.CHECKPOINT: _checkpoint_schema(),
        DATA_EFFICIENCY: _data_efficiency_schema(),
        "hybrid_engine": runtime.HybridEngineConfig,
        "weight_quantization": WeightQuantConfig,
        "compile": CompileConfig,
        TIMERS: {TIMERS_THROUGHPUT: DeepSpeedThroughputTimerConfig},
        "tensor_parallel": TPTrainingConfig,
        # "auto" is a value of its own in this section: nothing is dropped.
        runtime.EXPERT_PARALLEL: dict.fromkeys(_keys_read(parse_autoep_config), FREE),
        "pipeline": FREE,
        DATASTATES_CHECKPOINTING: FREE,
    }
    return dict.fromkeys(scalars, SCALAR) | sections


def _checkpoint_schema() -> dict[str, Schema]:
    """Two readers share the section "checkpoint": runtime/config.py and model_checkpointing/config.py."""
    from deepspeed.runtime import constants as c
    from deepspeed.runtime.model_checkpointing.config import (
        get_checkpoint_config,
        get_checkpoint_writer_config,
    )
    from deepspeed.runtime.model_checkpointing.constants import CHECKPOINT_WRITER

    return {
        **_keys_read(lambda section: get_checkpoint_config({c.CHECKPOINT: section})),
        c.LOAD_UNIVERSAL_CHECKPOINT: SCALAR,
        c.USE_NODE_LOCAL_STORAGE_CHECKPOINT: SCALAR,
        c.CHECKPOINT_PARALLEL_WRITE: {c.CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE: SCALAR},
        CHECKPOINT_WRITER: _keys_read(lambda section: get_checkpoint_writer_config({CHECKPOINT_WRITER: section})),
    }


def _data_efficiency_schema() -> dict[str, Schema]:
    """The data efficiency library copies sections and looks keys up later: its key names are its constants."""
    from deepspeed.runtime.data_pipeline import constants as d

    def named(prefix: str) -> dict[str, Schema]:
        return {
            value: FREE
            for name, value in vars(d).items()
            if name.startswith(prefix) and not name.endswith("_DEFAULT") and isinstance(value, str)
        }

    sampling = (
        d.DATA_SAMPLING_ENABLED,
        d.DATA_SAMPLING_NUM_EPOCHS,
        d.DATA_SAMPLING_NUM_WORKERS,
        d.DATA_SAMPLING_PIN_MEMORY,
    )
    return {
        d.DATA_EFFICIENCY_ENABLED: SCALAR,
        d.DATA_EFFICIENCY_SEED: SCALAR,
        d.DATA_SAMPLING: {
            **dict.fromkeys(sampling, SCALAR),
            d.CURRICULUM_LEARNING: named("CURRICULUM_LEARNING_"),
            d.DYNAMIC_BATCHING: named("DYNAMIC_BATCHING_"),
        },
        d.DATA_ROUTING: {d.DATA_ROUTING_ENABLED: SCALAR, d.RANDOM_LTD: named("RANDOM_LTD_")},
    }


class _NotesKeys(dict[str, Any]):
    """An empty dict that remembers in `keys_read`, in order, which keys it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_read: dict[str, None] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read[key] = None
        return default

    def __contains__(self, key: object) -> bool:
        self.keys_read[str(key)] = None
        return False

    def __bool__(self) -> bool:
        return True


def _keys_read(reader: Callable[[Any], object]) -> dict[str, Schema]:
    """The keys that one of DeepSpeed's plain-dict readers looks up in its section, each a plain value."""
    section = _NotesKeys()
    reader(section)
    return dict.fromkeys(section.keys_read, SCALAR)


def _optimizer_faults(section: Mapping[str, Any]) -> Iterator[str]:
    """`optimizer.params` against the signatures of the classes that `optimizer.type` may stand for."""
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import config as runtime

    # DeepSpeedEngine._configure_basic_optimizer and get_optimizer_configuration (runtime/engine.py). Muon and
    # the mup optimizers split their parameters over two optimizers: theirs are not checked.
    adam = (torch.optim.AdamW, torch.optim.Adam, DeepSpeedCPUAdam, FusedAdam)
    classes: dict[str, tuple[type, ...]] = {
        runtime.ADAM_OPTIMIZER: adam,
        runtime.ADAMW_OPTIMIZER: adam,
        runtime.ADAGRAD_OPTIMIZER: (torch.optim.Adagrad, DeepSpeedCPUAdagrad),
        runtime.LAMB_OPTIMIZER: (FusedLamb,),
        runtime.LION_OPTIMIZER: (DeepSpeedCPULion, FusedLion),
    }
    name = section.get("type")
    if not isinstance(name, str) or name == _AUTO:
        return
    kind = name.lower()
    if kind in classes:
        candidates = classes[kind]
    elif kind in runtime.DEEPSPEED_OPTIMIZERS:
        return
    elif isinstance(getattr(torch.optim, name, None), type):
        candidates = (getattr(torch.optim, name),)
    else:
        of_torch = [known for known, value in vars(torch.optim).items() if isinstance(value, type)]
        yield _unknown_value("optimizer.type", name, [*runtime.DEEPSPEED_OPTIMIZERS, *of_torch])
        return
    extra = {runtime.TORCH_ADAM_PARAM, runtime.ADAM_W_MODE} if candidates is adam else set()
    yield from _params_faults("optimizer", section, candidates, extra)


def _scheduler_faults(section: Mapping[str, Any]) -> Iterator[str]:
    """`scheduler.params` against the signature of the class named by `scheduler.type`."""
    import torch
    from deepspeed.runtime import lr_schedules

    name = section.get("type")
    if not isinstance(name, str) or name == _AUTO:
        return
    scheduler = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if isinstance(scheduler, type):
        yield from _params_faults("scheduler", section, (scheduler,), set())
    else:
        of_torch = [known for known, value in vars(torch.optim.lr_scheduler).items() if isinstance(value, type)]
        yield _unknown_value("scheduler.type", name, [*lr_schedules.VALID_LR_SCHEDULES, *of_torch])


def _params_faults(
    section_name: str, section: Mapping[str, Any], classes: tuple[type, ...], extra: set[str]
) -> Iterator[str]:
    where = f"{section_name}.params"
    params = section.get("params", {})
    if not isinstance(params, dict):
        yield f"{where}: found {_kind(params)}, expected an object {{...}}"
        return
    names = set(extra)
    for cls in classes:
        # The first parameter of each is what it optimizes or schedules.
        names |= set(list(inspect.signature(cls).parameters)[1:])
    names.discard("max_grad_norm")  # In some signatures, but refused by the engine: gradient_clipping replaces it.
    schema = dict.fromkeys(sorted(names), SCALAR)
    yield from _faults_of_object(params, schema, where, {}, f"{section['type']} does not take it")


def _unknown_value(where: str, value: str, known: list[str]) -> str:
    suggestion = _suggestion(value, known, value)
    return f"{where}: found {_shown(value)}, which neither DeepSpeed nor torch has{suggestion}"


def _suggestion(found: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(found, known, n=1, cutoff=0.6)
    return f' (did you mean "{where.removesuffix(found)}{close[0]}"?)' if close else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else _shown(value)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Without DeepSpeed's warnings on deprecated keys, which it prints when it reads the config to train."""
    from deepspeed.utils import logger

    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
