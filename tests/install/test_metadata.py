"""No extra puts another torch in the place of the one that is there."""

import importlib.metadata
import re
import sys

import pytest
import source_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((source_tree.ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def needs(names: set[str]) -> dict[str, set[str]]:
    """What these distributions need, and what those need, as far as they are installed: ``{name: requirements}``."""
    found: dict[str, set[str]] = {}
    open_ = set(names)
    while open_:
        name = open_.pop()
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            required = []
        found[name] = {r for r in required if "extra ==" not in r}
        open_ |= {name_of(r) for r in found[name]} - set(found) - {"torch"}
    return found


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_names_a_torch(extra):
    found = needs({name_of(requirement) for requirement in EXTRAS[extra]})
    exact = {
        (name, requirement)
        for name, requirements in found.items()
        for requirement in requirements
        if name_of(requirement) == "torch" and "==" in requirement.partition(";")[0]
    }
    assert not exact and "torchvision" not in found


def test_the_search_finds_what_it_looks_for():
    """timm brings torchvision, which names one torch."""
    try:
        importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed here")
    assert "torchvision" in needs({"timm"})


def test_what_the_build_needs():
    build = tomllib.loads((source_tree.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {name_of(requirement) for requirement in build} == {"setuptools", "torch", "ninja"}
