"""The commands and options that the README and the docs print are ones that `genieblue` has."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import REPOSITORY, run

from genieblue.cli.app import app

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
OPTIMUM = {"optimum-cli genieblue-": "genieblue ", "optimum-cli export genieblue-": "genieblue export "}
# Of accelerate, lm-eval, lmms-eval and vLLM.
OF_OTHERS = {"--use_fsdp", "--fsdp_version", "--use_deepspeed", "--zero_stage", "--include_path", "--model",
             "--trust-request-mm-kwargs", "--max-loras", "--max-lora-rank", "--allowed-media-domains",
             "--enable-scale-out"}  # fmt: skip


def code_of(page: Path) -> Iterator[tuple[str, bool]]:
    """Every line of shell and every inline code of a page, and whether it can be a whole command."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        yield from ((line, "…" not in line) for line in block.replace("\\\n", " ").splitlines())
    yield from ((span, False) for span in re.findall("`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def commands_of(page: Path) -> Iterator[tuple[str, bool]]:
    """The commands of a page, from `genieblue` on."""
    for line, is_whole in code_of(page):
        for theirs, ours in OPTIMUM.items():
            line = line.replace(theirs, ours)
        if found := re.search(r"(?:^|/|-m )genieblue (.*)", line):
            yield found[1], is_whole


def options_of(command: Any) -> set[str]:
    """The options of a command and of those under it."""
    own = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return own.union({"-h", "--help"}, *map(options_of, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_commands_can_be_parsed(page):
    for text, is_whole in commands_of(page):
        command, words = typer.main.get_command(app), shlex.split(text, comments=True)
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, text
            command, words = command.commands[words[0]], words[1:]
        own = words[: words.index("--")] if "--" in words else words  # the rest is another program's
        given = {word.partition("=")[0] for word in own if word.startswith("-")}
        assert given <= options_of(command), text
        if is_whole:
            command.make_context(command.name, words)  # raises an error for a wrong value or number of arguments


def test_options_that_are_named_alone_exist():
    spans = [(page.name, code) for page in PAGES for code, _ in code_of(page) if re.match(r"--[a-z]", code)]
    known = options_of(typer.main.get_command(app)) | OF_OTHERS
    assert len(spans) > 30 and not [span for span in spans if re.split("[ =]", span[1])[0] not in known]


@pytest.mark.parametrize("group", ["", "data", "export", "lab"])
def test_a_list_of_commands_cuts_no_sentence(group):
    commands = run(*group.split(), "--help").stdout.partition("Commands:")[2]
    assert commands and "..." not in commands
