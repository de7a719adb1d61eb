"""The language model inside a VLM: what it shares with a base, what of it is its own, and how both are put together.

Its linear layers are those of the multimodal view (the base's weights with LoRA, or copies), its other modules stay
the VLM's own code and take the view's parameters. Embedding and head read the base's rows but for those of their own.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .language_adapter_genieblue import (
    ADAPTER,
    PEFT_PREFIX,
    adapter_dtype,
    adapter_parameters,
    find_blocks,
    set_parameter,
)
from .model_files_genieblue import some
from .vlm_configuration_genieblue import check_family

try:
    from peft.utils import ModulesToSaveWrapper
except ImportError:  # Without a try transformers would import peft before `require_peft` can check it.
    raise

LARGEST_DIFFERENCE = 0.5  # of a VLM's linear layers from its base's, relative; two unrelated models have about 1.4
ROWS_AT_A_TIME = 8192
OF_PEFT = {"base_layer", "modules_to_save"}  # in the name of a layer that an adapter has changed

# Of a layer's name in the base, its weight there and in the VLM, and a rank: factors B (out, rank) and A (rank, in).
Factors = Callable[[str, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def decoder_path(model: PreTrainedModel) -> str:
    """Where the decoder, without its head, lies in a base or a VLM."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


class LanguagePair:
    """The language model of a VLM beside the base that it was trained from, parameter by parameter."""

    def __init__(self, vlm: PreTrainedModel, base: PreTrainedModel):
        self.base, self._vlm = base, vlm
        self._base_prefix, self._vlm_prefix = f"{decoder_path(base)}.", f"{decoder_path(vlm)}."
        self.blocks, _ = find_blocks(base)
        self.embeddings: Any = (vlm.get_input_embeddings(), base.get_input_embeddings())
        self.heads: Any = (vlm.get_output_embeddings(), base.get_output_embeddings())

    def of_vlm(self, name: str) -> torch.Tensor:
        """The VLM's parameter that has this name in the base."""
        return self._vlm.get_parameter(self._vlm_prefix + name.removeprefix(self._base_prefix)).detach()

    def of_base(self, name: str) -> torch.Tensor:
        """The base's parameter of this name."""
        return self.base.get_parameter(name).detach()

    def names(self) -> Iterator[str]:
        """Names in the base of all parameters of the decoder but the embedding."""
        embedding = self.embeddings[1].weight
        for name, parameter in self.base.get_submodule(self._base_prefix[:-1]).named_parameters():
            if parameter is not embedding:
                yield self._base_prefix + name

    def linears(self, block: int) -> list[str]:
        """Names in the base of a block's linear layers."""
        path = f"{self.blocks}.{block}"
        modules = self.base.get_submodule(path).named_modules()
        return [f"{path}.{name}" for name, module in modules if isinstance(module, nn.Linear)]

    def count_blocks(self) -> int:
        """How many blocks both have."""
        return len(self.base.get_submodule(self.blocks))  # pyright: ignore[reportArgumentType]: a list of modules

    def is_tied(self) -> bool:
        """Whether embedding and head are one, in both."""
        return all(head.weight is each.weight for head, each in zip(self.heads, self.embeddings, strict=True))

    def check(self) -> float:
        """How far the linear layers of the VLM are from the base's, relative.

        Raises `ValueError` for models that do not belong together (other names, shapes or precision, or differences
        as large as the weights), for one with an adapter, and for an LM head with a bias.
        """
        check_family(self._vlm.config.model_type)
        for who, model in (("VLM", self._vlm), ("base", self.base)):
            if any(OF_PEFT.intersection(name.split(".")) for name, _ in model.named_parameters()):
                raise ValueError(
                    f"The {who} {_named(model)} has an adapter of PEFT: merge it (`merge_and_unload`) or take it off "
                    "first. Its files must not be beside the weights either: transformers loads it with them."
                )
        inner = self._vlm.get_submodule(self._vlm_prefix[:-1])
        own = {self._base_prefix + name: each.detach() for name, each in inner.named_parameters()}
        base = {name: self.of_base(name) for name in self.names()}
        embedding = next(name for name, each in inner.named_parameters() if each is self.embeddings[0].weight)
        del own[self._base_prefix + embedding]
        problems = [f"{name} is missing in the VLM" for name in base.keys() - own.keys()]
        problems += [f"{name} is missing in the base" for name in own.keys() - base.keys()]
        problems += [
            f"{name} has shape {list(own[name].shape)}, in the base {list(base[name].shape)}"
            for name in own.keys() & base.keys()
            if own[name].shape != base[name].shape
        ]
        widths = [each.weight.shape[1] for each in self.embeddings]
        if widths[0] != widths[1]:
            problems.insert(0, f"its embedding has {widths[0]} columns, the base's {widths[1]}")
        if problems:
            raise ValueError(
                f"{_named(self._vlm)} was not trained from {_named(self.base)}: {some(sorted(problems))}. Give the "
                "base that the VLM was made from."
            )
        # No class of a known family has one; the view's head would give the base's to the VLM.
        biased = [
            who
            for who, head in zip(("VLM", "base"), self.heads, strict=True)
            if getattr(head, "bias", None) is not None
        ]
        if biased:
            raise ValueError(
                f"The LM head of the {' and of the '.join(biased)} has a bias, for which there is no place in a "
                "GenieBlue of a VLM "
                f"({_named(self._vlm)}, {_named(self.base)}): expected heads without one, as those of Llama and Qwen."
            )
        dtypes = {each.dtype for each in (*own.values(), *base.values())}
        if len(dtypes) > 1:
            raise ValueError(f"VLM and base are in {some(sorted(map(str, dtypes)))}: load both with one `dtype`.")
        squares = torch.zeros(2, dtype=torch.float64)
        for name, value in base.items():
            if value.ndim == 2:
                first = value.float()
                squares += torch.stack([(own[name].float() - first).norm(), first.norm()]).double().square().cpu()
        difference = float((squares[0] / squares[1].clamp(min=1e-30)).sqrt())
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"{_named(self._vlm)} was not trained from {_named(self.base)}: the weights of its linear layers "
                f"differ by {difference:.2f} of their size, expected at most {LARGEST_DIFFERENCE} (unrelated models "
                "have about 1.4). Give the base that the VLM was made from."
            )
        return difference


