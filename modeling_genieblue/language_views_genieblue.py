"""The two views of one language model: the base itself, and a second module tree over the same parameters.

The text view is the base, untouched. The multimodal view is a second tree of the same architecture whose frozen
parameters are the very `Parameter` objects of the base, with trained copies in place of the replicated blocks and
LoRA on the linears of all others. What is trained is saved as a stock PEFT adapter.
"""

import copy
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .compat_genieblue import require_peft

require_peft()

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

try:
    from peft import LoraConfig, TaskType, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
except ImportError:  # Without a try transformers would import peft before `require_peft` has its say.
    raise

ADAPTER_FOLDER = "language_adapter"
ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
# Not PEFT's name: stock PEFT would take the file, find none of its keys in it, and go on with random LoRA.
QUANTIZED_ADAPTER_NAME = "quantized_adapter.safetensors"
ADAPTER = "default"
PEFT_PREFIX = "base_model.model."


def find_blocks(language_model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a decoder's blocks: the heaviest `ModuleList` as long as `config.num_hidden_layers`."""
    count = language_model.config.get_text_config(decoder=True).num_hidden_layers
    candidates = [
        (sum(parameter.numel() for parameter in module.parameters()), path, module)
        for path, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not candidates:
        raise ValueError(
            f"{type(language_model).__name__} has no list of {count} blocks: GenieBlue needs a decoder that keeps its "
            "blocks in one `nn.ModuleList`, as Llama-style models do."
        )
    _, path, blocks = max(candidates, key=lambda candidate: candidate[0])
    return path, blocks


def make_lora_config(base: nn.Module, config) -> LoraConfig:
    """The stock PEFT configuration of a GenieBlue adapter: copies as `modules_to_save`, LoRA on all other blocks."""
    path, blocks = find_blocks(base)
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "The base already carries a PEFT adapter: merge it (`merge_and_unload()`) or load the base without it."
        )
    replicated = set(config.replicated_layers)
    adapted = [index for index in range(len(blocks)) if index not in replicated]
    linears = {
        name.rsplit(".", 1)[-1]
        for index in adapted
        for name, module in blocks[index].named_modules()
        # A kind of linear that the base's own code defines (a router, say) may return something else.
        if isinstance(module, nn.Linear) and type(module).__module__ != type(base).__module__
    }
    if not linears:
        raise ValueError(f"The blocks of {type(base).__name__} hold no `nn.Linear` that LoRA could adapt.")
    pattern = _unique_suffix(base, path)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(linears),
        layers_to_transform=adapted,
        layers_pattern=pattern,
        modules_to_save=[f"{pattern}.{index}" for index in sorted(replicated)],
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
    )


def check_adapter_settings(lora_config: LoraConfig, saved: dict) -> None:
    """`ValueError` if the saved PEFT configuration means another adapter than config.json: PEFT would run another."""
    for name in ("r", "lora_alpha", "target_modules", "layers_to_transform", "modules_to_save"):
        here, there = getattr(lora_config, name), saved.get(name)
        if isinstance(here, list | set):
            here, there = sorted(here), sorted(there) if isinstance(there, list) else there
        if here != there:
            raise ValueError(
                f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME} has {name} {there!r}, config.json means {here!r}: load the "
                "files that belong together (same repository, same revision)."
            )


def _unique_suffix(model: nn.Module, path: str) -> str:
    """Shortest tail of `path` that names no other module list (a base with a vision encoder has several `layers`)."""
    others = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name != path]
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        suffix = ".".join(parts[-length:])
        if not any(f".{other}".endswith(f".{suffix}") for other in others):
            return suffix
    return path


def build_multimodal_view(base: nn.Module, lora_config: LoraConfig) -> nn.Module:
    """A second tree over the base's parameters, with the adapter's own parameters still on the meta device.

    The base is only read, but its parameters are frozen (`requires_grad=False`): in GenieBlue it never trains. Its
    generation configuration is shared too; the view's configuration is its own, so that nothing done to the view (an
    attention implementation set) reaches the base.
    """
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    memo[id(base.generation_config)] = base.generation_config
    # What an earlier `generate` left with the base goes on running the base, so the view must not have it.
    left = [name for name in ("_compiled_call", "_cached_continuous_batching_manager") if name in vars(base)]
    memo |= {id(vars(base)[name]): name for name in left}
    view = copy.deepcopy(base, memo)
    for name in left:
        delattr(view, name)
    path, _ = find_blocks(base)
    blocks = view.get_submodule(path)
    replicated = [int(name.rsplit(".", 1)[-1]) for name in lora_config.modules_to_save]
    shared = {index: blocks[index] for index in replicated}
    # PEFT deep-copies a module that is to be trained. It is given a skeleton, so that no copy is made in memory.
    for index, block in shared.items():
        blocks[index] = _meta_skeleton(block)
    try:
        inject_adapter_in_model(lora_config, view, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except (AttributeError, ValueError) as error:
        raise _unsupported(base, f"PEFT refuses its blocks, {str(error).split('. ')[0]}") from error
    copied = tuple(f"{path}.{index}." for index in replicated)
    if any(name.startswith(copied) and isinstance(module, BaseTunerLayer) for name, module in view.named_modules()):
        raise _unsupported(base, "lists within its blocks are taken for the blocks themselves")
    for index, block in shared.items():
        wrapper = blocks[index]
        if not isinstance(wrapper, ModulesToSaveWrapper):
            raise ValueError(f"PEFT did not wrap block {index} of {type(base).__name__} at {path}.{index}.")
        wrapper.original_module = block
    base.requires_grad_(False)
    return view


def _unsupported(base: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(base).__name__} is no decoder that GenieBlue can adapt: {reason}. Expected a Llama-style decoder, "
        "whose blocks are attention and an MLP of `nn.Linear` layers."
    )


