"""The data of a run: tokenizer, corpora and plans checked against one another."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.encoding import TokenizerInfo, load_tokenizer_info
from data_prep.errors import UserError, nearest
from data_prep.mix import is_mixture, read_mixture
from data_prep.plan import prepare_plan, read_plan
from data_prep.shards import ShardSet, has_shards, survey
from pipeline.causal import find_sentinels
from pipeline.order import Order, shares_of
from pipeline.recipe import DataSection, Recipe
from pipeline.rows import Corpus
from pipeline.samples import Samples, Style
from pipeline.words import special_ids, word_starts


@dataclass(frozen=True)
class Data:
    """What a run trains and evaluates on.

    notes: lines for the log, such as what could not be checked.
    """

    tokenizer: TokenizerInfo
    corpora: tuple[Corpus, ...]
    train: Samples
    validation: Samples
    notes: tuple[str, ...] = ()


def is_missing(section: DataSection) -> bool:
    """True when the shards are not there (or not finished) but the recipe says how to make them."""
    return section.prepare is not None and not all(has_shards(Path(folder)) for folder in section.folders.values())


def prepare(section: DataSection) -> None:
    """Runs the recipe's data_prep job; raises UserError when it fails or makes other shards."""
    from data_prep.__main__ import run_stage

    assert section.prepare is not None
    run_stage("run", [section.prepare])
    if is_missing(section):
        raise UserError(f"data.prepare: {section.prepare} does not make data.shards {section.shards}")


def wait_for_shards(section: DataSection) -> None:
    """Returns when another rank has made the shards. A collective would do, but for its time-out: a corpus may take
    hours. (When that rank fails, the launcher ends this one.)"""
    while is_missing(section):
        time.sleep(0.2)


def open_shards(section: DataSection) -> tuple[dict[str, ShardSet], dict[str, float] | None]:
    """The recipe's shard sets by corpus, and a mixture's own weights.

    Raises UserError saying how to make them when they are missing.
    """
    found: dict[str, ShardSet] = {}
    for name, folder in ((name, Path(folder)) for name, folder in section.folders.items()):
        if not has_shards(folder):
            raise UserError(
                f"data.shards: {folder} holds no finished shards; make them with `python -m data_prep tokenize --input"
                f" ... --tokenizer {section.tokenizer} --output_dir {folder}`"
            )
        if is_mixture(folder):
            if isinstance(section.shards, dict):
                raise UserError(f"data.shards: {name}: {folder} is a mixture; name the shard sets in it one by one")
            mixture = read_mixture(folder)
            weights = {component.name: component.weight for component in mixture.components}
            return {component.name: mixture.open(component) for component in mixture.components}, weights
        found[name] = ShardSet.open(folder)
    return found, None


def resolve_weights(recipe: Recipe) -> Recipe:
    """The recipe with the weights of its corpora stated, where there are several: a mixture's own, or as their tokens,
    so that every document is seen equally often."""
    sets, own_weights = open_shards(recipe.data)
    if recipe.data.weights is not None or len(sets) == 1:
        return recipe
    weights = own_weights or {name: float(sum(shards.tokens)) for name, shards in sets.items()}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"weights": {0: weights}})})


def plan_samples(recipe: Recipe) -> None:
    """Writes the plans of the recipe's samples beside the shards unless they are there."""
    for shards in open_shards(recipe.data)[0].values():
        prepare_plan(shards, recipe.pack_settings)


