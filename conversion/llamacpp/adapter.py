"""The LoRA form as a GGUF adapter: llama.cpp's names, and q and k in the order of its own files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from safetensors import safe_open
from torch import nn

from conversion.llamacpp.gguf_file import write_gguf
from modeling_genieblue.language_adapter_genieblue import PEFT_PREFIX
from modeling_genieblue.model_files_genieblue import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_settings

LARGEST_DIFFERENCE = 0.02  # of a base's norms in its GGUF, relative: more is another model, not rounding


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores a family of models.

    Attributes:
        interleaved: the rows of q and k of each head are stored in pairs, as Meta's own code has them.
        norm_offset: what is added to the gain of a norm.
    """

    architecture: MODEL_ARCH
    interleaved: bool = False
    norm_offset: float = 0.0

    @property
    def name(self) -> str:
        """Of the architecture, as it stands in GGUF files."""
        return MODEL_ARCH_NAMES[self.architecture]


# By the base's `model_type`. Each is tested against llama.cpp.
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_offset=1.0),
}


def family_of(config: Any) -> Family:
    """The family of a base by its configuration; `ValueError` if it is not one of `FAMILIES`."""
    if (family := FAMILIES.get(config.model_type)) is None:
        raise ValueError(
            f"The base is of type {config.model_type!r}, and it is not known how llama.cpp stores its matrices; known "
            f"are {', '.join(FAMILIES)}. Use `genieblue export lora`, and llama.cpp's convert_lora_to_gguf.py on that."
        )
    return family


def write_adapter(lora_form: Path, base: nn.Module, path: Path) -> None:
    """Writes the LoRA form in a folder as the GGUF file `path`.

    Raises `ValueError` for a base of an unknown family, and for a matrix that has no name in llama.cpp.
    """
    family, config = family_of(base.config), base.config
    names = get_tensor_name_map(family.architecture, config.num_hidden_layers)
    alpha = read_settings(lora_form / ADAPTER_CONFIG_NAME)["lora_alpha"]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family.interleaved else {}

    def settings(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(path.parent.name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))

    with safe_open(lora_form / ADAPTER_WEIGHTS_NAME, framework="pt") as file:
        sources = {_llama_name(key, names): key for key in file.keys()}

        def read(name: str) -> torch.Tensor:
            value = file.get_tensor(sources[name])
            layer = sources[name].split(".")[-3]
            return interleave(value, heads[layer]) if name.endswith("lora_b") and layer in heads else value

        dtype = base.dtype
        tensors = {name: (torch.Size(file.get_slice(key).get_shape()), dtype) for name, key in sources.items()}
        write_gguf(path, family.name, settings, tensors, read)


def _llama_name(key: str, names: Any) -> str:
    """`base_model.model.model.layers.3.mlp.up_proj.lora_A.weight` → `blk.3.ffn_up.weight.lora_a`."""
    matrix, _, kind = key.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".lora_")
    if (name := names.get_name(f"{matrix}.weight", try_suffixes=(".weight",))) is None:
        raise ValueError(f"{matrix} has no name in llama.cpp's files: use `genieblue export lora`.")
    return f"{name}.lora_{kind.lower()}"


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as Llama's files in GGUF have them: in each head, the two halves in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def check_base_file(path: Path, base: nn.Module) -> None:
    """`ValueError` or `OSError` if a GGUF file is not of this base; its norms, which are never quantized, tell.

    Those differ between fine-tunes by little, so this finds other models, and not each other fine-tune.
    """
    family = family_of(base.config)
    try:
        reader: Any = GGUFReader(path)
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise OSError(f"{path} cannot be read as a GGUF file ({error}): give the base's own.") from error
    field = reader.get_field(Keys.General.ARCHITECTURE)
    architecture = None if field is None else field.contents()
    if architecture != family.name:
        raise ValueError(f"{path} holds a model of type {architecture!r}, expected {family.name!r}: give the base's.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, gain in _norms(base, family):
        if name not in stored:
            raise ValueError(f"{path} has no {name}, which the base has: it is of another model; give the base's.")
        values = torch.from_numpy(stored[name].data.copy()).float()
        if values.shape != gain.shape:
            raise ValueError(
                f"{name} in {path} has shape {list(values.shape)}, in the base {list(gain.shape)}: give the base's."
            )
        difference = float((values - gain).norm() / gain.norm())
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{name} in {path} differs from the base's by {difference:.1%}: it is of another model, on which the "
                "adapter would give wrong answers. Give a GGUF of the base itself."
            )


def _norms(base: nn.Module, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    names = get_tensor_name_map(family.architecture, base.config.num_hidden_layers)
    for key, value in base.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is not None and name.endswith("norm.weight") and value.ndim == 1:
            yield name, value.float().cpu() + family.norm_offset
