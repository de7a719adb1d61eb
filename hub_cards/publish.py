"""Publishing the folder of a saved GenieBlue: checked first, then sent to the Hub as one commit."""

import ast
import logging
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from hub_cards.model_card import (
    CARD,
    MEASUREMENTS,
    RECIPE,
    card_info_from_folder,
    is_as_generated,
    render_model_card,
    write_model_card,
)
from hub_cards.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    COMMIT_SHA,
    OUR_MODULES,
    QMAPS,
    WEIGHTS,
    WEIGHTS_INDEX,
    adapter_weights,
    are_zero,
    is_hub_id,
    read_json,
    read_model_config,
    read_tensor_sizes,
    read_weight_map,
    weight_files,
)

logger = logging.getLogger(__name__)

# What may be published beside the weights and the code. Anything else in the folder (checkpoints, optimizer states,
# logs, data) stays at home.
PUBLISHED_NAMES = (
    "config.json",
    "base_fingerprint.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    RECIPE,
    MEASUREMENTS,
    CARD,
    "LICENSE*",
    "NOTICE*",
    "*.png",  # pictures that a card shows
    "*.jpg",
)
TOKENIZER_VOCABULARIES = ("tokenizer.json", "tokenizer*.model", "spiece.model", "vocab.json", "vocab.txt")
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
CONFIGS_THAT_NAME_CODE = ("config.json", *PROCESSOR_CONFIGS, "tokenizer_config.json")

# Files of an earlier push that would disagree with this one if they stayed. Patterns match within one folder.
STALE_PATTERNS = (
    WEIGHTS,
    "model-*-of-*.safetensors",
    WEIGHTS_INDEX,
    f"{ADAPTER_FOLDER}/*",
    "*_genieblue.py",
    "adapter_config.json",
)


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Checks the folder of a saved GenieBlue and pushes it to the Hub as one commit; creates the repo if need be.

    A missing card is written into the folder; one that was generated and not edited is rendered anew for `repo_id`,
    and gives way to a card that somebody edited on the Hub. Files of an earlier push that are no longer there are
    deleted in the same commit, files of other origin are left alone.

    Raises `ValueError` with every problem found, before anything is sent; the Hub's own errors pass through.
    """
    folder = Path(folder)
    problems = find_problems(folder)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{folder} was not published, nothing was sent:\n{listed}")

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and revision != "main" and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    remote = set(api.list_repo_files(repo_id, revision=revision))

    additions = [CommitOperationAdd(path, folder / path) for path in files_to_publish(folder) if path != CARD]
    card = _card_to_send(api, folder, repo_id, revision, remote)
    if card is not None:
        additions.append(CommitOperationAdd(CARD, card.encode()))
    sent = {addition.path_in_repo for addition in additions}
    deletions = [CommitOperationDelete(path) for path in sorted(remote - sent) if _matches(path, STALE_PATTERNS)]
    if deletions:
        names = ", ".join(deletion.path_in_repo for deletion in deletions)
        logger.warning("Deleting files of an earlier push from %s: %s", repo_id, names)

    # Not `upload_folder`: with Xet it splits an upload of more than five minutes into several commits, and between
    # them the repo would hold new code with old weights.
    return api.create_commit(
        repo_id,
        operations=[*deletions, *additions],
        commit_message=commit_message or "Upload GenieBlue",
        revision=revision,
        create_pr=create_pr,
    )


def find_problems(folder: str | Path) -> list[str]:
    """Why a folder cannot be published, one sentence each; empty if it can.

    Raises `OSError` or `ValueError` if it is not the folder of a GenieBlue at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the one that the model was saved into.")
    config = read_model_config(folder)
    return [
        *_base_problems(folder, config),
        *_weight_problems(folder),
        *_adapter_problems(folder, config),
        *_code_problems(folder, config),
        *_processor_problems(folder),
    ]


def files_to_publish(folder: str | Path) -> list[str]:
    """Paths, relative to the folder, that belong to its GenieBlue; what is left out is logged."""
    folder = Path(folder)
    config = read_model_config(folder)
    chosen = {ADAPTER_CONFIG, adapter_weights(config), *weight_files(folder), *_code_files(folder)}
    if config.get("quantization") is not None:
        chosen |= set(QMAPS)
    inner_base = config.get("base_model_name_or_path") or ""
    if inner_base.startswith("./"):
        chosen |= {f"{inner_base[2:]}/{path.name}" for path in (folder / inner_base).iterdir() if path.is_file()}
    if WEIGHTS not in chosen:
        chosen.add(WEIGHTS_INDEX)
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    chosen |= {name for name in names if _matches(name, PUBLISHED_NAMES) and (folder / name).is_file()}
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    chosen -= {name for name in chosen if name.endswith((".png", ".jpg")) and name not in card}
    left_out = sorted(set(names) - {name.split("/")[0] for name in chosen} - {"__pycache__"})
    if left_out:
        logger.warning("Not published, as no part of a GenieBlue: %s", ", ".join(left_out))
    return sorted(chosen)


