"""Held-out data for the verdict on a quantized model: answers to chats, and the perplexity of references and texts."""

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion.verdict import Limits, judge, perplexity_change
from genieblue.data.chat_samples import BAD_SAMPLE, texts_of
from genieblue.data.chats import ChatDataset
from genieblue.data.plain_texts import is_plain_text, read_paragraphs
from genieblue.data.same_prompts import shared_prompts
from genieblue.evaluation.answering import ModelAnswerer, answerer_of
from genieblue.evaluation.evaluate import Evaluation, ScoredAnswer, compare, evaluate
from genieblue.evaluation.samples import EvaluationDataset
from hub_cards.verdicts import PLAIN_TEXT, REFERENCES
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

logger = logging.getLogger(__name__)

WINDOW, WINDOWS = 512, 32  # tokens of a text that are predicted from one another; the first windows of a file
STRETCH = 64  # tokens of a window that count as one sample: of a short text, windows are too few for a standard error
COMPARED_SAMPLES, COMPARED_TOKENS = 8, 32  # of each view, for the error by part
# A Japanese text has all three, in any proportion.
SCRIPTS = dict.fromkeys(("Cjk", "Hiragana", "Katakana"), "Chinese or Japanese")


@dataclass
class Measured:
    """What one model does on the data: scored answers, and by view and kind of text the losses of its samples."""

    answers: list[ScoredAnswer] = field(default_factory=list)
    losses: dict[tuple[str, str], list[tuple[float, int]]] = field(default_factory=dict)


