"""Makes a GenieBlue of a VLM and the base that it was trained from, without training."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from conversion.create import WEIGHT_OPTIONS, check_numbers, check_weight_files, load_base_model, load_part
from conversion.extraction_plan import BlockChange, Choice, Plan, plan_extraction, trade_off
from conversion.language_exports import check_new_folder
from conversion.low_rank import Spectrum, factor_change
from conversion.quantization.error import logits_error
from conversion.quantization.hessians import Hessians, check_runs_by_blocks, walk_blocks
from conversion.staging import CONVERSION, explained_full_disk, lock_output
from conversion.verification.saved_model import PROMPTS
from hub_cards.model_card import Measurement
from modeling_genieblue import GenieBlueForConditionalGeneration, VlmGenieBlueProcessor
from modeling_genieblue.base_loading_genieblue import check_base_type, check_complete
from modeling_genieblue.image_reading_genieblue import read_image
from modeling_genieblue.loading_genieblue import hub_commit
from modeling_genieblue.model_files_genieblue import (
    EXTRACTION_NAME,
    MEASUREMENTS_NAME,
    TRADE_OFF_NAME,
    ModelFiles,
    some,
    weight_files,
)
from modeling_genieblue.saving_genieblue import save_model
from modeling_genieblue.staging_genieblue import StagingFolder
from modeling_genieblue.vlm_configuration_genieblue import check_family
from modeling_genieblue.vlm_language_genieblue import LanguagePair, OwnLanguage, decoder_path

logger = logging.getLogger(__name__)
LARGEST_SHARE_OF_MOVED_TOKENS = 0.01  # some VLMs give an unused token of their base another name
MEASURED_REQUESTS, MEASURED_POSITIONS = 8, 64  # the logits of more would fill the memory
PATTERN_SIDE = 224  # pixels
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
Request = dict[str, Any]  # of the VLM
Chat = tuple[Sequence[dict[str, Any]], Sequence[Any]]  # messages, and the images of their image parts in order
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Extraction:
    """What was written: the folder, the plan, how far the VLM's blocks were from the base's, and the errors.

    `own_rows` and `own_bytes` are what is stored whole: rows of embedding and head; these with norms and biases.
    """

    output: Path
    plan: Plan
    difference: float
    own_rows: dict[str, Any]
    own_bytes: int
    measurements: list[Measurement]


def extract_genieblue(
    mllm: str | os.PathLike,
    base: str | os.PathLike,
    output: str | os.PathLike,
    choice: Choice | None = None,
    *,
    calibration: Iterable[Chat] | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    mllm_revision: str | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Writes a GenieBlue whose images run the VLM `mllm` and whose text runs `base`, from which that was trained.

    Weights stay in their files until they are read, one matrix at a time; the factors of all changes lie on the disk
    beside `output` meanwhile.

    Args:
        mllm: folder or Hub id of a VLM of a known family.
        base: folder or Hub id of its base; recorded as a relative path, or with its commit.
        choice: which blocks are copied, and the ranks of the others.
        calibration: chats with images; errors are then those of the linear layers' outputs on them, as the VLM runs
            them, and otherwise those of weights. The cut is the best for these errors.
        dtype: `"auto"` is the base's. The VLM is read in it too: what is stored in another is cast, which takes memory
            for the whole VLM, and may round its weights (a warning says so).
        trust_remote_code: allows code from the base's repository to run.

    Raises `ValueError` or `OSError`, leaving nothing behind, for an output that exists, a VLM of an unknown family, a
    quantized or incomplete source, weights that are no finite floating-point numbers, a budget that does not pay for
    what is stored whole, and two models that do not belong together.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The trade-off is drawn with matplotlib: pip install 'genieblue[train]'.")
    choice = choice or Choice()
    mllm, base = os.fspath(mllm), os.fspath(base)
    out = check_new_folder(output, [mllm, base])
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if not os.path.isdir(mllm):  # settings, processor and weights are of one commit, whatever is pushed meanwhile
        mllm_revision = hub_commit(mllm, mllm_revision, newest=True, **hub) or mllm_revision
    from_vlm = {**hub, "revision": mllm_revision}
    from_base = {**hub, "revision": base_revision, "trust_remote_code": trust_remote_code}
    _check_configs(mllm, base, from_vlm, from_base, is_calibrated=calibration is not None)
    processor = VlmGenieBlueProcessor(
        load_part("base's tokenizer", base, AutoTokenizer.from_pretrained, **from_base),
        load_part("VLM's processor", mllm, AutoProcessor.from_pretrained, never_runs_code=True, **from_vlm),
    )
    _check_vocabulary(processor, mllm, base)
    base_model = load_base_model(base, dtype=dtype, **from_base)
    vlm, cast = _load_vlm(mllm, base_model.dtype, from_vlm)
    pair = LanguagePair(vlm, base_model)
    difference = pair.check()
    choice, asked = _within_budget(choice, pair), choice
    requests = None if calibration is None else _encoded(processor, calibration)
    measured = _measured_requests(processor, requests)
    exact = {of: _logits(lambda **request: vlm(**request).logits, each) for of, each in measured.items()}
    with lock_output(out, CONVERSION), explained_full_disk(out), StagingFolder(out, "extraction") as folder:
        wrap = progress or (lambda steps, _title: steps)
        blocks = _factor(pair, vlm, folder, requests, wrap)
        number = base_model.dtype.itemsize
        plan, curve = plan_extraction(blocks, choice, number), trade_off(blocks, choice, number)
        rank = min(plan.ranks.values(), default=1)
        model = GenieBlueForConditionalGeneration.from_vlm(
            vlm,
            base_model,
            replicated_layers=plan.copied,
            lora_rank=rank,
            lora_alpha=rank,
            rank_pattern={name: each for name, each in plan.ranks.items() if each != rank} or None,
            factors=_StoredFactors(folder),
            base_model_name_or_path=base,
            base_model_revision=base_revision,
            vlm_revision=mllm_revision,
            hub_kwargs=hub,
        )
        rows = [
            _compared(
                exact[of], _logits(lambda **request: model(**request, view="multimodal").logits, each), of + cast
            )
            for of, each in measured.items()
        ]
        rows.append(_error_of_linears(plan, blocks, requests is not None))
        settings = model.own_language.settings(model.config.own_head_rows is None)
        own_rows = {name: settings[name] for name in ("own_embedding_rows", "own_head_rows")}
        own_bytes = _bytes_of(model.own_language)
        facts = {
            MEASUREMENTS_NAME: [asdict(row) for row in rows],
            EXTRACTION_NAME: {
                "source": {"name": mllm if not os.path.isdir(mllm) else Path(mllm).name, "revision": mllm_revision},
                "choice": asdict(asked),
                "calibrated": requests is not None,
                "difference": difference,
                "plan": asdict(plan),
                "own_bytes": own_bytes,
                "trade_off": [{"bytes": each.bytes, "error": each.error, "copied": each.copied} for each in curve],
            },
            TRADE_OFF_NAME: draw_trade_off(plan, curve, sum(block.bytes for block in blocks)),
        }
        save_model(model, out, processor=processor, facts=facts, replace=False)
    return Extraction(out, plan, difference, own_rows, own_bytes, rows)


def _check_configs(
    mllm: str, base: str, from_vlm: dict[str, Any], from_base: dict[str, Any], is_calibrated: bool
) -> None:
    """`ValueError` or `OSError` for unsuitable sources, after reading only configurations and indices."""
    # The type first: another one may need code from the VLM's repository already for its configuration.
    settings, _ = load_part("VLM", mllm, PreTrainedConfig.get_config_dict, never_runs_code=True, **from_vlm)
    check_family(settings.get("model_type"), mllm)
    config = load_part("VLM", mllm, AutoConfig.from_pretrained, never_runs_code=True, **from_vlm)
    if is_calibrated:
        check_runs_by_blocks(config.model_type, "leave out the calibration (--calibration)")
    base_config = load_part("base", base, AutoConfig.from_pretrained, **from_base)
    check_base_type(base, base_config)
    for name, each in ((mllm, config), (base, base_config)):
        check_weight_files(name, each, "so no change can be computed: give 16 or 32 bits.")


def _check_vocabulary(processor: VlmGenieBlueProcessor, mllm: str, base: str) -> None:
    """`ValueError` if many tokens of the base have another id in the VLM."""
    of_vlm, of_base = processor.vlm_processor.tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    moved = sum(of_vlm.get(token) != index for token, index in of_base.items())
    if moved > LARGEST_SHARE_OF_MOVED_TOKENS * len(of_base):
        raise ValueError(
            f"{mllm} was not trained from {base}: {moved:,} of the base's {len(of_base):,} tokens are missing or have "
            "another id in it. Give the base that the VLM was made from."
        )


def _load_vlm(mllm: str, dtype: torch.dtype, from_vlm: dict[str, Any]) -> tuple[PreTrainedModel, str]:
    """The VLM in a precision, and what a measurement is to say of that: nothing if it is the one it is stored in."""
    options = {"dtype": dtype, "never_runs_code": True, **WEIGHT_OPTIONS, **from_vlm}
    vlm, info = load_part("VLM", mllm, AutoModelForImageTextToText.from_pretrained, **options)
    check_complete(mllm, info, "VLM")
    if unread := sorted(map(str, info["unexpected_keys"])):
        logger.warning("%s has %d tensors that its class does not read: %s.", mllm, len(unread), some(unread))
    check_numbers("VLM", mllm, vlm, renamed=True, **from_vlm)
    return vlm.eval(), _cast(mllm, dtype, from_vlm)


def _cast(mllm: str, dtype: torch.dtype, from_vlm: dict[str, Any]) -> str:
    found = set()
    for path in weight_files(ModelFiles(mllm, **from_vlm).cached).values():
        with safe_open(path, framework="pt") as file:
            found |= {DTYPES.get(file.get_slice(name).get_dtype()) for name in file.keys()}
    stored = found - {dtype, None}  # without integer masks and positions
    if not stored:
        return ""
    partly = "partly " if dtype in found else ""
    names = partly + " and ".join(sorted(str(each).removeprefix("torch.") for each in stored))
    to = str(dtype).removeprefix("torch.")
    if all(torch.promote_types(each, dtype) == dtype for each in stored):
        logger.warning("%s is stored in %s and read in %s, which takes memory for all of it.", mllm, names, to)
        return ""
    logger.warning(
        "%s is stored in %s and read in %s, the precision of the base: its weights are rounded, so that images do not "
        "give exactly its logits even with all blocks copied, and all of it is in memory. dtype (--dtype) chooses "
        "another precision for both.",
        mllm, names, to,
    )  # fmt: skip
    return f", the VLM's weights rounded from {names} to {to}"


def _bytes_of(own: OwnLanguage) -> int:
    return sum(each.numel() * each.element_size() for each in own.state_dict().values())


def _within_budget(choice: Choice, pair: LanguagePair) -> Choice:
    """The choice with what its budget leaves for copies and LoRA.

    Raises `ValueError` for a choice that cannot be met, with the numbers, before the long computation of all changes.
    """
    of = ""
    if choice.max_bytes is not None:
        spent = _bytes_of(OwnLanguage.of(pair, []))  # norms of copied blocks, which are small, count twice
        left = choice.max_bytes - spent
        of = (
            f"Of a budget of {choice.max_bytes:,} bytes, {spent:,} are needed for the rows of embedding and head, "
            "norms and biases in which the VLM differs from the base"
        )
        if left < 1:
            raise ValueError(f"{of}, which are stored whole, so that nothing is left for copies and LoRA: give more.")
        choice, of = replace(choice, max_bytes=left), f"{of}. "
    blocks = []
    for index in range(pair.count_blocks()):
        shapes = {name: pair.of_base(f"{name}.weight").shape for name in pair.linears(index)}
        zeros = {name: Spectrum((rows, columns), torch.zeros(min(rows, columns)), 1.0)
                 for name, (rows, columns) in shapes.items()}  # fmt: skip
        blocks.append(BlockChange(index, _bytes_of_block(pair, index), zeros))
    try:
        plan_extraction(blocks, choice, pair.base.dtype.itemsize)
    except ValueError as error:
        raise ValueError(f"{of}{error}") from error
    return choice


def _bytes_of_block(pair: LanguagePair, index: int) -> int:
    block = pair.base.get_submodule(f"{pair.blocks}.{index}")
    return sum(each.numel() * each.element_size() for each in block.parameters())


class _StoredFactors:
    """Factors of changes, which are stored in a folder with all their ranks."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(
        self, name: str, base: torch.Tensor, own: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with safe_open(self._folder / f"{name}.safetensors", framework="pt") as file:
            return file.get_slice("B")[:, :rank], file.get_slice("A")[:rank]


