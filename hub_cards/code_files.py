"""The Python files that transformers' auto classes load from a model folder."""

from pathlib import Path
from typing import Any

from modeling_genieblue.model_files_genieblue import (
    CONFIG_NAME,
    PROCESSOR_CONFIGS,
    TOKENIZER_CONFIG_NAME,
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


def code_problems(folder: Path) -> list[str]:
    """Reasons why the code in a folder would not load, one sentence each."""
    try:
        missing = [name for name in code_files(folder) if not (folder / name).is_file()]
    except SyntaxError as error:
        return [f"{error.filename} is not valid Python ({error.msg}, line {error.lineno}): save the model again."]
    except (OSError, ValueError) as error:
        return [str(error)]
    return [f"Code files are missing: {', '.join(missing)}: save the model again."] if missing else []
