"""Published GPU kernels for norms, activations and rotary positions, where `liger-kernel` is installed.

Only for models on CUDA and for the length of a run. Liger puts forwards on the modules and classes and functions into
the file that the model was defined in; both are given back. Tried, not looked up: the logits with and without must
agree.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.training.blocks import Note
from lorafit.training.modes import evaluating

Changes = Mapping[str, Any]
_ABSENT = object()
OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""The loss is ours."""


@contextmanager
def fast_kernels(model: nn.Module, on_note: Note = lambda sentence: None) -> Iterator[None]:
    """Inside the block of code, `model` runs on Liger's kernels if it can; elsewhere nothing happens."""
    if not _on_cuda(model) or not (apply := _liger()):
        yield
        return
    expected = _logits(model)
    places = [vars(module) for module in model.modules()] + _files(model)
    before = [dict(place) for place in places]
    changes: list[Changes] = []
    try:
        problem = None
        try:
            apply(model, **OFF)
            if not _close(_logits(model), expected):
                problem = "its logits differ"
        except Exception as error:  # a kernel can fail in any way, and training does not depend on it
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        changes = [_changes(place, old) for place, old in zip(places, before, strict=True)]
        if problem:
            _give_back(places, changes)
            changes = []
            on_note(f"liger-kernel is not used ({problem})")
        yield
    finally:
        _give_back(places, changes)


def _liger() -> Any:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return None
    return _apply_liger_kernel_to_instance


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def _files(model: nn.Module) -> list[dict[str, Any]]:
    """The global names of every file that a class of the model was defined in, torch's own left out."""
    names = {type(module).__module__ for module in model.modules()}
    return [vars(sys.modules[name]) for name in sorted(names) if name.split(".")[0] not in ("torch", "lorafit")]


def _changes(place: Mapping[str, Any], before: Mapping[str, Any]) -> Changes:
    """What `place` held under each name that has another value now."""
    return {
        name: before.get(name, _ABSENT)
        for name in place.keys() | before.keys()
        if place.get(name, _ABSENT) is not before.get(name, _ABSENT)
    }


def _give_back(places: list[dict[str, Any]], changes: list[Changes]) -> None:
    for place, changed in zip(places, changes, strict=False):
        for name, value in changed.items():
            if value is _ABSENT:
                place.pop(name, None)
            else:
                place[name] = value


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    ids = torch.arange(1, 33, device=next(model.parameters()).device)[None] % config.vocab_size
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
