"""The page: a chat with pictures, and the same question to the base alone and to both views. All of Gradio is here."""

import copy
import html
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.themes import Default
from gradio.utils import get_upload_folder

from genieblue.serving.conversation import Chat, Conversation
from genieblue.serving.server_conversation import ServerConversation
from genieblue.serving.web.answers import Progress, ask_base_alone, stream
from genieblue.serving.web.look import STYLE, facts, remark
from genieblue.serving.web.tiles import draw_tiles
from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor
from modeling_genieblue.image_reading_genieblue import read_image

logger = logging.getLogger(__name__)

LARGEST_UPLOAD = "50mb"
MOST_SESSIONS = 20  # whose caches are kept
HOUR = 3600  # seconds
QUEUE = "model"  # one answer at a time, whoever asks
LOCAL_FONTS = ["system-ui", "sans-serif"]  # Gradio's own theme fetches its fonts
COLUMNS = ("base-alone", "text-view", "multimodal-view")
TITLES = ("Base alone", "Text view", "Multimodal view")
TITLES_OF_SERVER = ("Base alone", "Server, without pictures", "Server, with pictures")
ABOUT = (
    "A message without pictures is answered in the **text view**, which is the base model itself. "
    "From its first picture on, a conversation runs in the **multimodal view**."
)
ABOUT_SERVER = (
    "A GenieBlue answers a request without pictures in its text view, and one with pictures in its multimodal view. "
    "The server tells neither which view ran nor how pictures were cut, so only what it was asked is shown."
)
NO_HISTORY = " The base has no chat template: each message is completed on its own, without history."
Talk = Conversation | ServerConversation
PLAIN: dict[str, Any] = {
    "render_markdown": False, "latex_delimiters": [], "buttons": [], "allow_file_downloads": False
}  # fmt: skip


class _Session:
    """What one visitor has said and seen. No dataclass, which Gradio would take apart."""

    def __init__(self, conversation: Talk):
        self.conversation = _fresh(conversation)
        self.shown: list[dict[str, Any]] = []
        self.stop = threading.Event()
        self.is_left = False  # for a new one, maybe in the middle of an answer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Session":
        """A new one, which is what Gradio makes such copies for."""
        return _Session(self.conversation)