def _meta_skeleton(block: nn.Module) -> nn.Module:
    """`block` with parameters on the meta device; linears of a quantized base become plain ones, to hold a copy."""
    memo = {id(buffer): buffer for buffer in block.buffers()}
    for parameter in block.parameters():
        memo[id(parameter)] = (
            nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
            if parameter.is_floating_point()
            else parameter
        )
    skeleton = copy.deepcopy(block, memo)
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            skeleton.set_submodule(name, plain.requires_grad_(False))
    return skeleton


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of the multimodal view is the adapter's, by its name, and not the base's."""
    return any(part in name for part in (".lora_A.", ".lora_B.", ".modules_to_save."))


def adapter_parameters(view: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """`(name in the tree, name in a stock PEFT checkpoint, parameter)` of everything the adapter trains."""
    for name, parameter in view.named_parameters():
        if is_adapter_name(name):
            stock = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
            yield name, PEFT_PREFIX + stock, parameter


def adapter_dtype(name: str, base_dtype: torch.dtype) -> torch.dtype:
    """Precision in memory: a copied block has the base's, LoRA at least float32.

    Stock PEFT keeps LoRA in float32 as well. It is small, trains better so, and a CPU multiplies such small matrices
    several times as fast as in half precision.
    """
    return torch.promote_types(base_dtype, torch.float32) if ".lora_" in name else base_dtype


def initialize_adapter(view: nn.Module, base_dtype: torch.dtype) -> None:
    """Copies equal to the originals, LoRA B zero: both views agree until the first training step."""
    for name, _, parameter in list(adapter_parameters(view)):
        if ".modules_to_save." in name:
            original = view.get_parameter(name.replace(f".modules_to_save.{ADAPTER}.", ".original_module."))
            if type(original) is not nn.Parameter or not original.is_floating_point():
                raise ValueError(
                    f"{name}: the base's block is quantized, so there is nothing to train a copy from. Load the base "
                    "in 16 or 32 bits to make a new GenieBlue; an existing one loads onto a quantized base."
                )
            value = original.detach().to(adapter_dtype(name, base_dtype), copy=True)
        else:
            dtype = adapter_dtype(name, base_dtype)
            value = torch.zeros(parameter.shape, dtype=dtype, device=parameter_device(view, name))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5))  # PEFT's own choice
        set_parameter(view, name, value)


def parameter_device(view: nn.Module, name: str) -> torch.device:
    """Device on which an adapter parameter must lie: that of the base's weights beside it."""
    if ".modules_to_save." in name:
        neighbour = view.get_submodule(name.split(".modules_to_save.")[0] + ".original_module")
    else:
        neighbour = view.get_submodule(name.split(".lora_")[0] + ".base_layer")
    return next(
        (parameter.device for parameter in neighbour.parameters() if parameter.device.type != "meta"),
        torch.device("cpu"),
    )


