"""A GenieBlue extracted from a lab's full fine-tuning: what it still reads at several budgets, and the base's text.

    python -m benchmarks.lab_extraction LAB [--seed 0] [--tasks digits receipts naming] [--out rows]

LAB is a lab's folder with a finished `full` cell. Its projector is InternVL's, so projector and trained language model
go into transformers' own InternVL as they are, with the lab's SigLIP and tiles; that VLM is extracted against its
base. Bytes are those of all that the language side adds, against those of the base. Calibrated on the lab's own
training chats. Each case leaves its figures in `--out`, where a stopped run goes on.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging as transformers_logging

from benchmarks.exchange import added_bytes, as_chat, is_text_the_bases
from benchmarks.report import print_table
from conversion.extract import extract_genieblue
from conversion.extraction_plan import Choice
from genieblue.evaluation.metrics import standard_error
from genieblue.lab.cells import LAB_FILE, Cell, base_of, image_scores
from genieblue.lab.data import LabChats
from genieblue.lab.lab_file import LabFile, read_lab_file
from genieblue.lab.structures.full import LANGUAGE_MODEL
from genieblue.lab.text import split_documents
from modeling_genieblue import GenieBlueForConditionalGeneration, GenieBlueProcessor, VlmGenieBlueProcessor

SHARES = (0.5, 0.35, 0.25)  # of the base's bytes, for all that an extraction adds
CALIBRATION_CHATS, CALIBRATION_SEED, TEXT_TOKENS = 32, 1234, 1024


class SiglipInternVLConfig(InternVLConfig):
    """InternVL's with a SigLIP, where it has a tower of its own."""

    sub_configs_defaults = InternVLConfig.sub_configs_defaults | {"vision_config": SiglipVisionConfig}


class SiglipInternVL(InternVLForConditionalGeneration):
    """InternVL's with a SigLIP."""

    config_class = SiglipInternVLConfig


class TileProcessor(GenieBlueProcessor):
    """The lab's processor for a VLM that does not ask how many tiles each image has."""

    _auto_class = None

    def __call__(self, *arguments: Any, **options: Any) -> BatchFeature:
        return _without_counts(super().__call__(*arguments, **options))

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        return _without_counts(super().apply_chat_template(*arguments, **options))


def _without_counts(inputs: Any) -> Any:
    if isinstance(inputs, BatchFeature):
        inputs.pop("num_tiles", None)
    return inputs


def write_internvl(full: Path, out: Path) -> None:
    """Writes a lab's full fine-tuning as transformers' InternVL; `ValueError` if that has other logits."""
    source = GenieBlueForConditionalGeneration.from_pretrained(full)
    language = AutoModelForCausalLM.from_pretrained(full / LANGUAGE_MODEL)
    config = source.config
    text = language.config.to_dict() | {"vocab_size": config.image_token_id + 1}
    vlm = SiglipInternVL(
        SiglipInternVLConfig(
            vision_config=config.vision_config, text_config=text, image_token_id=config.image_token_id,
            image_seq_length=config.image_seq_length, downsample_ratio=1 / config.downsample_factor,
            vision_feature_select_strategy="full", tie_word_embeddings=language.config.tie_word_embeddings,
        )
    ).to(language.dtype)  # fmt: skip
    rows = vlm.get_input_embeddings().weight.detach().clone()
    rows[: language.config.vocab_size] = language.get_input_embeddings().weight
    vlm.get_decoder().load_state_dict(language.model.state_dict() | {"embed_tokens.weight": rows})
    vlm.model.vision_tower.load_state_dict(source.vision_tower.state_dict())
    projector = source.multi_modal_projector.state_dict()
    vlm.model.multi_modal_projector.load_state_dict(
        {name.replace("norm.", "layer_norm."): each for name, each in projector.items()}
    )
    vlm.generation_config = language.generation_config
    processor = TileProcessor.from_pretrained(full)
    check_same_logits(source, vlm.eval(), processor)
    for part in (vlm, processor):
        part.save_pretrained(out)


