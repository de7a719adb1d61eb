"""What the repository promises of itself: the file tree is complete, links lead somewhere, nothing imports upward."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Repository layout")[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# From the top of the house down: each room imports from itself and from those after it.
FLOORS = (
    "genieblue.cli", "genieblue.demo", "genieblue.lab", "genieblue.training", "genieblue.evaluation",
    "genieblue.serving", "genieblue.data", "conversion", "hub_cards", "modeling_genieblue",
)  # fmt: skip


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def floor_of(module: str) -> int | None:
    return next((number for number, room in enumerate(FLOORS) if f"{module}.".startswith(f"{room}.")), None)


def imports_of(path: str) -> list[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return names + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]


def test_every_file_is_in_the_tree_of_the_architecture_page():
    rooms = ("modeling_genieblue/*.py", "hub_cards", "conversion/*.py", "genieblue/*.py", "optimum_cli", "examples",
             "benchmarks/*.py")  # fmt: skip
    names = {Path(path).name for path in tracked(*rooms)} - {"__init__.py", "py.typed"}
    assert not sorted(name for name in names if name not in TREE)


def test_the_tree_names_no_file_that_is_gone():
    named = set(re.findall(r"[\w]+\.(?:py|md|sh)", TREE))
    assert not sorted(named - {Path(path).name for path in tracked()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_docs_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_index_of_the_docs_lists_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index and page.name != "README.md"
    ]


def test_the_messages_that_the_troubleshooting_page_quotes_exist():
    source = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in tracked("*.py") if "tests/" not in path)
    messages = re.sub(r'"\n\s*f?"', "", source)  # strings over several lines
    rows = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
    quotes = [quote for row in rows if row.startswith("| ") for quote in re.findall("`(.+?)`", row.split(" | ")[0])]
    pieces = [piece.strip() for quote in quotes for piece in quote.split("…") if piece.strip()]
    assert len(pieces) > 8 and not [piece for piece in pieces if piece not in messages]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_no_room_imports_from_one_above_it():
    upward = []
    for path in tracked(*(room.replace(".", "/") for room in FLOORS)):
        if not path.endswith(".py"):
            continue
        own = floor_of(path.removesuffix(".py").replace("/", "."))
        upward += [(path, name) for name in imports_of(path) if (floor := floor_of(name)) is not None and floor < own]
    # A save renders a card and publishes through `hub_cards` where that is installed.
    assert [(path, name) for path, name in upward if path != "modeling_genieblue/saving_genieblue.py"] == []


def test_every_name_that_is_imported_from_a_module_of_ours_is_there():
    """Also in benchmarks and examples, which no other test runs."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in tracked("*.py")}
    missing = []
    for path in tracked("benchmarks/*.py", "examples/*.py", "conversion/*.py", "genieblue/*.py", "hub_cards/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in modules:
                names = names_in(modules[node.module])
                missing += [
                    f"{path}: {node.module}.{each.name}"
                    for each in node.names
                    if each.name not in names and f"{node.module}.{each.name}" not in modules
                ]
    assert not missing


def names_in(path: str) -> set[str]:
    """What a module defines or imports at its top, also under an `if` or `try`."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse((ROOT / path).read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            else:
                waiting.append(node)
    return names
