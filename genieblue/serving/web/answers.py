"""Answers as a page shows them: in growing pieces, with the view that ran and the speed. Knows nothing of Gradio."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import TextStreamer

from genieblue.serving.conversation import GREEDY, Chat

BASE_ALONE = "base alone"


@dataclass(frozen=True)
class Progress:
    """An answer so far; at the end there is a `result`, see `Conversation.ask`, or it was `stopped`."""

    text: str
    result: dict[str, Any] | None = None
    seconds: float = 0.0  # the prompt's own time included
    stopped: bool = False


def stream(
    ask: Callable[..., dict[str, Any]],
    *args: Any,
    stop: threading.Event,
    lock: AbstractContextManager[Any] | None = None,
    **settings: Any,
) -> Iterator[Progress]:
    """Runs `ask(*args, on_text=…, **settings)` and yields its answer as it grows; errors of `ask` are raised here.

    Once `stop` is set, also by closing the iterator, the generation ends at its next word, as a turn that failed.
    `lock` is held as long as `ask` runs, which goes on for that word after the iterator is closed.
    """
    pieces: queue.Queue[Any] = queue.Queue()

    def on_text(piece: str) -> None:
        if stop.is_set():
            raise _Stopped
        pieces.put(piece)

    def run() -> None:
        try:
            with lock or nullcontext():
                pieces.put((ask(*args, on_text=on_text, **settings), time.monotonic() - started))
        except BaseException as error:
            pieces.put(error)

    started = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    text = ""
    try:
        while isinstance(piece := pieces.get(), str):
            text += piece
            yield Progress(text)
        if isinstance(piece, _Stopped):
            yield Progress(text, stopped=True)
        elif isinstance(piece, BaseException):
            raise piece
        else:
            result, seconds = piece
            yield Progress(result["text"], result, seconds)
    except GeneratorExit:
        stop.set()
        raise


class _Stopped(Exception):
    """Leaves a generation that nobody waits for any more."""


def ask_base_alone(chat: Chat, prompt: str, *, max_new_tokens: int, on_text: Callable[[str], None]) -> dict[str, Any]:
    """The greedy answer of the base by its own tokenizer, template and `generate`, without anything of GenieBlue."""
    base, tokenizer = chat.model.language_model, chat.processor.tokenizer
    if chat.completes_only:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    streamer = _Words(tokenizer, on_text)
    output = base.generate(
        **inputs.to(base.device), max_new_tokens=max_new_tokens, streamer=streamer, num_beams=1, **GREEDY
    )
    length = inputs["input_ids"].shape[1]
    ids = output[0, length:].tolist()
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "view": BASE_ALONE,
        "prompt_tokens": length,
        "generated_tokens": len(ids),
    }


class _Words(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
