"""Held-out chats for the verdict on a phone NPU's bundle: answers of the model and of its bundle, and logits."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genieblue.data.chat_samples import BAD_SAMPLE
from genieblue.data.collation import ChatCollator
from genieblue.data.plain_texts import is_plain_text
from genieblue.evaluation.answering import ModelAnswerer
from genieblue.evaluation.evaluate import Evaluation, compare, evaluate
from genieblue.evaluation.held_out import compare_with_calibration
from genieblue.evaluation.qnn_answering import BundleAnswerer, tokens_read
from genieblue.evaluation.samples import EvaluationDataset
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

MOST_NAMED = 5  # chats that are too long, in a message


class BundleHeldOut:
    """Chats as for `genieblue eval`."""

    def __init__(self, sources: Sequence[str | Path], *, metric: str | None = None):
        """`ValueError` or `OSError` for data that is missing, empty, bad or no chats; `metric` for samples without."""
        for source in filter(is_plain_text, sources):
            raise ValueError(f"{source} is a text, but a bundle is compared on chats: give JSONL, or leave it out.")
        self.chats = [EvaluationDataset(source, metric=metric, skip_bad=None) for source in sources]
        self.digests = [f"{chats.sha256} {metric}" for chats in self.chats]

    def check(self, processor: Any, context_length: int, stop_ids: Sequence[int]) -> None:
        """Encodes each chat once; `ValueError` that names those which a bundle with this context cannot answer."""
        too_long = []
        for chats in self.chats:
            for place in range(len(chats)):
                sample = chats[place]
                try:
                    tokens = tokens_read(processor, sample, stop_ids)
                except BAD_SAMPLE as error:
                    raise ValueError(f"{sample.where}: {error}") from error
                if tokens > context_length:
                    too_long.append(f"{sample.where} ({tokens} tokens)")
        if too_long:
            more = f" and {len(too_long) - MOST_NAMED} more" if len(too_long) > MOST_NAMED else ""
            raise ValueError(
                f"These held-out chats are longer than the context of {context_length} tokens, so a bundle cannot "
                f"answer them: {', '.join(too_long[:MOST_NAMED])}{more}. Shorten them or leave them out, or export "
                "with a longer context (--context-length)."
            )

    def answers(self, model: Any, runner: Any) -> dict[str, list[dict[str, Any]]]:
        """By view, paired differences of the answers of a model and of its bundle, as `conversion.qnn.verdict` takes.

        `runner` is a `conversion.qnn.bundle.runner.QnnRunner`.
        """
        both = []
        for answerer in (ModelAnswerer(model, runner.processor), BundleAnswerer(runner)):
            both.append(Evaluation([answer for chats in self.chats for answer in evaluate(answerer, chats).answers]))
        pairs = {view: [each.of_view(view) for each in both] for view in (TEXT, MULTIMODAL)}
        return {view: [asdict(each) for each in compare(*pair)] for view, pair in pairs.items() if pair[0].answers}

    def requests(self, processor: Any, most: int) -> Iterator[dict[str, Any]]:
        """The first `most` chats of each view with their references, as a bundle's logits are compared on them."""
        encode, left = ChatCollator(processor).encode, dict.fromkeys((True, False), most)
        for chats in self.chats:
            for place in range(len(chats)):
                sample = chats[place]
                kind = bool(sample.images)
                if left[kind]:
                    left[kind] -= 1
                    yield encode(sample)
                if not any(left.values()):
                    return

    def compare_with_calibration(self, calibration: Path, image_folder: Path | None) -> list[str]:
        """Warnings about chats that are calibrated on too, or in another script; they are remarks of the verdict."""
        return compare_with_calibration(self.chats, (), [calibration], image_folder)
