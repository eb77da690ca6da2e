"""A token for the hub is never shown, never written, and never asked for in a flag or a settings file."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from lorafit.app.cli import VERBS, main

# What must come out nowhere: one in each place where the hub looks for a token.
SECRETS = {
    "HF_TOKEN": "hf_CanaryInHfToken000000000000000000000",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryInHubToken00000000000000000000",
    "token": "hf_CanaryInTheTokenFile0000000000000000",
    "stored_tokens": "hf_CanaryAmongTheStored0000000000000000",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Gossip(BaseHTTPRequestHandler):
    """A hub that refuses everything and repeats all that it was told, in the body and in every header it can."""

    heard: list[str]

    def do_GET(self) -> None:
        told = " ".join(f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "host")
        self.heard.append(told)
        status = next((int(part) for part in ("401", "403", "500") if part in self.path), 404)
        body = json.dumps({"error": f"{self.headers['Authorization']} {told}", "message": told}).encode()
        self.send_response(status, self.headers["Authorization"])
        for header in ("X-Error-Message", "X-Request-Id", "X-Amzn-Trace-Id", "Location"):
            self.send_header(header, f"{self.headers['Authorization']} {told}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and all that it has heard."""
    heard: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Gossip,), {"heard": heard}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]) -> Path:
    """A folder with a tiny model, rows, and a home of the hub with tokens in its store."""
    folder = tmp_path_factory.mktemp("secrets")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    row = json.dumps({"prompt": "What comes after 1?", "completion": "2 comes."})
    (folder / "rows.jsonl").write_text(f"{row}\n" * 4, encoding="utf-8")
    (folder / "home").mkdir()
    (folder / "home" / "token").write_text(SECRETS["token"])
    (folder / "home" / "stored_tokens").write_text(f"[mine]\nhf_token = {SECRETS['stored_tokens']}\n")
    return folder


# What is run in one process: each line a command line, or the name of a variable that is taken away.
COMMANDS = """
train --model model --data rows.jsonl --out run --dtype float32 --device cpu --r 2 --epochs 1 --max-length 64
inspect --model model --data rows.jsonl --device cpu
merge --model model --adapter run/adapter --out merged --device cpu
train --model nobody/m401 --data nobody/d401:train --out never
inspect --model nobody/m401 --debug
inspect --model nobody/m403 --debug
inspect --model nobody/m404 --debug
chat --model nobody/m500 --adapter nobody/a500 --debug
inspect --data nobody/d403:train --debug
inspect --data nobody/d500:train
inspect --model model --adapter nobody/a401 --debug
push run/adapter nobody/p401 --debug
push run nobody/p403 --dry-run
push run nobody/p500 --public --stall 60
HF_TOKEN
inspect --model nobody/m404 --debug
HUGGING_FACE_HUB_TOKEN
inspect --model nobody/m401 --debug
inspect --model nobody/m403
""".strip().splitlines()
PROGRAM = """
import os, sys, time
time.sleep = lambda seconds: None  # the hub's client waits before it asks again
from lorafit.app.cli import main
from lorafit.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, as_dict
for line in sys.stdin.read().splitlines():
    if " " in line:
        print("code", main(line.split()))
    else:
        del os.environ[line]
    configs = [ModelConfig(), LoraConfig(), DataConfig(), TrainConfig()]
    print(configs, as_dict(*configs), [vars(config) for config in configs if hasattr(config, "__dict__")])
"""


def test_no_token_comes_out_anywhere(place: Path, hub: tuple[str, list[str]]) -> None:
    """Not in what is printed, with --debug or without, not in a file, and not when the hub sends back what it hears."""
    address, heard = hub
    variables = {name: SECRETS[name] for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    quiet = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(COMMANDS),
        env=os.environ | variables | quiet,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes[:3] == [0, 0, 0], done.stderr
    assert codes[11:14] == [11, 0, 11], done.stderr
    assert all(code in (3, 4, 5) for code in codes[3:11] + codes[14:]), codes
    assert "Traceback" in done.stderr
    # The hub was told the token of each place in turn, so all this was put to the test.
    assert all(any(SECRETS[name] in told for told in heard) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "token"))
    written = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for name in ("token", "stored_tokens"):
        del written[place / "home" / name]
    assert {place / "run" / "config.yaml", place / "merged" / "config.json"} <= written.keys()
    said = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()} | written
    beginnings = [secret[:14].encode() for secret in SECRETS.values()]  # a line that is cut off may cut a token
    assert not [where for where, text in said.items() if any(beginning in text for beginning in beginnings)]
    assert "Bearer ***" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "flag",
    ["--token X", "--token=X", "--hf-token=X", "--hf_token X", "--hub-token X --debug", "--use-auth-token=X", "-t X"],
)
def test_there_is_no_flag_for_a_token(verb: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    secret = SECRETS["HF_TOKEN"]
    assert main([verb, *flag.replace("X", secret).split()]) == 2
    said = capsys.readouterr()
    assert "unknown flag '-" in said.err
    assert secret not in said.out + said.err
    assert secret.replace("_", "-") not in said.out + said.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "hf_token: X\n"),
        ("run.yaml", "lr: 1e-4\ntoken: X\n"),
        ("run.yaml", "hub:\n  token: X\n"),
        ("run.yaml", "hf_token: [X\n"),
        ("run.yaml", "hf_token: 'X\n"),
        ("run.yaml", "lr: 1\n hf_token: X\n"),
        ("run.yaml", "- X\n"),
        ("run.toml", "hf_token = 'X'\n"),
        ("run.toml", "hf_token = X\n"),
        ("run.toml", "hf_token = 'X\n"),
        ("run.json", '{"token": "X"}'),
        ("run.json", '{"token": "X'),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_there_is_no_setting_for_a_token(
    name: str, text: str, debug: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = SECRETS["HF_TOKEN"]
    (tmp_path / name).write_text(text.replace("X", secret))
    assert main(["train", "--config", str(tmp_path / name), *debug]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said.splitlines()[-1]
    # Not even its beginning, as where a file is shown in part.
    assert secret[:16] not in said
