"""The files of a model: names, location, contents and sha256.

The one owner of all that. It needs no torch, so that what only looks at a folder need not load it.
"""

import ast
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .addresses_genieblue import refuse_address

# The folder of a model
CONFIG_NAME, GENERATION_CONFIG_NAME = "config.json", "generation_config.json"
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
WEIGHT_SHARDS = "model-*-of-*.safetensors"
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# Of a processor, and by file a setting without which it is not what its name says.
PROCESSOR_FILES = {"processor_config.json": "image_token_id", TOKENIZER_CONFIG_NAME: None, "tokenizer.json": "model"}
# Patterns of what tokenizers keep their vocabulary in, of all files of tokenizers, and of licences.
VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "vocab.*")
TOKENIZER_FILES = (
    *VOCABULARIES, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*",
)  # fmt: skip
LICENSE_FILES = ("*LICENSE*", "*NOTICE*", "USE_POLICY*")
CARD_NAME = "README.md"

# The folder of a GenieBlue
MODEL_TYPE = "genieblue"
OWN_MODULES = ("vision_tower", "multi_modal_projector")  # in its weights; the language parts lie in the adapter
VLM_MODULES = ("vlm", "own_language")  # in the place of these, where a whole VLM is the multimodal side
EXTRACTION_NAME, TRADE_OFF_NAME = "extraction.json", "extraction.png"  # how a VLM's language model was kept
VLM_FOLDER = "vlm"  # its processor and generation settings; those in the root are the base's
ADAPTER_FOLDER = "language_adapter"
PEFT_PREFIX = "base_model.model."  # of the names in an adapter
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
BASE_FINGERPRINT_NAME = "base_fingerprint.json"
RECIPE_NAME, MEASUREMENTS_NAME = "training_recipe.json", "measurements.json"
INNER_BASE = "base"  # the subfolder with the quantized base of a self-contained GenieBlue
EVAL_RESULTS = ".eval_results"  # the Hub's folder for results, see huggingface.co/docs/hub/eval-results
CODE_FILES, QUANTIZED_CODE_FILES, VLM_CODE_FILES = "*_genieblue.py", "quantized_*_genieblue.py", "vlm_*_genieblue.py"

# What has a name of its own where weights are stored in another form. Not PEFT's name: stock PEFT would take the file,
# find none of its keys in it, and go on with random LoRA. Nor transformers' own: its classes would do the same.
QUANTIZED_ADAPTER_NAME, QUANTIZED_WEIGHTS_NAME = "quantized_adapter.safetensors", "quantized_model.safetensors"
QMAP_NAME = "quanto_qmap.json"
QUANT_METHOD = "genieblue_quanto"  # of a base that GenieBlue quantized, among those that transformers knows

