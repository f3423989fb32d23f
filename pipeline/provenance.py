"""`run.json`: everything that a run was made of; and the summary that is printed when it is done."""

import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import durable
from data_prep.encoding import load_tokenizer_info, tokenizer_files
from data_prep.errors import UserError
from data_prep.shards import ShardSet, unigram_entropy
from pipeline.checkpoint import Sources
from pipeline.data import Data
from pipeline.metrics import read_validation
from pipeline.recipe import Recipe, check_recipe
from pipeline.stages import continued

RUN_NAME = "run.json"
TOKENIZER_FOLDER = "tokenizer"
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "numpy")
# Recipe fields that may change when a run goes on: they do not alter a step that was already taken.
_FREE = (
    "training.max_steps",
    "training.max_tokens",
    "evaluation.",
    "checkpoint.",
    "faults.",
    "training.skip_samples",
    "data.prepare",
    "data.tokenizer",  # its fingerprint is compared, wherever it is
    "model.init_from",
    "model.activation_checkpointing",
)
# Fields that may change from the step on at which a run goes on: what came before stays as it was.
_STAGED = ("training.global_batch_size", "data.weights", "data.shards")
# A checkpoint has no states for others.
_FIXED = ("objective", "optimizer.type")


def sources_of(recipe: Recipe, data: Data) -> Sources:
    """What checkpoints say they come from."""
    content = json.dumps(json.loads(recipe.model_dump_json()), sort_keys=True)
    return Sources(
        recipe=hashlib.sha256(content.encode()).hexdigest(),
        tokenizer=data.tokenizer.fingerprint,
        corpora={corpus.name: corpus.shards.fingerprint for corpus in data.corpora},
    )


def git_commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


@dataclass(frozen=True)
class Changes:
    """What may be otherwise when a run goes on (`--allow_changed`: fields or sections), and where that is said."""

    allowed: tuple[str, ...] = ()
    say: Callable[[str], None] = print

    def check(self, output_dir: Path, changed: Mapping[str, str]) -> None:
        """Raises UserError unless all are allowed. changed: field -> what it was and is."""
        refused = {field: what for field, what in changed.items() if not self._allows(field)}
        if refused:
            fields = " ".join(sorted(refused))
            fixed = [field for field in refused if field in _FIXED]
            way_out = "" if fixed else f", or take them over from here on with --allow_changed {fields}"
            raise UserError(
                f"{output_dir} cannot be resumed as another run: {'; '.join(refused.values())}; give another"
                f" --output_dir, change it back{way_out}"
            )
        for what in changed.values():
            self.say(f"changed   {what}")

    def _allows(self, field: str) -> bool:
        return field not in _FIXED and any(field == name or field.startswith(f"{name}.") for name in self.allowed)


NO_CHANGES = Changes()


def continue_recipe(output_dir: Path, recipe: Recipe, step: int, changes: Changes) -> Recipe:
    """The recipe of a run that goes on after `step` steps: batch sizes are as they were up to there, and the recipe's
    from there on.

    Raises UserError when it is not the run's, naming the fields with both values.
    """
    before = _before(output_dir)
    if before is None:
        return recipe
    old, new = _flat(before["recipe"]), _flat(json.loads(recipe.model_dump_json()))
    changed = {
        name: f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith((*_FREE, *_STAGED))
    }
    changes.check(output_dir, changed)
    earlier = check_recipe(before["recipe"], str(output_dir / RUN_NAME))
    sizes = continued(earlier.training.batch_sizes.stages, recipe.training.batch_sizes.stages, step)
    later = {start: count for start, count in (recipe.training.skip_samples or {}).items() if start >= step}
    skipped = {**(earlier.training.skip_samples or {}), **later}
    training = recipe.training.model_copy(
        update={"global_batch_size": sizes if len(sizes) > 1 else sizes[0], "skip_samples": skipped or None}
    )
    return recipe.model_copy(update={"training": training})


