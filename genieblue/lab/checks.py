"""What is wrong with the base, the tower and the data of a lab, found before anything is made."""

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conversion.chat_template import check_chat_template
from conversion.create import check_base_config, load_part, load_vision_config
from genieblue.data.chats import ChatDataset
from genieblue.lab.data import fitting, read_questions, read_texts
from genieblue.lab.lab_file import BASES, SMALL, LabFile
from genieblue.lab.text_tasks import text_questions
from modeling_genieblue.configuration_genieblue import PLACEMENTS

logger = logging.getLogger(__name__)


def check_lab(lab: LabFile) -> None:
    """`ValueError` or `OSError` for data, a base or a tower that a lab cannot be made of."""
    for name, files in lab.tasks.items():
        if files:
            _check_own_task(lab, name, files)
    texts = read_texts(lab.texts)
    text_questions(lab.text_tasks)
    if lab.vision != SMALL:
        load_vision_config(lab.vision)
    if lab.base not in BASES:
        tokenizer = _check_base(lab)
        if texts:
            fitting(texts, tokenizer, lab.settings(0, {}).max_length)


def _check_own_task(lab: LabFile, name: str, files: dict[str, str]) -> None:
    chats = ChatDataset(files["train"], skip_bad=None)
    if not len(chats):
        raise ValueError(f"The training data of the task {name!r} is empty: expected chats.")
    if lab.projector_steps and (without := len(chats) - len(chats.with_images())):
        raise ValueError(
            f"{without} of {len(chats)} chats in the training data of the task {name!r} have no image, and the "
            "projector's own stage trains on images alone: name them in `texts`, or set `projector_steps: 0`."
        )
    questions = read_questions(files["eval"], name, lab.held_out)
    if both := questions.sample_hashes() & chats.sample_hashes():
        logger.warning(
            "%d of %d questions of the task %r are also in its training data: its score says little of new ones.",
            len(both),
            len(questions),
            name,
        )


def _check_base(lab: LabFile) -> PreTrainedTokenizerBase:
    check_base_config(lab.base, PLACEMENTS[0])  # with every placement, a quarter of the blocks is copied
    tokenizer = load_part("base's tokenizer", lab.base, AutoTokenizer.from_pretrained)
    if tokenizer.chat_template is None:
        raise ValueError(f"{lab.base} has no chat template, so no chat can be trained: give a base that has one.")
    check_chat_template(tokenizer, None, f"The chat template of {lab.base}")
    return tokenizer