class HeldOutData:
    """Chats as for `genieblue eval`, and plain texts (`.txt`, `.md`), to compare models on: a `verdict.HeldOut`.

    The answers to chats are scored, and the perplexity of their references is measured, each in the sample's own view;
    that of plain texts in the text view, in the first windows of 512 tokens that do not overlap.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        processor: Any,
        *,
        metric: str | None = None,
        limits: Limits | None = None,
        accept_loss: bool = False,
    ):
        """`ValueError` or `OSError` for data that is missing, empty or bad, chats without a reference among it.

        `metric` is for samples that name none.
        """
        self.processor, self.limits, self.accept_loss = processor, limits or Limits(), accept_loss
        self.remarks: list[str] = []  # what makes the verdict worth less
        self.chats: list[EvaluationDataset] = []
        self.data: list[dict[str, Any]] = []
        self._paragraphs: list[str] = []
        self._windows: list[list[int]] = []
        for source in sources:
            of = PLAIN_TEXT if is_plain_text(source) else REFERENCES
            if of == PLAIN_TEXT:
                paragraphs = read_paragraphs(source, "held-out text")
                self._paragraphs += paragraphs
                self._windows += self._windows_of("\n\n".join(paragraphs))
                sha256 = hashlib.sha256(Path(source).read_bytes()).hexdigest()
            else:
                self.chats.append(EvaluationDataset(source, metric=metric, skip_bad=None))
                sha256 = self.chats[-1].sha256
            if sha256 in (each["sha256"] for each in self.data):
                raise ValueError(f"{source} is given twice: more samples must be other samples.")
            self.data.append({"name": Path(source).name, "sha256": sha256, "of": of})

    def _windows_of(self, text: str) -> list[list[int]]:
        ids = self.processor.tokenizer(text, verbose=False)["input_ids"]
        size = min(WINDOW, self.processor.tokenizer.model_max_length)
        windows = [ids[start : start + size] for start in range(0, min(len(ids), size * WINDOWS), size)]
        return [window for window in windows if len(window) > 1]

    def measure(self, model: Any) -> Measured:
        """Answers and losses of a 16-bit or quantized GenieBlue; `ValueError` that names a sample it cannot answer."""
        answerer = answerer_of(model, self.processor)
        measured = Measured()
        for dataset in self.chats:
            measured.answers += evaluate(answerer, dataset).answers
        for view, of, logits, ids in self._predictions(answerer):
            losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
            samples = losses.split(STRETCH if of == PLAIN_TEXT else len(losses))
            measured.losses.setdefault((view, of), []).extend((float(each.sum()), len(each)) for each in samples)
        return measured

    def logits(self, model: Any) -> dict[str, torch.Tensor]:
        """By view, logits (positions, vocabulary) of the first tokens of the first few references, or of texts."""
        found: dict[str, list[torch.Tensor]] = {}
        for view, _, logits, _ in self._predictions(answerer_of(model, self.processor), COMPARED_SAMPLES):
            if len(found.setdefault(view, [])) < COMPARED_SAMPLES:
                found[view].append(logits[:COMPARED_TOKENS].cpu())
        return {view: torch.cat(each) for view, each in found.items()}

    def _predictions(
        self, answerer: ModelAnswerer, most: int | None = None
    ) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """View, kind, logits (tokens, vocabulary), ids (tokens,) of each sample.

        With `most`, only of the first so many of a view, and of the beginnings of texts.
        """
        seen: Counter[str] = Counter()
        for dataset in self.chats:
            for place in range(len(dataset)):
                sample = dataset[place]
                view = answerer.view(sample)
                seen[view] += 1
                if most is not None and seen[view] > most:
                    continue
                try:
                    logits, ids = answerer.reference_logits(sample)
                except BAD_SAMPLE as error:
                    raise ValueError(f"{sample.where}: {error}") from error
                yield view, REFERENCES, logits, ids
        for window in self._windows[:most]:
            window = window if most is None else window[: COMPARED_TOKENS + 1]
            ids = torch.tensor([window], device=answerer.model.device)
            with torch.no_grad():
                logits = answerer.model(input_ids=ids, view=TEXT, use_cache=False).logits
            yield TEXT, PLAIN_TEXT, logits[0, :-1].float(), ids[0, 1:]

    def verdict(
        self, before: Measured, after: Measured, error_by_part: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, Any]:
        """The verdict on a quantized model measured as `after`, made from one measured as `before`."""
        views = {}
        for view in (TEXT, MULTIMODAL):
            one, other = (Evaluation(found.answers).of_view(view) for found in (before, after))
            answers = [asdict(each) for each in compare(one, other)] if one.answers else []
            perplexity = [
                perplexity_change(of, losses, after.losses[own, of])
                for (own, of), losses in before.losses.items()
                if own == view
            ]
            if perplexity:
                views[view] = {"answers": answers, "perplexity": perplexity}
        found = judge(views, self.limits, self.accept_loss, remarks=self.remarks)
        return found | {"data": self.data, "error_by_part": dict(error_by_part or {})}

    def compare_with_calibration(self, files: Iterable[Path], image_folder: Path | None = None) -> None:
        """Warns, and remarks in the verdict, as `compare_with_calibration` does."""
        self.remarks += compare_with_calibration(self.chats, self._paragraphs, files, image_folder)


def compare_with_calibration(
    held_out: Iterable[ChatDataset],
    paragraphs: Sequence[str],
    files: Iterable[Path],
    image_folder: Path | None = None,
) -> list[str]:
    """Warns of, and returns, what makes a verdict worth less: held-out chats or paragraphs that are also calibrated on
    from `files`, whatever their answers (see `shared_prompts`), or that are in another script. Languages of one script
    cannot be told apart."""
    held_out, calibration, texts, remarks = list(held_out), [], [], []
    for path in files:
        if is_plain_text(path):
            texts += read_paragraphs(path)
            continue
        calibration.append(ChatDataset(path, image_folder=image_folder, skip_bad=None))
        texts += _texts(calibration[-1])
    shared = shared_prompts(held_out, calibration) + len(set(paragraphs) & set(texts))
    if shared:
        remarks.append(f"{shared} held-out samples or paragraphs are in the calibration data too, so it is too kind")
    texts_of_held_out = [*paragraphs, *(text for chats in held_out for text in _texts(chats))]
    scripts = [_main_script(each) for each in (texts, texts_of_held_out)]
    if None not in scripts and scripts[0] != scripts[1]:
        remarks.append(f"calibration data is mostly {scripts[0]}, held-out data mostly {scripts[1]}")
    for sentence in remarks:
        logger.warning("About the verdict: %s.", sentence)
    return remarks


def _texts(chats: ChatDataset) -> Iterator[str]:
    for place in range(min(len(chats), 256)):
        yield from texts_of(chats[place].messages)


def _main_script(texts: Iterable[str]) -> str | None:
    """The script of most letters, by their names in Unicode, such as `Latin`; `None` if there are no letters."""
    letters = (letter for text in texts for letter in text[:1000] if letter.isalpha())
    names = Counter(re.split("[ -]", unicodedata.name(letter, "?"))[0].title() for letter in letters)
    scripts: Counter[str] = Counter()
    for name, count in names.items():
        scripts[SCRIPTS.get(name, name)] += count
    return scripts.most_common(1)[0][0] if scripts else None
