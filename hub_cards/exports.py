"""Exports of a GenieBlue's language side: what their folders record, their cards, and publishing them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from hub_cards.code_files import tokenizer_problems
from hub_cards.model_card import (
    License,
    assemble_card,
    base_facts,
    card_environment,
    card_metadata,
    folder_facts,
    hub_license,
    path_beside,
    with_vlm,
)
from hub_cards.model_folder import PartSize, copied_share, not_finite, own_weight_files, read_tensor_sizes
from hub_cards.one_commit import Upload, check_no_problems, matches, read_card, send
from hub_cards.publish_base import published_base
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CARD_NAME,
    CODE_FILES,
    COMMIT_SHA,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    LICENSE_FILES,
    PROCESSOR_CONFIGS,
    TOKENIZER_FILES,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
    file_sha256,
    is_hub_id,
    read_settings,
    some,
)

EXPORT_FACTS_NAME, SPECTRUM_NAME = "genieblue_export.json", "spectrum.png"
LORA_GGUF_NAME, MMPROJ_NAME = "lora.gguf", "mmproj.gguf"
EXPORT_VERSION = 1  # of the facts


@dataclass(frozen=True)
class ExportKind:
    """A kind of export: the body of its card, how the Hub files it, and what its folder holds."""

    template: str
    relation: str  # to the base, in the Hub's notation
    library: str
    tags: tuple[str, ...]
    published: tuple[str, ...]  # patterns of its files, besides the card, the facts and licences
    foreign: tuple[str, ...]  # patterns of another model's files, which would be loaded instead


KINDS = {
    "lora": ExportKind(
        "lora_form_card_template.md",
        "adapter",
        "peft",
        ("genieblue", "lora", "peft"),
        (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, SPECTRUM_NAME),
        (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS, *PROCESSOR_CONFIGS),
    ),
    "merged": ExportKind(
        "merged_card_template.md",
        "finetune",
        "transformers",
        ("genieblue",),
        (CONFIG_NAME, GENERATION_CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS, *TOKENIZER_FILES, "*.py"),
        (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CODE_FILES, *PROCESSOR_CONFIGS),
    ),
    "gguf": ExportKind(
        "gguf_card_template.md",
        "adapter",
        "gguf",
        ("genieblue", "lora", "gguf", "llama.cpp"),
        (LORA_GGUF_NAME, MMPROJ_NAME, SPECTRUM_NAME),
        (CONFIG_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS),
    ),
}


def read_export(folder: Path) -> dict[str, Any] | None:
    """The facts of an export; `None` for any other folder. Raises `OSError` for damaged ones."""
    path = folder / EXPORT_FACTS_NAME
    if not path.is_file():
        return None
    facts = read_settings(path, ("kind", "source", "base", "measurements"))
    if facts["kind"] not in KINDS:
        raise OSError(f"{path} has kind {facts['kind']!r}, expected {' or '.join(KINDS)}: export the model again.")
    return facts


def write_export_card(folder: Path, repo_name: str, base_folder: Path | None = None) -> None:
    """Writes `README.md` into the folder of an export; languages are those of the base, and so is the licence unless
    there is a VLM."""
    card = render_export_card(folder, repo_name, base_folder=base_folder)
    (folder / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")


def render_export_card(
    folder: Path, repo_name: str, facts: dict[str, Any] | None = None, base_folder: Path | None = None
) -> str:
    """The card of an export; `facts` replace those in the folder, for a base that is published under another name.

    A base that is neither on the Hub nor in `base_folder` leaves its licence to an existing card.
    """
    facts = facts or read_export(folder) or {}
    kind, base = KINDS[facts["kind"]], facts["base"]
    on_hub = is_hub_id(base["name"], folder) and "/" in base["name"]
    licence, languages = _licence(folder, base, on_hub, base_folder)
    source, vlm = facts["source"], facts.get("vlm")
    vlm_name, vlm_revision = (None, None) if vlm is None else (vlm["name"], vlm.get("revision"))
    vlm_licence = None if vlm_name is None else hub_license(vlm_name, vlm_revision)
    info = {
        **facts,
        "repo_name": repo_name,
        "base_name": base["name"] if on_hub else path_beside(folder, base["name"]),
        "base_is_on_hub": on_hub,
        "base_link": _link(base, on_hub),
        "base_revision": base["revision"] if on_hub else None,
        "vlm": vlm,
        "copied": copied_share(facts["replicated_layers"], facts.get("num_blocks"), vlm is not None),
        "vlm_link": _link({"name": vlm_name, "revision": vlm_revision}, True) if vlm_name else None,
        "vlm_licence": vlm_licence,
        "source_link": _link(source, is_hub_id(source["name"], folder) and "/" in source["name"]),
        "size": None if facts["kind"] == "gguf" else sum(_sizes(folder, facts["kind"]).values(), PartSize()),
        "licence": licence,
        "has_spectrum": (folder / SPECTRUM_NAME).is_file(),
    }
    metadata = card_metadata(
        with_vlm(base["name"] if on_hub else None, vlm_name),
        kind.relation,
        licence if vlm is None else vlm_licence,  # its weights are the VLM's, or its difference from the base
        languages,
        pipeline_tag="image-text-to-text" if facts.get("image_tokens") else "text-generation",
        tags=kind.tags,
    )
    metadata.library_name = kind.library
    return assemble_card(metadata, card_environment().get_template(kind.template).render(info=info))


def _licence(
    folder: Path, base: dict[str, Any], on_hub: bool, base_folder: Path | None
) -> tuple[License | None, list[str]]:
    if on_hub:
        return base_facts(base["name"], base["revision"])
    places = (base_folder or folder / base["name"], folder)
    return next((facts for place in places if place.is_dir() and (facts := folder_facts(place))[0]), (None, []))


def _link(model: dict[str, Any], on_hub: bool) -> str:
    if not on_hub:
        return f"`{Path(model['name']).name}`"  # a path means nothing to other people
    commit = f" at commit `{model['revision']}`" if model["revision"] else ""
    return f"[`{model['name']}`](https://huggingface.co/{model['name']}){commit}"


def _sizes(folder: Path, kind: str) -> dict[str, PartSize]:
    files = [ADAPTER_WEIGHTS_NAME] if kind == "lora" else own_weight_files(folder)
    return {name: size for file in files for name, size in read_tensor_sizes(folder / file).items()}


def publish_export(folder: str | Path, repo_id: str, *, base: str | None = None, **commit: Any) -> CommitInfo:
    """Checks the folder of an export and pushes it to the Hub as one commit; creates the repo if needed.

    `base` (`you/base` or `you/base@commit`) is the Hub repository of a base that was local; its weight files must have
    the recorded sha256. `commit` are options of `one_commit.send`. Raises `ValueError` with every problem found,
    before anything is uploaded; the Hub's own errors pass through.
    """
    folder = Path(folder)
    facts = read_export(folder)
    if facts is None:
        raise ValueError(f"{folder} has no {EXPORT_FACTS_NAME}: give a folder written by `genieblue export`.")
    if base is not None:
        name, revision = published_base(base, facts["base"]["fingerprint"], commit.get("token"))
        facts["base"] |= {"name": name, "revision": revision}
    check_no_problems(folder, [*export_problems(folder, facts)])
    kind = KINDS[facts["kind"]]
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    chosen = {name for name in names if matches(name, (*kind.published, CARD_NAME, *LICENSE_FILES))}
    files: dict[str, Path | bytes] = {name: folder / name for name in chosen}
    files[EXPORT_FACTS_NAME] = _json_bytes(_without_paths(facts, folder))
    if facts["kind"] == "lora":
        base_of_adapter = {"base_model_name_or_path": facts["base"]["name"], "revision": facts["base"]["revision"]}
        files[ADAPTER_CONFIG_NAME] = _json_bytes(read_settings(folder / ADAPTER_CONFIG_NAME) | base_of_adapter)
    upload = Upload(
        files=files,
        message=f"Upload {facts['kind']} export",
        card=read_card(folder),
        render_card=lambda name: render_export_card(folder, name, facts),
        stale=tuple(pattern for pattern in kind.published if pattern != SPECTRUM_NAME),
        foreign=kind.foreign,
    )
    return send(upload, repo_id, **commit)


def export_problems(folder: Path, facts: dict[str, Any]) -> Iterator[str]:
    """Reasons why an export cannot be published, one sentence each."""
    base = facts["base"]
    if facts["kind"] in ("lora", "gguf"):
        if not (is_hub_id(base["name"], folder) and "/" in base["name"]):
            yield (
                f"Its base is {base['name']!r}, a local path that nobody else has: give the Hub repository with the "
                "same files (`--base you/base`); publish the base first if there is none."
            )
        elif not isinstance(base["revision"], str) or not COMMIT_SHA.fullmatch(base["revision"]):
            yield f"Its base {base['name']} is recorded at {base['revision']!r}, expected a 40-digit commit."
    else:
        yield from tokenizer_problems(folder)
        if read_settings(folder / CONFIG_NAME).get("quantization_config") is not None:
            yield f"{CONFIG_NAME} has a quantization_config, but the weights are not quantized: export it again."
    if facts["kind"] == "gguf":
        for name, recorded in facts["files"].items():
            path = folder / name
            if not path.is_file():
                yield f"{name} is missing: export the model again."
            elif file_sha256(path) != recorded["sha256"]:
                yield f"{name} is not what was exported, by its sha256: export the model again."
        return
    if facts["kind"] == "lora" and not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        yield f"{ADAPTER_WEIGHTS_NAME} is missing: export the model again."
        return
    try:
        files = [ADAPTER_WEIGHTS_NAME] if facts["kind"] == "lora" else own_weight_files(folder)
        _sizes(folder, facts["kind"])
    except OSError as error:
        yield str(error)
        return
    if broken := [name for file in files for name in not_finite(folder / file)]:
        yield f"NaN or infinity in {some(broken)}: the export is unusable; export the model again."


def _without_paths(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The facts with the names of folders in place of paths on this computer."""
    named = {}
    for key in ("source", "base"):
        name = facts[key]["name"]
        named[key] = facts[key] | {"name": name if is_hub_id(name, folder) else Path(name).name}
    return facts | named


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
