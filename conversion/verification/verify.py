"""Verifies a saved GenieBlue: its bytes and the base's, the text answers, the adapter and the code."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from conversion.unchanged import other_base_files
from conversion.verdict import HeldOut
from conversion.verification import clean_process
from conversion.verification.answer_boundaries import check_answer_boundaries
from conversion.verification.checks import Check, CheckFailed, fail_on, run_check
from conversion.verification.saved_model import PROMPTS, SavedModel, foreign_code, logits_of
from conversion.verification.verify_quantized import (
    check_quantization,
    check_verdict,
    check_verdict_on_data,
    find_invalid_values,
    may_run_code_of_base,
)
from hub_cards.model_folder import (
    adapter_weights,
    lora_in_words,
    not_finite,
    own_weight_files,
    read_model_config,
    read_tensor_sizes,
)
from modeling_genieblue.base_identity_genieblue import compare_with_samples, different_settings
from modeling_genieblue.language_adapter_genieblue import adapter_parameters, load_adapter, make_lora_config
from modeling_genieblue.language_views_genieblue import build_multimodal_view
from modeling_genieblue.loading_genieblue import LoadRequest
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    BASE_FINGERPRINT_NAME,
    CHANGED_BASE,
    HUB_KEYS,
    ModelFiles,
    changed_weights,
    is_inner_folder,
    own_modules,
    own_weight_places,
    read_json,
    recorded_weights,
    some,
    weight_files,
)
from modeling_genieblue.quantized_parts_genieblue import load_quantized_adapter, quantized_values

logger = logging.getLogger(__name__)

QUESTION = "What is in this picture?"
CONVERSATION = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And another one?"},
]
NEW_TOKENS = 16
# Largest difference between two logits, relative to their range, that counts as rounding. A missing or wrong adapter
# changes logits by far more.
SAME_LOGITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
CLEAN_PROCESS_SECONDS = 3600


def verify_model(
    model: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    held_out: HeldOut | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> list[Check]:
    """Runs every check on a saved GenieBlue (folder or Hub id); an exception fails its check, and the others go on.

    The last check runs the repository's own Python files in a separate process, so verify only models that you would
    load with `trust_remote_code=True`. At most two copies of the base are in memory at a time.

    Args:
        base: folder or Hub id of the base, if it is not at the recorded location; it must be the same base.
        trust_remote_code: allows code from the *base's* repository to run.
        dtype: dtype of the comparisons; `"auto"` is the base's own.
        held_out: data to repeat the verdict on a quantized GenieBlue with, beside the recorded one.
        on_check: called with each check when it is done.

    Raises `ValueError` or `OSError` only if `model` is not a GenieBlue.
    """
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    hub = {key: value for key, value in hub.items() if value is not None}
    subject = SavedModel(os.fspath(model), base, revision, hub, trust_remote_code, dtype, device)
    subject.held_out = held_out
    if held_out is not None and not subject.is_quantized:
        raise ValueError(f"{model} is not quantized, so there is nothing to compare it with: leave out --eval-data.")
    checks = []
    for name, function in CHECKS.items():
        if name in ONLY_QUANTIZED and not subject.is_quantized:
            continue
        if name in ONLY_WITH_DATA and held_out is None or name in NOT_WITH_VLM and subject.has_vlm:
            continue
        replaced = QUANTIZED_CHECKS if subject.is_quantized else VLM_CHECKS if subject.has_vlm else {}
        name, function = replaced.get(name, (name, function))
        check = run_check(name, partial(function, subject))
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return checks


def check_folder(subject: SavedModel) -> str:
    """The auto classes recognise the folder as a GenieBlue; its weights are finite, and none belongs to the base."""
    folder = subject.folder
    problems = []
    places = subject.files()
    if ADAPTER_CONFIG_NAME in places:
        problems.append(
            f"{ADAPTER_CONFIG_NAME} is in the root, so `AutoModel` of a Hub id would load the base instead: it "
            f"belongs in {ADAPTER_FOLDER}/"
        )
    files = own_weight_files(folder)
    names = {name for file in files for name in read_tensor_sizes(folder / file)}
    config = read_model_config(folder)
    own = own_modules(config)
    foreign = sorted(name for name in names if name.split(".", 1)[0] not in own)
    if foreign:
        problems.append(f"{', '.join(files)} contain {some(foreign)}, expected only {' and '.join(own)}")
    if broken := [name for file in files for name in not_finite(folder / file)]:
        problems.append(f"NaN or infinity in {some(broken)}")
    base = config.get("base_model_name_or_path")
    inner = base[2:] if is_inner_folder(base) else None
    expected = {*files, adapter_weights(config)}
    if inner is not None:
        expected |= {f"{inner}/{file}" for file in weight_files(ModelFiles(folder / inner).find)}
    known = ("", ADAPTER_FOLDER, inner)
    weights = {place for place in places if place.endswith(WEIGHT_SUFFIXES) and place.rpartition("/")[0] in known}
    if others := weights - expected:
        problems.append(f"it contains foreign weight files, which nothing loads or checks: {some(sorted(others))}")
    fail_on(problems)
    of_base = f"the base in {base}" if inner is not None else "no weight of the base"
    return f"{len(names)} tensors of {' and '.join(own)}, all finite; {of_base}, no adapter in the root"


def check_own_files(subject: SavedModel) -> str:
    """Every byte of the GenieBlue's own weight files, by sha256; a base in its folder is the next check's."""
    config = read_model_config(subject.folder)
    fail_on(changed_weights(subject.folder, config))
    places = own_weight_places(subject.folder)
    recorded = [place for place in places if place in recorded_weights(config)]
    unseen = "a changed number in them goes unnoticed until the GenieBlue is loaded and saved again"
    if not recorded:
        return f"no sha256 of its weights is recorded: {unseen}"
    others = [place for place in places if place not in recorded]
    rest = "".join(f"; {place} is not recorded, another program wrote it: {unseen}" for place in others[:1])
    return f"sha256 of {', '.join(recorded)} as recorded{rest}"


def check_base_files(subject: SavedModel) -> str:
    """Every byte of the base's weight files, by sha256, and the recorded sample of each tensor."""
    name, options = subject.base
    recorded = subject.config.base_model_fingerprint or {}
    if not recorded:
        raise CheckFailed(
            "config.json records no sha256 of the base's files: load the base from files and save the model again."
        )
    files = ModelFiles(name, **{key: options[key] for key in HUB_KEYS if key in options})
    problems, found = other_base_files(files, recorded)
    problems += [
        f"sha256 of {file} is {found[file]}, the base's own config.json records {sha256}: {CHANGED_BASE}"
        for file, sha256 in recorded_weights(subject.base_quantization or {}).items()
        if found.get(file, sha256) != sha256
    ]
    fail_on(problems)
    samples = read_json(subject.folder / BASE_FINGERPRINT_NAME)
    values = None if subject.base_quantization is None else quantized_values(subject.plain)
    fail_on(compare_with_samples(subject.plain, samples, values))
    fail_on(different_settings(subject.plain.config, subject.config.text_config))
    return f"settings, sha256 of the weights and samples of {len(samples)} tensors match {name}"