def build_page(name: str, conversation: Talk, max_new_tokens: int = 512) -> gr.Blocks:
    """The page of what a conversation talks to; every visitor gets a conversation of their own."""
    label = Path(name).resolve().name if os.path.isdir(name) else name
    if is_server := isinstance(conversation, ServerConversation):
        label = f"{conversation.name} at {conversation.address}"
    limit: dict[str, Any] = (
        {"concurrency_limit": None} if is_server else {"concurrency_id": QUEUE, "concurrency_limit": 1}
    )
    titles = TITLES_OF_SERVER if is_server else TITLES
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if not is_server:
        settings["lock"] = threading.Lock()  # one that its visitor has left may still be at its last word

    def answer(session: _Session, message: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
        session.stop.clear()
        question = [_picture(path, Path(path).name) for path in message["files"]]
        question += [_text(message["text"])] if message["text"] else []
        turn: list[dict[str, Any]] = []
        try:
            images = _opened(message["files"])
            pieces = stream(session.conversation.ask, message["text"], images, stop=session.stop, **settings)
            for progress in chain([Progress("")], pieces):  # a long prompt takes its time before the first word
                answered = _answered(progress, max_new_tokens)
                if progress.result is not None:
                    answered += _tiles(images, session.conversation)
                turn = [_said("user", question), _said("assistant", answered)]
                if not session.is_left:
                    yield session, [*session.shown, *turn], None
        except Exception as error:
            _complain(error)
            yield session, session.shown, message  # what was typed stays
        else:
            session.shown = [*session.shown, *turn]
        if session.is_left:
            yield copy.deepcopy(session), [], None

    def compare(session: _Session, message: dict[str, Any]) -> Iterator[list[Any]]:
        session.stop.clear()
        shown: list[list[dict[str, Any]]] = [[], [], []]
        texts: list[str | None] = [None, None, None]
        yield [*shown, ""]
        try:
            images = _opened(message["files"])
            sides = _sides(conversation, message["text"], images)
        except Exception as error:
            _complain(error)
            return
        for number, (title, side) in enumerate(zip(titles, sides, strict=True)):
            if isinstance(side, str):
                shown[number] = [_said("assistant", [gr.HTML(remark(side))])]
                continue
            yield [*shown, f"{title}: being asked …"]
            try:
                for progress in stream(side, stop=session.stop, **settings):
                    shown[number] = [_said("assistant", _answered(progress, max_new_tokens))]
                    texts[number] = None if progress.result is None else progress.text
                    yield [*shown, f"{title}: answering …"]
            except Exception as error:
                shown[number] = [_said("assistant", [gr.HTML(remark(_words(error)))])]
            if session.stop.is_set():
                yield [*shown, "Stopped."]
                return
        if texts[2] is not None and images:
            shown[2][0]["content"] += _tiles(images, conversation)
        yield [*shown, _verdict(texts)]

    with gr.Blocks(title=f"GenieBlue: {label}", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(f"## GenieBlue `{label}`\n{ABOUT_SERVER if is_server else ABOUT}"
                    f"{NO_HISTORY if conversation.completes_only else ''}")  # fmt: skip
        with gr.Tab("Chat"):
            session = gr.State(_Session(conversation))
            chat = gr.Chatbot(height="54vh", show_label=False, elem_id="chat", **PLAIN)
            entry = _entry("entry")
            with gr.Row():
                stop = _button("Stop", "stop")
                reset = _button("New conversation", "reset")
            entry.submit(answer, [session, entry], [session, chat, entry], **limit)
            stop.click(_stop, session, None)
            for event in (reset.click, chat.clear):  # the latter is the bin at the top of the chat
                event(_leave, session, [session, chat])
        with gr.Tab("Side by side"):
            gr.Markdown("One question, without a history. Pictures are given to the multimodal view alone.")
            comparison = gr.State(_Session(conversation))
            asked = _entry("compare")
            with gr.Row():
                stop_all = _button("Stop", "stop-all")
                verdict = gr.Markdown(elem_id="verdict")
            with gr.Row():
                columns = [
                    gr.Chatbot(label=title, elem_id=name, height="50vh", min_width=280, **PLAIN)
                    for title, name in zip(titles, COLUMNS, strict=True)
                ]
            asked.submit(compare, [comparison, asked], [*columns, verdict], **limit)
            stop_all.click(_stop, comparison, None)
    return page


def open_page(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves a page in the background; `page.block_thread()` waits until it is interrupted."""
    page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, prevent_thread_lock=True, quiet=True,
        max_file_size=LARGEST_UPLOAD, state_session_capacity=MOST_SESSIONS, run_history=False, footer_links=[],
        theme=Default(font=LOCAL_FONTS, font_mono=["monospace"]), css=STYLE,
    )  # fmt: skip


def _fresh(conversation: Talk) -> Talk:
    """Another conversation with the same model or server."""
    another = copy.copy(conversation)
    another.reset()
    return another


def _stop(session: _Session) -> None:
    session.stop.set()


def _leave(session: _Session) -> tuple[_Session, list[Any]]:
    session.is_left = True
    session.stop.set()
    return copy.deepcopy(session), []


def _entry(name: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        file_count="multiple", file_types=["image"], sources=["upload"], show_label=False, elem_id=name,
        placeholder="Ask something; drop pictures here", max_plain_text_length=1_000_000,
    )  # fmt: skip


def _button(title: str, name: str) -> gr.Button:
    return gr.Button(title, elem_id=name, size="sm", scale=0, min_width=160)


def _opened(paths: list[str]) -> list[Any]:
    """The pictures of uploaded files, which errors name without the folder that they were put in."""
    try:
        return [read_image(Path(path), index) for index, path in enumerate(paths)]
    except (ValueError, OSError) as error:
        message = str(error)
        for path in paths:
            message = message.replace(path, Path(path).name)
        raise ValueError(message) from error


def _complain(error: Exception) -> None:
    gr.Warning(html.escape(_words(error)), duration=None)


def _words(error: Exception) -> str:
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    logger.exception("An answer failed.", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _said(role: str, parts: list[Any]) -> dict[str, Any]:
    return {"role": role, "content": parts}


def _text(text: str) -> dict[str, Any]:
    """A text as it is: Gradio would take the indentation of a bare string away, and show tags as HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def _picture(path: str, words: str) -> dict[str, Any]:
    return {"path": path, "alt_text": words}


def _answered(progress: Progress, max_new_tokens: int) -> list[Any]:
    if progress.result is None and not progress.stopped:
        return [_text(progress.text or "…")]
    text = [_text(progress.text)] if progress.text else []
    return [*text, gr.HTML(facts(progress, max_new_tokens))]


def _tiles(images: list[Any], conversation: Talk) -> list[Any]:
    """The pictures of how images are cut, where that is known."""
    image_processor = getattr(getattr(conversation, "processor", None), "image_processor", None)
    if not isinstance(image_processor, GenieBlueImageProcessor):
        return []
    parts = []
    for image in images:
        picture, words = draw_tiles(image, image_processor)
        path = save_pil_to_cache(picture, get_upload_folder(), format="png")
        parts += [gr.HTML(remark(words)), _picture(path, words)]
    return parts


def _sides(conversation: Talk, text: str, images: list[Any]) -> list[Callable[..., dict[str, Any]] | str]:
    """For each column what answers, or why nothing does."""
    if not text.strip() and not images:
        raise ValueError("The prompt is empty: give a text or an image.")
    ask = [_fresh(conversation).ask for _ in range(2)]
    alone = (
        partial(ask_base_alone, conversation, text)
        if isinstance(conversation, Chat)
        else "Only a model that PyTorch runs here can run its base without anything of GenieBlue."
    )
    views: list[Callable[..., dict[str, Any]] | str] = [partial(ask[0], text), partial(ask[1], text, images)]
    if not isinstance(conversation, ServerConversation):
        views[1] = partial(ask[1], text, images, view="multimodal")
    elif not images:
        views[1] = "A server runs the multimodal view only for pictures."
    if not text.strip():
        alone = views[0] = "There is no text to ask."
    return [alone, *views]


def _verdict(texts: list[str | None]) -> str:
    base, text, _ = texts
    if base is None or text is None:
        return ""
    return f"The base alone and the text view gave **{'the same answer' if base == text else 'different answers'}**."