@torch.no_grad()
def _factor(
    pair: LanguagePair,
    vlm: PreTrainedModel,
    folder: Path,
    requests: Sequence[Request] | None,
    progress: Progress,
) -> list[BlockChange]:
    """The spectra of all blocks' changes; the factors go into files in `folder`."""
    blocks = []

    def process(index: int, _block: Any, hessians: Hessians) -> None:
        spectra = {}
        path = f"{pair.blocks}.{index}"
        for name in pair.linears(index):
            weights = pair.of_base(f"{name}.weight"), pair.of_vlm(f"{name}.weight")
            b, a, spectra[name] = factor_change(*weights, hessians.get(name.removeprefix(f"{path}.")))
            factors = {"A": a, "B": b}  # LoRA is saved in the base's precision anyway
            factors = {kind: each.to("cpu", pair.base.dtype).contiguous() for kind, each in factors.items()}
            save_file(factors, folder / f"{name}.safetensors")
        blocks.append(BlockChange(index, _bytes_of_block(pair, index), spectra))

    if requests is None:
        for index in progress(range(pair.count_blocks()), "blocks"):
            process(index, None, {})
    else:
        path = f"{decoder_path(vlm)}.layers"
        walk_blocks(vlm, requests, path, process, progress=lambda steps: progress(steps, "blocks"))
    return blocks


