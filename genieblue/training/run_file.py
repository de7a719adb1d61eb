"""A run as a YAML file: what `genieblue train` takes as options, and every setting of a run."""

import dataclasses
import difflib
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from genieblue.training.settings import TrainingSettings

# What a run needs besides its settings, with the types of the values.
INPUTS: dict[str, Any] = {
    "model": str,
    "data": list[str],
    "out": str,
    "eval_data": str,
    "text_share": float,
    "image_folder": str,
    "image_root": list[str],
    "follow_links": bool,
    "base": str,
    "on_quantized": str,
    "dtype": str,
    "trust_remote_code": bool,
    "skip_bad": bool,
}
NAMED = ("data", "image_root")  # may also be mappings, from names
REQUIRED = ("stage", "model", "data", "out")
_TYPES = {**INPUTS, **get_type_hints(TrainingSettings)}


def read_run_file(path: Path) -> dict[str, Any]:
    """The values of a run file by name; `ValueError` for an unknown name or a value of the wrong type.

    Paths in it are relative to the folder in which the command runs, as on the command line.
    """
    values = read_yaml(path, "a run", "stage: 2")
    for name in NAMED:
        if isinstance(values.get(name), dict):
            values[name] = [f"{key}={item}" for key, item in values[name].items()]  # as on the command line
    return checked_values(values, _TYPES, path, "a run")


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """The values of a YAML file by name; `OSError` or `ValueError` if it holds none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: expected the YAML file of {what}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    except ValueError as error:  # such as a date that does not exist
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: expected lines like `{example}`.")
    return {str(name): value for name, value in values.items()}


class _StrictLoader(yaml.SafeLoader):
    """Refuses a name that is twice in a mapping, of which YAML would silently keep the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            line = node.start_mark.line + 1
            raise ValueError(f"`{twice[0]}` is twice in what begins in line {line}: leave one of them out.")
        return super().construct_mapping(node, deep)


def checked_values(values: Mapping[str, Any], types: Mapping[str, Any], path: Path, what: str) -> dict[str, Any]:
    """The values, but for empty ones, as the types of their names.

    Raises `ValueError` naming the file for an unknown name or another type.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return {name: _checked(name, value, types, path, what) for name, value in given.items()}


def write_run_file(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values that `read_run_file` reads back."""
    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def settings_of(values: Mapping[str, Any]) -> TrainingSettings:
    """The `TrainingSettings` in a run's values; `ValueError` naming what a run needs and these lack."""
    if missing := [name for name in REQUIRED if values.get(name) in (None, [])]:
        options = ", ".join(f"--{name}" for name in missing)
        raise ValueError(f"A run needs {', '.join(missing)}: give {options}, or set them in the file of --config.")
    names = {field.name for field in dataclasses.fields(TrainingSettings)}
    return TrainingSettings(**{name: value for name, value in values.items() if name in names})


def _checked(name: str, value: Any, types: Mapping[str, Any], path: Path, what: str) -> Any:
    if name not in types:
        close = difflib.get_close_matches(name, types, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else f" Known are: {', '.join(sorted(types))}."
        raise ValueError(f"{path}: `{name}` is no setting of {what}.{hint}")
    try:
        return _as_type(value, types[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: `{name}` is {value!r}, expected {error}.") from error


def _as_type(value: Any, wanted: Any) -> Any:
    """`value` as a type of the settings; `ValueError` with the name of the type if it is none."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _as_type(value, next(each for each in arguments if each is not type(None)))
    if origin in (list, tuple):
        single = value if isinstance(value, list) else [value]
        items = [_as_type(item, arguments[0]) for item in single]
        return items if origin is list else tuple(items)
    if origin is not None:  # a mapping of learning rates
        if not isinstance(value, dict):
            raise ValueError("a mapping, such as `lora: 1.0e-4`")
        return {str(key): _as_type(item, arguments[1]) for key, item in value.items()}
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes `1e-4`, without a dot, for a text
        except ValueError:
            raise ValueError("a number") from None
    if wanted is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return os.path.expanduser(str(value))  # all of them name something: a folder, a file, a dtype …
    if type(value) is not wanted:
        raise ValueError({int: "a whole number", bool: "true or false", str: "a text"}.get(wanted, "a number"))
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