def check_language_adapter(subject: SavedModel) -> str:
    """The loader accepts every tensor of the adapter, all numbers are valid, and its settings are config.json's."""
    lora_config = make_lora_config(subject.plain, subject.config)
    config = read_model_config(subject.folder)
    path = subject.folder / adapter_weights(config)
    read_tensor_sizes(path)  # raises for a truncated file
    view = build_multimodal_view(subject.plain, lora_config)
    problems = []
    try:
        if subject.is_quantized:
            load_quantized_adapter(view, LoadRequest.from_arguments(subject.folder, {}), subject.plain.dtype)
        else:
            load_adapter(view, path, subject.plain.dtype)
    except ValueError as error:
        problems.append(str(error))
    problems += [*find_invalid_values(path), *subject.different_settings(lora_config)]
    fail_on(problems)
    count = sum(parameter.numel() for _, _, parameter in adapter_parameters(view))
    layers = ", ".join(map(str, subject.config.replicated_layers))
    copies = f"copies of the blocks {layers}" if layers else "no copied block"
    return f"{count:,} parameters: {lora_in_words(config)} and {copies}, as in config.json; every number is valid"


def check_tokenizer(subject: SavedModel) -> str:
    """Text-only requests are formatted and tokenized exactly as the base's own tokenizer does it."""
    trust = {"trust_remote_code": subject.trust}
    processor = subject.processor_class.from_pretrained(subject.name, **trust, **subject.source)
    own = subject.base_tokenizer
    problems = []
    if processor.tokenizer.get_vocab() != own.get_vocab():
        problems.append("the vocabulary differs from the base's")
    # With a VLM it is the VLM's processor that expands images.
    if not subject.has_vlm and processor.image_token_id != subject.config.image_token_id:
        problems.append(
            f"the processor's image_token_id is {processor.image_token_id}, config.json has "
            f"{subject.config.image_token_id}"
        )
    texts = [*PROMPTS, processor.image_token, "".join(own.all_special_tokens)]
    problems += [
        f"{text!r} becomes {list(ids)[:8]}, with the base's tokenizer {list(expected)[:8]}"
        for text in texts
        if (ids := processor(text)["input_ids"]) != (expected := own(text)["input_ids"])
    ]
    formatted = "the base has no chat template"
    if own.chat_template is not None:
        formatted = "and a conversation"
        for settings in ({"add_generation_prompt": True}, {}):
            settings |= {"tokenize": True, "return_dict": True}
            ids = processor.apply_chat_template(CONVERSATION, **settings)["input_ids"]
            if ids != own.apply_chat_template(CONVERSATION, **settings)["input_ids"]:
                problems.append(f"a conversation is formatted differently ({settings})")
    fail_on(problems)
    return f"{len(own)} tokens, {len(texts)} texts {formatted}: equal to the base's own"


