"""All stages from one YAML file: a mapping from stages to their flags, carried out in the file's order."""

import argparse
import functools
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import UserError, nearest

SUMMARY = "Carry out the stages of a YAML job file, in its order; what is up to date is not made again."
EXAMPLES = """\
  python -m data_prep run job.yaml

with a job.yaml such as
  train_tokenizer: {input: [corpus/*.jsonl], output_dir: data/tokenizer, type: bpe, vocab_size: 32000}
  tokenize:        {input: [corpus/*.jsonl], tokenizer: data/tokenizer, output_dir: data/shards}
  pack:            {shards: data/shards, objective: causal, sequence_length: 1024}
(a stage that is needed more than once takes a list of such mappings)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="the job file")


def read_job(path: Path) -> list[tuple[str, list[str]]]:
    """The (stage, command-line arguments) of a job file; raises UserError naming file, stage and key."""
    import yaml

    from data_prep.__main__ import STAGES, stage_parser

    try:
        job = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(job, dict) or not job:
        raise UserError(
            f"{path}: expected a mapping from stages to their flags, such as `pack: {{shards: data/shards}}`"
        )
    known = [stage for stage in STAGES if stage != "run"]
    steps = []
    for stage, entries in job.items():
        if stage not in known:
            raise UserError(f"{path}: unknown stage {stage!r}; {nearest(str(stage), known)}")
        parser = stage_parser(stage)
        parser.error = functools.partial(_refuse, path, stage)  # type: ignore[method-assign]
        flags = {
            flag[2:] if flag.startswith("--") else flag: action
            for action in parser._actions
            for flag in (action.option_strings or [action.dest])
            if action.dest != "help"
        }
        for options in entries if isinstance(entries, list) else [entries]:
            if not isinstance(options, dict):
                raise UserError(f"{path}: {stage}: expected a mapping of flags, found {options!r}")
            for key in options:
                if key not in flags:
                    raise UserError(f"{path}: {stage}: unknown flag {key!r}; {nearest(str(key), list(flags))}")
                if options[key] is None:
                    raise UserError(f"{path}: {stage}: {key} has no value")
            argv = _arguments(options, flags)
            parser.parse_args(argv)  # every stage is checked before the first one runs
            steps.append((stage, argv))
    return steps


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
    from data_prep.__main__ import run_stage

    for stage, argv in read_job(arguments.job):
        print(f"== {stage}", flush=True)
        run_stage(stage, argv)
