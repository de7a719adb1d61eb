"""Private members of libraries that the code rests on: all of them are listed in docs/compatibility.md."""

import ast
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("modeling_genieblue", "hub_cards", "conversion", "genieblue")
LIBRARIES = ("transformers", "peft", "huggingface_hub", "torch", "accelerate", "optimum")
# Python's own, an attribute that is found through `__dict__` and is ours, and two endings of names.
NO_MEMBERS = {"_exit", "_Printer__lines", "_Printer__setup", "_replace", "_genieblue", "_in", "_out"}
NAME = re.compile(r"_[a-zA-Z]\w*[a-zA-Z0-9]")
ROW = re.compile(
    r"^\| (?P<library>[\w.-]+) \| (?P<members>`[^|]*`) \| (?P<files>[^|]*) \| [^|]* \| `(?P<test>[^|`]*)` \|$"
)


def read_rows() -> list[dict]:
    """The table: library, members, files that use them, the test that would notice a change."""
    page = (REPOSITORY / "docs/compatibility.md").read_text(encoding="utf-8")
    lines = page.partition("## Private members")[2].splitlines()
    rows = [match.groupdict() for line in lines if (match := ROW.match(line))]
    assert len(rows) == sum(line.startswith("| ") for line in lines) - 1, "a row is not of the table's form"
    return [
        row | {"members": re.findall(r"`([^`]+)`", row["members"]), "files": re.findall(r"[\w/.]+\.py", row["files"])}
        for row in rows
    ]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return read_rows()


def sources() -> dict[str, ast.Module]:
    """Our code, but for what is made for one version of vLLM alone, and runs in an environment of its own."""
    paths = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    paths = [path for path in paths if not re.search(r"^from vllm\b", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Names that are defined in our code; what another object than `self` or `model` is given is not ours."""
    names = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "model", "bar"):
                names.add(node.attr)
    return names


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.keyword):
        return [node.arg or ""]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    return []


def used_members() -> dict[str, set[str]]:
    """Private names of others that our code reads, writes, imports or passes, and the files where it does."""
    trees = sources()
    own, used = own_names(trees), {}
    for file, tree in trees.items():
        for name in (name for node in ast.walk(tree) for name in names_in(node)):
            if NAME.fullmatch(name) and name not in own | NO_MEMBERS:
                used.setdefault(name, set()).add(file)
    return used


def overridden_members() -> dict[str, set[str]]:
    """Private names of libraries' classes that our classes define anew, and the files where they do."""
    for room in map(importlib.import_module, ROOMS):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if not module.name.endswith("__main__"):
                try:
                    importlib.import_module(module.name)
                except ModuleNotFoundError as error:
                    if (error.name or "").partition(".")[0] not in ("vllm", "gradio"):
                        raise
    found = {}
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in ROOMS]:
        for each in vars(module).values():
            if inspect.isclass(each) and each.__module__ == module.__name__:
                theirs = [base for base in each.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
                for name in vars(each).keys() & {name for base in theirs for name in vars(base)}:
                    if NAME.fullmatch(name) and name != "_abc_impl":
                        found.setdefault(name, set()).add(module.__name__.replace(".", "/") + ".py")
    return found


def test_every_private_member_is_listed_where_it_is_used(rows):
    listed = {(name, file) for row in rows for name in row["members"] for file in row["files"]}
    found = {
        (name, file) for names in (used_members(), overridden_members()) for name in names for file in names[name]
    }
    assert found - listed == set(), "add what is new to the table in docs/compatibility.md, or do without it"


def test_every_listed_member_and_file_still_has_to_do_with_the_other(rows):
    for row in rows:
        texts = {file: (REPOSITORY / file).read_text(encoding="utf-8") for file in row["files"]}
        uses = {(name, file) for name in row["members"] for file in texts if name in texts[file]}
        assert {name for name, _ in uses} == set(row["members"]), row
        assert {file for _, file in uses} == set(row["files"]), row


def test_every_listed_member_is_in_its_library(rows):
    """Whatever a behaviour's own test says, a name that is gone is noticed here."""
    for library in {row["library"] for row in rows}:
        (folder,) = importlib.util.find_spec(library.replace("-", ".")).submodule_search_locations
        files = [path for path in Path(folder).rglob("*.py*") if path.suffix in (".py", ".pyi")]
        text = "".join(path.read_text(encoding="utf-8") for path in files if "models" not in path.parts[-3:-2])
        gone = [name for row in rows if row["library"] == library for name in row["members"] if name not in text]
        assert gone == [], library


def test_every_listed_override_overrides_something(rows):
    """Else the library has lost what ours was to take the place of."""
    marked = {name for row in rows if row["library"] in LIBRARIES for name in row["members"]}
    defined = own_names(sources()) & marked
    assert defined - set(overridden_members()) - set(used_members()) == set()


def test_every_listed_test_exists(rows):
    for row in rows:
        file, _, name = row["test"].partition("::")
        assert f"def {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), row["test"]