def continue_weights(output_dir: Path, recipe: Recipe, step: int) -> Recipe:
    """As `continue_recipe`, of the weights of the corpora, which are stated (pipeline.data.resolve_weights)."""
    before = _before(output_dir)
    if before is None or recipe.data.weight_stages is None:
        return recipe
    earlier = check_recipe(before["recipe"], str(output_dir / RUN_NAME)).data.weight_stages
    was = earlier or {0: dict.fromkeys(before["corpora"], 1.0)}
    weights = continued(was, recipe.data.weight_stages, step)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"weights": weights})})


def check_data(output_dir: Path, data: Data, changes: Changes = NO_CHANGES) -> None:
    """Raises UserError when tokenizer or corpora of a run that goes on are not those of its start; other corpora may
    have joined."""
    before = _before(output_dir)
    if before is None:
        return
    now = {corpus.name: corpus.shards.fingerprint for corpus in data.corpora}
    was, found = before.get("tokenizer_fingerprint"), data.tokenizer.fingerprint
    changed = {} if was == found else {"data.tokenizer": f"the tokenizer's fingerprint was {was!r}, now {found!r}"}
    different = [
        f"the shards' fingerprint of {name} was {fingerprint!r}, now {now.get(name)!r}"
        for name, fingerprint in before["corpora"].items()
        if now.get(name) != fingerprint
    ]
    if different:
        changed["data.shards"] = "; ".join(different)
    changes.check(output_dir, changed)


def _before(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / RUN_NAME
    if not path.exists():
        return None
    found = read_run(output_dir)
    if not isinstance(found.get("recipe"), dict) or not isinstance(found.get("corpora"), dict):
        raise UserError(f"{path} is damaged (no recipe or corpora); restore it or start another --output_dir")
    return found


def record_run(
    output_dir: Path, recipe: Recipe, ds_config: dict[str, Any], data: Data, model_config: dict[str, Any]
) -> None:
    """Writes `run.json`, and a copy of the tokenizer beside it: a run's folder is enough to export from."""
    target = output_dir / TOKENIZER_FOLDER
    if not target.exists() or load_tokenizer_info(target).fingerprint != data.tokenizer.fingerprint:
        with durable.replacing_folder(target, overwrite=True) as temporary:
            for path in tokenizer_files(data.tokenizer.folder):
                shutil.copyfile(path, temporary / path.name)
    durable.write_json(
        output_dir / RUN_NAME,
        {
            "recipe": json.loads(recipe.model_dump_json()),
            "deepspeed_config": ds_config,
            "model_config": model_config,
            "corpora": {corpus.name: corpus.shards.fingerprint for corpus in data.corpora},
            "tokenizer_fingerprint": data.tokenizer.fingerprint,
            "samples": {
                split: dict(zip((corpus.name for corpus in data.corpora), samples.sizes, strict=True))
                for split, samples in (("train", data.train), ("validation", data.validation))
            },
            "versions": {"python": platform.python_version(), **package_versions()},
            "git_commit": git_commit(),
            "command": sys.argv,
        },
    )


def read_run(output_dir: Path) -> dict[str, Any]:
    """`run.json` of a run; raises UserError when there is none."""
    path = output_dir / RUN_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    except FileNotFoundError:
        raise UserError(f"{output_dir} is no run: it has no {RUN_NAME}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None


def log_summary(output_dir: Path, shards: Sequence[ShardSet], seconds: float, logger: logging.Logger) -> None:
    """Validation loss before and after, beside what a model without context would reach, and what to do next."""
    evaluations = read_validation(output_dir)
    logger.info(f"done in {seconds:.0f} s; {output_dir}")
    if evaluations:
        (first, before), (last, after) = evaluations[0], evaluations[-1]
        logger.info(f"  validation loss     {before:.4f} (step {first}) -> {after:.4f} (step {last}) nats a token")
        if len(shards) == 1:
            floor = unigram_entropy(shards[0])
            logger.info(f"  unigram entropy     {floor:.4f} nats a token (reached without learning any context)")
        logger.info(f"  perplexity          {math.exp(before):,.0f} -> {math.exp(after):,.1f}")
    logger.info(f"  tensorboard --logdir {output_dir / 'tensorboard'}")