def open_data(recipe: Recipe) -> Data:
    """Opens tokenizer, shards and plans. Corpora without stated weights (`resolve_weights`) count alike.

    Raises UserError when one is missing, or when shards were made with another tokenizer.
    """
    section = recipe.data
    sets, _ = open_shards(section)
    tokenizer = load_tokenizer_info(Path(section.tokenizer))
    notes: list[str] = []
    corpora = []
    for name, shards in sets.items():
        if shards.tokenizer_fingerprint is None:
            shards, found = adopt(shards, tokenizer)
            notes += found
        elif tokenizer.fingerprint != shards.tokenizer_fingerprint:
            raise UserError(
                f"data.tokenizer {section.tokenizer} has fingerprint {tokenizer.fingerprint[:12]}, but the shards in"
                f" {shards.folder} were made with {shards.tokenizer_fingerprint[:12]}; name the tokenizer that made"
                " them, or tokenize again"
            )
        plan = read_plan(shards, recipe.pack_settings)
        if plan is None:
            raise UserError(
                f"{shards.folder} has no plan for these samples; run `python -m data_prep pack` (see --help)"
            )
        corpora.append(Corpus(name, shards, plan))
    return Data(tokenizer, tuple(corpora), *_samples(recipe, tuple(corpora), tokenizer), tuple(notes))


def _samples(recipe: Recipe, corpora: tuple[Corpus, ...], tokenizer: TokenizerInfo) -> tuple[Samples, Samples]:
    """The training and held-out samples."""
    names = [corpus.name for corpus in corpora]
    stages = recipe.data.weight_stages or {0: dict.fromkeys(names, 1.0)}
    for weights in stages.values():
        for name in weights:
            if name not in names:
                raise UserError(f"data.weights names {name!r}; {nearest(name, names)}")
    folder = Path(recipe.data.tokenizer)
    causal, masking = recipe.causal, recipe.masking
    style = Style(
        special=tokenizer.special,
        vocab_size=tokenizer.vocab_size,
        document_attention=recipe.data.document_attention,
        masking=masking,
        causal=causal,
        curriculum=recipe.curriculum,
        word_starts=word_starts(folder) if masking.unit != "token" else None,
        further_special=tuple(special_ids(folder).tolist()) if recipe.objective == "mlm" else (),
        sentinels=find_sentinels(folder, prefix=causal.fim_prefix, middle=causal.fim_middle, suffix=causal.fim_suffix)
        if causal.fim_rate
        else None,
    )
    keys = [corpus.key for corpus in corpora]
    first_numbers = {step: recipe.training.batch_sizes.first_sample(step) for step in stages}
    training = [(first_numbers[step], shares_of(weights, names)) for step, weights in sorted(stages.items())]
    sizes = [[corpus.plan.split(split).samples for corpus in corpora] for split in ("train", "validation")]
    return (
        Samples(corpora, Order(sizes[0], keys, training, recipe.seed), "train", style, recipe.seed),
        Samples(corpora, Order(sizes[1], keys, [], recipe.seed), "validation", style, recipe.seed),
    )


def adopt(shards: ShardSet, tokenizer: TokenizerInfo) -> tuple[ShardSet, tuple[str, ...]]:
    """Shards of another program with what their files do not say taken from `tokenizer`, and what to log about it.

    Raises UserError when they hold ids that the tokenizer has not.
    """
    found = survey(shards)
    for extreme in (found.smallest, found.largest):
        if not 0 <= extreme < tokenizer.vocab_size:
            raise UserError(
                f"data.shards {shards.folder} hold id {extreme}, but data.tokenizer {tokenizer.folder} has"
                f" {tokenizer.vocab_size} ids: another tokenizer made them; name that one"
            )
    looked_at = "all" if found.tokens == sum(shards.tokens) else f"{found.tokens:,} of {sum(shards.tokens):,}"
    notes = [
        f"{shards.folder} has no manifest.json ({len(shards.names)} shards of another program): that"
        f" {tokenizer.folder} made them could not be checked, only that its ids reach theirs ({looked_at} tokens seen)"
    ]
    end = tokenizer.special.end_of_document
    if found.last != end:
        notes.append(
            f"warning: {found.last_share:.1%} of the documents end with id {found.last}, few or none with the end of"
            f" document of {tokenizer.folder}, {end}: their ends are not told from their text"
        )
    elif found.last_share < 1:
        notes.append(
            f"warning: {found.last_share:.1%} of the documents end with the tokenizer's end of document, {end}; the"
            " others run into the ones that follow"
        )
    adopted = replace(
        shards,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=end,
    )
    return adopted, tuple(notes)