# Where files come from: the same for our repository and the base's, but for the revision and the subfolder.
SHARED_HUB_KEYS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
HUB_KEYS = (*SHARED_HUB_KEYS, "revision", "subfolder")
ACCESS_KEYS = ("token", "cache_dir", "local_files_only")  # with which a base that was loaded is found again
BYTES_AT_A_TIME = 2**20  # of a file whose sha256 is computed
SHA256, COMMIT_SHA = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def name_of_variant(name: str, variant: str | None) -> str:
    """A weight file's name with transformers' mark of a variant: `model.safetensors` → `model.fp16.safetensors`."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def own_modules(config: dict[str, Any]) -> tuple[str, ...]:
    """The modules whose weights lie in `model.safetensors` of a GenieBlue with these settings (of config.json)."""
    return OWN_MODULES if config.get("vlm_config") is None else VLM_MODULES


# Folder or Hub id


def is_path(name: str | os.PathLike) -> bool:
    """Whether a name is written as a path (`../base`, `/models/base`, `a/b/c`) and not as a Hub id (`org/base`)."""
    name = os.fspath(name)
    return name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1


def is_hub_id(name: Any, folder: str | os.PathLike = ".") -> TypeGuard[str]:
    """Whether a recorded name is a Hub id rather than a path, absolute or relative to `folder`."""
    if not isinstance(name, str) or is_path(name) or os.path.exists(os.path.join(folder, name)):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_inner_folder(name: Any) -> TypeGuard[str]:
    """Whether a base lies in a subfolder of the GenieBlue that names it."""
    return isinstance(name, str) and name.startswith("./") and ".." not in name.split("/")


def check_folder_or_id(name: str | os.PathLike, what: str = "") -> None:
    """`FileNotFoundError` for the path of a folder that is not there, `ValueError` for a web address."""
    refuse_address(name, what.strip() or "The model")
    if is_path(name) and not os.path.isdir(name):
        raise FileNotFoundError(f"{what}{name} is not a folder: give a folder or a Hub id.")


class ModelFiles:
    """The files of a model in a folder or on the Hub; `hub` are keyword arguments of huggingface_hub."""

    def __init__(self, name: str | os.PathLike, *, subfolder: str = "", **hub: Any):
        check_folder_or_id(name)
        self.name, self.subfolder = os.fspath(name), subfolder
        self.hub = {key: value for key, value in hub.items() if value is not None}
        self.folder = Path(name, subfolder) if os.path.isdir(name) else None

    def place(self, file: str) -> str:
        """Path of a file in the repository."""
        return f"{self.subfolder}/{file}" if self.subfolder else file

    def find(self, file: str, *, must_answer: bool = False, **options: Any) -> Path | None:
        """Path of a file, downloaded if it must be; `None` if there is none. The Hub's other errors pass through.

        With `must_answer` a Hub that does not say whether there is such a file is one of these.
        """
        if self.folder is not None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, self.place(file), **(self.hub | options)))
        except LocalEntryNotFoundError:  # not in the cache, and the Hub was not asked or does not answer
            if must_answer:
                raise
            return None
        except EntryNotFoundError:
            return None

    def cached(self, file: str) -> Path | None:
        """Path of a file that is on this computer."""
        return self.find(file, local_files_only=True)


# What they hold


def read_json(path: str | os.PathLike) -> Any:
    """Content of a JSON file; `OSError` that names it if it cannot be read, or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(
            f"{path} cannot be read, it is not valid JSON ({error}): it is damaged; fetch it again."
        ) from error


def read_settings(path: str | os.PathLike, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The JSON object in a file; `OSError` that names the file if it holds anything else, or lacks what is needed."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise OSError(f"{path} holds a JSON {kind}, expected settings by name: it is damaged; fetch it again.")
    if lacking := [name for name in needed if name not in settings]:
        raise OSError(f"{path} has no {', '.join(lacking)}: it is damaged, or of another model; fetch it again.")
    return settings


def check_settings_files(
    source: str | os.PathLike, files: dict[str, str | None], required: str | None = None, **kwargs: Any
) -> None:
    """`OSError` if one of `files` of a folder or Hub id is there and broken, or a folder lacks the `required` one.

    With each file goes a setting without which it is not what its name says, or `None`.
    """
    from transformers.utils.hub import cached_file  # which knows what of a Hub that does not answer can be let pass

    if required is not None and os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, kwargs.get("subfolder") or "", required)):
            raise FileNotFoundError(f"{source} has no {required}: it is incomplete; save or fetch it again.")
    hub_kwargs = {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}
    lenient = ("gated_repo", "missing_entries", "connection_errors")
    hub_kwargs |= {f"_raise_exceptions_for_{problem}": False for problem in lenient}
    for name, needed in files.items():
        if (path := cached_file(source, name, **hub_kwargs)) is not None:
            read_settings(path, [needed] if needed else [])


