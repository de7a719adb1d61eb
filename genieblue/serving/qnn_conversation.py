"""A conversation with a phone NPU's bundle, run on this computer."""

from typing import Any

import numpy as np

from conversion.qnn.bundle.runner import QnnRunner, choose_view
from conversion.stdout import stdout_to_stderr
from genieblue.serving.conversation import Conversation


class QnnChat(Conversation):
    """A conversation with a bundle. Decoding is greedy; the graphs' context length limits the conversation."""

    tensors = "np"

    def __init__(self, runner: QnnRunner):
        self.runner = runner
        super().__init__(runner.processor)

    def _answer(
        self, ids: list[int], pixel_values: Any, *, view: str, max_new_tokens: int, streamer: Any
    ) -> list[int]:
        view = choose_view(view, pixel_values)
        graphs = self.runner.views[view]
        with stdout_to_stderr():  # the emulator prints a banner on stdout
            graphs.open()
        cached = self._shared_with_cache(ids, view)
        if cached < len(self._cached_ids):  # the graphs' cache cannot be cropped
            cached = 0
        decoder = self._cache if cached else graphs.decoder()
        self._forget_cache()  # if anything fails from here on, the cache is invalid
        new = self._new_pixels(pixel_values, ids[cached:])
        answer = []
        if streamer is not None:
            streamer.put(np.asarray(ids))
        for token in self.runner.continue_from(decoder, ids[cached:], new, max_new_tokens=max_new_tokens):
            answer.append(token)
            if streamer is not None:
                streamer.put(np.asarray([token]))
        if streamer is not None:
            streamer.end()
        self._cache, self._cached_view = decoder, view
        self._cached_ids = [*ids, *answer][: decoder.length]
        return answer
