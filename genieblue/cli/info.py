"""`genieblue info`: the parts of a GenieBlue, as a table or JSON."""

from typing import Any

import typer

from genieblue.cli.options import Base, Json, Model, Revision
from genieblue.cli.terminal import looking_for, note, print_json, print_table, stdout_for_json
from hub_cards.short_numbers import short_bytes


def print_info(model: str, base: str | None, revision: str | None) -> None:
    """Prints a summary of a GenieBlue and a table of its parts, with their precision if it is quantized."""
    from hub_cards.model_folder import PartSize, lora_in_words, lora_ranks
    from hub_cards.model_parts import LANGUAGE_MODEL, model_info
    from modeling_genieblue.model_files_genieblue import is_inner_folder

    with looking_for(model):
        found = model_info(model, base=base, revision=revision)
    config = found.config
    source, commit = config.get("base_model_name_or_path"), config.get("base_model_revision")
    where = f" at {commit}" if commit else " (relative to this folder)" if str(source).startswith(".") else ""
    typer.echo(f"{model}: GenieBlue on {source}{where}")
    layers = config.get("replicated_layers") or []
    lora = lora_in_words(config) + (f", alpha {config.get('lora_alpha')}" if lora_ranks(config) else "")
    typer.echo(
        f"{len(layers)} of {(config.get('text_config') or {}).get('num_hidden_layers')} blocks replicated: "
        f"{', '.join(map(str, layers)) or 'none'} ({config.get('placement') or 'custom'}); "
        f"{lora}; {_images(config)}\n"
    )
    own = [size for name, size in found.parts.items() if size is not None and name != LANGUAGE_MODEL]
    total = sum(own, PartSize())
    rows = [
        (name, found.precisions.get(name, ""), *(("unknown", "") if size is None else
                                                 (f"{size.parameters:,}", short_bytes(size.bytes))))
        for name, size in [*found.parts.items(), ("total without base", total)]
    ]  # fmt: skip
    header = ("part", "precision", "parameters", "on disk")
    shown = range(4) if found.precisions else (0, 2, 3)
    print_table([header[column] for column in shown], [[row[column] for column in shown] for row in rows])
    if is_inner_folder(source):
        note("language_model is the base, stored in a folder of this GenieBlue.")
    else:
        note("language_model is the base; its weights are stored in its own repository, not here.")


def _images(config: dict[str, Any]) -> str:
    if (vlm := config.get("vlm_config")) is not None:
        return f"images run a VLM of type {vlm.get('model_type')}"
    return f"{config.get('image_seq_length')} tokens per tile"


def info(model: Model, json_output: Json = False, base: Base = None, revision: Revision = None) -> None:
    """List the parts of a GenieBlue with their parameters and sizes."""
    if not json_output:
        print_info(model, base, revision)
        return
    from hub_cards.model_parts import model_info

    with stdout_for_json(True), looking_for(model):
        found = model_info(model, base=base, revision=revision)
    print_json(found.as_json())
