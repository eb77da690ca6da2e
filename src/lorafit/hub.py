"""The hub: what it means when it does not give what was asked for, and the folder that a name on it stands for.

`huggingface_hub` alone asks for the token, from the environment or its own store. It is imported where it is used:
`lorafit --help` does not wait for it.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorafit.errors import AdapterError, listing

ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What a name with an owner looks like; `run/adapter` does, too, so a folder here goes before it."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What may lie beside a model, or beside an adapter that learned tokens."""


def adapter_folder(name: str | Path) -> Path:
    """Where the adapter `name` is: a folder here, or `owner/name`, `owner/name@revision` fetched from the hub.

    A branch, tag or commit is a revision. Only the two files of PEFT's format are fetched, and a tokenizer's.
    AdapterError in one line if the hub does not give them.
    """
    path, (repo, _, revision) = Path(name).expanduser(), str(name).partition("@")
    if isinstance(name, Path) or path.exists() or not ON_HUB.fullmatch(repo):
        return path
    from huggingface_hub import snapshot_download

    try:
        wanted = [*ADAPTER_FILES, *TOKENIZER_FILES]
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    except Exception as error:
        said = reason(error, "adapter") or f"it cannot be fetched: {' '.join(str(error).split())[:240]}"
        raise AdapterError(f"{name}: {said}") from error
    if missing := [file for file in ADAPTER_FILES if not (folder / file).is_file()]:
        raise AdapterError(f"{name}: no {listing(missing)} there on the hub: it is no adapter in PEFT's format")
    return folder


def reason(error: BaseException, what: str) -> str | None:
    """Why the hub did not give a `what` ("model"), the end of a sentence; None if it is not the hub's doing."""
    from huggingface_hub import errors as hub

    # In this order: a gated repository is also one not found, and what is behind an answer says more than its form.
    sentences: dict[type[BaseException] | int, str] = {
        hub.HFValidationError: "neither a folder here nor a name that the hub could have",
        hub.GatedRepoError: "gated: accept its terms on huggingface.co, then `hf auth login`",
        hub.RepositoryNotFoundError: f"no such folder here or {what} on the hub (private: `hf auth login` first)",
        hub.RevisionNotFoundError: f"the hub has this {what}, but not this revision",
        401: "the hub wants a token, or does not know the one it gets: `hf auth login`",
        403: "the hub does not let you: your token may not read it (huggingface.co/settings/tokens)",
        429: "the hub asks to wait, there were too many requests from here: try again in some minutes",
        5: "the hub has a fault of its own: try again later",
        hub.LocalEntryNotFoundError: "no such folder here, not in the hub's cache, and the hub cannot be reached",
    }
    found = list(chain(error))
    codes = {code for e in found for code in (status(e), status(e) // 100)}
    for kind, sentence in sentences.items():
        if kind in codes if isinstance(kind, int) else any(isinstance(e, kind) for e in found):
            return sentence
    return "the connection to the hub broke: try again" if lost(found) else None


def lost(errors: Sequence[BaseException]) -> bool:
    """Whether it was the connection that failed, and no answer that was given.

    httpx's errors have no base in common with Python's, and the library's name differs between versions.
    """
    broken = any(isinstance(e, ConnectionError) or type(e).__module__.startswith("http") for e in errors)
    return broken and not any(map(status, errors))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it came from."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop(0)
        if each is not None and each not in seen:
            seen.append(each)
            waiting += [each.__cause__, each.__context__]
            yield each


def status(error: BaseException) -> int:
    """The HTTP status that `error` is about; 0 if it is about none."""
    code = getattr(getattr(error, "response", None), "status_code", 0)
    return code if isinstance(code, int) else 0
