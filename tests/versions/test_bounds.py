"""What `setup.py` allows: the pinned set, and the next minor version of transformers and peft."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<transformers>5\.\d+\.\d+) \| (?P<peft>[\d.]+) \| (?P<huggingface_hub>[\d.]+) \|.*$", re.M)


def requirements() -> dict[str, Requirement]:
    """Those of `setup.py`, also of its extras, by name."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [Requirement(text) for text in texts if re.match(r"[\w-]+(\[\w+\])?>=[^ ]+(;.*)?$", text)]
    return {each.name.lower().replace("-", "_"): each for each in found}


def pins() -> dict[str, str]:
    """Versions by name; the page's come first in its environment, and the others are found behind them."""
    files = [REPOSITORY / name for name in ("tests/clients/web.txt", "constraints.txt")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition(";")[0].split("==") for line in lines if not line.startswith("#")]
    return {name.lower().replace("-", "_"): version for name, version in pairs}


def versions_tried(library: str) -> list[Version]:
    """The versions of a library in the table of docs/compatibility.md that are not refused."""
    page = (REPOSITORY / "docs/compatibility.md").read_text(encoding="utf-8")
    return [Version(row[library]) for row in ROW.finditer(page) if "refused" not in row[0]]


def test_every_requirement_has_a_pin_that_it_allows():
    allowed, pinned = requirements(), pins()
    assert {"torch", "transformers", "peft", "typer", "trl", "pyright"} <= set(allowed)
    assert {
        name: pinned.get(name) for name, each in allowed.items() if pinned.get(name, "") not in each.specifier
    } == {}


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_upper_bound_is_behind_the_minor_version_after_the_newest_tried(library):
    newest, allowed = max(versions_tried(library)), requirements()[library].specifier
    assert newest in allowed
    assert Version(f"{newest.major}.{newest.minor + 1}.99") in allowed
    assert Version(f"{newest.major}.{newest.minor + 2}") not in allowed


@pytest.mark.parametrize("library", ["transformers", "peft", "huggingface_hub"])
def test_pinned_version_was_tried(library):
    """A pin that moved asks for another `make test-versions`."""
    assert Version(pins()[library]) in versions_tried(library)
