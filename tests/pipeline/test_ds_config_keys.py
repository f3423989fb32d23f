"""What stands in a DeepSpeed config is either carried out or refused by name."""

import ast
import importlib
import inspect
import json
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.ds_config_keys import check_ds_config_keys, read_ds_config, top_level_schema

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def fault_of(config: dict[str, Any]) -> str:
    """The one line on `config`, without its source."""
    with pytest.raises(UserError) as caught:
        check_ds_config_keys(config, "x.json")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("x.json: ")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_passes(path: Path) -> None:
    check_ds_config_keys(read_ds_config(path), str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_leaves_to_the_recipe_what_is_the_recipes(path: Path) -> None:
    of_recipe = {
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "train_batch_size",
        "gradient_accumulation_steps",
    }
    assert not of_recipe & read_ds_config(path).keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            'unknown key "zero_optimisation" (did you mean "zero_optimization"?); DeepSpeed would ignore it',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            'unknown key "zero_optimization.offload_optimizer.devise" '
            '(did you mean "zero_optimization.offload_optimizer.device"?); DeepSpeed refuses it',
        ),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            'unknown key "activation_checkpointing.partition_activation" '
            '(did you mean "activation_checkpointing.partition_activations"?); DeepSpeed would ignore it',
        ),
        (
            {"checkpoint": {"writer": {"typ": "fast"}}},
            'unknown key "checkpoint.writer.typ" (did you mean "checkpoint.writer.type"?); DeepSpeed would ignore it',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decya": 0.1}}},
            'unknown key "optimizer.params.weight_decya" (did you mean "optimizer.params.weight_decay"?); '
            "AdamW does not take it",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 5}}},
            'unknown key "scheduler.params.warmup_steps" '
            '(did you mean "scheduler.params.warmup_num_steps"?); '
            "WarmupLR does not take it",
        ),
        (
            {"optimizer": {"type": "AdamWW", "params": {}}},
            'optimizer.type: found "AdamWW", which neither DeepSpeed nor torch has (did you mean "AdamW"?)',
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_likely_one(config: dict[str, Any], message: str) -> None:
    assert fault_of(config) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimization": {"overlap_comm": "perhaps"}},
            'zero_optimization.overlap_comm: found "perhaps", expected a valid boolean, unable to interpret input',
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_size": -1}},
            "zero_optimization.stage3_prefetch_bucket_size: found -1, expected greater than or equal to 0",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "gpu"}}},
            "zero_optimization.offload_param.device: found \"gpu\", expected 'none', 'cpu' or 'nvme'",
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": -1}},
            "fp16.loss_scale: found -1; fp16.loss_scale must be >= 0 (0 enables dynamic loss scaling)",
        ),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "zero_optimization: compute_grad_norm=false is supported only with ZeRO Stage 1 or 2",
        ),
        ({"bf16": True}, "bf16: found true, expected an object {...}"),
        ({"train_batch_size": {"global": 8}}, "train_batch_size: found an object, expected one value"),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(config: dict[str, Any], message: str) -> None:
    assert fault_of(config) == message


def test_a_removed_key_is_refused_with_deepspeeds_reason() -> None:
    assert fault_of({"amp": {"enabled": True}}).startswith('"amp" was removed from DeepSpeed: NVIDIA Apex')
    assert fault_of({"zero_optimization": {"mics_shard_size": 2}}).startswith(
        '"zero_optimization.mics_shard_size" was removed from DeepSpeed: MiCS'
    )


