"""Answers as a page shows them: in growing pieces, with the view that ran and the speed. Knows nothing of Gradio."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from genieblue.serving.conversation import GREEDY, Chat, TextPieces

BASE_ALONE = "base alone"


@dataclass(frozen=True)
class Progress:
    """An answer so far; `result` is there at the end, see `Conversation.ask`."""

    text: str
    result: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def facts(self) -> str:
        """The view that ran, the tokens, and how many a second, the prompt's own time included."""
        if self.result is None:
            return ""
        count = self.result["generated_tokens"]
        name = self.result["view"]
        view = name if name == BASE_ALONE else f"{name} view"
        speed = count / max(self.seconds, 1e-6)
        return f"{view} · {self.result['prompt_tokens']} prompt tokens · {count} generated · {speed:.1f} tokens/s"


def stream(ask: Callable[..., dict[str, Any]], *args: Any, **settings: Any) -> Iterator[Progress]:
    """Runs `ask(*args, on_text=…, **settings)` and yields its answer as it grows; errors of `ask` are raised here.

    Closing the iterator stops the generation at its next word, and waits for that.
    """
    pieces: queue.Queue[Any] = queue.Queue()
    stopped = threading.Event()

    def on_text(piece: str) -> None:
        if stopped.is_set():
            raise _Stopped
        pieces.put(piece)

    def run() -> None:
        try:
            pieces.put(ask(*args, on_text=on_text, **settings))
        except BaseException as error:
            pieces.put(error)

    started = time.monotonic()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    text = ""
    try:
        while isinstance(piece := pieces.get(), str):
            text += piece
            yield Progress(text)
        if isinstance(piece, BaseException):
            raise piece
        yield Progress(piece["text"], piece, time.monotonic() - started)
    finally:
        stopped.set()
        thread.join()


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
    inputs = inputs.to(base.device)
    streamer = TextPieces(tokenizer, on_text, "", "")
    output = base.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, num_beams=1, **GREEDY)
    length = inputs["input_ids"].shape[1]
    ids = output[0, length:].tolist()
    return {
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "view": BASE_ALONE,
        "prompt_tokens": length,
        "generated_tokens": len(ids),
    }
