"""Which adapter is it? A hash, since A and B are kept in fp32: their values are the same wherever they are."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def adapter_digest(tensors: Mapping[str, Tensor]) -> str | None:
    """sha256 of the low-rank tensors under their plain names; None if there are none.

    Modules trained in full are left out: putting one in twice is putting it in once.
    """
    found = hashlib.sha256()
    names = sorted(name for name in tensors if ".lora_" in name)
    for name in names:
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name} {tuple(values.shape)}\n".encode())
        found.update(values.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest() if names else None


def merged_digests(model: nn.Module) -> list[str]:
    """The adapters that `merge_lora` has made part of `model`, or of the model it was saved as."""
    listed = getattr(getattr(model, "config", None), "lorafit_merged", None)
    return [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []


def note_merged(model: nn.Module, digest: str | None) -> None:
    """Write `digest` into the model's configuration, which saves it with the model."""
    config = getattr(model, "config", None)
    listed = merged_digests(model)
    if config is not None and digest is not None and digest not in listed:
        config.lorafit_merged = [*listed, digest]