def _base_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    base, revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
    if base is None:
        yield "Its base is not recorded, so nobody could load it: save the model with the Hub id of its base."
    elif not is_hub_id(base, folder):
        yield (
            f"Its base is {base!r}, a local path, which nobody else has: publish the base first, then save the model "
            "with the Hub id as its base."
        )
    elif not isinstance(revision, str) or not COMMIT_SHA.fullmatch(revision):
        yield (
            f"Its base {base} is recorded at the revision {revision!r}, expected the 40 digits of a commit: save it "
            "with the base loaded from the Hub at that commit, so that a later change of the base cannot reach it."
        )
    if not config.get("base_model_fingerprint") or not (folder / "base_fingerprint.json").is_file():
        yield (
            "Its base's fingerprint is missing (base_fingerprint.json, and sha256 in config.json), so nobody could "
            "tell whether they have the right base: save the model again with the base's files at hand."
        )


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        files = weight_files(folder)
        found: dict[str, str] = {}
        for file in files:
            found |= dict.fromkeys(read_tensor_sizes(folder / file), file)
        if files != [WEIGHTS] and (weight_map := read_weight_map(folder)) != found:
            differing = sorted({name for name, _ in set(weight_map.items()) ^ set(found.items())})
            yield f"{WEIGHTS_INDEX} and the shards disagree about {_some(differing)}: save the model again."
    except (OSError, ValueError) as error:
        yield str(error)
        return
    foreign = sorted(name for name in found if name.split(".", 1)[0] not in OUR_MODULES)
    if foreign:
        yield (
            f"The weights hold {_some(foreign)}, expected only {' and '.join(OUR_MODULES)}: weights of the base are "
            "not published; save the model with `save_pretrained`, which leaves them out."
        )
    missing = [module for module in OUR_MODULES if not any(name.startswith(f"{module}.") for name in found)]
    if missing:
        yield f"The weights hold nothing of {' and '.join(missing)}: save the model again."


def _adapter_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    if (folder / "adapter_config.json").exists():
        yield (
            "adapter_config.json lies in the root: `AutoModel.from_pretrained` of the repo would then load the base "
            f"with an adapter in place of a GenieBlue. The adapter belongs into {ADAPTER_FOLDER}/; remove the file."
        )
    try:
        adapter = read_json(folder / ADAPTER_CONFIG)
        weights = adapter_weights(config)
        tensors = read_tensor_sizes(folder / weights)
    except (OSError, ValueError) as error:
        yield f"The language adapter is not complete: {error}"
        return
    for ours, peft in (("base_model_name_or_path", "base_model_name_or_path"), ("base_model_revision", "revision")):
        if adapter.get(peft) != config.get(ours):
            yield (
                f"{ADAPTER_CONFIG} has {peft} {adapter.get(peft)!r}, config.json has {ours} {config.get(ours)!r}: "
                "they must name the same base; save the model again."
            )
    if not tensors:
        yield f"{weights} holds no tensor: save the model again."
    lora_b = [name for name in tensors if ".lora_B." in name]
    if lora_b and are_zero(folder / weights, lora_b):
        yield (
            "Nothing has been trained in the language model (all of LoRA B is zero), so the copied blocks are the "
            "base's own weights, which are not published: train stage 2 first (`genieblue train --stage 2`)."
        )


def _code_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    auto_map = config.get("auto_map") or {}
    for auto_class in ("AutoConfig", "AutoModel"):
        if auto_class not in auto_map:
            yield f"config.json has no auto_map entry for {auto_class}, so nobody could load it: save the model again."
    try:
        missing = [name for name in _code_files(folder) if not (folder / name).is_file()]
    except SyntaxError as error:
        yield f"{error.filename} is not valid Python ({error.msg}, line {error.lineno}): save the model again."
        return
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if missing:
        yield f"Code files are missing: {', '.join(missing)}: save the model again."


def _processor_problems(folder: Path) -> Iterator[str]:
    names = [path.name for path in folder.iterdir()]
    if not any(name in names for name in PROCESSOR_CONFIGS):
        yield f"The processor is missing ({' or '.join(PROCESSOR_CONFIGS)}): save the model with its processor."
    if "tokenizer_config.json" not in names or not any(_matches(name, TOKENIZER_VOCABULARIES) for name in names):
        yield "The tokenizer is missing (tokenizer_config.json and its vocabulary): save the model with its processor."


def _code_files(folder: Path) -> list[str]:
    """Python files that the auto classes load: those that any `auto_map` names, and what they import from siblings."""
    waiting: list[str] = []
    for config_name in CONFIGS_THAT_NAME_CODE:
        if (folder / config_name).is_file():
            waiting += _auto_map_files(read_json(folder / config_name))
    files: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in files:
            files.add(name)
            waiting += _sibling_imports(folder / name)
    return sorted(files)


def _auto_map_files(config: Any) -> list[str]:
    """Files named by the `auto_map` of a configuration and of the image processor's inside of a processor's."""
    if not isinstance(config, dict):
        return []
    references: list[Any] = []
    for holder in (config, config.get("image_processor")):
        if isinstance(holder, dict):
            references += (holder.get("auto_map") or {}).values()
    flat = [item for entry in references for item in (entry if isinstance(entry, list | tuple) else [entry])]
    # `repo--module.Class` is code of another repo, None the absent half of a tokenizer's pair.
    return [f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item]


def _sibling_imports(path: Path) -> list[str]:
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [f"{node.module.split('.')[0]}.py" for node in imports if node.module]


def _card_to_send(api: HfApi, folder: Path, repo_id: str, revision: str | None, remote: set[str]) -> str | None:
    """Text of the card for this push; None to keep the one on the Hub."""
    path = folder / CARD
    if not path.exists():
        write_model_card(folder, card_info_from_folder(folder, repo_id))
    card = path.read_text(encoding="utf-8")
    if not is_as_generated(card):
        return card
    if CARD in remote:
        published = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
        if not is_as_generated(published):
            logger.warning("The card of %s was edited on the Hub and is kept.", repo_id)
            return None
    # The one in the folder was rendered at a save, when the repo's name was not known yet.
    return render_model_card(card_info_from_folder(folder, repo_id))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    # `fnmatch` alone lets a star reach into subfolders.
    return any(path.count("/") == pattern.count("/") and fnmatchcase(path, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
