"""The flags of `pretrain.py`: its own few, and one for every field of the recipe."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, nearest
from pipeline import recipe as recipes
from pipeline.profiling import parse_steps

EXAMPLES = """\
examples:
  deepspeed pipeline/pretrain.py --deepspeed_config ds_configs/zero2.json
  deepspeed pipeline/pretrain.py --deepspeed_config ds_configs/zero2.json --recipe pipeline/recipes/gpt2-124m.yaml \\
      --data.shards data/corpus --data.tokenizer data/tokenizer --output_dir runs/first --training.max_steps 1000
  deepspeed --hostfile hostfile pipeline/pretrain.py --deepspeed_config ds_configs/zero3.json --recipe my.yaml
"""


@dataclass(frozen=True)
class Arguments:
    """What the command line said; recipe overrides as (dotted name, text)."""

    deepspeed_config: Path
    recipe: Path
    output_dir: Path
    resume: str
    allow_changed: tuple[str, ...]
    dry_run: bool
    deterministic: bool
    max_restarts: int
    verify_every: int
    profile: range
    overrides: tuple[tuple[str, str], ...]


def add_files(parser: argparse.ArgumentParser, of_ds_config: str) -> None:
    """Adds the flags of the two files. of_ds_config: what the command takes from the ds_config."""
    parser.add_argument("--deepspeed_config", type=Path, required=True, metavar="JSON", help=of_ds_config)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=recipes.DEFAULT_RECIPE,
        metavar="YAML",
        help="what is trained (default: demo-gpt)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed pipeline/pretrain.py",
        description="Pretrain a GPT (causal) or BERT (masked-LM) model on token shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_files(parser, "how it is carried out (ds_configs/)")
    parser.add_argument(
        "--output_dir", type=Path, metavar="D", help="folder of the run (default: runs/<recipe's name>)"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="auto: go on from the newest checkpoint in --output_dir, if any; none: start anew, refuse a folder"
        " that holds checkpoints; PATH: start from that checkpoint folder (default: %(default)s)",
    )
    parser.add_argument(
        "--allow_changed",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="recipe fields or sections that a run which goes on takes over although they alter its steps, such as"
        " optimizer.lr, data.shards or data.tokenizer (default: such a change is refused)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check configuration, data, disk, network, speed and memory on every host, take a step of random tokens,"
        " and end without training",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="only kernels whose results do not vary: two runs on one machine are bitwise equal, at some cost on GPUs",
    )
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=0,
        metavar="N",
        help="when a rank dies or hangs, start all ranks again from the newest checkpoint, so many times (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--verify_every",
        type=int,
        default=0,
        metavar="N",
        help="every N steps work the gradients out twice more and compare the ranks' weights, to find hardware that"
        " computes wrongly; at the cost of two steps; 0: never (default: %(default)s)",
    )
    parser.add_argument(
        "--profile", metavar="A:B", help="write a torch profiler trace of steps A to B to OUTPUT_DIR/profile"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK says the same
    group = parser.add_argument_group("recipe fields, each overriding the file's")
    for name, (section, attribute) in recipes.fields().items():
        info = section.model_fields[attribute]
        default = "" if info.is_required() else f" (default: {info.get_default()})"
        group.add_argument(
            f"--{name}",
            metavar="VALUE",
            help=f"{info.description}{default}".replace("%", "%%"),
            dest=f"field:{name}",
        )
    return parser


def _known_fields(names: list[str]) -> list[str]:
    fields = recipes.fields()
    for name in names:
        if not any(field == name or field.startswith(f"{name}.") or name.startswith(f"{field}.") for field in fields):
            raise UserError(f"--allow_changed {name} is no field of a recipe; {nearest(name, fields)}")
    return names


def parse_arguments(argv: list[str]) -> Arguments:
    """Parses the command line; raises UserError for an unknown flag."""
    parsed, unknown = _parser().parse_known_args(argv)
    for name in ("max_restarts", "verify_every"):
        if getattr(parsed, name) < 0:
            raise UserError(f"--{name} is {getattr(parsed, name)}, expected 0 or more")
    overrides = [
        (name.removeprefix("field:"), value)
        for name, value in vars(parsed).items()
        if name.startswith("field:") and value is not None
    ]
    while unknown:
        name, joined, value = unknown.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {name!r}; `--help` lists the flags")
        if not joined:
            if not unknown:
                raise UserError(f"{name} needs a value")
            value = unknown.pop(0)
        overrides.append((name.removeprefix("--"), value))
    return Arguments(
        deepspeed_config=parsed.deepspeed_config,
        recipe=parsed.recipe,
        output_dir=parsed.output_dir or Path("runs") / parsed.recipe.stem,
        resume=parsed.resume,
        allow_changed=tuple(_known_fields(parsed.allow_changed)),
        dry_run=parsed.dry_run,
        deterministic=parsed.deterministic,
        max_restarts=parsed.max_restarts,
        verify_every=parsed.verify_every,
        profile=parse_steps(parsed.profile) if parsed.profile else range(0),
        overrides=tuple(overrides),
    )
