"""Weights files from strangers: mutated bytes, headers and folders; each loads as what it is, or is one line."""

import os
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lorafit.adapter.peft_format import FLOATS, WEIGHTS
from lorafit.files import MANIFEST
from lorafit.lora import inject
from soak.headers import BYTE_EDITS, flip
from soak.hostile import Files, differs, loaded, ours, write

NAME = "adapters"
WHAT = "a mutated weights file loads as exactly what it is or is refused in one line; the model is else unchanged"
COUNT = 20_000
LONG = 1_000_000


def run(case: int, folder: Path) -> str | None:
    """Sealed: as we save it, with a manifest. Bare: without it. Foreign: without our notes, as PEFT writes it."""
    rng = random.Random(case)
    origin = rng.choice(("sealed", "bare", "foreign"))
    name = rng.choice(("a", "b", "c"))
    files = dict(ours()[name].files)
    if origin == "foreign":
        files[WEIGHTS] = safetensors.torch.save(safetensors.torch.load(files[WEIGHTS]), {"format": "pt"})
    if origin != "sealed":
        del files[MANIFEST]
    if rng.random() < 0.9:
        for _ in range(rng.choice((1, 1, 1, 2))):
            files[WEIGHTS] = rng.choice(BYTE_EDITS)(rng, files[WEIGHTS])
    else:
        for mixed in rng.sample(sorted(files), rng.choice((1, 2))):
            other = ours()[rng.choice(("a", "b", "c"))].files
            files[mixed] = rng.choice((other[mixed], flip(rng, files[mixed]) if mixed == MANIFEST else other[mixed]))
    target = write(folder / "adapter", files)
    if rng.random() < 0.02:
        disguise(rng, target / WEIGHTS)
    wrong, model = loaded(target, folder)
    if not wrong and model is not None:
        wrong = judged(model, files, sealed=MANIFEST in files)
    return f"case {case} ({origin} {name}): {wrong}" if wrong else None


def disguise(rng: random.Random, file: Path) -> None:
    """Something else than a file of its length where the weights should be."""
    kind = rng.choice(("huge", "folder", "pipe", "itself", "device", "nowhere", "link"))
    data = file.read_bytes()
    if kind == "huge":
        os.truncate(file, rng.choice((2**30, 2**40)))
        return
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"itself": file.name, "device": "/dev/zero", "nowhere": "nowhere", "link": "blob"}[kind])
        file.with_name("blob").write_bytes(data)


def judged(model: Any, files: Files, sealed: bool) -> str:
    """What is wrong with the adapter that was loaded from `files`; "" if nothing."""
    whole = next((adapter for adapter in ours().values() if adapter.files[WEIGHTS] == files[WEIGHTS]), None)
    if whole is not None:
        return differs(model, whole)
    if sealed:
        return "a weights file that is not what the manifest says was loaded"
    return unlike_the_file(model, files[WEIGHTS])


def unlike_the_file(model: Any, data: bytes) -> str:
    """How the loaded adapter differs from what safetensors itself reads; "" if in nothing."""
    try:
        held = safetensors.torch.load(data)
    except Exception as error:
        return f"a file was loaded that safetensors refuses ({str(error)[:100]})"
    plain = {key: tensor for key, tensor in held.items() if ".base_layer." not in key}
    state = inject.adapter_state(model)
    # A start that is made anew from the base (PEFT's 'pissa', 'olora') is in no file; B goes through its difference.
    starts = {name for name in state if name.endswith(("lora_A0", "lora_B0"))}
    state = {name: tensor for name, tensor in state.items() if name not in starts}
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if starts else {"rtol": 0.0, "atol": 0.0}
    if len(plain) != len(state):
        return f"{len(plain)} tensors in the file, {len(state)} in the model"
    for name, tensor in state.items():
        alike = (own.to(tensor.dtype) for key, own in plain.items() if key.endswith(name) and own.shape == tensor.shape)
        if not any(torch.allclose(own, tensor, equal_nan=True, **tolerance) for own in alike):
            return f"{name} is not what the file says"
        if not tensor.isfinite().all():
            return f"{name} is not finite"
    strange = [str(tensor.dtype) for tensor in plain.values() if tensor.dtype not in FLOATS]
    if strange:
        return f"the file's numbers are {strange[0]}"
    return ""