def set_parameter(view: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts `value` in the place of the parameter `name` of `view`."""
    module_path, _, leaf = name.rpartition(".")
    view.get_submodule(module_path).register_parameter(leaf, nn.Parameter(value))


def load_adapter(view: nn.Module, weights_file: str | os.PathLike, base_dtype: torch.dtype) -> None:
    """Fills the adapter of `view` from a stock PEFT file; every tensor must be expected, and none may be missing.

    Raises `OSError` for a damaged file and `ValueError` for missing, unexpected or differently shaped tensors; the
    view is left as it was then.
    """
    expected = {stock: (name, parameter) for name, stock, parameter in adapter_parameters(view)}
    try:
        with safe_open(weights_file, framework="pt") as file:
            found = set(file.keys())
            problems = _key_problems(set(expected), found)
            shapes = {stock: list(file.get_slice(stock).get_shape()) for stock in found & set(expected)}
            problems += [
                f"{stock} has shape {shape}, expected {list(expected[stock][1].shape)}"
                for stock, shape in sorted(shapes.items())
                if shape != list(expected[stock][1].shape)
            ]
            problems += tensors_of_other_kinds(file, shapes)
            if problems:
                raise ValueError(
                    f"{weights_file} does not fit this base and configuration: {'; '.join(problems)}. Load the files "
                    "that belong together (same repository, same revision)."
                )
            for stock, (name, _) in expected.items():
                dtype = adapter_dtype(name, base_dtype)
                set_parameter(view, name, file.get_tensor(stock).to(parameter_device(view, name), dtype))
    except ValueError:
        raise
    except Exception as error:  # safetensors raises its own type, which is no OSError
        raise OSError(f"{weights_file} cannot be read ({error}): it is damaged; fetch it again.") from error


def tensors_of_other_kinds(file: safe_open, names: Iterable[str]) -> list[str]:
    """One sentence for each tensor of an open safetensors file that is not floating point: a cast destroys values."""
    dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(names)}
    return [
        f"{name} holds {dtype}, expected floating-point numbers"
        for name, dtype in dtypes.items()
        if dtype not in ("F64", "F32", "F16", "BF16")
    ]


def _key_problems(expected: set[str], found: set[str]) -> list[str]:
    def listed(names: set[str]) -> str:
        shown = sorted(names)[:3]
        return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")

    problems = []
    if missing := expected - found:
        problems.append(f"{len(missing)} tensors are missing ({listed(missing)})")
    if extra := found - expected:
        problems.append(f"{len(extra)} tensors are not expected ({listed(extra)})")
    return problems


def save_adapter(
    view: nn.Module, values: Mapping[str, torch.Tensor], folder: str | os.PathLike, dtype: torch.dtype
) -> None:
    """Writes the adapter's weights to `folder` in the layout of stock PEFT, in `dtype`; `values` by name in `view`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        stock: values[name].detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        for name, stock, _ in adapter_parameters(view)
    }
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def save_adapter_config(lora_config: LoraConfig, folder: str | os.PathLike) -> None:
    """Writes PEFT's configuration of the adapter, the same bytes for the same settings."""
    saved_config = copy.deepcopy(lora_config)
    saved_config.inference_mode = True
    saved_config.save_pretrained(str(folder))
    config_file = Path(folder) / ADAPTER_CONFIG_NAME
    written = json.loads(config_file.read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # a set: otherwise no two saves are alike
    config_file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _FirstBlockReached(Exception):
    """Carries what the first block of a decoder is given."""

    def __init__(self, hidden_states: torch.Tensor):
        self.hidden_states = hidden_states


class TextEmbedder:
    """Embeds token ids as the model itself does, for models that are then run on `inputs_embeds`.

    Most decoders feed their blocks with the plain rows of the embedding, or transform ids and embeddings alike.
    Some (BlueLM: a LayerNorm) transform the rows only when they are looked up from ids; for these the input of the
    first block is what has to be passed on. Which kind a model is, is found out by running it up to its first block.
    """

    def __init__(self, view: nn.Module):
        path, _ = find_blocks(view)
        self._view = view
        self._first_block = f"{path}.0"
        self._from_first_block: bool | None = None

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (batch, length) → embeddings (batch, length, hidden_size)."""
        if self._from_first_block is None:
            self._from_first_block = self._needs_first_block()
        if self._from_first_block:
            return self._first_block_input(input_ids=input_ids)
        return self._view.get_input_embeddings()(input_ids)

    @torch.no_grad()
    def _needs_first_block(self) -> bool:
        embedding = self._view.get_input_embeddings()
        ids = torch.arange(min(8, embedding.weight.shape[0]), device=embedding.weight.device)[None]
        was_training = self._view.training
        self._view.eval()  # dropout would hide the comparison
        try:
            from_ids = self._first_block_input(input_ids=ids)
            rows = embedding(ids)
            if torch.equal(self._first_block_input(inputs_embeds=rows), from_ids):
                return False
            if torch.equal(self._first_block_input(inputs_embeds=from_ids), from_ids):
                return True
        finally:
            self._view.train(was_training)
        raise ValueError(
            f"{type(self._view).__name__} gives its blocks something else for `inputs_embeds` than for `input_ids`; "
            "GenieBlue cannot place image features among its embeddings."
        )

    def _first_block_input(self, **inputs: torch.Tensor) -> torch.Tensor:
        thread = threading.get_ident()

        def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() == thread:  # another request may be running through this block
                raise _FirstBlockReached(args[0] if args else kwargs["hidden_states"])

        handle = self._view.get_submodule(self._first_block).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._view(**inputs, use_cache=False)
        except _FirstBlockReached as reached:
            return reached.hidden_states
        finally:
            handle.remove()
        raise ValueError(f"{type(self._view).__name__} never ran its first block.")


__all__ = ["TextEmbedder", "build_multimodal_view", "load_adapter", "make_lora_config", "save_adapter"]
