"""Verifies a quantized base alone: its bytes, its numbers, what it lost, and that plain users can load it."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from conversion.verdict import nothing_measured
from conversion.verification.checks import Check, CheckFailed, fail_on, run_check
from conversion.verification.saved_model import PROMPTS, foreign_code, logits_of
from conversion.verification.verify_quantized import find_invalid_values
from hub_cards.publish_base import find_base_problems
from hub_cards.verdicts import summary
from modeling_genieblue.model_files_genieblue import QUANTIZED_WEIGHTS_NAME, recorded_weights, some
from modeling_genieblue.quantized_base_genieblue import load_quantized_base, read_base_quantization


def is_quantized_base(name: str, **hub: Any) -> bool:
    """Whether a folder or Hub id is a base that GenieBlue quantized; `False` also for what cannot be read."""
    try:
        return read_base_quantization(name, **hub) is not None
    except (OSError, ValueError):
        return False


def verify_quantized_base(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    on_check: Callable[[Check], None] | None = None,
    **hub: Any,
) -> list[Check]:
    """Runs every check on a quantized base (folder or Hub id); an exception fails its check, and the others go on.

    That it is a rounding of the original base is not checked: `quantize` does that when it reuses one.

    Args:
        dtype: of the activations; `"auto"` is the recorded one.
        trust_remote_code: allows code of the original base to run, if transformers has no class for it.
        on_check: called with each check when it is done.
        hub: `token`, `revision`, `cache_dir`, `local_files_only`.

    Raises `ValueError` or `OSError` only if `name` is not a quantized base.
    """
    settings = read_base_quantization(name, **hub)
    if settings is None:
        raise ValueError(f"{name} is not a base quantized by GenieBlue.")
    folder = Path(name if os.path.isdir(name) else snapshot_download(os.fspath(name), **hub))

    loads = partial(_check_loads, folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    checks = []
    for title, function in {
        "files": partial(_check_files, folder, settings),
        "numbers": partial(_check_numbers, folder),
        "verdict": partial(_check_verdict, settings),
        "loads": loads,
    }.items():
        checks.append(run_check(title, function))
        if on_check is not None:
            on_check(checks[-1])
    return checks


def _check_files(folder: Path, settings: dict[str, Any]) -> str:
    """The folder is whole, and every byte of its weights as recorded."""
    fail_on(problem.removesuffix(".") for problem in find_base_problems(folder))
    recorded = recorded_weights(settings)
    code = f"; {some(others)} differ from the installed package's" if (others := foreign_code(folder)) else ""
    if not recorded:
        raise CheckFailed("no sha256 of its weights is recorded: quantize the model again")
    return f"sha256 of {', '.join(recorded)} as recorded{code}"


def _check_numbers(folder: Path) -> str:
    fail_on(find_invalid_values(folder / QUANTIZED_WEIGHTS_NAME))
    return "every scale, zero point and code is one that rounding gives"


def _check_verdict(settings: dict[str, Any]) -> str:
    """The verdict on the text view, as it was recorded, is not that too much is lost, unless that was accepted."""
    verdict = settings.get("verdict") or nothing_measured()
    if not verdict["accepted"]:
        raise CheckFailed(f"as recorded: {summary(verdict)}")
    return f"as recorded: {summary(verdict)}"


def _check_loads(folder: Path, *, dtype: Any, device: Any, trust_remote_code: bool) -> str:
    """It loads by the installed code, without what the folder's own would be needed for, and gives finite logits."""
    base = load_quantized_base(folder, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(base.device)
        if not logits_of(base, ids).isfinite().all():
            raise CheckFailed(f"logits of {text!r} are NaN or infinite")
    return f"a {type(base).__name__}, with finite logits for {len(PROMPTS)} prompts"
