"""How the frozen linear layers of a model are stored: a registry of functions that change it in place.

What is changed layer by layer is changed while the model is loaded, so that it never lies there densely.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn
from transformers import core_model_loading
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError, UsageError, nearest
from lorafit.lora.inject import attached
from lorafit.lora.int8 import Int8Linear
from lorafit.lora.weights import read_weight, write_weight


def store(model: nn.Module, storage: str) -> nn.Module:
    """Make `storage` (a name in `STORAGES`) how the linear layers of `model` are kept. Returns it."""
    _check(storage)
    if attached(model) is not None:
        raise UsageError("this model carries an adapter already: choose the storage before it is put in")
    STORAGES[storage](model)
    return model


@contextmanager
def stored_while_loading(storage: str) -> Iterator[None]:
    """Inside the block transformers reads one tensor after the other, and a layer is changed when its weight is there.

    `store` has to follow: what the loader puts in its place afterwards (tied layers), and all of it if this version of
    transformers has no such place, is changed then.
    """
    _check(storage)
    put = getattr(core_model_loading, "set_param_for_module", None)
    if storage not in LAYERS or put is None:
        yield
        return

    def put_and_store(model: nn.Module, target: str, *values: Any) -> None:
        put(model, target, *values)
        name, _, key = target.rpartition(".")
        layer = model.get_submodule(name)
        tied: Any = getattr(model, "all_tied_weights_keys", {})
        if key == "weight" and _is_stored(model, layer) and target not in (*tied, *tied.values()):
            model.set_submodule(name, _replaced(layer, storage))
            _give_back()

    # Threads that read ahead would hold the whole model densely.
    with (
        patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1"),
        patch.object(core_model_loading, "set_param_for_module", put_and_store),
    ):
        yield


def to_int8(model: nn.Module) -> None:
    """8-bit codes for every linear layer but the output head, which decides between close words.

    Subclasses, which may compute something else, are left alone; ModelError if there is nothing but these.
    """
    for name, layer in list(model.named_modules()):
        if _is_stored(model, layer):
            model.set_submodule(name, _replaced(layer, "int8"))
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ModelError(f"this {type(model).__name__} has no plain linear layers to keep in 8 bits: use storage dense")


def to_dense(model: nn.Module) -> None:
    """Layers as transformers has them. What 8 bits could not say does not come back."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int8Linear):
            model.set_submodule(name, write_weight(layer, read_weight(layer)).train(layer.training))


def _is_stored(model: nn.Module, layer: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return type(layer) in (nn.Linear, Conv1D) and layer is not head


def _replaced(layer: Any, storage: str) -> nn.Module:
    made = LAYERS[storage](layer).train(layer.training)
    made._is_hf_initialized = True  # type: ignore[assignment]  # else the loader would look for something to initialise
    return made


def _give_back() -> None:
    """Have glibc return what was freed: the holes that dense layers leave among narrow ones seldom fit the next one."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _check(storage: str) -> None:
    if storage not in STORAGES:
        raise UsageError(f"unknown storage '{storage}'{nearest(storage, STORAGES)}: use {', '.join(STORAGES)}")


LAYERS: dict[str, Callable[[Any], nn.Module]] = {"int8": Int8Linear}
"""Storages that take a linear layer and give another in its place."""
STORAGES: dict[str, Callable[[nn.Module], None]] = {"dense": to_dense, "int8": to_int8}
