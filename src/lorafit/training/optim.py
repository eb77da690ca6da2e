"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from lorafit.config import TrainConfig
from lorafit.errors import UsageError, listing, nearest
from lorafit.lora.inject import wrappers
from lorafit.lora.layers import LoraEmbedding, LoraLinear
from lorafit.lora.names import key_matches
from lorafit.lora.tokens import TokenRows
from lorafit.training.rules import apply_rule, frozen_factors


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over every parameter that is trained, under the training rule of `config`.

    Parameters of one learning rate make a group; its `share` is that rate over `config.lr`. At each step the loop
    sets the rates from `lr_at` and these shares.
    """
    still = {id(tensor) for tensor in frozen_factors(model, config.rule)}
    trained = [place for place in _places(model) if id(place.parameter) not in still]
    if not trained:
        raise UsageError("nothing in this model is trained: add_lora it first")
    _refuse_idle(trained, config)
    groups: dict[float, list[nn.Parameter]] = {}
    for place in trained:
        groups.setdefault(place.rate(config) / config.lr, []).append(place.parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "share": share} for share, parameters in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    apply_rule(model, optimizer, config.rule)
    return optimizer


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a straight rise, then the schedule down to 0.

    A function of the step and nothing else, so there is no scheduler whose state could be lost.
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * max(0.0, fall)


class _Place(NamedTuple):
    """A trained parameter, the names it goes by from long to short, and the wrapper or plain layer that holds it."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    layer: nn.Module

    def rate(self, config: TrainConfig) -> float:
        """Its peak learning rate: the most specific thing that is said about it."""
        if keys := [key for key in config.lr_pattern if self.matches(key)]:
            return config.lr_pattern[max(keys, key=len)]
        if self.embeds and config.lr_embeddings is not None:
            return config.lr_embeddings
        if self.in_full and config.lr_modules is not None:
            return config.lr_modules
        return config.lr * (config.lora_plus_ratio if self.beside_a else 1.0)

    def matches(self, key: str) -> bool:
        return any(key_matches(key, name) for name in self.names)

    @property
    def embeds(self) -> bool:
        """Whether it is looked up: an update of an embedding, trained rows, or an embedding trained in full."""
        return isinstance(getattr(self.layer, "base_layer", self.layer), nn.Embedding) or self.rows

    @property
    def rows(self) -> bool:
        return isinstance(self.layer, TokenRows)

    @property
    def in_full(self) -> bool:
        return not isinstance(self.layer, LoraLinear) and not self.rows

    @property
    def beside_a(self) -> bool:
        """Whether LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives it the larger rate: B, and DoRA's magnitude.

        Not the factors of an embedding, where A is the one that starts at 0, nor modules trained in full.
        """
        layer = self.layer
        return (
            isinstance(layer, LoraLinear)
            and not isinstance(layer, LoraEmbedding)
            and self.parameter is not layer.factors[0]
        )


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every parameter that requires gradients, in the model's order."""
    homes = {
        id(parameter): (f"{name}.{key.removeprefix('trained.')}", name, layer)
        for name, layer in wrappers(model)
        for key, parameter in layer.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            full, layer_name, layer = homes.get(id(parameter), (name, owner, model.get_submodule(owner)))
            names = dict.fromkeys((full, full.removesuffix(".weight"), layer_name))
            yield _Place(parameter, tuple(names), layer)


def _refuse_idle(trained: Iterable[_Place], config: TrainConfig) -> None:
    """UsageError for a learning rate that nothing has."""
    trained = list(trained)
    idle = [key for key in config.lr_pattern if not any(place.matches(key) for place in trained)]
    if idle:
        known = sorted({name.rsplit(".", 1)[-1] for place in trained for name in place.names})
        wrong = listing(f"'{key}'{nearest(key, known)}" for key in idle)
        raise UsageError(f"lr_pattern {wrong} matches nothing that is trained; their names end in {listing(known, 12)}")
    asked = {
        "lr_embeddings": config.lr_embeddings is None or any(place.embeds for place in trained),
        "lr_modules": config.lr_modules is None or any(place.in_full for place in trained),
        "lora_plus_ratio": config.lora_plus_ratio == 1 or any(place.beside_a for place in trained),
    }
    if nothing := [name for name, fits in asked.items() if not fits]:
        raise UsageError(f"{listing(nothing)}: nothing of that kind is trained in this model, leave it out")
