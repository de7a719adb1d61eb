"""Whether a chat template can be used: a trial beforehand, so that no sample is blamed for it later."""

from itertools import repeat
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_genieblue.chat_messages_genieblue import with_string_contents

IMAGE = "<image>"  # to a template, a placeholder is text like any other
QUESTION, ANSWER = "Which colour is this?", "Blue, I think."
NO_TEMPLATE = (
    "This model has no chat template, without which no chat can be written out: make it with one (`genieblue init "
    "--chat-template FILE`), or set `processor.chat_template`."
)


class UnusableTemplate(ValueError):
    """A chat template that is missing or broken, whatever the chat."""


def check_processor_template(processor: Any) -> None:
    """`UnusableTemplate` if the processor of a GenieBlue has no chat template, or one that cannot be used."""
    if processor.chat_template is None:
        raise UnusableTemplate(NO_TEMPLATE)
    own = processor.tokenizer.chat_template is not None
    template = None if own else processor.chat_template
    check_chat_template(processor.tokenizer, template, "The model's chat template")


def check_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str) -> None:
    """`UnusableTemplate`, with `name` for the template, if it fails on a chat, or leaves out a text or an image of it.

    `chat_template` is for a tokenizer without one: `None` stands for the tokenizer's own.
    """
    template = tokenizer.chat_template if chat_template is None else chat_template
    if isinstance(template, str) and not template.strip():
        raise UnusableTemplate(f"{name} is empty: expected Jinja text that writes out `messages`.")
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
    except Exception as error:  # a template can fail in any way of Jinja, and of the Python within it
        line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise UnusableTemplate(
            f"{name} fails on {what} ({type(error).__name__}{line}: {error}): correct the template, or what it "
            "asks of the tokenizer."
        ) from error
    pieces = [piece for message in strings for piece in message["content"].split("\n")]
    if missing := [piece for piece in pieces if piece not in text]:
        raise UnusableTemplate(
            f"{name} leaves {missing[0]!r} out of {what}: expected one that writes out the content of each message, "
            "which is a string."
        )


__all__ = ["NO_TEMPLATE", "UnusableTemplate", "check_processor_template", "check_chat_template"]