def test_a_deprecated_key_is_accepted_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    check_ds_config_keys({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "x.json")
    assert capfd.readouterr() == ("", "")


def test_further_faults_are_counted() -> None:
    assert fault_of({"a_key": 1, "b_key": 2, "c_key": 3}).endswith("(and 2 more)")


@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": "auto"},
        {"zero_optimization": {"reduce_bucket_size": "auto"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
    ],
)
def test_auto_is_refused_where_deepspeed_drops_it(config: dict[str, Any]) -> None:
    assert '"auto" is dropped by DeepSpeed without a word; give a value or leave the key out' in fault_of(config)


@pytest.mark.parametrize(
    "config",
    [
        {"train_micro_batch_size_per_gpu": "auto"},
        {"data_types": {"keep_in_fp32_modules": "auto"}},
        {"zero_optimization": {"zenflow": {"select_strategy": "auto"}}},
        {"pipeline": {"stages": "auto"}},
    ],
)
def test_auto_is_accepted_where_it_is_resolved_or_a_default_of_deepspeeds(config: dict[str, Any]) -> None:
    check_ds_config_keys(config, "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {},\n "bf16": {}}', 'the key "bf16" stands twice in one object; keep one of them'),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', 'the key "stage" stands twice in one object'),
        ('{\n  "bf16": {"enabled": true,}\n}', "line 2, column 2"),
        ("[1]", "found a list at the top level, expected an object {...}"),
        ("7", "found 7 at the top level, expected an object {...}"),
    ],
)
def test_a_file_that_is_not_one_json_object_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_ds_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot read the DeepSpeed config \(No such file"):
        read_ds_config(tmp_path / "none.json")


def one_character_typos(key: str) -> st.SearchStrategy[str]:
    letters = st.sampled_from(string.ascii_lowercase + "_")
    place = st.integers(0, len(key) - 1)
    return st.one_of(
        st.builds(lambda i, c: key[:i] + c + key[i + 1 :], place, letters),
        st.builds(lambda i, c: key[:i] + c + key[i:], place, letters),
        st.builds(lambda i: key[:i] + key[i + 1 :], place),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_any_one_character_typo_of_a_known_key_is_refused_and_the_key_suggested(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(top_level_schema())))
    typo = data.draw(one_character_typos(key))
    assume(typo not in top_level_schema())
    message = fault_of({typo: 1})
    assert message.startswith((f'unknown key "{typo}"', f'"{typo}" was removed'))
    # fp16 and bf16, or wandb and aio, are too short for the suggestion to be certain.
    if len(key) > 6 and message.startswith("unknown"):
        assert f'did you mean "{key}"' in message


def test_importing_the_module_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, pipeline.ds_config_keys; sys.exit(bool({'torch', 'deepspeed'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Drift: the keys that DeepSpeed reads, found in its source, against ours.


class KeysOfTopLevel(ast.NodeVisitor):
    """Collects the constant keys that a function looks up in the dict that one of its parameters holds.

    Follows the dict into the functions and classes that it is handed to, in whatever module they are.
    """

    def __init__(self, function: Callable[..., Any], holder: str, bound: dict[str, Any]) -> None:
        self.namespace = vars(sys.modules[function.__module__]) | bound
        self.holder = holder
        self.keys: set[str] = set()
        self.unresolved: set[str] = set()
        self.loops: dict[str, list[Any]] = {}
        source = inspect.getsource(function)
        self.visit(ast.parse("if True:\n" + source if source[0].isspace() else source))

    def is_holder(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
            node = node.func.value
        return ast.unparse(node) in (self.holder, "self._param_dict")

    def add(self, node: ast.expr) -> None:
        if isinstance(node, ast.Name) and node.id in self.loops:
            self.keys.update(self.loops[node.id])
            return
        try:
            value = eval(ast.unparse(node), self.namespace)
        except NameError:
            self.unresolved.add(ast.unparse(node))
        else:
            self.keys.add(value)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.note_loop(node.generators[0])
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.note_loop(node)
        self.generic_visit(node)

    def note_loop(self, loop: ast.For | ast.comprehension) -> None:
        target = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
        if isinstance(target, ast.Name):
            try:
                self.loops[target.id] = list(eval(ast.unparse(loop.iter), self.namespace))
            except NameError:
                return
            self.loops[target.id] = [item[0] if isinstance(item, tuple) else item for item in self.loops[target.id]]

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.ops[0], ast.In | ast.NotIn) and self.is_holder(node.comparators[0]):
            self.add(node.left)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.is_holder(node.value):
            self.add(node.slice)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and self.is_holder(node.func.value):
            self.add(node.args[0])
        elif any(self.is_holder(argument) for argument in node.args):
            name = ast.unparse(node.func)
            if name.startswith("get_") and name.endswith("_param"):
                self.add(node.args[1])
            elif isinstance(called := self.namespace.get(name), FunctionType | type) and called is not DICT_COPY:
                self.follow(called, node)
        self.generic_visit(node)

    def follow(self, called: Callable[..., Any], node: ast.Call) -> None:
        function = vars(called)["__init__"] if isinstance(called, type) else called
        parameters = inspect.signature(called).parameters
        bound = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        holder = ""
        for name, argument in zip(parameters, node.args, strict=False):
            if self.is_holder(argument):
                holder = name
            else:
                bound[name] = eval(ast.unparse(argument), self.namespace)
        inner = KeysOfTopLevel(function, holder, bound)
        self.keys |= inner.keys
        self.unresolved |= inner.unresolved


DICT_COPY = importlib.import_module("copy").copy


def keys_that_deepspeed_reads() -> set[str]:
    from deepspeed.runtime.config import (
        _REMOVED_TOP_LEVEL_CONFIG_KEYS,
        DeepSpeedConfig,
        _reject_removed_config_keys,
    )

    keys: set[str] = set()
    for method, holder in (
        (DeepSpeedConfig.__init__, "config"),
        (DeepSpeedConfig._initialize_params, "param_dict"),
        (DeepSpeedConfig._do_warning_check, "self._param_dict"),
        (_reject_removed_config_keys, "param_dict"),
    ):
        found = KeysOfTopLevel(method, holder, {})
        assert not found.unresolved, f"DeepSpeed reads keys that this test cannot name: {found.unresolved}"
        keys |= found.keys
    return keys - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_we_know_every_top_level_key_that_deepspeed_reads_and_no_other() -> None:
    read, known = keys_that_deepspeed_reads(), set(top_level_schema())
    assert read - known == set(), "DeepSpeed reads keys that top_level_schema() refuses"
    assert known - read == set(), "top_level_schema() has keys that DeepSpeed does not read"


def test_deepspeed_accepts_what_we_accept(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for path in SHIPPED:
        config = json.loads(path.read_text()) | {"train_micro_batch_size_per_gpu": 1}
        check_ds_config_keys(config, str(path))
        read = DeepSpeedConfig(config)
        assert read.zero_optimization_stage == config["zero_optimization"]["stage"]
        assert read.bfloat16_config.enabled == ("bf16" in config)