def _encoded(processor: VlmGenieBlueProcessor, chats: Iterable[Chat]) -> list[Request]:
    """Chats with images as the VLM's processor encodes them.

    Raises `ValueError` if there are none, or no template for them.
    """
    own, requests = processor.vlm_processor, []
    for messages, images in chats:
        parts = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
        try:
            text = own.apply_chat_template(parts)
        except Exception as error:  # A template can fail in any way on unexpected content.
            raise ValueError(
                f"The VLM has no chat template that formats chats with images ({error}): leave out the calibration "
                "(--calibration)."
            ) from error
        pictures = [read_image(image).convert("RGB") for image in images]
        requests.append(dict(processor(text=[text], images=pictures, return_tensors="pt")))
    if not requests:
        raise ValueError("There are no calibration chats with images: give some, or leave them out.")
    return requests


def _measured_requests(
    processor: VlmGenieBlueProcessor, calibration: list[Request] | None
) -> dict[str, list[Request]]:
    """What logits are compared on, by what a card says of it: calibration chats or, without any, fixed prompts."""
    if calibration is not None:
        measured = calibration[:MEASURED_REQUESTS]
        return {f"{len(measured)} calibration chats": measured}
    own = processor.vlm_processor
    behind_image = dict(processor(text=[_question(processor)], images=[_pattern()], return_tensors="pt"))
    texts = [{"input_ids": own.tokenizer(prompt, return_tensors="pt")["input_ids"]} for prompt in PROMPTS]
    return {
        "a fixed prompt behind one image with a pattern": [behind_image],
        f"{len(PROMPTS)} fixed prompts without images": texts,
    }


