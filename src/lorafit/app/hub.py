"""`lorafit push`: an adapter or a merged model goes to the hub, with a model card made from its run.

Only files on a list go there, and it is printed first. Nothing of the training data does, and no path of this machine:
the card and the configuration name models and data sets as the hub knows them, or by the last part of their path.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.app.card import Subject, make_card, public_name, run_name
from lorafit.app.runs import ADAPTER, PICTURE, PastRun, read_run
from lorafit.errors import AdapterError, HubBusy, HubError, UsageError, listing
from lorafit.files import MANIFEST, damaged
from lorafit.hub import ADAPTER_FILES, ON_HUB, TOKENIZER_FILES

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
AGAIN = "the same command goes on where it stopped"
# What the hub may answer, by HTTP status or by our own word for it. A status of 500 or more is one.
REFUSALS: dict[str | int, tuple[type[HubError], str]] = {
    401: (HubError, "the hub does not know you: `hf auth login`, or HF_TOKEN with a token that may write"),
    403: (HubError, "your token may not write there: huggingface.co/settings/tokens, or another owner"),
    404: (HubError, "the hub knows no such owner, or you may not see it"),
    429: (HubBusy, f"the hub asks to wait, there were too many requests from here: in some minutes {AGAIN}"),
    500: (HubBusy, f"the hub has a fault of its own: later {AGAIN}"),
    "connection": (HubBusy, f"the connection to the hub broke, or there is none: {AGAIN}"),
    "offline": (HubError, "HF_HUB_OFFLINE is set: take it away to push"),
    "public": (HubError, "is on the hub already, and public: --public if it shall be, else choose another name"),
}


@dataclass(frozen=True)
class Parcel:
    """Files that go as they are, files that are written for it, names in the folder that stay here, and a note.

    `str(parcel)` is the list that a person reads before anything is sent.
    """

    files: Mapping[str, Path]
    texts: Mapping[str, str]
    left: Sequence[str]
    note: str = ""

    def __str__(self) -> str:
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        lines = [f"  {name:32} {size:>14,} bytes" for name, size in sorted(sizes.items())]
        lines += [f"not on the list, so left here: {listing(self.left)}"] if self.left else []
        return "\n".join(lines + ([self.note] if self.note else []))


def send(parcel: Parcel, repo: str, *, public: bool, message: str, stall: float) -> str:
    """Upload it in one commit; returns what to tell. HubError, or HubBusy where trying again helps."""
    files = {name: str(path) for name, path in parcel.files.items()}
    request = {"repo": repo, "public": public, "message": message, "files": files, "texts": parcel.texts}
    answer = upload(request, stall)
    if "done" not in answer:
        raise refused(repo, answer)
    kept = f"\n{repo} is private and stays so: its settings on the hub can change that"
    return f"{answer['done']}{kept if public and answer['private'] else ''}"


def refused(repo: str, answer: Mapping[str, Any]) -> HubError:
    """The error for an answer that is no success."""
    code = answer["refused"]
    kind, sentence = REFUSALS.get(500 if isinstance(code, int) and code >= 500 else code, (HubError, "refused"))
    return kind(f"{repo}: {sentence}" + (f" ({answer['said'][:240]})" if sentence == "refused" else ""))


# --- what goes there ---------------------------------------------------------------------------------


def pack(
    place: str | Path,
    repo: str,
    *,
    run: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Parcel:
    """What of the adapter, run or merged model at `place` goes to `repo`, with a card from `run`.

    `run` is by default the folder that the adapter is in; `base_model` the base's name on the hub, by default what
    the configuration says. Refuses a folder that is none of the three, or is damaged.
    """
    if not ON_HUB.fullmatch(repo):
        raise UsageError(f"'{repo}' is no name on the hub: it is owner/name")
    folder = Path(place).expanduser()
    if (folder / ADAPTER / ADAPTER_FILES[0]).is_file():
        folder = folder / ADAPTER
    past = read_run(Path(run)) if run else _run_around(folder)
    local = past is not None and "model" in past.local
    texts: dict[str, str] = {}
    allowed: Sequence[str] = MODEL_FILES
    if (folder / ADAPTER_FILES[0]).is_file():
        subject = _adapter(folder, base_model, local)
        allowed = (*ADAPTER_FILES[1:], *TOKENIZER_FILES)
        texts[ADAPTER_FILES[0]] = json.dumps(subject.config, indent=2, sort_keys=True) + "\n"
    elif (folder / "config.json").is_file():
        subject = Subject(base_model or (run_name(past, "model") if past else ""), None)
    else:
        raise AdapterError(f"{folder}: neither an adapter, nor a run with one, nor a model folder")
    if broken := damaged(folder):
        raise AdapterError(f"{folder}: {'; '.join(broken)}: it is not what was saved, and not pushed")
    files = {path.name: path for pattern in allowed for path in sorted(folder.glob(pattern)) if path.is_file()}
    if not any(name.endswith(".safetensors") for name in files):
        raise AdapterError(f"{folder}: there are no weights in it (safetensors)")
    if past and (past.folder / PICTURE).is_file():
        files[PICTURE] = past.folder / PICTURE
    texts["README.md"] = make_card(subject, past, repo, license, picture=PICTURE in files)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    note = "" if ON_HUB.fullmatch(subject.base) else f"its base model is called {subject.base or 'nothing'} there: "
    note += "--base-model owner/name says where others find it" if note else ""
    return Parcel(files, texts, sorted(here - files.keys() - texts.keys() - {MANIFEST}), note)


def _run_around(folder: Path) -> PastRun | None:
    parent = folder.resolve().parent
    return read_run(parent) if folder.resolve().name == ADAPTER and (parent / "config.yaml").is_file() else None


def _adapter(folder: Path, base_model: str | None, local: bool) -> Subject:
    """What an adapter is; its configuration names the base as the hub knows it."""
    from lorafit.adapter.check import check_adapter
    from lorafit.adapter.peft_config import read_config

    read_config(folder)  # refuses what is none
    refused = [finding.what for finding in check_adapter(folder, "vllm") if finding.verdict == "rejects"]
    config = json.loads((folder / ADAPTER_FILES[0]).read_bytes())
    base = base_model or public_name(config.get("base_model_name_or_path") or "", local)
    return Subject(base=base, config={**config, "base_model_name_or_path": base or None}, refused=refused)


# --- the process that sends it -----------------------------------------------------------------------


def upload(request: Mapping[str, Any], stall: float) -> dict[str, Any]:
    """Have `upload.py` do it, and end it if it says nothing for `stall` seconds, or we are ended."""
    drawn = sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0") in ("", "0")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "lorafit.app.upload"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if drawn else subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for us: we end it
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
            heard = b""
            while True:
                ready, _, _ = select.select([child.stdout], [], [], stall)
                if not ready:
                    raise HubBusy(
                        f"{request['repo']}: not a byte moved for {stall:g} seconds (--stall): {AGAIN}; should it stop "
                        "there again, HF_HUB_DISABLE_XET=1 takes the older way to the hub"
                    )
                piece = os.read(child.stdout.fileno(), 2**16)
                if not piece:
                    raise HubBusy(f"{request['repo']}: the sending process ended with code {child.wait()}: {AGAIN}")
                *lines, heard = (heard + piece).split(b"\n")
                for answer in map(json.loads, lines):
                    if answer:
                        return dict(answer)
        finally:
            child.kill()
