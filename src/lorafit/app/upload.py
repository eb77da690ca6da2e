"""Puts files on the hub, in a process of its own: it may wait for ever, and can be ended only from outside.

`python -m lorafit.app.upload` reads a request as JSON and answers in lines of JSON: `{}` whenever bytes have moved,
and at the end one that is not empty. The token is asked for by `huggingface_hub` alone.
"""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

TELL_EVERY = 0.5  # seconds


def main() -> None:
    """Answer the one request on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    warnings.simplefilter("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    count_bytes(lambda: tell({}))
    tell(answered(json.load(sys.stdin)))


def count_bytes(moved: Callable[[], None]) -> None:
    """From here on `moved` is called, now and then, when the hub's client has read or sent some."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    update, last = tqdm.update, time.monotonic()

    def update_and_tell(self: Any, n: float | None = 1) -> Any:
        nonlocal last
        if n and time.monotonic() - last >= TELL_EVERY:
            last = time.monotonic()
            moved()
        return update(self, n)

    tqdm.update = update_and_tell  # every byte is counted on some bar, whether it is drawn or not


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """What has come of `request`: `done`, the commit's address; or `public`: it would have been; or `refused`."""
    from huggingface_hub import errors

    from lorafit.hub import chain, lost, status

    try:
        return uploaded(request)
    except errors.OfflineModeIsEnabled:
        return {"refused": "offline"}
    except Exception as error:
        found = list(chain(error))
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__  # "Error while uploading" does not say which
        said = " ".join(str(error).split()) or type(error).__name__
        code = next(filter(None, map(status, found)), 0)
        return {"refused": code or ("connection" if lost(found) else "other"), "said": said}


def uploaded(request: dict[str, Any]) -> dict[str, Any]:
    """Create the repository if it is not there, and make one commit. What is there already is not sent again."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo = HfApi(), request["repo"]
    api.create_repo(repo, private=not request["public"], exist_ok=True)
    private = bool(api.repo_info(repo).private)
    if not private and not request["public"]:
        return {"refused": "public"}
    files = {**request["files"], **{name: text.encode() for name, text in request["texts"].items()}}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(repo, operations, commit_message=request["message"])
    return {"done": commit.commit_url, "private": private}


if __name__ == "__main__":
    main()