def check_text_view(subject: SavedModel) -> str:
    """Logits and greedy generation of the text view equal those of the plain base, bit for bit."""
    base, model = subject.plain, subject.model
    problems = []
    tokens = 0
    for ids, expected in zip(subject.prompts, subject.plain_logits, strict=True):
        logits = logits_of(model, ids)
        if not torch.equal(logits, expected):
            worst = (logits.float() - expected.float()).abs().max()
            problems.append(f"logits of a prompt of {ids.shape[1]} tokens differ by up to {worst:.3g}")
    # Rows of different lengths, padded on the left as in batched serving.
    batch = _left_padded(subject.prompts, base.config.get_text_config(decoder=True))
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for inputs in (*({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in subject.prompts), batch):
        if not torch.equal(logits_of(model, **inputs), logits_of(base, **inputs)):
            problems.append(f"logits of {len(inputs['input_ids'])} rows with an attention mask differ")
        generated, expected = model.generate(**inputs, **settings), base.generate(**inputs, **settings)
        tokens += generated[:, inputs["input_ids"].shape[1] :].numel()
        if not torch.equal(generated, expected):
            ours, plain = (ids[:, -NEW_TOKENS:].tolist() for ids in (generated, expected))
            problems.append(f"generated {ours}, the base {plain}")
    fail_on(problems)
    return (
        f"logits of {len(PROMPTS)} prompts and of their batch, and {tokens} generated tokens equal the plain base's "
        f"bit for bit ({_name(base.dtype)}, {base.device.type})"
    )


def check_stock_peft(subject: SavedModel) -> str:
    """`PeftModel.from_pretrained` on the plain base gives the multimodal view's logits; disabled, the base's."""
    base_logits = subject.plain_logits  # computed before PEFT modifies the plain base
    ours = [logits_of(subject.model, ids, view="multimodal") for ids in subject.prompts]
    peft = PeftModel.from_pretrained(subject.plain, subject.folder, subfolder=ADAPTER_FOLDER)
    stock = [logits_of(peft, ids) for ids in subject.prompts]
    problems = []
    dtype = subject.plain.dtype
    worst = max(_relative_difference(*pair) for pair in zip(ours, stock, strict=True))
    limit = SAME_LOGITS.get(dtype, SAME_LOGITS[torch.bfloat16])
    if not worst <= limit:  # NaN fails too
        problems.append(
            f"the multimodal view differs from stock PEFT by {worst:.2g} of the logits' range (limit {limit:g})"
        )
    with peft.disable_adapter():
        if not all(
            torch.equal(logits_of(peft, ids), expected)
            for ids, expected in zip(subject.prompts, base_logits, strict=True)
        ):
            problems.append("with the adapter disabled, the logits of stock PEFT are not the base's")
    fail_on(problems)
    moved = max(_relative_difference(*pair) for pair in zip(ours, base_logits, strict=True))
    return (
        f"largest difference, of the logits' range: {worst:.1g} ({_name(dtype)}); the adapter changes the base's "
        f"logits by {moved:.2g}; disabled, they equal the base's bit for bit"
    )


def check_adapter_tensors(subject: SavedModel) -> str:
    """Stock PEFT loads the adapter onto the plain base: matrices, without the norms and rows of the VLM."""
    peft: Any = PeftModel.from_pretrained(subject.plain, subject.folder, subfolder=ADAPTER_FOLDER)
    stock = {name: value for name, _, value in adapter_parameters(peft.base_model.model)}
    ours = {name: value for name, _, value in adapter_parameters(subject.model.multimodal_language_model)}
    differing = [name for name in ours if name not in stock or (stock[name].float() - ours[name].float()).any()]
    fail_on([f"stock PEFT has other values in {some(differing)}"] if differing else [])
    own = len(list(subject.model.own_language.parameters()))
    return f"stock PEFT loads {len(ours)} tensors onto the base; {own} more of the VLM's are in model.safetensors"


def _relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    logits, expected = logits.float(), expected.float()
    return float((logits - expected).abs().max() / (expected.max() - expected.min()))


def check_remote_code(subject: SavedModel) -> str:
    """The repository's own code files load without the package, and answer about an image."""
    base_name, base_options = subject.base  # raises if the base's code is not allowed: here it would run
    if not subject.is_local and not subject.trust and (foreign := foreign_code(subject.folder)):
        raise CheckFailed(
            f"{some(foreign)} differ from the installed package's files and were not run: read them, then allow them "
            "with trust_remote_code (--trust-remote-code)"
        )
    alone = subject.base_quantization is not None and may_run_code_of_base(subject)
    subject.release()
    settings = {
        "model": str(subject.folder) if subject.is_local else subject.name,
        "hub": _for_clean_process(subject.source),
        "quantized_base": base_name if alone else None,
        "base_hub": _for_clean_process(base_options),
        "base": {} if subject.base_override is None else {"base_model": os.path.abspath(base_name)
                                                  if os.path.isdir(base_name) else base_name},
        "dtype": subject.dtype if isinstance(subject.dtype, str) else _name(subject.dtype),
        "device": subject.device,
        "prompt": QUESTION,
        "max_new_tokens": 4,
    }  # fmt: skip
    report = _run_clean_process(settings, subject.hub.get("token"))
    installed = {name: module for name, module in report["modules"].items() if "transformers_modules" not in module}
    if installed:
        raise CheckFailed(f"not taken from the repository: {installed}; config.json lacks their `auto_map` entries")
    if report["base_class"] is not None and not report["base_is_equal"]:
        raise CheckFailed(
            f"the base {base_name}, loaded with its own code files, gives different logits from the text view"
        )
    of_base = f"; its base alone, a {report['base_class']}, gives the text view's logits" if alone else ""
    others = foreign_code(subject.folder)
    return (
        f"{', '.join(report['modules'])} run the repository's own files "
        f"({f'{some(others)} differ from' if others else 'byte for byte those of'} the installed package) in a clean "
        f"process; it answered about an image of {report['tiles']} tiles with {report['new_tokens']} tokens"
        f"{of_base}"
    )


def _for_clean_process(options: dict[str, Any]) -> dict[str, Any]:
    """Hub options without the token and the permission for remote code, which the process gets in other ways."""
    return {key: value for key, value in options.items() if key not in ("token", "trust_remote_code")}


def _run_clean_process(settings: dict[str, Any], token: str | bool | None) -> dict[str, Any]:
    """Runs `clean_process` in an empty folder with a cache of code files of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_MODULES_CACHE": os.path.join(folder, "modules")}
        if isinstance(token, str):
            environment["HF_TOKEN"] = token
        try:
            process = subprocess.run(
                [sys.executable, "-P", clean_process.__file__],
                input=json.dumps(settings, default=str),  # paths and devices
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=CLEAN_PROCESS_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(
                f"a clean process did not answer within {CLEAN_PROCESS_SECONDS} seconds and was stopped: a code file "
                "in the repository may hang"
            ) from error
    if process.returncode != 0:
        raise CheckFailed(f"a clean process failed with exit code {process.returncode}: {_last_error(process.stderr)}")
    return json.loads(process.stdout.strip().splitlines()[-1])


CHECKS: dict[str, Callable[[SavedModel], str]] = {
    "folder": check_folder,
    "own_files": check_own_files,
    "base_files": check_base_files,
    "language_adapter": check_language_adapter,
    "tokenizer": check_tokenizer,
    "answer_boundaries": check_answer_boundaries,
    "text_view": check_text_view,
    "stock_peft": check_stock_peft,
    "verdict": check_verdict,
    "verdict_on_data": check_verdict_on_data,
    "remote_code": check_remote_code,
}
# Replacements of checks for a GenieBlue with a VLM, and for a quantized one.
VLM_CHECKS = {"stock_peft": ("adapter_tensors", check_adapter_tensors)}
NOT_WITH_VLM = ("answer_boundaries",)  # chats are trained with the VLM's own template
QUANTIZED_CHECKS = {"stock_peft": ("quantization", check_quantization)}
ONLY_QUANTIZED = ("verdict", "verdict_on_data")
ONLY_WITH_DATA = ("verdict_on_data",)  # beside the recorded one, which it does not replace


def _left_padded(rows: list[torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    length = max(row.shape[1] for row in rows)
    pad = getattr(config, "pad_token_id", None) or 0
    padded = [nn.functional.pad(row, (length - row.shape[1], 0), value=pad) for row in rows]
    mask = [nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows]
    return {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask)}


def _last_error(stderr: str) -> str:
    """The message of the exception that ended a process, possibly several lines."""
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    message = " ".join(lines[starts[-1] :] if starts else lines[-3:])
    return message if len(message) <= 500 else f"{message[:500]} …"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
