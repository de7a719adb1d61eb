"""The model card: typed facts, how they are read from a saved model's folder, and their rendering."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.repocard import metadata_load
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_cards.model_folder import (
    BASE_PARTS,
    PartSize,
    copied_share,
    count_formats,
    count_parts,
    lora_ranks,
    precision_tags,
    read_model_config,
    shown_precisions,
)
from hub_cards.short_numbers import bits_each, short_bytes, short_count
from hub_cards.verdicts import summary
from modeling_genieblue.model_files_genieblue import (
    CARD_NAME,
    MEASUREMENTS_NAME,
    PROCESSOR_CONFIGS,
    RECIPE_NAME,
    TRADE_OFF_NAME,
    is_hub_id,
    is_inner_folder,
    read_json,
)

logger = logging.getLogger(__name__)

TAGS = ("genieblue", "multimodal", "vision-language-model")
PLACEMENT_WORDS = {"skip": "every fourth block", "pre": "the first quarter", "post": "the last quarter"}
HUB = "https://huggingface.co"
HUB_TIMEOUT_SECONDS = 10

_MARK = re.compile(r"\n<!-- genieblue card, as generated: ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class License:
    """A licence in the Hub's notation: an identifier, with a name and link if it is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One measurement: its name, its value, and the data or method."""

    name: str
    value: str
    how: str


@dataclass(frozen=True)
class Quantization:
    """How a GenieBlue was quantized."""

    precisions: dict[str, str]  # by part, as in `ModelCardInfo.parts` and `BASE_PARTS`
    rounding: str
    group_size: int | None  # 4-bit codes with one scale
    activations: str
    mixed: str = ""  # how many linears of the blocks have which format, if they differ
    other_precision: dict[str, str] = field(default_factory=dict)  # layer -> precision and reason
    other_rounding: dict[str, str] = field(default_factory=dict)  # part -> rounding, and for how many of its layers
    source: str | None = None  # Hub id of the unquantized GenieBlue
    verdict: str | None = None  # on what quantization costs

    @property
    def changes_base(self) -> bool:
        """Whether the base is quantized too."""
        return any(self.precisions.get(part) != "w16a16" for part in BASE_PARTS)


@dataclass(frozen=True)
class ModelCardInfo:
    """Facts about a model. The card omits whatever is `None` or empty."""

    repo_name: str  # argument of `from_pretrained`: a Hub id or folder name
    base_model: str | None = None  # Hub id, or a path from the folder in which `repo_name` lies
    base_is_on_hub: bool = False
    base_is_inside: bool = False  # in a folder of the repository itself
    base_revision: str | None = None
    base_needs_remote_code: bool = False
    base_license: License | None = None
    num_blocks: int | None = None
    vision_model: str | None = None
    parts: dict[str, PartSize] = field(default_factory=dict)
    placement: str | None = None
    replicated_layers: list[int] = field(default_factory=list)
    lora_rank: int | None = None  # the least, where ranks differ by layer
    largest_rank: int | None = None
    lora_alpha: int | None = None
    tile_size: int | None = None
    max_tiles: int | None = None
    image_seq_length: int | None = None
    vlm_type: str | None = None  # model type of the VLM that it sees with, in the place of a vision tower
    vlm_vision_type: str | None = None  # model type of that VLM's vision side
    vlm: str | None = None  # Hub id of that VLM
    vlm_revision: str | None = None
    vlm_license: License | None = None
    trade_off: str | None = None  # picture of size against error of its language model
    recipe: dict[str, dict[str, Any]] | None = None  # stage -> setting -> value
    measurements: list[Measurement] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    quantization: Quantization | None = None

    @property
    def copied(self) -> str:
        """Whether `no`, `some` or `all` blocks are copies."""
        return copied_share(self.replicated_layers, self.num_blocks, self.vlm_type is not None)


def render_model_card(info: ModelCardInfo) -> str:
    """Markdown of the card: YAML front matter for the Hub, then the body."""
    facts = {"info": info, "placement_words": PLACEMENT_WORDS, "hub": HUB, "base_parts": BASE_PARTS}
    template = card_environment().get_template("model_card_template.md")
    body = template.render(facts, total=sum(info.parts.values(), PartSize()))
    return assemble_card(_metadata(info), body)


def assemble_card(metadata: ModelCardData, body: str) -> str:
    """A complete card, with a hash that shows later whether somebody edited it."""
    body = re.sub(r"\n{3,}", "\n\n", body).strip()  # omitted sections leave empty lines
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"
    return f"{text}\n<!-- genieblue card, as generated: {_digest(text)} -->\n"


