"""The two views of a GenieBlue as calibration runs them: what takes a request, and where its blocks are."""

from dataclasses import dataclass, field
from typing import Any

import torch

from modeling_genieblue.language_adapter_genieblue import find_blocks
from modeling_genieblue.vlm_language_genieblue import decoder_path


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples for `gptq`: rows of ids (1, length) for the base, requests with images for GenieBlue's own parts."""

    text: list[torch.Tensor] = field(default_factory=list)
    multimodal: list[dict[str, torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class CalibratedView:
    """A model that takes `requests` as its arguments, and the path of the list of its blocks."""

    model: Any
    blocks: str
    requests: list[dict[str, Any]]


def vlm_of(model: Any) -> Any:
    """The VLM of a GenieBlue that has one, else `None`."""
    return getattr(model, "vlm", None)


def own_state(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a GenieBlue outside its adapter: of vision tower and projector, or of a VLM; not copied."""
    return {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in model.own_modules}


def text_view(model: Any, samples: CalibrationSamples) -> CalibratedView:
    """The base, with rows of text."""
    base = model.language_model
    return CalibratedView(base, find_blocks(base)[0], [{"input_ids": ids.to(base.device)} for ids in samples.text])


@torch.no_grad()
def multimodal_view(model: Any, samples: CalibrationSamples, count: int | None = None) -> CalibratedView:
    """The multimodal view, or the VLM, with the first `count` requests with images; with texts if there are none."""
    view, vlm = model.multimodal_language_model, vlm_of(model)
    chosen = (samples.multimodal or [{"input_ids": ids} for ids in samples.text])[:count]
    requests = [{name: value.to(view.device) for name, value in sample.items()} for sample in chosen]
    if vlm is not None:
        return CalibratedView(vlm, f"{decoder_path(vlm)}.layers", requests)
    for request in requests:
        request["inputs_embeds"] = model.embed_request(request.pop("input_ids"), request.pop("pixel_values", None))
    return CalibratedView(view, find_blocks(view)[0], requests)
