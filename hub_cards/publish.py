"""Checks the folder of a saved GenieBlue, then publishes it on the Hub as one commit."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from hub_cards.code_files import code_files, code_problems, tokenizer_problems
from hub_cards.model_card import card_info_from_folder, render_model_card, write_model_card
from hub_cards.model_folder import (
    ADAPTER_CONFIG,
    QMAPS,
    adapter_weights,
    are_zero,
    not_finite,
    own_weight_files,
    read_model_config,
    read_tensor_sizes,
    without_path,
)
from hub_cards.one_commit import Upload, check_no_problems, json_bytes, matches, read_card, send
from hub_cards.publish_base import (
    base_files_to_publish,
    files_with_accepted_loss,
    find_base_problems,
    map_problems,
    published_base,
)
from hub_cards.verdicts import verdict_problems, with_accepted_loss
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    BASE_FINGERPRINT_NAME,
    CARD_NAME,
    CODE_FILES,
    COMMIT_SHA,
    CONFIG_NAME,
    EVAL_RESULTS,
    EXTRACTION_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    INNER_BASE,
    LICENSE_FILES,
    MEASUREMENTS_NAME,
    PROCESSOR_CONFIGS,
    QUANTIZED_WEIGHTS_NAME,
    RECIPE_NAME,
    TOKENIZER_FILES,
    VLM_FOLDER,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
    changed_weights,
    file_sha256,
    is_hub_id,
    is_inner_folder,
    own_modules,
    read_json,
    read_weight_map,
    some,
)

logger = logging.getLogger(__name__)

# Files that may be published in addition to weights and code. Anything else in the folder (checkpoints, optimizer
# states, logs, data) is never uploaded.
PUBLISHED_NAMES = (
    CONFIG_NAME,
    BASE_FINGERPRINT_NAME,
    GENERATION_CONFIG_NAME,
    *PROCESSOR_CONFIGS,
    *TOKENIZER_FILES,
    RECIPE_NAME,
    MEASUREMENTS_NAME,
    EXTRACTION_NAME,
    CARD_NAME,
    *LICENSE_FILES,
    "*.png",  # images in the card
    "*.jpg",
)

# Files from an earlier push that would conflict with this one. A star does not match `/`.
STALE_PATTERNS = (
    WEIGHTS_NAME,
    WEIGHT_SHARDS,
    INDEX_NAME,
    f"{ADAPTER_FOLDER}/*",
    QMAPS[0],
    CODE_FILES,
    ADAPTER_CONFIG_NAME,
    RECIPE_NAME,
    MEASUREMENTS_NAME,
    f"{EVAL_RESULTS}/*.yaml",
    f"{INNER_BASE}/*",
)


def publish_folder(
    folder: str | Path, repo_id: str, *, base: str | None = None, accept_loss: bool = False, **commit: Any
) -> CommitInfo:
    """Checks the folder of a saved GenieBlue and pushes it to the Hub as one commit; creates the repo if needed.

    A missing card is written into the folder. A generated, unedited card is rendered again for `repo_id`, but never
    replaces one that was edited on the Hub. Our files from an earlier push that no longer exist are deleted in the
    same commit; other files are left alone.

    `base` (`you/base` or `you/base@commit`) is the Hub repository of a base that the folder records as a local path;
    its weight files must have the recorded sha256. The upload records it at its commit; the folder does not change.
    `accept_loss` publishes a quantized model in spite of a verdict that it lost too much, which its card keeps.
    `commit` are options of `one_commit.send`, such as `token` and `private`.

    Raises `ValueError` with every problem found, before anything is uploaded; the Hub's own errors pass through.
    """
    folder = Path(folder)
    config = _config_to_publish(folder, base, commit.get("token"))
    if accept_loss and config.get("quantization") is not None:
        config["quantization"] = with_accepted_loss(config["quantization"])
    check_no_problems(folder, find_problems(folder, config))
    files: dict[str, Path | bytes] = {name: folder / name for name in files_to_publish(folder, config)}
    inner_base = config.get("base_model_name_or_path")
    if accept_loss and is_inner_folder(inner_base):
        changed = files_with_accepted_loss(folder / inner_base)
        files |= {f"{inner_base[2:]}/{name}": content for name, content in changed.items()}
    if config != read_model_config(folder):
        files[CONFIG_NAME] = json_bytes(config)
    if base is not None:
        adapter = read_json(folder / ADAPTER_CONFIG)
        names = {"base_model_name_or_path": config["base_model_name_or_path"]}
        files[ADAPTER_CONFIG] = json_bytes(adapter | names | {"revision": config["base_model_revision"]})
    elif not (folder / CARD_NAME).exists():
        write_model_card(folder, card_info_from_folder(folder, repo_id))
    upload = Upload(
        files=files,
        message="Upload GenieBlue",
        card=read_card(folder),
        render_card=lambda name: render_model_card(card_info_from_folder(folder, name, config)),
        stale=STALE_PATTERNS,
    )
    return send(upload, repo_id, **commit)


def _config_to_publish(folder: Path, base: str | None, token: str | bool | None) -> dict[str, Any]:
    """`config.json` in the form to publish."""
    config = read_model_config(folder)
    if source := (config.get("quantization") or {}).get("source"):
        config["quantization"]["source"] = without_path(source, folder)
    if base is None:
        return config
    name, commit = published_base(base, config.get("base_model_fingerprint"), token)
    return config | {"base_model_name_or_path": name, "base_model_revision": commit}


def find_problems(folder: str | Path, config: dict[str, Any] | None = None) -> list[str]:
    """Reasons why a folder cannot be published, one sentence each; empty if it can.

    `config` replaces its `config.json`, if the base is published under a different name.

    Raises `OSError` or `ValueError` if the folder is not a GenieBlue.
    """
    folder = Path(folder)
    recorded = read_model_config(folder)
    config = config or recorded
    problems = [
        *_base_problems(folder, config),
        *_weight_problems(folder, config),
        *_adapter_problems(folder, recorded),
        *code_problems(folder, ("AutoConfig", "AutoModel")),
        *_processor_problems(folder),
        *verdict_problems(config.get("quantization")),
    ]
    # Last, as every byte is read. Nobody could load these from the Hub.
    return problems or [f"{problem}." for problem in changed_weights(folder, recorded)]


def files_to_publish(folder: str | Path, config: dict[str, Any] | None = None) -> list[str]:
    """Paths, relative to the folder, that belong to its GenieBlue; other files are logged.

    `config` replaces its `config.json`, if the base is published under a different name.
    """
    folder = Path(folder)
    config = config or read_model_config(folder)
    chosen = {ADAPTER_CONFIG, adapter_weights(config), *own_weight_files(folder), *code_files(folder)}
    if config.get("quantization") is not None:
        chosen |= set(QMAPS)
    inner_base = config.get("base_model_name_or_path")
    if is_inner_folder(inner_base):
        chosen |= {f"{inner_base[2:]}/{name}" for name in base_files_to_publish(folder / inner_base)}
    if config.get("vlm_config") is not None:
        chosen |= {path.relative_to(folder).as_posix() for path in folder.glob(f"{VLM_FOLDER}/*") if path.is_file()}
    if WEIGHTS_NAME not in chosen:
        chosen.add(INDEX_NAME)
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    chosen |= {name for name in names if matches(name, PUBLISHED_NAMES) and (folder / name).is_file()}
    chosen |= {path.relative_to(folder).as_posix() for path in folder.glob(f"{EVAL_RESULTS}/*.yaml")}
    card = read_card(folder) or ""
    chosen -= {name for name in chosen if name.endswith((".png", ".jpg")) and name not in card}
    left_out = sorted(set(names) - {name.split("/")[0] for name in chosen} - {"__pycache__"})
    if left_out:
        logger.warning("Not published, because not part of a GenieBlue: %s", ", ".join(left_out))
    return sorted(chosen)


def _base_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    base, revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
    if base is None:
        yield "Its base is not recorded, so nobody could load it: save the model with the Hub id of its base."
    elif is_inner_folder(base) and config.get("quantization") is not None:
        yield from _inner_base_problems(folder / base, config)
    elif not is_hub_id(base, folder):
        yield (
            f"Its base is {base!r}, a local path that nobody else has: give the Hub repository with the same files "
            "(`--base you/base`, `base=` in Python); publish the base first if there is none."
        )
    elif not isinstance(revision, str) or not COMMIT_SHA.fullmatch(revision):
        yield (
            f"Its base {base} is recorded at the revision {revision!r}, expected a 40-digit commit: save it with the "
            "base loaded from the Hub at a commit, so that later changes to the base cannot affect it."
        )
    if not config.get("base_model_fingerprint") or not (folder / BASE_FINGERPRINT_NAME).is_file():
        yield (
            "Its base's fingerprint is missing (base_fingerprint.json, and sha256 in config.json), so nobody could "
            "verify their base: save the model again where the base's files are available."
        )


def _inner_base_problems(inner: Path, config: dict[str, Any]) -> Iterator[str]:
    try:
        problems = find_base_problems(inner)
    except (OSError, ValueError) as error:
        problems = [str(error)]
    yield from (f"Its base in {inner.name}/: {problem}" for problem in problems)
    if problems:
        return
    recorded = config.get("base_model_fingerprint") or {}
    if recorded.get(QUANTIZED_WEIGHTS_NAME) != file_sha256(inner / QUANTIZED_WEIGHTS_NAME):
        yield (
            f"{inner.name}/{QUANTIZED_WEIGHTS_NAME} does not have the recorded sha256: it was changed or belongs to "
            "another base; quantize the model again."
        )


def _weight_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    try:
        files = own_weight_files(folder)
        found: dict[str, str] = {}
        for file in files:
            found |= dict.fromkeys(read_tensor_sizes(folder / file), file)
        if files != [WEIGHTS_NAME] and (weight_map := read_weight_map(folder / INDEX_NAME)) != found:
            differing = sorted({name for name, _ in set(weight_map.items()) ^ set(found.items())})
            yield f"{INDEX_NAME} and the shards disagree about {some(differing)}: save the model again."
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if broken := [name for file in files for name in not_finite(folder / file)]:
        yield _not_finite_problem(broken)
    if config.get("quantization") is not None:
        yield from map_problems(folder / QMAPS[0], set(found))
    own = own_modules(config)
    foreign = sorted(name for name in found if name.split(".", 1)[0] not in own)
    if foreign:
        yield (
            f"The weights contain {some(foreign)}, expected only {' and '.join(own)}: the base's weights "
            "are never published; save the model with `save_pretrained`, which leaves them out."
        )
    needed = own if config.get("vlm_config") is None else own[:1]  # a VLM may differ in nothing but its blocks
    missing = [module for module in needed if not any(name.startswith(f"{module}.") for name in found)]
    if missing:
        yield f"The weights are missing {' and '.join(missing)}: save the model again."


def _not_finite_problem(names: list[str]) -> str:
    return f"NaN or infinity in {some(names)}: the model is unusable; train or save it again."


def _adapter_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    if (folder / ADAPTER_CONFIG_NAME).exists():
        yield (
            "adapter_config.json is in the root: `AutoModel.from_pretrained` would load the base with an adapter "
            f"instead of a GenieBlue. Remove the file; the adapter belongs in {ADAPTER_FOLDER}/."
        )
    try:
        adapter = read_json(folder / ADAPTER_CONFIG)
        weights = adapter_weights(config)
        tensors = read_tensor_sizes(folder / weights)
    except (OSError, ValueError) as error:
        yield f"The language adapter is incomplete: {error}"
        return
    for ours, peft in (("base_model_name_or_path", "base_model_name_or_path"), ("base_model_revision", "revision")):
        if adapter.get(peft) != config.get(ours):
            yield (
                f"{ADAPTER_CONFIG} has {peft} {adapter.get(peft)!r}, config.json has {ours} {config.get(ours)!r}: "
                "they must name the same base; save the model again."
            )
    if not tensors:
        yield f"{weights} contains no tensors: save the model again."
    if broken := not_finite(folder / weights):
        yield _not_finite_problem(broken)
    if config.get("quantization") is not None:
        yield from map_problems(folder / QMAPS[1], set(tensors))
    lora_b = [name for name in tensors if ".lora_B." in name and not name.endswith("._scale")]
    if lora_b and are_zero(folder / weights, lora_b):
        yield (
            "The language model is untrained (all of LoRA B is zero), so the replicated blocks are the base's own "
            "weights, which are not published: train stage 2 first (`genieblue train --stage 2`)."
        )


def _processor_problems(folder: Path) -> Iterator[str]:
    if not any((folder / name).is_file() for name in PROCESSOR_CONFIGS):
        yield f"The processor is missing ({' or '.join(PROCESSOR_CONFIGS)}): save the model with its processor."
    yield from tokenizer_problems(folder)
