"""What is compared: plain LoRA, and one thing after another changed in it.

Initialisations and formulas come from their registries and rules from the configuration, so that a new one is compared
without being named here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lorafit import INITS, VARIANTS, LoraConfig, TrainConfig

RANK, ALPHA = 16, 32.0
BASE = "lora"
# No method: the start of A and B that tests use.
LEFT_OUT = ("gaussian_both",)
# Numbers and switches that are a method when they are not what they are by default: name -> setting and value.
KNOBS: dict[str, tuple[str, Any]] = {
    "rslora": ("rslora", True),
    "lora-plus": ("lora_plus_ratio", 16.0),
    "neftune": ("neftune", 5.0),
}


@dataclass(frozen=True)
class Method:
    """Plain LoRA but for these settings."""

    name: str
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def lora_config(self) -> LoraConfig:
        return LoraConfig(**({"r": RANK, "alpha": ALPHA} | dict(self.lora)))


def all_methods() -> dict[str, Method]:
    """Every method by name, plain LoRA first."""
    plain = LoraConfig()
    found = [Method(BASE)]
    found += [Method(name, lora={"init": name}) for name in INITS if name not in (plain.init, *LEFT_OUT)]
    found += [Method(name, lora={"variant": name}) for name in VARIANTS if name != plain.variant]
    found += [Method(rule, training={"rule": rule}) for rule in _choices(TrainConfig, "rule")]
    for name, (setting, value) in KNOBS.items():
        if setting in _fields(LoraConfig):
            found.append(Method(name, lora={setting: value}))
        elif setting in _fields(TrainConfig):
            found.append(Method(name, training={setting: value}))
    return {method.name: method for method in found}


def _fields(config: Any) -> dict[str, Any]:
    return {one.name: one.default for one in dataclasses.fields(config)}


def _choices(config: Any, name: str) -> list[str]:
    """What a setting of fixed choices can be, but for its default."""
    kind, default = get_type_hints(config).get(name), _fields(config).get(name)
    return [choice for choice in get_args(kind) if choice != default] if get_origin(kind) is Literal else []
