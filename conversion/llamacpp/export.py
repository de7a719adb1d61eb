"""A GenieBlue for llama.cpp: one adapter and one file for images, for an unmodified `llama-server` with its base."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conversion.language_exports import load_source
from conversion.lora_form import Matrix, Progress, check_choice, write_lora_form
from conversion.quantization.bases import check_source
from conversion.staging import CONVERSION, explained_full_disk, lock_output
from hub_cards.exports import EXPORT_FACTS_NAME, LORA_GGUF_NAME, MMPROJ_NAME, SPECTRUM_NAME, write_export_card
from hub_cards.model_card import Measurement
from modeling_genieblue import GenieBlueConfig, GenieBlueProcessor, VlmGenieBlueConfig
from modeling_genieblue.model_files_genieblue import HUB_KEYS, file_sha256, read_settings, write_json
from modeling_genieblue.staging_genieblue import NewFolder


@dataclass(frozen=True)
class LlamaCppExport:
    """What was written: the folder, bytes of each file, the form's matrices, what no LoRA carries, the errors."""

    output: Path
    files: dict[str, int]
    matrices: list[Matrix]
    left_behind: dict[str, float]
    measurements: list[Measurement]
    image_tokens: int | None  # of a tile, which the server must be told

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


def export_llamacpp(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    language_only: bool = False,
    base_gguf: str | os.PathLike | None = None,
    rank: int | None = None,
    error: float | None = None,
    max_bytes: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **load_kwargs: Any,
) -> LlamaCppExport:
    """Writes the LoRA form of a GenieBlue (folder or Hub id) as a GGUF adapter, and its vision side as an mmproj.

    Args:
        language_only: leaves the vision side out.
        base_gguf: the base's GGUF that the adapter is for, to check that it is of this base.

    For the other arguments see `export_lora`. Raises `ValueError` or `OSError`, leaving nothing behind, for what
    `export_lora` refuses, a base whose files in llama.cpp are unknown, a GGUF of another model, and a vision side that
    llama.cpp would run differently.
    """
    check_choice(rank, error, max_bytes)
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("Files for llama.cpp are written with gguf: pip install 'genieblue[gguf]'.")
    from conversion.llamacpp.adapter import check_base_file, family_of, write_adapter
    from conversion.llamacpp.vision import check_vision, write_mmproj

    hub = {key: load_kwargs[key] for key in HUB_KEYS if load_kwargs.get(key) is not None}
    config = GenieBlueConfig.from_pretrained(source, **hub)
    if isinstance(config, VlmGenieBlueConfig):
        raise ValueError(
            f"{source} sees with a whole VLM ({config.vlm_config.model_type}), whose tiles, positions and template "
            "llama.cpp would need: only a GenieBlue with a SigLIP and a projector (`genieblue init`) is exported. "
            "`genieblue quantize` makes this one smaller."
        )
    check_source(source, config)
    family_of(config.text_config)
    trust = {"trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
    processor = GenieBlueProcessor.from_pretrained(source, **trust, **hub)
    if not language_only:
        check_vision(config, processor)
    model, out = load_source(source, out, **load_kwargs)
    base, config = model.language_model, model.config
    if base_gguf is not None:
        check_base_file(Path(base_gguf).expanduser(), base)
    with lock_output(out, CONVERSION), explained_full_disk(out), NewFolder(out, "export", replace=False) as new:
        lora_form = new.folder / "lora"
        lora_form.mkdir()
        form = write_lora_form(
            model,
            new,
            lora_form,
            rank=rank,
            error=error,
            max_bytes=max_bytes,
            calibration=calibration,
            progress=progress,
        )
        write_adapter(lora_form, base, new.staging / LORA_GGUF_NAME)
        if not language_only:
            write_mmproj(model, processor, new.staging / MMPROJ_NAME)
        os.rename(lora_form / SPECTRUM_NAME, new.staging / SPECTRUM_NAME)
        written = sorted(new.staging.glob("*.gguf"))
        files = {path.name: path.stat().st_size for path in written}
        facts = read_settings(lora_form / EXPORT_FACTS_NAME) | {
            "kind": "gguf",
            "files": {path.name: {"bytes": files[path.name], "sha256": file_sha256(path)} for path in written},
            "image_tokens": None if language_only else config.image_seq_length,
        }
        write_json(new.staging / EXPORT_FACTS_NAME, facts)
        write_export_card(new.staging, out.name, base_folder=Path(config.base_model_name_or_path))
        new.put_in_place()
    return LlamaCppExport(out, files, form.matrices, form.left_behind, form.measurements, facts["image_tokens"])
