"""Installed packages outside the versions that this project was tested within are refused before anything starts."""

import importlib.metadata
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.requirements import Requirement

from data_prep.errors import UserError

_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_DISTRIBUTION = "bert-gpt-pretraining"
# Why a bound is where it is, for the packages whose older or newer versions are known to do harm: to be read with the
# bounds of pyproject.toml, none of which lets one of these in.
_REASONS = {
    "torch": "before 2.10 torch.load can run code out of a checkpoint in spite of weights_only (CVE-2026-24747)",
    "transformers": "before 5.3 it has CVE-2026-4372, and 5.1.0 breaks DeepSpeed (transformers pull request 43780)",
    "deepspeed": "what pipeline/ rests on was read in 0.19's source (docs/architecture.md) and is private to it",
}


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, of this checkout or as it was installed; without extras."""
    if _PROJECT.exists():
        stated: Iterable[str] = tomllib.loads(_PROJECT.read_text())["project"]["dependencies"]
    else:
        stated = importlib.metadata.requires(_DISTRIBUTION) or ()
    found = [Requirement(text) for text in stated]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_versions(installed: Callable[[str], str] = importlib.metadata.version) -> None:
    """Raises UserError for the first package that is missing or outside its bounds, with the reason where one is known.

    installed: the version of a package; raises PackageNotFoundError.
    """
    for requirement in requirements():
        try:
            version = installed(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{requirement.name} is not installed, expected {requirement.specifier}; pip install '{requirement}'"
            ) from None
        if not requirement.specifier.contains(version, prereleases=True):
            reason = f" ({_REASONS[requirement.name]})" if requirement.name in _REASONS else ""
            raise UserError(
                f"{requirement.name} {version} is installed, expected {requirement.specifier}{reason};"
                f" pip install '{requirement}'"
            )
