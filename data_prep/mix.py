"""Weighted mixing: a manifest that names shard sets and the share of the training samples drawn from each.

Nothing is copied. A weight is a share of the samples; samples are equally long, so it is as well the share of the
tokens that training sees. A component of weight w and T tokens is read w * N / T times in a training of N tokens: its
epochs.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import InputFile
from data_prep.manifest import MANIFEST_NAME, Manifest, read_manifest
from data_prep.parts import Execution, working
from data_prep.shards import ShardSet, is_foreign

SUMMARY = "Mix shard sets by weight: writes a manifest that names them, and copies nothing."
EXAMPLES = """\
  python -m data_prep mix --shards data/wiki data/code --weights 0.7 0.3 --output_dir data/mixture
  python -m data_prep inspect data/mixture --tokens 10e9
"""
KIND = "mixture"


def positive_number(text: str) -> float:
    """The type of command-line flags that are finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=Path, nargs="+", required=True, metavar="D", help="folders of token shards, one tokenizer's"
    )
    parser.add_argument(
        "--weights",
        type=positive_number,
        nargs="+",
        metavar="W",
        help="share of the training samples drawn from each, in the order of --shards; their sum is scaled to 1"
        " (default: as their tokens, so that every document is seen equally often)",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="D", help="folder of the mixture's manifest")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run of this stage left in --output_dir"
    )


@dataclass(frozen=True)
class Component:
    """One shard set of a mixture.

    folder: relative to the mixture's. weight: its share of the samples; a mixture's weights add up to 1.
    fingerprint: of the shard set. tokenizer_fingerprint: None of shards of another program.
    """

    name: str
    folder: str
    weight: float
    documents: int
    tokens: int
    fingerprint: str
    tokenizer_fingerprint: str | None


@dataclass(frozen=True)
class Mixture:
    """Shard sets of one tokenizer and one dtype, and how much of each to draw."""

    folder: Path
    components: tuple[Component, ...]
    dtype: str

    def path(self, component: Component) -> Path:
        """The folder of a component's shards."""
        return Path(os.path.normpath(self.folder / component.folder))

    def open(self, component: Component) -> ShardSet:
        """The shards of a component; raises UserError when they are not those that were mixed."""
        folder = self.path(component)
        if not folder.is_dir():
            raise UserError(
                f"{self.folder / MANIFEST_NAME} names {folder}, which is missing: move it back, or mix again"
            )
        shards = ShardSet.open(folder)
        if shards.fingerprint != component.fingerprint:
            raise UserError(
                f"{folder} has fingerprint {shards.fingerprint[:12]}, {self.folder / MANIFEST_NAME} was made of"
                f" {component.fingerprint[:12]}: the shards have changed; mix again"
            )
        return shards

    def tokens_once(self) -> float:
        """Tokens of the longest training that reads no component twice."""
        return min(component.tokens / component.weight for component in self.components)

    def epochs(self, tokens: float) -> list[float]:
        """How often each component is read in a training of `tokens` tokens."""
        return [component.weight * tokens / component.tokens for component in self.components]


def is_mixture(folder: Path) -> bool:
    """True when `folder` holds a finished mixture."""
    return (folder / MANIFEST_NAME).exists() and read_manifest(folder).kind == KIND