@cache  # it keeps the templates that it has compiled
def card_environment() -> Environment:
    """Jinja environment with the templates in this folder and their filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": _cell,
        "quoted": _python_string,
        "bits_each": lambda size: bits_each(size.parameters, size.bytes),
        "license_link": _license_link,
        "short_count": short_count,
        "short_bytes": short_bytes,
    }
    return environment


def base_facts(base: str, revision: str | None) -> tuple[License | None, list[str]]:
    """Licence and languages of a base on the Hub, if the Hub can be reached."""
    return hub_license(base, revision), _as_list(_hub_metadata(base, revision).get("language"))


def hub_license(name: str, revision: str | None) -> License | None:
    """Licence of a model on the Hub, if the Hub can be reached; a relative link is that of a file there."""
    return _license(_hub_metadata(name, revision), f"{HUB}/{name}/blob/{revision or 'main'}")


def folder_facts(folder: Path) -> tuple[License | None, list[str]]:
    """Licence and languages from the README in a model's folder; a link may point to a file in that folder."""
    metadata = _local_metadata(folder)
    licence = _license(metadata, None)
    if licence is not None:
        licence = replace(licence, link=metadata.get("license_link"))
    return licence, _as_list(metadata.get("language"))


def is_as_generated(card: str) -> bool:
    """Whether a card was generated by us and never edited, so that it may be regenerated."""
    card = card.replace("\r\n", "\n")
    mark = _MARK.search(card)
    return mark is not None and mark[1] == _digest(card[: mark.start()])


def write_model_card(folder: str | Path, info: ModelCardInfo) -> bool:
    """Writes `README.md` into a folder; returns False and changes nothing if it already exists."""
    card = render_model_card(info)
    path = Path(folder) / CARD_NAME
    try:
        file = path.open("x", encoding="utf-8", newline="\n")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(card)
    except BaseException:
        path.unlink(missing_ok=True)  # a partial card would count as an existing one from then on
        raise
    return True


def card_info_from_folder(
    folder: str | Path, repo_name: str | None = None, config: dict[str, Any] | None = None
) -> ModelCardInfo:
    """Collects the facts in a saved GenieBlue's folder; `repo_name` defaults to the folder's name.

    `config` replaces its `config.json`, for a card that is published with a different base name. Also reads, if they
    exist, `training_recipe.json` (`{stage: {setting: value}}`) and `measurements.json`
    (`[{"name", "value", "how"}]`). The licence and languages come from the base: from its README if it is a folder,
    else from the Hub; if the Hub cannot be reached they stay unknown, with a warning.

    Raises `OSError` for a missing or damaged file, `ValueError` for unexpected contents.
    """
    folder = Path(folder).resolve()
    config = config or read_model_config(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("base_model_revision")
    text_config = config.get("text_config") or {}
    vlm_config = config.get("vlm_config") or {}
    vlm = vlm_config.get("_name_or_path")
    vlm = vlm if "/" in str(vlm) and is_hub_id(vlm, folder) else None
    vlm_revision = config.get("vlm_revision")
    vision_name = (config.get("vision_config") or {}).get("_name_or_path")
    on_hub = is_hub_id(base, folder)
    local_base = None if on_hub else base
    base_card = _hub_metadata(base, revision) if on_hub else _local_metadata(folder / base) if base else {}
    images, ranks = _image_settings(folder), lora_ranks(config)
    return ModelCardInfo(
        repo_name=repo_name or folder.name,
        base_model=path_beside(folder, local_base) if local_base else base,
        base_is_on_hub=on_hub,
        base_is_inside=is_inner_folder(base),
        base_revision=revision,
        base_needs_remote_code=bool(config.get("base_model_runs_remote_code")),
        base_license=_license(base_card, f"{HUB}/{base}/blob/{revision or 'main'}" if on_hub else None),
        num_blocks=text_config.get("num_hidden_layers"),
        # A local path means nothing to other people.
        vision_model=vision_name if "/" in str(vision_name) and is_hub_id(vision_name, folder) else None,
        parts=count_parts(folder),
        placement=config.get("placement"),
        replicated_layers=config.get("replicated_layers") or [],
        lora_rank=ranks[0] if ranks else None,
        largest_rank=ranks[1] if ranks and ranks[1] > ranks[0] else None,
        lora_alpha=config.get("lora_alpha"),
        tile_size=images.get("tile_size"),
        max_tiles=images.get("max_tiles"),
        image_seq_length=config.get("image_seq_length"),
        vlm_type=vlm_config.get("model_type"),
        vlm_vision_type=(vlm_config.get("vision_config") or {}).get("model_type"),
        vlm=vlm,
        vlm_revision=vlm_revision,
        vlm_license=None if vlm is None else hub_license(vlm, vlm_revision),
        trade_off=TRADE_OFF_NAME if (folder / TRADE_OFF_NAME).is_file() else None,
        recipe=_read_recipe(folder / RECIPE_NAME),
        measurements=_read_measurements(folder / MEASUREMENTS_NAME),
        languages=_as_list(base_card.get("language")),
        quantization=_quantization(config.get("quantization"), folder),
    )


def _quantization(recorded: dict[str, Any] | None, folder: Path) -> Quantization | None:
    if recorded is None:
        return None
    source = (recorded.get("source") or {}).get("name")
    return Quantization(
        precisions=shown_precisions(recorded),
        rounding=recorded["rounding"],
        group_size=recorded.get("group_size"),
        activations=recorded["activations"],
        mixed=count_formats(recorded.get("formats")),
        other_precision=recorded.get("other_precision") or {},
        other_rounding=recorded.get("other_rounding") or {},
        source=source if is_hub_id(source, folder) and "/" in source else None,
        verdict=summary(recorded["verdict"]) if recorded.get("verdict") else None,
    )


def _metadata(info: ModelCardInfo) -> ModelCardData:
    quantization = info.quantization
    made_from, relation = with_vlm(info.base_model if info.base_is_on_hub else None, info.vlm), "adapter"
    sees_by_siglip = info.vlm_type is None or "siglip" in (info.vlm_vision_type or "")
    tags = [*TAGS, *["siglip"] * sees_by_siglip, "peft", *["lora"] * (info.copied != "all")]
    if quantization is not None:
        made_from, relation = quantization.source or made_from, "quantized"
        # Stock PEFT does not load it.
        tags = [tag for tag in tags if tag != "peft"]
        tags += ["quantized", "optimum-quanto", *precision_tags(quantization.precisions)]
    licence = info.vlm_license if info.vlm_type else info.base_license  # what is stored is the VLM's
    return card_metadata(made_from, relation, licence, info.languages, pipeline_tag="image-text-to-text", tags=tags)


def with_vlm(base: str | None, vlm: str | None) -> str | list[str] | None:
    """What the front matter names as the models that one was made from: the base, with the VLM if there is one."""
    return [base, vlm] if base and vlm else base


def card_metadata(
    base_model: str | list[str] | None,
    relation: str,
    licence: License | None,
    languages: list[str],
    *,
    pipeline_tag: str,
    tags: Sequence[str],
) -> ModelCardData:
    """Front matter of a card; `base_model` must be Hub ids, since the Hub accepts nothing else."""
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        license=licence.id if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        language=languages or None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys(tags)),
    )