def _named(model: PreTrainedModel) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


class OwnRows(nn.Module):
    """Rows of a VLM's embedding or head: `weight` (count, hidden_size) in the places `indices` (count,)."""

    indices: torch.Tensor

    def __init__(self, indices: torch.Tensor, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("indices", indices)
        self.weight = nn.Parameter(weight)


class OwnLanguage(nn.Module):
    """What the VLM's language model has of its own outside its blocks' matrices, named as in the base."""

    embedding: OwnRows | None
    head: OwnRows | None  # `None`: there is none of its own, or it is tied to the embedding

    def __init__(self, tensors: dict[str, torch.Tensor], embedding: OwnRows | None, head: OwnRows | None):
        super().__init__()
        self.tensors, self.embedding, self.head = nn.Module(), embedding, head
        for name, value in tensors.items():
            place = self.tensors
            *path, leaf = name.split(".")
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.register_parameter(leaf, nn.Parameter(value))

    @classmethod
    def of(cls, pair: LanguagePair, replicated: list[int]) -> "OwnLanguage":
        """What differs between VLM and base and is neither in a copied block nor carried by LoRA."""
        copied = tuple(f"{pair.blocks}.{index}." for index in replicated)
        carried = {f"{name}.weight" for index in range(pair.count_blocks()) for name in pair.linears(index)}
        tensors = {
            name: pair.of_vlm(name)
            for name in pair.names()
            if not name.startswith(copied)
            and name not in carried
            and not torch.equal(pair.of_vlm(name), pair.of_base(name))
        }
        embedding = _own_rows(pair.embeddings[0].weight, pair.embeddings[1].weight)
        head = None if pair.is_tied() else _own_rows(pair.heads[0].weight, pair.heads[1].weight)
        return cls(tensors, embedding, head)

    def settings(self, is_tied: bool) -> dict[str, Any]:
        """What a configuration records of it."""
        counts = [0 if rows is None else len(rows.indices) for rows in (self.embedding, self.head)]
        return {
            "own_language_tensors": [name for name, _ in self.tensors.named_parameters()],
            "own_embedding_rows": counts[0],
            "own_head_rows": None if is_tied else counts[1],
        }


@torch.no_grad()
def _own_rows(own: torch.Tensor, base: torch.Tensor) -> OwnRows | None:
    common = min(len(own), len(base))
    differs = torch.cat([
        (own[start:end] != base[start:end]).any(dim=1)
        for start in range(0, common, ROWS_AT_A_TIME)
        for end in [min(start + ROWS_AT_A_TIME, common)]
    ])  # fmt: skip
    indices = torch.cat([differs.nonzero()[:, 0], torch.arange(common, len(own), device=differs.device)])
    return OwnRows(indices, own.detach()[indices]) if len(indices) else None


class JoinedEmbedding(nn.Module):
    """An embedding of a VLM that reads the base's rows but for those of its own; both by the VLM's own code."""

    place: torch.Tensor

    def __init__(self, embedding: nn.Embedding, base_weight: nn.Parameter, own: OwnRows, count: int):
        super().__init__()
        embedding.padding_idx = None  # only training of the whole embedding would need it
        # With their weights in place of the VLM's, which is not copied.
        self.base = copy.deepcopy(embedding, {id(embedding.weight): base_weight})
        self.own = copy.deepcopy(embedding, {id(embedding.weight): own.weight})
        place = torch.full((count,), -1, device=own.indices.device)
        place[own.indices] = torch.arange(len(own.indices), device=place.device)
        self.register_buffer("place", place, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The base's rows, for code that asks for their dtype and device."""
        return self.base.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape → embeddings (…, hidden_size)."""
        place = self.place[input_ids]
        is_own = place >= 0
        base = self.base(input_ids.masked_fill(is_own, 0))
        return torch.where(is_own.unsqueeze(-1), self.own(place.clamp(min=0)), base)


class JoinedHead(nn.Module):
    """An LM head of a VLM that reads the base's rows but for those of its own."""

    def __init__(self, head: nn.Module, own: OwnRows, count: int):
        super().__init__()
        self.base, self.own, self.count = head, own, count

    @property
    def weight(self) -> Any:
        """The base's rows, for code that asks for their dtype and device."""
        return self.base.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, hidden_size) → logits (…, vocabulary of the VLM)."""
        logits = self.base(hidden_states)
        logits = nn.functional.pad(logits, (0, self.count - logits.shape[-1]))  # also cuts
        own = nn.functional.linear(hidden_states, self.own.weight.to(hidden_states.dtype))
        return logits.index_copy(-1, self.own.indices, own.to(logits.dtype))


@torch.no_grad()
def fill_adapter(view: nn.Module, pair: LanguagePair, factors: Factors) -> None:
    """Puts the VLM's weights into the adapter of `view`: copies as they are, LoRA as the best of its rank."""
    dtype = pair.base.dtype
    for name, stock, _ in list(adapter_parameters(view)):
        base_name = stock.removeprefix(PEFT_PREFIX)
        if ".modules_to_save." in name:
            set_parameter(view, name, pair.of_vlm(base_name).to(adapter_dtype(name, dtype)))
        elif ".lora_A." in name:
            layer: Any = view.get_submodule(name.split(".lora_A.")[0])
            linear = base_name.split(".lora_A.")[0]
            rank, (rows, columns) = layer.r[ADAPTER], layer.base_layer.weight.shape
            weights = pair.of_base(f"{linear}.weight"), pair.of_vlm(f"{linear}.weight")
            b, a = factors(linear, *weights, min(rank, rows, columns))
            b, a = b.float() / layer.scaling[ADAPTER], a.float()
            more = rank - b.shape[1]
            set_parameter(view, name, nn.functional.pad(a, (0, 0, 0, more)).to(adapter_dtype(name, dtype)))
            name = name.replace(".lora_A.", ".lora_B.")
            set_parameter(view, name, nn.functional.pad(b, (0, more)).to(adapter_dtype(name, dtype)))


def best_factors(name: str, base: torch.Tensor, own: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of this rank that is nearest to `own - base`, by the SVD; as `Factors`."""
    change = own.float() - base.float()
    basis, _, _ = torch.linalg.svd(change, full_matrices=False)
    return balanced(basis[:, :rank], change)


def balanced(basis: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the projection of `change` (out, in) onto an orthonormal `basis` (out, rank), of equal size."""
    rest = basis.t() @ change
    balance = rest.norm(dim=1).clamp(min=1e-30).sqrt()
    return basis * balance, rest / balance[:, None]


def join_language(vlm: PreTrainedModel, view: PreTrainedModel, own: OwnLanguage, is_tied: bool) -> None:
    """Puts the modules and parameters of the multimodal view in place of those of the VLM's language model.

    Raises `ValueError` if the VLM's configuration gives another language model than the view.
    """
    view_decoder, decoder = view.get_submodule(decoder_path(view)), vlm.get_submodule(decoder_path(vlm))
    for name, value in own.tensors.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module: Any = view.get_submodule(owner)
        getattr(module, "base_layer", module).register_parameter(leaf, value)
    embedding: Any = vlm.get_input_embeddings()
    count = len(embedding.weight)
    for name, module in list(decoder.named_modules()):
        parameters = {leaf: each for leaf, each in module.named_parameters(recurse=False)}
        if not parameters or module is embedding:
            continue
        twin = _twin(view_decoder, name)
        if isinstance(module, nn.Linear):
            decoder.set_submodule(name, twin)
            continue
        for leaf, each in parameters.items():
            if twin.get_parameter(leaf).shape != each.shape:
                raise ValueError(f"{name}.{leaf} has another shape in the base: load the base that was recorded.")
            module.register_parameter(leaf, twin.get_parameter(leaf))
    base_weight: Any = view.get_input_embeddings().weight
    if own.embedding is None:  # the base may have more rows, to which no id of the VLM leads
        embedding.weight = base_weight
    elif len(own.embedding.indices) == count:
        embedding.weight = own.embedding.weight
    else:
        vlm.set_input_embeddings(JoinedEmbedding(embedding, base_weight, own.embedding, count))
    rows = own.embedding if is_tied else own.head
    head: Any = view.get_output_embeddings()
    if rows is not None and len(rows.indices) == count:
        vlm.get_output_embeddings().weight = rows.weight  # pyright: ignore[reportOptionalMemberAccess]
    elif rows is not None or head.weight.shape[0] != count:
        weight = torch.zeros(0, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
        rows = rows or OwnRows(torch.zeros(0, dtype=torch.long), weight)
        vlm.set_output_embeddings(JoinedHead(head, rows, count))
    else:
        vlm.set_output_embeddings(head)


def _twin(decoder: nn.Module, name: str) -> Any:
    """The module of the view's decoder that does what the module of this name does in the VLM's."""
    module: Any = decoder
    for part in name.split("."):
        module = module.get_submodule(part)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[ADAPTER]
    return module
