"""`verify` shows that trained answers are what is generated, and names what keeps them from it."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_genieblue import save_tiny_pair

from conversion.verification.answer_boundaries import check_answer_boundaries
from conversion.verification.checks import CheckFailed
from conversion.verification.saved_model import SavedModel

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|system|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_tiny_pair(tmp_path_factory.mktemp("good")).parent


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "pair") / "genieblue"


def check(folder: Path) -> str:
    return check_answer_boundaries(SavedModel(str(folder), None, None, {}, False, "auto", None))


def use_template(folder: Path, template: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def test_answers_end_where_generation_stops(folder):
    assert "10 chats" in check(folder) and check(folder).endswith("answers end in '</s>'")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        CHATML.replace("{{ m['content'] }}", "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
                       "{% endif %}{{ m['content'].split('</think>')[-1] }}"),
    ],
    ids=["an end that does not stop", "trims", "no generation prompt", "a thought before the last answer"],
)  # fmt: skip
def test_other_ways_to_write_a_chat_are_proven_too(folder, template):
    use_template(folder, template)
    check(folder)


def test_a_model_without_chat_template_has_no_answers_to_prove(folder):
    use_template(folder, None)
    assert "no chat template" in check(folder)


def test_a_template_whose_prompt_is_not_how_the_chat_goes_on_is_named(folder):
    use_template(folder, CHATML.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>{% endif"))
    with pytest.raises(CheckFailed, match="not prefix-stable"):
        check(folder)


def test_a_base_whose_generation_never_stops_is_named(folder):
    for path in (folder / "generation_config.json", folder.parent / "base" / "generation_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    with pytest.raises(CheckFailed, match="never stops"):
        check(folder)
