"""What transformers' auto classes load from a model folder besides weights: Python files, and a tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_cards.one_commit import matches
from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    PROCESSOR_CONFIGS,
    TOKENIZER_CONFIG_NAME,
    VOCABULARIES,
    read_json,
    with_siblings,
)

CONFIGS_THAT_NAME_CODE = (CONFIG_NAME, *PROCESSOR_CONFIGS, TOKENIZER_CONFIG_NAME)


def code_files(folder: Path) -> list[str]:
    """Files named in any `auto_map` and the siblings they import, whether or not they exist.

    Raises `SyntaxError` for a file that is not valid Python, `OSError` for a damaged configuration.
    """
    waiting: list[str] = []
    for config_name in CONFIGS_THAT_NAME_CODE:
        if (folder / config_name).is_file():
            waiting += _auto_map_files(read_json(folder / config_name))
    return with_siblings(folder, waiting)


def _auto_map_files(config: Any) -> list[str]:
    """Files named in the `auto_map` of a configuration, or of a nested image processor or quantized base."""
    if not isinstance(config, dict):
        return []
    references: list[Any] = []
    for holder in (config, config.get("image_processor"), config.get("quantization_config")):
        if isinstance(holder, dict):
            references += (holder.get("auto_map") or holder.get("base_auto_map") or {}).values()
    flat = [item for entry in references for item in (entry if isinstance(entry, list | tuple) else [entry])]
    # `repo--module.Class` is code in another repo; None is the missing slow or fast tokenizer of a pair.
    return [f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item]


def code_problems(folder: Path, auto_classes: tuple[str, ...]) -> Iterator[str]:
    """Reasons why these auto classes could not load the code in a folder, one sentence each."""
    auto_map = read_json(folder / CONFIG_NAME).get("auto_map") or {}
    for auto_class in auto_classes:
        if auto_class not in auto_map:
            yield f"config.json has no auto_map entry for {auto_class}, so nobody could load it: save the model again."
    try:
        if missing := [name for name in code_files(folder) if not (folder / name).is_file()]:
            yield f"Code files are missing: {', '.join(missing)}: save the model again."
    except SyntaxError as error:
        yield f"{error.filename} is not valid Python ({error.msg}, line {error.lineno}): save the model again."
    except (OSError, ValueError) as error:
        yield str(error)


def tokenizer_problems(folder: Path) -> Iterator[str]:
    """The reason why the tokenizer in a folder would not load, if there is one."""
    names = [path.name for path in folder.iterdir()]
    if TOKENIZER_CONFIG_NAME not in names or not any(matches(name, VOCABULARIES) for name in names):
        yield (
            "The tokenizer is missing (tokenizer_config.json and its vocabulary): save the model with its processor, "
            "or copy the base's tokenizer files."
        )
