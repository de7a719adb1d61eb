"""The Python files that the auto classes of transformers load from a model's folder."""

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
    """Files that any `auto_map` names, and what they import from siblings, whether they are there or not.

    Raises `SyntaxError` for a file that is not valid Python, `OSError` for a configuration that is damaged.
    """
    waiting: list[str] = []
    for config_name in CONFIGS_THAT_NAME_CODE:
        if (folder / config_name).is_file():
            waiting += _auto_map_files(read_json(folder / config_name))
    return with_siblings(folder, waiting)


def _auto_map_files(config: Any) -> list[str]:
    """Files named by the `auto_map` of a configuration, of an image processor's and of a quantized base's inside."""
    if not isinstance(config, dict):
        return []
    references: list[Any] = []
    for holder in (config, config.get("image_processor"), config.get("quantization_config")):
        if isinstance(holder, dict):
            references += (holder.get("auto_map") or holder.get("base_auto_map") or {}).values()
    flat = [item for entry in references for item in (entry if isinstance(entry, list | tuple) else [entry])]
    # `repo--module.Class` is code of another repo, None the absent half of a tokenizer's pair.
    return [f"{item.split('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item]


def code_problems(folder: Path) -> list[str]:
    """Why the code of a folder would not load, one sentence each."""
    try:
        missing = [name for name in code_files(folder) if not (folder / name).is_file()]
    except SyntaxError as error:
        return [f"{error.filename} is not valid Python ({error.msg}, line {error.lineno}): save the model again."]
    except (OSError, ValueError) as error:
        return [str(error)]
    return [f"Code files are missing: {', '.join(missing)}: save the model again."] if missing else []
