"""The page: a chat with pictures, and the same question to the base alone and to both views. All of Gradio is here."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from genieblue.serving.conversation import Chat, Conversation
from genieblue.serving.server_conversation import ServerConversation
from genieblue.serving.web.answers import Progress, ask_base_alone, stream
from genieblue.serving.web.tiles import draw_tiles
from modeling_genieblue.image_reading_genieblue import read_image

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The page needs Gradio, which is not installed: pip install 'genieblue[web]'.", name="gradio"
    ) from error

LARGEST_UPLOAD = "50mb"
QUEUE = "model"  # one answer at a time, whoever asks
LOCAL_FONTS = ["system-ui", "sans-serif"]  # Gradio's own theme fetches its fonts
Talk = Conversation | ServerConversation


@dataclass
class _Session:
    """What one visitor has said and seen."""

    conversation: Talk
    shown: list[dict[str, Any]] = field(default_factory=list)


def build_page(name: str, new_conversation: Callable[[], Talk], max_new_tokens: int = 512) -> gr.Blocks:
    """The page of a model; every visitor talks in a conversation of their own."""

    label = name.rstrip("/").rpartition("/")[2] if os.path.isdir(name) else name

    def answer(session: _Session | None, message: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
        session = session or _Session(new_conversation())
        before = list(session.shown)
        question = [_said("user", gr.Image(path)) for path in message["files"]]
        question += [_said("user", message["text"])] if message["text"] else []
        try:
            images = _opened(message["files"])
            for progress in stream(session.conversation.ask, message["text"], images, max_new_tokens=max_new_tokens):
                session.shown = [*before, *question, *_answered(progress)]
                if progress.result is not None:
                    session.shown += _cut(images, session.conversation)
                yield session, session.shown, None
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
            session.shown = before  # and what was typed stays
            yield session, before, message

    def forget() -> tuple[None, list[Any]]:
        return None, []

    def compare(message: dict[str, Any]) -> Iterator[list[Any]]:
        sides: list[list[dict[str, Any]]] = [[], [], []]
        said: list[str | None] = [None, None, None]
        try:
            images = _opened(message["files"])
            for number, (ask, *arguments) in enumerate(_sides(new_conversation(), message["text"], images)):
                if ask is None:
                    sides[number] = [_said("assistant", arguments[0])]
                    yield [*sides, ""]
                    continue
                question, pictures, options = arguments
                for progress in stream(ask, *question, max_new_tokens=max_new_tokens, **options):
                    sides[number], said[number] = _answered(progress), progress.text
                    yield [*sides, ""]
                sides[number] += _cut(pictures, new_conversation())
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
        yield [*sides, _verdict(said)]

    with gr.Blocks(title=f"GenieBlue: {label}", analytics_enabled=False) as page:
        gr.Markdown(f"# GenieBlue\n`{label}`: texts are answered by the base itself, pictures by the multimodal view.")
        with gr.Tab("Chat"):
            session = gr.State(None)
            chat = gr.Chatbot(height=520, render_markdown=False, show_label=False, elem_id="chat", buttons=["copy"])
            entry = _entry("entry")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="stop")
                reset = gr.Button("New conversation", elem_id="reset")
            running = entry.submit(answer, [session, entry], [session, chat, entry], concurrency_id=QUEUE)
            stop.click(None, cancels=running)
            reset.click(forget, None, [session, chat], cancels=running)
        with gr.Tab("Side by side"):
            gr.Markdown("One question, without a history. The base and the text view see no pictures.")
            asked = _entry("compare")
            with gr.Row():
                columns = [
                    gr.Chatbot(label=title, height=420, render_markdown=False, elem_id=title.lower().replace(" ", "-"))
                    for title in ("Base alone", "Text view", "Multimodal view")
                ]
            verdict = gr.Markdown(elem_id="verdict")
            asked.submit(compare, asked, [*columns, verdict], concurrency_id=QUEUE)
    return page


def open_page(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves a page until it is interrupted; `OSError` if the port is taken."""
    theme = gr.themes.Default(font=LOCAL_FONTS, font_mono=["monospace"])
    page.launch(server_name=host, server_port=port, share=False, max_file_size=LARGEST_UPLOAD, theme=theme)


def _entry(name: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        file_count="multiple", file_types=["image"], sources=["upload"], show_label=False, elem_id=name,
        placeholder="Ask something; drop pictures here",
    )  # fmt: skip


def _opened(paths: list[str]) -> list[Any]:
    return [read_image(path, index) for index, path in enumerate(paths)]


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _answered(progress: Progress) -> list[dict[str, Any]]:
    said = [_said("assistant", progress.text or "…")]
    return [*said, _said("assistant", f"[{progress.facts}]")] if progress.result is not None else said


def _cut(images: list[Any], conversation: Talk) -> list[dict[str, Any]]:
    """The pictures of how images are cut, which a server does not tell."""
    if isinstance(conversation, ServerConversation):
        return []
    cut = [draw_tiles(image, conversation.processor.image_processor) for image in images]
    return [_said("assistant", part) for picture, words in cut for part in (f"[{words}]", gr.Image(picture))]


def _sides(conversation: Talk, text: str, images: list[Any]) -> Iterator[tuple[Any, ...]]:
    """For each column how to ask: a function, its arguments, the pictures that it sees, options; or why not."""
    if isinstance(conversation, Chat):
        yield ask_base_alone, (conversation, text), [], {}
    else:
        yield None, "Only a model in PyTorch, which runs here, can run its base without anything of GenieBlue."
    yield conversation.ask, (text,), [], {}
    conversation.reset()
    if isinstance(conversation, ServerConversation) and not images:
        yield None, "A server runs the multimodal view only for pictures."
    else:
        options = {} if isinstance(conversation, ServerConversation) else {"view": "multimodal"}
        yield conversation.ask, (text, images), images, options


def _verdict(said: list[str | None]) -> str:
    base, text, _ = said
    if base is None or text is None:
        return ""
    return f"The base alone and the text view gave **{'the same answer' if base == text else 'different answers'}**."
