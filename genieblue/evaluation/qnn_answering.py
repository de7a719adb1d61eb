"""Answers of a phone NPU's bundle, run on this computer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from conversion.chat_ids import answer_text
from conversion.stdout import stdout_to_stderr
from genieblue.evaluation.answering import choice_rows, image_tiles
from genieblue.evaluation.metrics import CHOICE
from genieblue.evaluation.samples import EvaluationSample
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT


class BundleAnswerer:
    """Answers of a bundle, one sample at a time, as its graphs are made for one conversation."""

    batch_size = 1
    precision = "NPU bundle"

    def __init__(self, runner: Any):
        """`runner` is a `conversion.qnn.bundle.runner.QnnRunner`."""
        self.runner = runner
        self.processor = runner.processor
        self._stop_ids = tuple(runner.bundle.metadata["generation"]["eos_token_ids"])

    def view(self, sample: EvaluationSample) -> str:
        """The view that answers a sample."""
        return MULTIMODAL if sample.images else TEXT

    def answers(self, samples: Sequence[EvaluationSample], max_new_tokens: int) -> list[str]:
        """One greedy answer to each sample."""
        with stdout_to_stderr():  # the emulator prints a banner on stdout
            return [self._answer(sample, max_new_tokens) for sample in samples]

    def _answer(self, sample: EvaluationSample, max_new_tokens: int) -> str:
        ids, tiles = _prompt(self.processor, sample)
        answer = list(self.runner.generate(ids, tiles, max_new_tokens=max_new_tokens))
        return answer_text(self.processor, sample.prompt, answer)

    def log_likelihoods(self, sample: EvaluationSample) -> list[float]:
        """Of each of the sample's choices as the whole answer, with the stop token that ends it."""
        tiles, num_tiles = image_tiles(self.processor, sample)
        pixels = None if tiles is None else tiles.numpy()
        found = []
        for prompt, answer in choice_rows(self.processor, sample, num_tiles, self._stop_ids):
            with stdout_to_stderr():
                logits = np.asarray(self.runner.logits([*prompt, *answer[:-1]], pixels), np.float64)
            logits = logits[len(prompt) - 1 :]
            logits -= logits.max(axis=-1, keepdims=True)
            log_likelihoods = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            found.append(float(log_likelihoods[np.arange(len(answer)), answer].sum()))
        return found


def tokens_read(processor: Any, sample: EvaluationSample, stop_ids: Sequence[int]) -> int:
    """How many tokens the graphs read of a sample, for which its images are read: all but an answer's last one."""
    if sample.metric == CHOICE:
        rows = choice_rows(processor, sample, image_tiles(processor, sample)[1], stop_ids)
        return max(len(prompt) + len(answer) - 1 for prompt, answer in rows)
    return len(_prompt(processor, sample)[0])


def _prompt(processor: Any, sample: EvaluationSample) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids (length,) of a sample's prompt, and its tiles."""
    inputs = processor.apply_chat_template(
        sample.prompt,
        images=sample.images or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    return np.asarray(inputs["input_ids"]).reshape(-1), inputs.get("pixel_values")
