"""A conversation with a bundle for a phone's NPU, run on this computer."""

from typing import Any

import numpy as np

from conversion.qnn.bundle.runner import QnnRunner, choose_view
from conversion.stdout import stdout_to_stderr
from genieblue.serving.conversation import Conversation


class QnnChat(Conversation):
    """Asks the graphs of a bundle. Answers are greedy, and a conversation ends with the context of the graphs."""

    tensors = "np"

    def __init__(self, runner: QnnRunner):
        self.runner = runner
        super().__init__(runner.processor)

    def _answer(
        self, ids: list[int], pixel_values: Any, *, view: str | None, max_new_tokens: int, streamer: Any
    ) -> tuple[list[int], str]:
        view = choose_view(view, pixel_values)
        graphs = self.runner.views[view]
        with stdout_to_stderr():  # the emulator greets on stdout
            graphs.open()
        cached = self._shared_with_cache(ids, view)
        if cached < len(self._cached_ids):  # graphs have no way back to what was read before
            cached = 0
        decoder = self._cache if cached else graphs.decoder()
        self._forget_cache()  # whatever goes wrong from here on, it is not to be used again
        new = self._new_pixels(pixel_values, ids[cached:])
        answer = []
        if streamer is not None:
            streamer.put(np.asarray(ids))
        for token in self.runner.go_on(decoder, ids[cached:], new, max_new_tokens=max_new_tokens):
            answer.append(token)
            if streamer is not None:
                streamer.put(np.asarray([token]))
        if streamer is not None:
            streamer.end()
        self._cache, self._cached_view = decoder, view
        self._cached_ids = [*ids, *answer][: decoder.length]
        return answer, view


__all__ = ["QnnChat"]
