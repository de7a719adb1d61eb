"""Proves that training changed no byte of the base."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm


def tensor_digests(module: nn.Module, title: str) -> dict[str, str]:
    """sha256 of the bytes, dtype and shape of every parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    digests = {}
    with tqdm(desc=title, total=total, unit="B", unit_scale=True, delay=2) as bar:
        for name, tensor in tensors:
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            for plain in _plain_tensors(tensor.detach()):
                digest.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy())
            digests[name] = digest.hexdigest()
            bar.update(tensor.numel() * tensor.element_size())
    return digests


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a quantized tensor consists of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def check_base_unchanged(before: dict[str, str], after: dict[str, str]) -> None:
    """`ValueError` if the digests of the base differ."""
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ValueError(
            f"Training changed the base: {', '.join(changed[:3])} ({len(changed)} of {len(before)} tensors). Nothing "
            "was saved. Remove the callback or hook that wrote to it, and load the base again."
        )
