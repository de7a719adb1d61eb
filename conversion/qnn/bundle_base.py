"""The base as a bundle has it: for another export with the same codes, and to train on their values (healing)."""

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from conversion.qnn.bundle.metadata import Bundle
from conversion.qnn.graphs.rotation import Rotation
from conversion.qnn.qdq.encoding import WeightCodes
from conversion.qnn.qdq.files import read_codes
from conversion.qnn.qdq.language import LanguageSettings, codes_digest
from conversion.qnn.qdq.precision_plan import HEAD, PrecisionPlan
from conversion.quantization.healing import TRAINED_ON
from modeling_genieblue.as_built_genieblue import AsBuilt
from modeling_genieblue.language_adapter_genieblue import find_blocks

# Linears of a block whose input is normalized, and by what; the others add to the hidden states.
NORMS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}


class BundleBase:
    """The matrices of a bundle's text graphs."""

    def __init__(self, folder: str | os.PathLike, fingerprint: Mapping[str, str] | None):
        """`fingerprint` is that of a model's base.

        Raises `OSError` for a folder that is not a bundle, `ValueError` for one with changed files or of another base.
        """
        self.bundle = Bundle(folder)
        if problems := self.bundle.changed_files():
            raise ValueError(f"{folder} is not what was exported: {'; '.join(problems)}. Export the bundle again.")
        made_from = self.bundle.metadata["base"]["fingerprint"]
        if not made_from or made_from != fingerprint:
            raise ValueError(
                f"{folder} was not made from this model's base: the sha256 of their files are {made_from} and "
                f"{fingerprint}. Give a bundle of this base."
            )
        self._starts = [part["blocks"][0] for part in self.bundle.metadata["parts"]]
        self._part = -1  # the one of `_codes`
        self._codes: dict[str, WeightCodes] = {}

    @cached_property
    def digest(self) -> str:
        """Of the codes of the base's matrices: bundles of several GenieBlues, also in other parts, may share them."""
        digests = []
        for number, start in enumerate(self._starts):
            for name, codes in self._part_codes(number).items():
                words = name.split(".")
                if words[0] == "blocks":
                    words[1] = str(int(words[1]) + start)  # in the base
                digests.append(codes_digest({".".join(words): codes}))
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]

    def plan(self, settings: LanguageSettings) -> PrecisionPlan:
        """The formats of the matrices; `ValueError` if `settings` ask for others."""
        facts = self.bundle.metadata
        found, asked = f"{facts['llm']} ({facts['weights']})", f"{settings.llm} ({settings.most_matrices})"
        if found != asked:
            raise ValueError(
                f"{self.bundle.folder} has {found}, but {asked} was requested: request what it has, or round the base "
                "anew."
            )
        eight_bits = {int(index): names for index, names in facts["eight_bits"].items()}
        return PrecisionPlan(settings.most_matrices, eight_bits)

    def codes(self, index: int, name: str) -> WeightCodes:
        """A matrix by the name that it has in its block, or of the LM head, after the last block."""
        number = max(place for place, start in enumerate(self._starts) if start <= index)
        return self._part_codes(number)[name if name == HEAD else f"blocks.{index - self._starts[number]}.{name}"]

    def _part_codes(self, number: int) -> dict[str, WeightCodes]:
        if number != self._part:
            graph = self.bundle.metadata["parts"][number]["graphs"]["text_prefill"]
            self._part, self._codes = number, read_codes(self.bundle.path(graph["qdq"]))
        return self._codes


@torch.no_grad()
def put_on_bundle(model: Any, folder: str | os.PathLike) -> dict[str, str]:
    """Gives the base of a 16-bit GenieBlue, in memory only, the values that it has in a bundle.

    What is saved afterwards is an adapter for the original base, to be exported on that bundle's codes.

    Returns facts for the record of the training; raises like `BundleBase`, and the model is unchanged then.
    """
    base = BundleBase(folder, model.config.base_model_fingerprint)
    text = model.language_model
    path, blocks = find_blocks(text)
    rotation = Rotation(base.bundle.decoder.hidden_size)
    for index, block in enumerate(blocks):
        for title, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                name = title.rpartition(".")[2]
                values = torch.from_numpy(base.codes(index, f"{name}.weight").decode()).to(linear.weight.device)
                norm = getattr(block, NORMS[name]).weight if name in NORMS else None
                _copy_rotated(values, linear.weight, norm, rotation)
    _untie_heads(model)
    head = text.get_output_embeddings().weight
    values = torch.from_numpy(base.codes(len(blocks), HEAD).decode()).to(head.device)
    _copy_rotated(values, head, text.get_submodule(path.rpartition(".")[0]).norm.weight, rotation)
    model._as_built = AsBuilt(model)  # what it stands on from here on
    return {TRAINED_ON: f"{base.bundle.folder.resolve().name}, sha256 {base.digest}"}


def _copy_rotated(values: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None, rotation: Rotation) -> None:
    """Copies a graph's matrix (in, out) into a base's `weight` (out, in).

    It reads rotated states behind a `norm` whose weights (in,) it includes, or adds to rotated states.
    """
    if norm is None:
        weight.copy_(rotation.inverse(values).t())
        return
    norm = norm.float()
    # Where a norm's weight is zero, the matrix says nothing, and its own values have no effect.
    weight.copy_(torch.where(norm == 0, weight.float(), rotation.inverse(values.t()) / norm))


def _untie_heads(model: Any) -> None:
    """Gives both views an LM head apart from the embeddings, which have another precision in a bundle."""
    own = model.language_model.get_output_embeddings()
    if own.weight is model.get_input_embeddings().weight:
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        model.multimodal_language_model.get_output_embeddings().weight = own.weight
