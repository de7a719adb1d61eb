"""Checks that training matches generation: the same prompt ids, and answers that end with a stop token."""

from itertools import groupby
from typing import Any

from PIL import Image

from conversion.chat_ids import IGNORED, NO_STOP_TOKEN, answer_text, chat_rows, stop_token_ids
from conversion.verification.checks import CheckFailed, fail_on
from conversion.verification.saved_model import SavedModel
from modeling_genieblue import GenieBlueProcessor

# Answers whose start or end a template or tokenizer may merge with its own text.
ANSWERS = ("Blue.", "\nBlue,\nand green.", "  Blue", "Blue.\n", "7")


def check_answer_boundaries(subject: SavedModel) -> str:
    """Training ids of chats equal the processor's ids at inference, and answers end with a stop token."""
    _ = subject.base  # raises if the base's code is not allowed to run
    processor = GenieBlueProcessor.from_pretrained(subject.name, trust_remote_code=subject.trust, **subject.source)
    stop_ids = stop_token_ids(subject.model.generation_config)
    if processor.chat_template is None:
        return "there is no chat template: prompts are only completed, and chats cannot be trained"
    if not stop_ids:
        raise CheckFailed(NO_STOP_TOKEN)
    image = Image.new("RGB", (2 * processor.image_processor.tile_size, processor.image_processor.tile_size))
    chats = [_chat(answer, shown) for answer in ANSWERS for shown in (None, image)]
    fail_on(dict.fromkeys(problem for chat in chats for problem in _problems(processor, chat, stop_ids)))
    stops = " or ".join(repr(processor.tokenizer.decode([token])) for token in stop_ids)
    return f"{len(chats)} chats with two answers each: prompts are the same at inference, answers end in {stops}"


def _chat(answer: str, image: Any) -> list[dict[str, Any]]:
    question = "Name a colour."
    content = question if image is None else [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And another one?"},
        {"role": "assistant", "content": answer},
    ]


def _problems(processor: Any, chat: list[dict[str, Any]], stop_ids: tuple[int, ...]) -> list[str]:
    """Problems of a chat, one sentence each."""
    prompts = [
        processor.apply_chat_template(chat[:count], add_generation_prompt=True, tokenize=True, return_dict=True)
        for count in (1, 3)
    ]
    tiles = prompts[0]["num_tiles"] if "num_tiles" in prompts[0] else []
    try:
        rows = chat_rows(processor, chat, [int(count) for count in tiles], stop_ids)
    except ValueError as error:
        return [str(error)]
    problems = []
    found = [answer for row in rows for answer in _answers(row.input_ids, row.labels)]
    if len(found) != len(prompts):
        return [f"{len(found)} of {len(prompts)} answers of a chat are trained"]
    for number, ((before, answer), prompt) in enumerate(zip(found, prompts, strict=True)):
        ids = prompt["input_ids"]
        if before != list(ids[0] if isinstance(ids[0], (list, tuple)) else ids):
            problems.append("a prompt has different ids in training and at inference")
        if [token in stop_ids for token in answer] != [False] * (len(answer) - 1) + [True]:
            problems.append("an answer does not end with its first stop token")
        given, history = chat[2 * number + 1]["content"], chat[: 2 * number + 1]
        text = answer_text(processor, history, answer)
        if text.strip() != given.strip():
            problems.append(f"the answer {given!r} would be generated as {text!r}")
    return problems


def _answers(input_ids: list[int], labels: list[int]) -> list[tuple[list[int], list[int]]]:
    """(preceding ids, ids) of each answer in a row."""
    found = []
    for is_answer, indices in groupby(range(len(labels)), key=lambda index: labels[index] != IGNORED):
        if is_answer:
            positions = list(indices)
            found.append((input_ids[: positions[0]], [input_ids[index] for index in positions]))
    return found