def _image_settings(folder: Path) -> dict[str, Any]:
    for name in PROCESSOR_CONFIGS:
        if (folder / name).is_file():
            settings = read_json(folder / name)
            settings = settings.get("image_processor", settings)
            if "tile_size" in settings:
                return settings
    return {}


def _read_recipe(path: Path) -> dict[str, dict[str, Any]] | None:
    if not path.is_file():
        return None
    recipe = read_json(path)
    if not isinstance(recipe, dict) or not all(isinstance(settings, dict) for settings in recipe.values()):
        raise ValueError(f"{path} does not have the form {{stage: {{setting: value}}}}: fix or remove it.")
    return recipe or None


def _read_measurements(path: Path) -> list[Measurement]:
    if not path.is_file():
        return []
    try:
        return [Measurement(str(row["name"]), str(row["value"]), str(row["how"])) for row in read_json(path)]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{path} does not have the form [{{"name": ..., "value": ..., "how": ...}}]: fix or remove it.'
        ) from error


def _local_metadata(base: Path) -> dict[str, Any]:
    path = base / CARD_NAME
    try:
        metadata = metadata_load(path) if path.is_file() else None
    except Exception as error:  # the YAML may contain anything, and the card is optional
        logger.warning("The base's licence is unknown: the front matter of %s cannot be read (%s).", path, error)
        return {}
    return metadata or {}


def _hub_metadata(name: str, revision: str | None) -> dict[str, Any]:
    try:
        return _ask_hub(name, revision)
    except Exception as error:  # no network, a gated base, a bad response: saving must still work
        logger.warning("The licence of %s is unknown: the Hub returned no card for it (%s).", name, error)
        return {}


@lru_cache(maxsize=32)  # failures are not cached
def _ask_hub(name: str, revision: str | None) -> dict[str, Any]:
    card = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).card_data
    return card.to_dict() if card is not None else {}


def _license(metadata: dict[str, Any], files: str | None) -> License | None:
    """Licence in a model's front matter; a relative link is completed with `files`."""
    identifier, link = metadata.get("license"), metadata.get("license_link")
    if not isinstance(identifier, str):
        return None
    if link and "://" not in link:
        link = f"{files}/{link}" if files else None
    return License(identifier, metadata.get("license_name"), link)


def path_beside(folder: Path, base: str) -> str:
    """The base's path relative to the parent of the model's folder, where the card's code is run."""
    return Path(os.path.relpath(folder / base, folder.parent)).as_posix()


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])] if value else []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cell(value: Any) -> str:
    """A value escaped for a Markdown table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _python_string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _license_link(licence: License) -> str:
    """A licence's name, as a link if it has one."""
    name = licence.name or licence.id
    return f"[{name}]({licence.link})" if licence.link else name
