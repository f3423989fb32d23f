"""Packages outside the bounds of pyproject.toml are refused by name, with the reason where one is known."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from data_prep.errors import UserError
from pipeline.versions import check_versions, requirements


def with_version(name, version):
    def installed(package):
        if package == name:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version
        return importlib.metadata.version(package)

    return installed


def test_this_environment_is_within_the_bounds():
    check_versions()
    assert {"torch", "deepspeed", "transformers"} <= {requirement.name for requirement in requirements()}


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("torch", "2.9.1+cu128", "CVE-2026-24747"),
        ("transformers", "5.1.0", "CVE-2026-4372"),
        ("deepspeed", "0.20.0", "0.19"),
        ("pydantic", "1.10.2", "expected >=2.10;"),
    ],
)
def test_a_version_outside_is_named_with_bounds_and_reason(name, version, reason):
    with pytest.raises(UserError) as caught:
        check_versions(with_version(name, version))
    (bounds,) = (str(one.specifier) for one in requirements() if one.name == name)
    assert str(caught.value).startswith(f"{name} {version} is installed, expected {bounds}") and reason in str(
        caught.value
    )


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="orjson is not installed"):
        check_versions(with_version("orjson", None))


def test_no_bound_lets_a_version_with_a_known_hole_in():
    bounds = {one.name: one.specifier for one in requirements()}
    for harmful in ("torch==2.9.1", "transformers==5.1.0", "transformers==5.2.0"):
        requirement = Requirement(harmful)
        assert not bounds[requirement.name].contains(next(iter(requirement.specifier)).version)
