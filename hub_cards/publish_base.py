"""Publishes a quantized base, and finds a published base with the same bytes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from hub_cards.code_files import code_files, code_problems, tokenizer_problems
from hub_cards.model_card import is_as_generated
from hub_cards.model_folder import check_is_quantized_base, read_tensor_sizes
from hub_cards.one_commit import Upload, check_no_problems, json_bytes, matches, read_card, send
from hub_cards.quantized_base_card import render_quantized_base_card
from hub_cards.verdicts import verdict_problems, with_accepted_loss
from modeling_genieblue.model_files_genieblue import (
    CARD_NAME,
    CHANGED_BASE,
    CODE_FILES,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    LICENSE_FILES,
    QMAP_NAME,
    QUANTIZED_WEIGHTS_NAME,
    TOKENIZER_FILES,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
    changed_weights,
    file_sha256,
    is_hub_id,
    read_json,
)

logger = logging.getLogger(__name__)

CODE_CLASS = "AutoModelForCausalLM"
# Files of a base that its users need in addition to weights, configuration and code.
BASE_COMPANIONS = (GENERATION_CONFIG_NAME, "preprocessor_config.json", *TOKENIZER_FILES, *LICENSE_FILES)
PUBLISHED_NAMES = (CONFIG_NAME, QUANTIZED_WEIGHTS_NAME, QMAP_NAME, CARD_NAME, *BASE_COMPANIONS)
# transformers, and the base's fingerprint, prefer these files to the quantized ones.
FOREIGN_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS)


def publish_quantized_base(
    folder: str | Path, repo_id: str, *, accept_loss: bool = False, **commit: Any
) -> CommitInfo:
    """Checks the folder of a quantized base and pushes it to the Hub as one commit; creates the repo if needed.

    `accept_loss` publishes it in spite of a verdict that it lost too much, as accepted; the folder does not change.
    `commit` are options of `one_commit.send`, such as `token` and `private`. Raises `ValueError` with every problem
    found, before anything is uploaded; the Hub's own errors pass through.
    """
    folder = Path(folder)
    settings = check_is_quantized_base(folder)
    check_no_problems(folder, [*find_base_problems(folder), *([] if accept_loss else verdict_problems(settings))])
    files: dict[str, Path | bytes] = {name: folder / name for name in base_files_to_publish(folder)}
    if accept_loss:
        files |= files_with_accepted_loss(folder)
        settings = with_accepted_loss(settings)
    upload = Upload(
        files=files,
        message="Upload quantized base",
        card=read_card(folder),
        render_card=lambda name: render_quantized_base_card(folder, name, settings=settings),
        stale=(CODE_FILES,),
        foreign=FOREIGN_WEIGHTS,
    )
    return send(upload, repo_id, **commit)


def files_with_accepted_loss(folder: Path) -> dict[str, bytes]:
    """Content of the files of a quantized base that say so if its failed verdict is accepted; an edited card stays."""
    settings = check_is_quantized_base(folder)
    accepted = with_accepted_loss(settings)
    if accepted == settings:
        return {}
    files = {CONFIG_NAME: json_bytes({**read_json(folder / CONFIG_NAME), "quantization_config": accepted})}
    if (card := read_card(folder)) is not None and is_as_generated(card):
        files[CARD_NAME] = render_quantized_base_card(folder, folder.name, settings=accepted).encode()
    return files


def find_base_problems(folder: Path) -> list[str]:
    """Reasons why a quantized base's folder cannot be published, one sentence each; empty if it can.

    Raises `ValueError` if the folder is not a quantized base.
    """
    settings = check_is_quantized_base(folder)
    problems = [*_weight_problems(folder), *code_problems(folder, (CODE_CLASS,)), *tokenizer_problems(folder)]
    # Last, as every byte is read. Nobody could load these from the Hub.
    return problems or [f"{problem}." for problem in changed_weights(folder, settings, CHANGED_BASE)]


def base_files_to_publish(folder: Path) -> list[str]:
    """Names of the files that belong to a quantized base; other files are logged."""
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    chosen = {name for name in names if matches(name, PUBLISHED_NAMES)} | set(code_files(folder))
    if left_out := sorted(names - chosen):
        logger.warning("Not published, because not part of a quantized base: %s", ", ".join(left_out))
    return sorted(chosen)


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        found = read_tensor_sizes(folder / QUANTIZED_WEIGHTS_NAME)
    except OSError as error:
        yield str(error) if (folder / QUANTIZED_WEIGHTS_NAME).exists() else f"{QUANTIZED_WEIGHTS_NAME} is missing."
        return
    tied = bool(read_json(folder / CONFIG_NAME).get("tie_word_embeddings"))
    yield from map_problems(folder / QMAP_NAME, set(found), allowed_without_tensors=1 if tied else 0)
    for name in sorted(path.name for path in folder.iterdir() if matches(path.name, FOREIGN_WEIGHTS)):
        yield f"{name} would be loaded instead of the quantized weights: remove it."


def map_problems(path: Path, tensors: set[str], allowed_without_tensors: int = 0) -> list[str]:
    """Disagreements between a quantization map and the stored tensors, one sentence each."""
    if not path.is_file():
        return [f"{path.name} is missing, so nobody could read the quantized weights: quantize the model again."]
    try:
        kinds = {name: entry["weights"] for name, entry in read_json(path).items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        return [f"{path} is damaged ({error}): quantize the model again."]
    ending = {"qint8": ".weight._data", "qint4": ".weight._data._data"}
    unknown = sorted(name for name, kind in kinds.items() if kind not in ending)
    if unknown:
        return [f"{path} has an unknown precision, {kinds[unknown[0]]!r}, for {unknown[0]}: quantize the model again."]
    meant = {f"{name}{ending[kind]}" for name, kind in kinds.items()}
    stored = {name for name in tensors if name.endswith("._data")}
    missing, extra = sorted(meant - stored), sorted(stored - meant)
    if extra or len(missing) > allowed_without_tensors:
        return [f"{path} and the weights disagree about {(extra or missing)[0]}: quantize the model again."]
    return []


def published_base(reference: str, recorded: dict[str, str] | None, token: str | bool | None) -> tuple[str, str]:
    """Hub id and commit of `you/base` or `you/base@commit`, if its weight files have the recorded sha256.

    Raises `ValueError` if they differ or the repository is missing; the Hub's other errors pass through.
    """
    name, _, revision = reference.partition("@")
    if not is_hub_id(name, Path()) or "/" not in name:
        raise ValueError(f"The base {reference!r} is not a Hub id: give you/base or you/base@commit.")
    if not recorded:
        raise ValueError("The sha256 of the base's files is not recorded, so the base on the Hub cannot be verified.")
    try:
        info = HfApi(token=token).model_info(name, revision=revision or None, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name} is not on the Hub, or you have no access: push the base first ({error}).") from error
    files = info.siblings or []
    names = {file.rfilename for file in files}
    # transformers prefers a single file to shards.
    taken = {WEIGHTS_NAME} if WEIGHTS_NAME in names else set(recorded)
    found = {file.rfilename: _sha256(file, info, token) for file in files if file.rfilename in taken}
    for file in sorted(recorded.keys() | found.keys()):
        if found.get(file) != recorded.get(file):
            raise ValueError(
                f"{name} at {info.sha} is not the base that this model was made from: sha256 of {file} there is "
                f"{found.get(file, 'missing')}, the recorded one is {recorded.get(file, 'missing')}."
            )
    if CONFIG_NAME not in names:
        raise ValueError(
            f"{name} at {info.sha} has no config.json, so nobody could load it: publish the complete base."
        )
    return info.id, str(info.sha)


def _sha256(file: Any, info: Any, token: str | bool | None) -> str:
    if file.lfs is not None:
        return file.lfs.sha256
    return file_sha256(HfApi(token=token).hf_hub_download(info.id, file.rfilename, revision=info.sha))