def read_mixture(folder: Path) -> Mixture:
    """Reads a mixture's manifest; `Mixture.open` opens and checks its components.

    Raises UserError when `folder` holds no mixture.
    """
    content = read_manifest(folder, KIND).content
    try:
        components = tuple(Component(**component) for component in content["components"])
        return Mixture(folder, components, str(content["dtype"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST_NAME} is damaged ({error!r}): mix again") from None


def make_components(folders: list[Path], weights: list[float] | None, output_dir: Path) -> tuple[list[Component], str]:
    """The components of a mixture, and their dtype.

    weights: any scale; None for the sets' tokens. Raises UserError for sets of different tokenizers or dtypes, sets
    without tokens, one named twice, and another number of weights than of sets.
    """
    if weights is not None and len(weights) != len(folders):
        raise UserError(f"--weights has {len(weights)} numbers, expected {len(folders)}: one for each of --shards")
    real = [folder.resolve() for folder in folders]
    for index, folder in enumerate(real):
        if folder in real[:index]:
            raise UserError(f"--shards names {folders[index]} twice; name it once, with the sum of the weights")
    sets = [ShardSet.open(folder) for folder in folders]
    dtypes = [_dtype(shards) for shards in sets]
    for shards, dtype in zip(sets[1:], dtypes[1:], strict=True):
        if shards.tokenizer_fingerprint != sets[0].tokenizer_fingerprint:
            raise UserError(
                f"{sets[0].folder} was made with tokenizer {_short(sets[0])}, {shards.folder} with {_short(shards)}:"
                " a mixture has one tokenizer; tokenize one of them again"
            )
        if dtype != dtypes[0]:
            raise UserError(
                f"{sets[0].folder} holds {dtypes[0]}, {shards.folder} {dtype}: a mixture has one dtype; tokenize one"
                " of them again"
            )
    given = weights or [float(sum(shards.tokens)) for shards in sets]
    total = sum(given)
    components = [
        Component(
            name=name,
            folder=os.path.relpath(path, output_dir.resolve()),
            weight=weight / total,
            documents=sum(shards.documents),
            tokens=sum(shards.tokens),
            fingerprint=shards.fingerprint,
            tokenizer_fingerprint=shards.tokenizer_fingerprint,
        )
        for name, path, weight, shards in zip(_names(real), real, given, sets, strict=True)
    ]
    return components, dtypes[0]


def _dtype(shards: ShardSet) -> str:
    if not sum(shards.tokens):
        raise UserError(f"{shards.folder} holds no tokens: leave it out of --shards")
    return str(shards.shard(0).dtype.name)


def _short(shards: ShardSet) -> str:
    return shards.tokenizer_fingerprint[:12] if shards.tokenizer_fingerprint else "unknown (of another program)"


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths, all of one length, that tell the folders apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def component_faults(folder: Path) -> list[str]:
    """What does not fit in a mixture: components that are missing, damaged or not those that were mixed."""
    mixture = read_mixture(folder)
    faults = []
    for component in mixture.components:
        try:
            shards = mixture.open(component)
        except UserError as error:
            faults.append(str(error))
            continue
        found = (sum(shards.documents), sum(shards.tokens), shards.tokenizer_fingerprint)
        if found != (component.documents, component.tokens, component.tokenizer_fingerprint):
            faults.append(f"{folder / MANIFEST_NAME}: its counts of {component.name} are not those of its shards")
    total = sum(component.weight for component in mixture.components)
    if abs(total - 1) > 1e-9:
        faults.append(f"{folder / MANIFEST_NAME}: the weights add up to {total}, expected 1")
    return faults


def describe(mixture: Mixture, tokens: float | None = None) -> str:
    """A table: weight, documents and tokens of each component, and its epochs in a training of `tokens` tokens.

    Without `tokens`, of the longest training that reads no component twice.
    """
    length = mixture.tokens_once() if tokens is None else tokens
    epochs = mixture.epochs(length)
    width = max(len("component"), *(len(component.name) for component in mixture.components))
    lines = [f"  {'component':<{width}} {'weight':>8} {'documents':>14} {'tokens':>18} {'epochs':>10}"]
    for component, read in zip(mixture.components, epochs, strict=True):
        lines.append(
            f"  {component.name:<{width}} {component.weight:>8.2%} {component.documents:>14,} {component.tokens:>18,}"
            f" {read:>10,.3f}"
        )
    longest = ", the longest that reads nothing twice" if tokens is None else ""
    lines.append(f"  epochs in a training of {length:,.0f} tokens{longest}")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    output_dir: Path = arguments.output_dir
    components, dtype = make_components(arguments.shards, arguments.weights, output_dir)
    job: dict[str, Any] = {"command": "mix", "components": [asdict(component) for component in components]}
    # Components are identified by fingerprint; their files are named here so that no output folder is one of theirs.
    inputs = [
        InputFile.of(str(path))
        for folder in arguments.shards
        for path in (sorted(folder.glob("*.idx")) if is_foreign(folder) else [folder / MANIFEST_NAME])
    ]
    with working(output_dir, job, inputs, Execution(overwrite=arguments.overwrite)) as work:
        if work is not None and work.finishes():
            content = {
                "documents": sum(component.documents for component in components),
                "tokens": sum(component.tokens for component in components),
                "dtype": dtype,
                "components": [asdict(component) for component in components],
            }
            Manifest(kind=KIND, job=job, files={}, content=content).write(output_dir)
            print(f"{output_dir}: a mixture of {len(components)} shard sets")
    print(describe(read_mixture(output_dir)))
