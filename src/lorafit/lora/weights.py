"""Read and write the dense weight of any base layer, as a matrix of shape (out, in).

This is the one seam for how a frozen weight is *stored*. A new storage format, say 8-bit, is one registration
each:

    @read_weight.register(MyInt8Linear)
    def _(layer): return layer.codes.float() * layer.scales

and every formula, initialisation, merge and file format works on it. Nothing else asks a layer for its type.
`int8.py` is one such storage.
"""

from functools import singledispatch

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import ModelError


@singledispatch
def read_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as a floating-point matrix (out, in); a view where the layer stores it densely."""
    raise ModelError(f"lorafit cannot read the weight of a {type(layer).__name__}: register it with read_weight")


@singledispatch
def write_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Make `weight` (out, in) the layer's weight, in the layer's own dtype. Returns the layer that has it.

    That is `layer` itself with a new parameter: a weight that was shared with another layer (tied embeddings) stays
    as it was there. Where the storage could not hold just any weight, it is a dense layer to be put in its place.
    """
    raise ModelError(f"lorafit cannot write the weight of a {type(layer).__name__}: register it with write_weight")


def is_readable(layer: nn.Module) -> bool:
    """Whether a storage format is registered for this kind of layer."""
    return read_weight.dispatch(type(layer)) is not read_weight.dispatch(object)


def whole_weight(layer: nn.Module) -> Tensor:
    """`read_weight`, put together where its slices lie in several processes: all of them have to ask for it at once."""
    return gathered(read_weight(layer))


def gathered(weight: Tensor) -> Tensor:
    """`weight` itself, or all of it where every process has a slice."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


def _dense(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise ModelError(
            f"the weight of this {type(layer).__name__} is {weight.dtype}, which lorafit cannot read: "
            "load the model in a floating-point type, or register its class with read_weight"
        )
    return weight


def _replace(layer: nn.Module, weight: Tensor) -> nn.Module:
    old = _dense(layer)
    if hasattr(old, "full_tensor"):
        raise ModelError("a base that is dealt out over processes is not merged into: save the adapter, and merge that")
    layer.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    return layer


@read_weight.register(nn.Linear)
def _(layer: nn.Linear) -> Tensor:
    return _dense(layer)


@write_weight.register(nn.Linear)
def _(layer: nn.Linear, weight: Tensor) -> nn.Module:
    return _replace(layer, weight)


# GPT-2's Conv1D and nn.Embedding keep the transpose: (in, out), where an embedding's "in" is the vocabulary.
@read_weight.register(Conv1D)
@read_weight.register(nn.Embedding)
def _(layer: nn.Module) -> Tensor:
    return _dense(layer).T


@write_weight.register(Conv1D)
@write_weight.register(nn.Embedding)
def _(layer: nn.Module, weight: Tensor) -> nn.Module:
    return _replace(layer, weight.T)
