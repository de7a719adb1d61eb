"""What exports of the multimodal language side share: which models they take, how they are measured, their facts."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.create import not_finite_parameters
from conversion.quantization.bases import check_source
from conversion.quantization.error import logits_error, probe_requests
from conversion.quantization.views import vlm_of
from conversion.staging import check_can_be_made
from conversion.unchanged import check_unchanged
from hub_cards.exports import EXPORT_VERSION
from hub_cards.model_card import Measurement
from modeling_genieblue import GenieBlueConfig, GenieBlueForConditionalGeneration, VlmGenieBlueConfig
from modeling_genieblue.base_identity_genieblue import is_plain_weight
from modeling_genieblue.language_adapter_genieblue import adapter_parameters
from modeling_genieblue.loading_genieblue import LoadRequest
from modeling_genieblue.model_files_genieblue import HUB_KEYS, is_hub_id, is_path, some

MEASURED_REQUESTS, MEASURED_POSITIONS = 8, 64  # the logits of more would fill the memory
Request = dict[str, torch.Tensor]  # of the multimodal view
# Families of VLMs whose language model gets nothing of an image but embeddings, in positions like those of words.
PLAIN_LANGUAGE = ("idefics3", "internvl", "llava", "llava_next", "llava_onevision", "smolvlm")
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the logits, relative


def load_source(
    source: str | os.PathLike, out: str | os.PathLike, **load_kwargs: Any
) -> tuple[GenieBlueForConditionalGeneration, Path]:
    """The GenieBlue to export and the output folder, as an absolute path.

    Raises, mostly before any weights are read, `OSError` for an output that exists or cannot be made, and `ValueError`
    for one inside the input, for a quantized GenieBlue or base, for weights that are not as recorded, for one whose
    language side was never trained or has NaN or infinity, and for a VLM whose language model needs more of an image
    than embeddings.
    """
    hub = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    LoadRequest.from_arguments(source, hub).check_layout()
    config = GenieBlueConfig.from_pretrained(source, **hub)
    if isinstance(config, VlmGenieBlueConfig) and (family := config.vlm_config.model_type) not in PLAIN_LANGUAGE:
        raise ValueError(
            f"The language model in a VLM of type {family!r} ({source}) gets more of an image than embeddings "
            "(positions in two dimensions, attention among image tokens, or features between its blocks), which no "
            f"plain language model does: run the GenieBlue itself. Exported are {', '.join(PLAIN_LANGUAGE)}."
        )
    check_source(source, config)
    given = load_kwargs.get("base_model")
    out = check_new_folder(out, [place for place in (source, given, _local_base(source, config)) if place is not None])
    check_unchanged(source, base_model=given, subfolder=hub.get("subfolder"))
    model = GenieBlueForConditionalGeneration.from_pretrained(source, **load_kwargs)
    quantized = [name for name, weight in model.language_model.named_parameters() if not is_plain_weight(weight)]
    if quantized:
        raise ValueError(
            f"The base of {source} is quantized ({quantized[0]}), and so are no weights to compute with: load it in "
            "16 or 32 bits (--base)."
        )
    view = model.multimodal_language_model
    if broken := not_finite_parameters(model):
        raise ValueError(
            f"Weights of {source} contain NaN or infinity ({some(broken)}), so an export would be of no use: train "
            "the model again, or fetch it again."
        )
    trained = any(weight.any() for name, _, weight in adapter_parameters(view) if ".lora_B." in name)
    if not trained and vlm_of(model) is None:
        raise ValueError(
            f"The language model of {source} is untrained, so its multimodal view is the base itself: train stage 2 "
            "first (`genieblue train --stage 2`)."
        )
    return model, out


def _local_base(source: str | os.PathLike, config: GenieBlueConfig) -> str | None:
    name = config.base_model_name_or_path
    is_here = name is not None and is_path(name) and os.path.isdir(source)
    return os.path.join(os.path.realpath(source), str(name)) if is_here else None


def check_new_folder(out: str | os.PathLike, read: Sequence[str | os.PathLike]) -> Path:
    """The absolute path of a folder to be made; `OSError` if it cannot be, `ValueError` if it is inside an input."""
    out = Path(os.path.realpath(out))
    if out.exists():
        raise FileExistsError(f"{out} already exists: give a new folder.")
    check_can_be_made(out)
    for folder in (Path(os.path.realpath(place)) for place in read if os.path.isdir(place)):
        if folder in out.parents:
            raise ValueError(f"{out} is inside the input {folder}: give a folder outside.")
    return out


@torch.no_grad()
def embed_requests(model: Any, requests: Iterable[Mapping[str, Any]] | None) -> list[Request]:
    """Encoded chats as inputs of the multimodal view; without any, the fixed prompts behind a tile with a pattern.

    Of a VLM the prompts are without an image, which only its processor could make. Raises `ValueError` for an empty
    iterable.
    """
    device, embedded = model.language_model.device, []
    vlm = vlm_of(model)
    if requests is None:
        requests = probe_requests(model)
    for request in requests:
        ids = torch.as_tensor(request["input_ids"], device=device)
        ids = ids if ids.ndim == 2 else ids[None]
        if vlm is None:
            embedded.append({"inputs_embeds": model.embed_request(ids, request.get("pixel_values"))})
        else:
            inputs = {name: torch.as_tensor(value, device=device) for name, value in request.items()}
            embedded.append({"inputs_embeds": _embed_by_vlm(vlm, {**inputs, "input_ids": ids})})
    if not embedded:
        raise ValueError("There are no calibration chats: give some, or leave them out.")
    return embedded


def _embed_by_vlm(vlm: Any, request: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the VLM gives its language model for a request."""
    found: list[torch.Tensor] = []

    def note(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"])

    handle = vlm.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        vlm(**request, use_cache=False)
    finally:
        handle.remove()
    return found[0]


class LogitsGauge:
    """The logits of the exact multimodal side on some requests, to which other forms of it are compared."""

    def __init__(self, model: Any, requests: Sequence[Request], of_chats: bool):
        vlm = vlm_of(model)
        self.requests, self._rows = requests[:MEASURED_REQUESTS], None
        self.exact = self._logits(model.multimodal_language_model if vlm is None else vlm)
        self._rows = self.exact.shape[-1]  # a VLM may have fewer tokens than its base
        prompts = "fixed prompts behind one tile with a pattern" if vlm is None else "fixed prompts without images"
        kind = "calibration chats" if of_chats else prompts
        self.how = f"{len(self.exact)} positions of {len(self.requests)} {kind}"

    def measure(self, name: str, model: nn.Module) -> tuple[float, Measurement]:
        """Relative L2 error of a model's logits, and the same as a row for the card."""
        error, agreeing = logits_error(self.exact, self._logits(model))
        value = f"{error:.2g} relative L2; the same top token at {agreeing:.1%} of positions"
        return error, Measurement(name, value, self.how)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> torch.Tensor:
        rows = [model(**request, use_cache=False).logits[0, -MEASURED_POSITIONS:] for request in self.requests]
        return torch.cat(rows)[:, : self._rows].float().cpu()


@dataclass(frozen=True)
class Origin:
    """A model that an export comes from: its name (Hub id, or a path from the export's folder), commit and sha256."""

    name: str
    revision: str | None
    fingerprint: dict[str, str] | None


def export_facts(
    kind: str, model: Any, out: Path, measurements: Sequence[Measurement], **others: Any
) -> dict[str, Any]:
    """What an export records of itself; see `hub_cards.exports`."""
    request, config = model.provenance.source, model.config
    revision = None if os.path.isdir(request.path) else request.hub_kwargs.get("revision")
    base = config.base_model_name_or_path
    return {
        "version": EXPORT_VERSION,
        "kind": kind,
        "source": asdict(Origin(_name_from(out, request.path), revision, config.weight_fingerprint)),
        "base": asdict(Origin(_name_from(out, base), config.base_model_revision, config.base_model_fingerprint)),
        "base_needs_remote_code": bool(config.base_model_runs_remote_code),
        "vlm": vlm_facts(config, out),
        "replicated_layers": config.replicated_layers,
        "num_blocks": config.text_config.num_hidden_layers,
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "measurements": [asdict(row) for row in measurements],
        **others,
    }


def vlm_facts(config: GenieBlueConfig, out: Path) -> dict[str, Any] | None:
    """Type of the VLM whose language model is exported and, if it has them, its Hub id and commit."""
    if not isinstance(config, VlmGenieBlueConfig):
        return None
    of_vlm: Any = config.vlm_config
    name = getattr(of_vlm, "_name_or_path", None)
    on_hub = "/" in str(name) and is_hub_id(name, out)
    return {
        "type": of_vlm.model_type,
        "name": name if on_hub else None,
        "revision": config.vlm_revision if on_hub else None,
    }


def _name_from(out: Path, name: str) -> str:
    """A folder's path from `out`, written as a path; a Hub id as it is."""
    if not os.path.isdir(name):
        return name
    relative = os.path.relpath(os.path.realpath(name), out)
    return relative if relative.startswith(".") else os.path.join(".", relative)
