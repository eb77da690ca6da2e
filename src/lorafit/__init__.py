"""lorafit: LoRA fine-tuning of Hugging Face causal language models, in plain PyTorch.

A LoRA layer is a formula, an initialisation is a function, an adapter is a file, training is a page. The public names:

>>> from lorafit import load_model, add_lora, read_examples, Batches, train, save_lora
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.adapter.algebra import combine_adapters, diff_adapters, resize_adapter
    from lorafit.adapter.check import check_adapter
    from lorafit.adapter.export import export_adapter
    from lorafit.adapter.peft_format import load_lora, save_lora, unload_lora
    from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
    from lorafit.data.batches import Batches
    from lorafit.data.read import read_examples
    from lorafit.errors import LorafitError
    from lorafit.lora.counts import count_parameters, print_model_parameters, print_trainable_parameters
    from lorafit.lora.inits import INITS, init
    from lorafit.lora.inject import (
        add_lora,
        find_targets,
        lora_disabled,
        merge_lora,
    )
    from lorafit.lora.layers import VARIANTS, DoraLinear, LoraEmbedding, LoraLinear
    from lorafit.lora.tokens import add_tokens
    from lorafit.model.generate import generate, stream
    from lorafit.model.load import load_model
    from lorafit.training.calibrate import calibrate
    from lorafit.training.loop import evaluate, train

# Where each public name lives. They are imported when first used: `lorafit --help` must not wait for torch.
_HOME = {
    "config": ("DataConfig", "LoraConfig", "ModelConfig", "TrainConfig"),
    "errors": ("LorafitError",),
    "lora.layers": ("VARIANTS", "DoraLinear", "LoraEmbedding", "LoraLinear"),
    "lora.inits": ("INITS", "init"),
    "lora.counts": ("count_parameters", "print_model_parameters", "print_trainable_parameters"),
    "lora.inject": (
        "add_lora",
        "find_targets",
        "lora_disabled",
        "merge_lora",
    ),
    "lora.tokens": ("add_tokens",),
    "adapter.algebra": ("combine_adapters", "diff_adapters", "resize_adapter"),
    "adapter.check": ("check_adapter",),
    "adapter.export": ("export_adapter",),
    "adapter.peft_format": ("load_lora", "save_lora", "unload_lora"),
    "data.read": ("read_examples",),
    "data.batches": ("Batches",),
    "training.calibrate": ("calibrate",),
    "training.loop": ("evaluate", "train"),
    "model.load": ("load_model",),
    "model.generate": ("generate", "stream"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "INITS",
    "VARIANTS",
    "Batches",
    "DataConfig",
    "DoraLinear",
    "LoraConfig",
    "LoraEmbedding",
    "LoraLinear",
    "LorafitError",
    "ModelConfig",
    "TrainConfig",
    "add_lora",
    "add_tokens",
    "calibrate",
    "check_adapter",
    "combine_adapters",
    "count_parameters",
    "diff_adapters",
    "evaluate",
    "export_adapter",
    "find_targets",
    "generate",
    "init",
    "load_lora",
    "load_model",
    "lora_disabled",
    "merge_lora",
    "print_model_parameters",
    "print_trainable_parameters",
    "read_examples",
    "resize_adapter",
    "save_lora",
    "stream",
    "train",
    "unload_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lorafit' has no attribute '{name}'")
    return getattr(import_module(f"lorafit.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
