"""All stages from one YAML file, carried out in its order; stages that keep nothing stream into the next."""

import argparse
import functools
import inspect
import itertools
import re
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from data_prep.errors import UserError, nearest

SUMMARY = """\
Carry out the stages of a YAML job file, in its order; what is up to date is not made again.

A clean or deduplicate stage without output_dir keeps no documents: they go on to the stage that follows, which then
takes no input, and text is written once at most on its way to the shards."""
EXAMPLES = """\
  python -m data_prep run job.yaml
  python -m data_prep run job.yaml --workers 16
  python -m data_prep run job.yaml --task_index $SLURM_ARRAY_TASK_ID --num_tasks $SLURM_ARRAY_TASK_COUNT

with a job.yaml such as
  clean:           {input: [raw/*.jsonl.zst], rules: [gopher_quality, gopher_repetition]}
  deduplicate:     {}
  tokenize:        {tokenizer: data/tokenizer, output_dir: data/shards}
  pack:            {shards: data/shards, objective: causal, sequence_length: 1024}
or, where a stage is needed more than once, a list:
  - tokenize: {input: [wiki/*.parquet], tokenizer: data/tokenizer, output_dir: data/wiki}
  - tokenize: {input: [code/*.jsonl], tokenizer: data/tokenizer, output_dir: data/code}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from data_prep.parts import add_work_arguments

    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="the job file")
    add_work_arguments(parser)
    for action in parser._actions:
        if action.dest in WORK_FLAGS:  # given here, they count for every stage that has them
            action.default = argparse.SUPPRESS
            action.help = re.sub(r" \(default: .*\)$", "", action.help or "") + " (default: the file's)"


WORK_FLAGS = ("workers", "overwrite", "max_bad_fraction", "executor", "task_index", "num_tasks", "ray_address")


def read_job(path: Path) -> list[list[tuple[str, argparse.Namespace]]]:
    """The chains of a job file, in order: (stage, arguments) of each link; all but the last hand their documents on.

    Every stage's flags are checked before the first one runs. Raises UserError naming file, stage and key.
    """
    from data_prep.__main__ import STAGES, stage_module

    known = [stage for stage in STAGES if stage != "run"]
    chains: list[list[tuple[str, argparse.Namespace]]] = []
    chain: list[tuple[str, argparse.Namespace]] = []
    for stage, options in _entries(path):
        if stage not in known:
            raise UserError(f"{path}: unknown stage {stage!r}; {nearest(str(stage), known)}")
        if not isinstance(options, dict):
            raise UserError(f"{path}: {stage}: expected a mapping of flags, found {options!r}")
        module = stage_module(stage)
        hands_on = hasattr(module, "hand_on") and "output_dir" not in options
        if chain and "upstream" not in inspect.signature(module.main).parameters:
            raise UserError(
                f"{path}: {stage} cannot take the documents that {chain[-1][0]} hands on; give that stage an output_dir"
            )
        if stage in [before for before, _ in chain]:
            raise UserError(
                f"{path}: {stage} stands twice in one chain; give the stage before the second an output_dir"
            )
        chain.append((stage, _parsed(path, stage, options, hands_on=hands_on, takes_over=bool(chain))))
        if not hands_on:
            chains.append(chain)
            chain = []
    if chain:
        raise UserError(f"{path}: {chain[-1][0]}, the last stage, has no output_dir: nothing would be kept")
    return chains


def _entries(path: Path) -> list[tuple[str, Any]]:
    """The (stage, flags) of a job file: a mapping from stages to flags or lists of them, or a list of such mappings."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice: YAML would silently keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(
                        f"{path}: {key!r} stands twice in one mapping; write the job as a list (- {key}: ...)"
                    )
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            job = yaml.load(file, Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    mappings = job if isinstance(job, list) else [job]
    if not job or not all(isinstance(mapping, dict) for mapping in mappings):
        raise UserError(
            f"{path}: expected a mapping from stages to their flags, such as `pack: {{shards: data/shards}}`"
        )
    return [
        (stage, options)
        for mapping in mappings
        for stage, entries in mapping.items()
        for options in (entries if isinstance(entries, list) else [entries])
    ]


def _parsed(path: Path, stage: str, options: dict[str, Any], *, hands_on: bool, takes_over: bool) -> argparse.Namespace:
    """A stage's arguments from its flags in the file."""
    from data_prep.__main__ import stage_parser

    parser = stage_parser(stage)
    parser.error = functools.partial(_refuse, path, stage)  # type: ignore[method-assign]
    flags = {
        flag[2:] if flag.startswith("--") else flag: action
        for action in parser._actions
        for flag in (action.option_strings or [action.dest])
        if action.dest != "help" and not flag.startswith("-h")
    }
    for key in options:
        if key not in flags:
            raise UserError(f"{path}: {stage}: unknown flag {key!r}; {nearest(str(key), list(flags))}")
        if options[key] is None:
            raise UserError(f"{path}: {stage}: {key} has no value")
    if takes_over:
        if "input" in options:
            raise UserError(f"{path}: {stage}: its input is what the stage before hands on; remove input")
        flags["input"].required = False
    if hands_on:
        flags["output_dir"].required = False
    return parser.parse_args(_arguments(options, flags))


def _refuse(path: Path, stage: str, message: str) -> NoReturn:
    raise UserError(f"{path}: {stage}: {message}")


def _arguments(options: dict[str, Any], flags: dict[str, argparse.Action]) -> list[str]:
    positional, named = [], []
    for key, value in options.items():
        values = [str(item) for item in (value if isinstance(value, list) else [value])]
        if not flags[key].option_strings:
            positional += values
        elif isinstance(value, bool):
            if value:
                named.append(f"--{key}")
            elif isinstance(flags[key], argparse.BooleanOptionalAction):
                named.append(f"--no-{key}")
        else:
            named += [f"--{key}", *values]
    return positional + named


def main(arguments: argparse.Namespace) -> None:
    from data_prep.__main__ import stage_module, start_workers

    chains = read_job(arguments.job)
    given = {name: getattr(arguments, name) for name in WORK_FLAGS if hasattr(arguments, name)}
    for stage, options in itertools.chain.from_iterable(chains):
        if "num_tasks" in given and not hasattr(options, "num_tasks"):
            raise UserError(
                f"{arguments.job}: {stage} is no work for an array of tasks: run it by itself, before or after the"
                " others, and take it out of this file"
            )
        vars(options).update({name: value for name, value in given.items() if hasattr(options, name)})
    start_workers(
        {stage: None for stage, options in itertools.chain.from_iterable(chains) if hasattr(options, "executor")}
    )
    for chain in chains:
        print("== " + " -> ".join(stage for stage, _ in chain), flush=True)
        upstream = None
        for stage, options in chain[:-1]:
            upstream = stage_module(stage).hand_on(options, upstream)
        stage, options = chain[-1]
        module: ModuleType = stage_module(stage)
        if upstream is None:
            module.main(options)
        else:
            module.main(options, upstream)
