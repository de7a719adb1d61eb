"""Tries out a chat template in advance, so that no sample is blamed for its faults later."""

from itertools import repeat
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_genieblue.chat_messages_genieblue import with_string_contents

IMAGE = "<image>"  # for a template, a placeholder is ordinary text
QUESTION, ANSWER = "Which colour is this?", "Blue, I think."
NO_TEMPLATE = (
    "This model has no chat template, so chats cannot be formatted: make it with one (`genieblue init "
    "--chat-template FILE`), or set `processor.chat_template`."
)


class UnusableTemplate(ValueError):
    """A chat template that is missing, or broken for every chat."""


def check_processor_template(processor: Any) -> None:
    """`UnusableTemplate` if a GenieBlue's processor has no chat template, or a broken one."""
    if processor.chat_template is None:
        raise UnusableTemplate(NO_TEMPLATE)
    own = processor.tokenizer.chat_template is not None
    template = None if own else processor.chat_template
    check_chat_template(processor.tokenizer, template, "The model's chat template")


def check_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str) -> None:
    """`UnusableTemplate`, naming the template `name`, if it fails on a chat or drops a text or an image.

    `chat_template` is for a tokenizer without one; `None` means the tokenizer's own.
    """
    template = tokenizer.chat_template if chat_template is None else chat_template
    if isinstance(template, str) and not template.strip():
        raise UnusableTemplate(f"{name} is empty: expected a Jinja template that formats `messages`.")
    with_image = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    _try(tokenizer, chat_template, name, "a question", [{"role": "user", "content": QUESTION}])
    _try(tokenizer, chat_template, name, "a question with an image", [{"role": "user", "content": with_image}])
    chat = [{"role": "user", "content": with_image}, {"role": "assistant", "content": ANSWER}]
    _try(tokenizer, chat_template, name, "an answer about an image", chat)


def _try(
    tokenizer: PreTrainedTokenizerBase, template: str | None, name: str, what: str, chat: list[dict[str, Any]]
) -> None:
    strings = with_string_contents(chat, repeat(IMAGE))
    options = {"add_generation_prompt": chat[-1]["role"] == "user", "tokenize": False}
    try:
        text = tokenizer.apply_chat_template(strings, chat_template=template, **options)
    except Exception as error:  # Jinja, and Python expressions in a template, can raise any error
        line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise UnusableTemplate(
            f"{name} fails on {what} ({type(error).__name__}{line}: {error}): correct the template, or the "
            "tokenizer settings that it uses."
        ) from error
    pieces = [piece for message in strings for piece in message["content"].split("\n")]
    if missing := [piece for piece in pieces if piece not in text]:
        raise UnusableTemplate(
            f"{name} drops {missing[0]!r} from {what}: expected a template that writes the content of each message, "
            "which is a string."
        )
