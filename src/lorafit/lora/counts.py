"""How many parameters a model trains and holds, and how that is said."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, tied ones counted once."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> Counts:
    """How many parameters the model trains, and holds in all."""
    parameters = list(model.parameters())
    return Counts(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def print_trainable_parameters(model: nn.Module) -> None:
    """One line in PEFT's words: `trainable params: 16,896 || all params: 54,744 || trainable%: 30.8637`."""
    n = count_parameters(model)
    share = 100 * n.trainable / n.total
    print(f"trainable params: {n.trainable:,} || all params: {n.total:,} || trainable%: {share:.4f}")


def print_model_parameters(model: nn.Module) -> None:
    """A line per parameter: its name, shape and whether it is trained."""
    for name, parameter in model.named_parameters():
        print(f"{name:60} {tuple(parameter.shape)!s:18} requires_grad={parameter.requires_grad}")