def write_json(path: Path, content: Any) -> None:
    """A JSON file that people read as well, the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_files(find: Callable[[str], Path | None]) -> dict[str, Path]:
    """Path by name of the files of weights that a loader takes: one file, or else the shards that an index names.

    `find` gives the path of a file, or `None`. Returns `{}` if there is none, raises `OSError` for a shard that is
    missing and an index that is damaged or names a file elsewhere.
    """
    if (path := find(WEIGHTS_NAME)) is not None:
        return {WEIGHTS_NAME: path}
    if (index := find(INDEX_NAME)) is not None:
        files = {}
        for name in sorted(set(read_weight_map(index).values())):
            if (path := find(name)) is None:
                raise FileNotFoundError(f"{index} names {name}, which is not there: save or fetch the model again.")
            files[name] = path
        return files
    path = find(QUANTIZED_WEIGHTS_NAME)
    return {} if path is None else {QUANTIZED_WEIGHTS_NAME: path}


def read_weight_map(index: str | os.PathLike) -> dict[str, str]:
    """File of each tensor, as an index has it; `OSError` if it holds no such thing, or a file lies elsewhere."""
    weight_map = read_settings(index, ["weight_map"])["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise OSError(f"{index} has no weight_map: it is damaged; save or fetch the model again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise OSError(
                f"{index} names the shard {name!r}, expected a .safetensors file next to it: fetch it again."
            )
    return weight_map


def with_siblings(folder: Path, names: Iterable[str]) -> list[str]:
    """`names` of Python files in a folder, and what they import from siblings, directly or not, there or missing."""
    waiting, files = list(names), set()
    while waiting:
        name = waiting.pop()
        if name not in files:
            files.add(name)
            waiting += _sibling_imports(folder / name)
    return sorted(files)


def _sibling_imports(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return _imports_in(path.read_text(encoding="utf-8"), str(path))


@functools.lru_cache(maxsize=256)  # every save asks for the same files
def _imports_in(text: str, filename: str) -> list[str]:
    tree = ast.parse(text, filename=filename)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [f"{node.module.split('.')[0]}.py" for node in imports if node.module]


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few of a list of names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# sha256

CHANGED_WEIGHTS = (
    "it is damaged or of another save; fetch files that belong together. If it was replaced on purpose, load the "
    "GenieBlue from a local folder and save it again, which records the new file"
)
CHANGED_BASE = "it is damaged or of another base; fetch files that belong together, or quantize the model again"


def own_weight_places(folder: Path) -> list[str]:
    """Places in a GenieBlue's folder of its own weight files, of all variants, without the base's."""
    paths = [*folder.glob("*.safetensors"), *folder.glob(f"{ADAPTER_FOLDER}/*.safetensors")]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def recorded_weights(config: dict[str, Any]) -> dict[str, str]:
    """sha256 by place of the own weight files that `config` records; none by an earlier version.

    `config` is config.json of a GenieBlue, or the `quantization_config` in that of a quantized base.
    """
    recorded = config.get("weight_fingerprint")
    if not isinstance(recorded, dict | None):
        raise OSError(f"config.json has weight_fingerprint {recorded!r}, expected sha256 by file: fetch it again.")
    return recorded or {}


def changed_weights(
    folder: Path,
    config: dict[str, Any],
    remedy: str = CHANGED_WEIGHTS,
    on_read: Callable[[int], Any] | None = None,
) -> list[str]:
    """Own weight files with another sha256 than `config` (as for `recorded_weights`) records, one sentence each.

    Every byte is read, and `on_read` is told how many at a time. A file that is not recorded is none of them, nor is a
    recorded one that is not there.
    """
    recorded = recorded_weights(config)
    return [
        f"sha256 of {place} is {found}, recorded is {recorded[place]}: {remedy}"
        for place in own_weight_places(folder)
        if place in recorded and (found := file_sha256(folder / place, on_read)) != recorded[place]
    ]


def check_cached_sha256(owner: str, place: str, path: str | None, recorded: str | None, remedy: str) -> None:
    """`ValueError` if `path`, the file at a `place` of `owner` in the Hub's cache, has another sha256 than `recorded`.

    That costs nothing, as such files are named by it. Others are not read, and nothing is said of them.
    """
    found = None if path is None or recorded is None else cached_sha256(path)
    if found not in (None, recorded):
        raise ValueError(f"{place} of {owner} has sha256 {found}, its config.json records {recorded}: {remedy}.")


def file_sha256(path: str | os.PathLike, on_read: Callable[[int], Any] | None = None) -> str:
    """sha256 of a file, read in pieces; `on_read` is told the bytes of each."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(BYTES_AT_A_TIME))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            if on_read is not None:
                on_read(count)
    return digest.hexdigest()


def cached_sha256(path: str | os.PathLike) -> str | None:
    """sha256 of a large file in the Hub's cache, which is named by it, so that nothing is read; else `None`."""
    blob = os.path.basename(os.path.realpath(path))
    return blob if SHA256.fullmatch(blob) else None