def _question(processor: VlmGenieBlueProcessor) -> str:
    """A prompt behind an image, in the VLM's template if it has one that writes images (PaliGemma's has none)."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]
    try:
        text = processor.vlm_processor.apply_chat_template([{"role": "user", "content": content}])
    except Exception:  # A template can fail in any way on unexpected content.
        text = ""
    return text if text.count(processor.image_token) == 1 else f"{processor.image_token}{PROMPTS[0]}"


def _pattern() -> Image.Image:
    waves = torch.linspace(0, 25, PATTERN_SIDE)
    channels = [torch.sin(waves[None] + phase) * torch.cos(waves[:, None]) for phase in (0.0, 1.0, 2.0)]
    return Image.fromarray(((torch.stack(channels, dim=-1) + 1) * 127.5).to(torch.uint8).numpy())


@torch.no_grad()
def _logits(run: Callable[..., torch.Tensor], requests: Sequence[Request]) -> torch.Tensor:
    return torch.cat([run(**request)[0, -MEASURED_POSITIONS:].float() for request in requests])


def _compared(exact: torch.Tensor, ours: torch.Tensor, of: str) -> Measurement:
    error, agreeing = logits_error(exact, ours)
    return Measurement(
        "Logits against the VLM's own",
        f"{error:.2g} relative L2; the same top token at {agreeing:.1%} of positions",
        f"{len(exact)} positions of {of}",
    )


def _error_of_linears(plan: Plan, blocks: list[BlockChange], is_calibrated: bool) -> Measurement:
    full = sum(block.bytes for block in blocks)
    return Measurement(
        f"{'Outputs' if is_calibrated else 'Weights'} of linear layers against the VLM's own",
        f"{plan.error:.2g} relative error, at {plan.bytes / full:.0%} of the blocks' bytes",
        f"{len(plan.copied)} of {len(blocks)} blocks copied, the changes of all others cut by their SVD",
    )


def draw_trade_off(plan: Plan, curve: list[Plan], full: int) -> bytes:
    """A PNG: the error of the linear layers by bytes of copies and LoRA, with a dot at the plan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis: Any = figure.subplots()
    axis.plot([100 * each.bytes / full for each in curve], [each.error for each in curve], marker=".")
    axis.plot(100 * plan.bytes / full, plan.error, "o", label="this extraction")
    axis.set(xlabel="bytes of copies and LoRA, % of all blocks", ylabel="relative error of the linear layers", ylim=0)
    axis.grid(alpha=0.3)
    axis.legend()
    picture = BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()
