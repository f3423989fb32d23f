"""`python -m data_prep STAGE ...`: the command line of every stage."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType, ModuleType

import data_prep
from data_prep.errors import UserError, nearest

# In the order in which a corpus passes through them. A stage's module is imported only when it is asked for.
STAGES = {
    "builtin_corpus": "documents from this machine's Python docstrings, no network",
    "clean": "documents by quality, language and other rules",
    "deduplicate": "documents without duplicates and evaluation data",
    "train_tokenizer": "a tokenizer from documents",
    "tokenize": "documents to token shards",
    "mix": "a weighted mixture of shard sets, by reference",
    "pack": "plan the training samples of a shard set",
    "run": "all of the above from one YAML file",
    "inspect": "show what a folder of data holds",
    "verify": "check every byte of a folder of data",
}

EXAMPLES = """\
A corpus of your own, ready to train on:
  python -m data_prep train_tokenizer --input 'corpus/*.jsonl' --output_dir data/tokenizer --type bpe \\
      --vocab_size 32000
  python -m data_prep tokenize --input 'corpus/*.jsonl' --tokenizer data/tokenizer --output_dir data/shards
  python -m data_prep pack --shards data/shards --objective causal --sequence_length 1024
or all of it from one file:
  python -m data_prep run job.yaml

`python -m data_prep STAGE --help` explains one stage.
"""


def stage_module(name: str) -> ModuleType:
    """Imports the module of a stage: SUMMARY, EXAMPLES, add_arguments(parser), main(arguments).

    Where it has --workers, WORKER_IMPORTS may name modules that its workers import when they start.
    """
    return importlib.import_module(f"data_prep.{name}")


def stage_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one stage's flags."""
    module = stage_module(name)
    parser = argparse.ArgumentParser(
        prog=f"python -m data_prep {name}",
        description=module.SUMMARY,
        epilog="examples:\n" + module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def run_stage(name: str, argv: list[str]) -> None:
    """Runs one stage with command-line arguments; raises UserError for a user's mistake."""
    arguments = stage_parser(name).parse_args(argv)
    if hasattr(arguments, "workers"):
        start_workers([name])
    stage_module(name).main(arguments)


def start_workers(stages: Iterable[str]) -> None:
    """Has the process from which workers are forked import what these stages' workers need, while the stage begins."""
    from data_prep.executors import start_worker_server

    modules = [stage_module(name) for name in stages]
    start_worker_server(
        [name for module in modules for name in (module.__name__, *getattr(module, "WORKER_IMPORTS", ()))]
    )


def _terminate(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def handle_signals() -> None:
    """What ends a job from outside is met like Ctrl-C: it cleans up and can be continued."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _terminate)


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        stages = "\n".join(f"  {name:<16} {summary}" for name, summary in STAGES.items())
        print(f"usage: python -m data_prep STAGE ...\n\n{data_prep.__doc__}\n\nstages:\n{stages}\n\n{EXAMPLES}")
        return 0 if argv else 2
    name = argv[0]
    if name not in STAGES:
        print(f"error: unknown stage {name!r}; {nearest(name, STAGES)}", file=sys.stderr)
        return 2
    handle_signals()
    try:
        run_stage(name, argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `inspect ... | head` has read enough; Python's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror or error}{where}; nothing unfinished has a final name: mend that and run the same"
            " command again to continue",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
