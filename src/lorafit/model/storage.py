"""How the frozen linear layers of a loaded model are stored: a registry of functions that change it in place."""

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError, UsageError, nearest
from lorafit.lora.inject import attached
from lorafit.lora.int8 import Int8Linear
from lorafit.lora.weights import read_weight, write_weight


def store(model: nn.Module, storage: str) -> nn.Module:
    """Make `storage` (a name in `STORAGES`) how the linear layers of `model` are kept. Returns it."""
    if storage not in STORAGES:
        raise UsageError(f"unknown storage '{storage}'{nearest(storage, STORAGES)}: use {', '.join(STORAGES)}")
    if attached(model) is not None:
        raise UsageError("this model carries an adapter already: choose the storage before it is put in")
    STORAGES[storage](model)
    return model


def to_int8(model: nn.Module) -> None:
    """8-bit codes for every linear layer but the output head, which decides between close words.

    Subclasses, which may compute something else, are left alone; ModelError if there is nothing but these.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}
    if not layers:
        raise ModelError(f"this {type(model).__name__} has no plain linear layers to keep in 8 bits: use storage dense")
    for name, layer in layers.items():
        model.set_submodule(name, Int8Linear(layer).train(layer.training))


def to_dense(model: nn.Module) -> None:
    """Layers as transformers has them. What 8 bits could not say does not come back."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            model.set_submodule(name, write_weight(layer, read_weight(layer)).train(layer.training))


STORAGES: dict[str, Callable[[nn.Module], None]] = {"dense": to_dense, "int8": to_int8}
