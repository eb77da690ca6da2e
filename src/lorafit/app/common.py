"""What verbs share: options they cannot do without, where the base model comes from, the terminal."""

from dataclasses import dataclass
from typing import Any

from lorafit.config import ModelConfig, knob
from lorafit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OutConfig:
    """Where the result goes"""

    out: str = knob("", "folder to write")


def need(verb: str, **values: str | None) -> None:
    """Refuse a command line that lacks one of `values`."""
    for name, value in values.items():
        if not value:
            raise UsageError(f"{verb} needs --{name} (lorafit {verb} --help)")


def source(model: ModelConfig) -> dict[str, Any]:
    """Where the base model comes from, as keywords of lorafit.model.load."""
    return {"name": model.model, "revision": model.revision, "trust_remote_code": model.trust_remote_code}


def base(model: ModelConfig) -> dict[str, Any]:
    """The same with its precision, device and storage."""
    return {**source(model), "dtype": model.dtype, "device": model.device, "storage": model.storage}


def with_adapter(model: ModelConfig) -> dict[str, Any]:
    """The same with its adapter."""
    return {**base(model), "adapter": model.adapter, "force_base": model.force_base}


def make_console() -> Any:
    """Plain text comes out as it is: nothing wrapped, nothing in brackets taken for markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    print(text, end="", flush=True)
