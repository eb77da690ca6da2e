"""Which base model is it? An answer that survives precision, devices and versions.

A base model lives in bf16 here and in fp32 there, so its fingerprint is no hash but holds values: a few facts of the
architecture and some weights, sampled evenly from the layers that an adapter sits on and compared to the precision of
bf16.
"""

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, VALUES = 8, 16
NOTED = "_lorafit_values"
"""The attribute of a model whose weights are sharded that holds values of each, by name."""
# bf16 rounds to 2^-8 of a value; twice that, and room for fp16's smallest numbers.
RELATIVE, ABSOLUTE = 2.0**-7, 1e-7
DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FACTS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "hidden_act", "hidden_activation", "activation_function",
)  # fmt: skip
SAME = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # one function, many names


def base_fingerprint(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Facts of `model` and values of some weights of its `layers`, as JSON holds them.

    Weights that are not plain floating-point numbers (quantised, on the meta device) are left out; of 8-bit ones the
    scales are taken. Of sharded ones stands here what `remember_values` noted.
    """
    weights = dict(_samples(model, layers))
    values = {name: _packed(weights[name](VALUES)) for name in spread(list(weights), LAYERS)}
    return {"facts": _facts(model), "values": values}


def other_base(fingerprint: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> str | None:
    """How the base that `fingerprint` was taken of differs from `model`, in a few words; None if nothing speaks
    against it.

    The same base passes in another precision, on another device, with a resized vocabulary, tied or untied; what one
    of the two does not know is not compared. Raises ValueError if `fingerprint` is not one.
    """
    facts, values = _unpacked(fingerprint)
    weights = dict(_samples(model, layers))
    now = {name: weights[name](len(was)) for name, was in values.items() if name in weights}
    now = {name: found for name, found in now.items() if len(found) == len(values[name])}
    return _difference(facts, _facts(model), values, now)


def other_bases(one: Any, two: Any) -> str | None:
    """The same between two fingerprints: how the second base differs from the first."""
    (facts, values), (other_facts, other_values) = _unpacked(one), _unpacked(two)
    shared = {name: now for name, now in other_values.items() if name in values and len(now) == len(values[name])}
    return _difference(facts, other_facts, values, shared)


def join_fingerprints(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """What either knows of the base that both were taken of."""
    return {part: {**two[part], **one[part]} for part in ("facts", "values")}


def _difference(
    facts: Mapping[str, Any], other_facts: Mapping[str, Any], was: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> str | None:
    for name, fact in facts.items():
        if name in other_facts and not _same(fact, other_facts[name]):
            return f"its {name} was {fact!r}, here it is {other_facts[name]!r}"
    for name, values in now.items():
        if not torch.isclose(values, was[name], rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True).all():
            return f"{name} has other values here"
    return None


def _facts(model: nn.Module) -> dict[str, str | int | float]:
    return facts_of(getattr(model, "config", None))


def facts_of(config: Any) -> dict[str, str | int | float]:
    """What a model's configuration says about its architecture."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(config, name, None) for name in FACTS}
    return {name: SAME.get(str(v), v) for name, v in found.items() if isinstance(v, str | int | float)}


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6))


def _samples(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """By the weights' names how to get some of their values."""
    noted: Mapping[str, Tensor] = getattr(model, NOTED, {})
    for key, weight in _weights(layers):
        if hasattr(weight, "full_tensor"):
            if key in noted:
                yield key, partial(_noted, noted[key])
        elif type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and weight.dtype in DENSE:
            yield key, partial(_sample, weight.detach())


def _weights(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        for key, weight in (*layer.named_parameters(name), *layer.named_buffers(name)):
            if weight.numel() and (key.endswith(("weight", "scales")) or weight.ndim == 3):
                yield key, weight


@torch.no_grad()
def remember_values(model: nn.Module) -> None:
    """Note of every sharded weight what fingerprints are made of, while all processes are here.

    Each has some of the values, and 0 for the others; one sum of all weights puts them together. The base does not
    change, so that any process can say later by itself which one it is.
    """
    dealt = {name: p for name, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "full_tensor")}
    if dealt:
        flat = torch.stack([_own_share(parameter) for parameter in dealt.values()])
        torch.distributed.all_reduce(flat)
        setattr(model, NOTED, dict(zip(dealt, flat.cpu(), strict=True)))


def _own_share(weight: Any) -> Tensor:
    """`VALUES` values of a weight whose rows lie in all processes; 0 where this process has not got them."""
    local, count, width = weight.to_local().flatten(), weight.shape[0], weight.numel() // weight.shape[0]
    rows = -(-count // torch.distributed.get_world_size())
    places = _places(weight, VALUES).to(local.device) - min(torch.distributed.get_rank() * rows, count) * width
    here = (places >= 0) & (places < local.numel())
    values = torch.zeros(VALUES, dtype=torch.float32, device=local.device)
    values[here] = local[places[here]].float()
    return values


def _noted(values: Tensor, count: int) -> Tensor:
    """The values that were noted; they are what they are, whatever `count` is asked for."""
    return values


def spread(names: list[str], count: int) -> Iterable[str]:
    """`count` of `names`, the first, the last and evenly between."""
    last = len(names) - 1
    return names if last < count else [names[i * last // (count - 1)] for i in range(count)]


def _sample(weight: Tensor, count: int) -> Tensor:
    """`count` values of `weight`, the first, the last and evenly between, in fp32."""
    places = _places(weight, count)
    return weight[torch.unravel_index(places.to(weight.device), weight.shape)].float().cpu()


def _places(weight: Tensor, count: int) -> Tensor:
    return torch.arange(count) * (weight.numel() - 1) // max(count - 1, 1)


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _unpacked(fingerprint: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        facts = {name: fingerprint["facts"][name] for name in FACTS if name in fingerprint["facts"]}
        if not all(isinstance(fact, str | int | float) and len(str(fact)) <= 100 for fact in facts.values()):
            raise ValueError("a fact is a short text or a number")
        coded = {name: base64.b64decode(text, validate=True) for name, text in fingerprint["values"].items()}
        return facts, {name: torch.frombuffer(bytearray(data), dtype=torch.float32) for name, data in coded.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError("not the fingerprint of a base model") from error