@torch.no_grad()
def check_same_logits(source: Any, vlm: Any, processor: TileProcessor) -> None:
    """`ValueError` if the logits of two models for a picture are not those of one function."""
    picture = torch.randint(0, 256, (64, 160, 3), dtype=torch.uint8).numpy()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(
        chat, images=[picture], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = source(**inputs, view="multimodal").logits.float()
    error = (vlm(**inputs).logits[..., : expected.shape[-1]].float() - expected).norm() / expected.norm()
    if error > 0.02:  # of bfloat16
        raise ValueError(f"The InternVL's logits are {error:.3f} from those of the lab's model, of their norm.")


def cases(blocks: int, size: int) -> Iterator[tuple[str, Choice, bool]]:
    """Names of extractions, what is chosen, and whether it is calibrated; `size` is that of the base in bytes."""
    yield "all blocks copied", Choice(copies=blocks), False
    for share in SHARES:
        for kind in ("weights", "outputs"):
            yield f"{share:.0%} by {kind}", Choice("auto", max_bytes=int(share * size)), kind == "outputs"
    yield "35% with a quarter copied by outputs", Choice("skip", max_bytes=int(0.35 * size)), True


def bytes_of(base: Any) -> int:
    """Bytes of a model's parameters."""
    return sum(each.numel() * each.itemsize for each in base.parameters())


def measure(folder: Path, lab: LabFile, base: Any, vlm: Path, choice: Choice, is_calibrated: bool) -> dict[str, Any]:
    """Scores, bytes and text of one extraction."""
    place, start = base_of(folder, lab), time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        chats = map(as_chat, LabChats(lab.tasks, [], 0.0, CALIBRATION_CHATS, CALIBRATION_SEED))
        extraction = extract_genieblue(
            vlm, place, Path(temporary, "mine"), choice, calibration=chats if is_calibrated else None
        )
        seconds = time.process_time() - start
        model = GenieBlueForConditionalGeneration.from_pretrained(extraction.output)
        processor = VlmGenieBlueProcessor.from_pretrained(extraction.output)
        text = "\n".join(each.body for each in split_documents().held_out)
        ids = torch.tensor(processor.tokenizer(text)["input_ids"][:TEXT_TOKENS])
        return {
            "images": image_scores(model, processor, folder, lab),
            "share": added_bytes(extraction.output) / bytes_of(base),
            "copied": extraction.plan.copied,
            "difference": extraction.difference,
            "text": "equal" if is_text_the_bases(model, base, ids) else "differs",
            "CPU seconds": seconds,
        }


def row(source: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of a case: points by task, and against the source on the same questions."""
    tasks = found["images"]
    values, before = ([value for task in tasks for value in of[task]["values"]] for of in (found["images"], source))
    change = [one - other for one, other in zip(values, before, strict=True)]
    return {
        "answers": f"{statistics.fmean(values):.1f}",
        "change": f"{statistics.fmean(change):+.1f} ± {standard_error(change):.1f}",
        **{task: f"{of['score']:.0f}" for task, of in tasks.items()},
        **{name: value for name, value in found.items() if name not in ("images", "copied")},
        "copied": len(found.get("copied", ())),
    }


def main() -> None:
    """Prints one row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["digits", "receipts", "naming"])
    parser.add_argument("--out", type=Path, default=Path("lab-extraction"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    AutoConfig.register(SiglipInternVLConfig.model_type, SiglipInternVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(SiglipInternVLConfig, SiglipInternVL, exist_ok=True)
    AutoProcessor.register(SiglipInternVLConfig, TileProcessor, exist_ok=True)
    lab = read_lab_file(arguments.lab / LAB_FILE)
    full = Cell(next(iter(lab.data)), "full", arguments.seed).folder(arguments.lab)
    answered = json.loads((full / "images.json").read_text(encoding="utf-8"))
    source = {task: answered[task] for task in arguments.tasks}
    lab = replace(lab, tasks={task: lab.tasks[task] for task in arguments.tasks})
    vlm = arguments.out / "vlm"
    if not (vlm / "processor_config.json").is_file():  # written last
        write_internvl(full / "model", vlm)
    base = AutoModelForCausalLM.from_pretrained(base_of(arguments.lab, lab))
    rows = {"the lab's model": {"images": source}}
    for name, choice, is_calibrated in cases(base.config.num_hidden_layers, bytes_of(base)):
        path = arguments.out / f"{name.replace(' ', '-').replace('%', '')}.json"
        if not path.is_file():
            found = measure(arguments.lab, lab, base, vlm, choice, is_calibrated)
            path.write_text(json.dumps(found), encoding="utf-8")
        rows[name] = json.loads(path.read_text(encoding="utf-8"))
        print_table("Extractions", {name: row(source, found) for name, found in rows.items()})


if __name__ == "__main__":
    main()
