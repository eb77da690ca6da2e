"""The page of a run: it says what there is and what is not, asks for nothing, and can be read, light and dark."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit.app import charts
from lorafit.app.cli import main
from lorafit.app.report import POLICY, STYLE, page, place
from lorafit.app.runs import read_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = '</pre><script src="https://example.com/x.js"></script><img src=//example.com/p.png onerror=a()>'


def layer(name: str, share: float, rank: float) -> dict[str, Any]:
    return {"layer": name, "r": 8, "norm": share * 10, "share": share, "effective_rank": rank}


ABOUT = {
    "lorafit": "0.1.0",
    "torch": "2.13.0",
    "model": {"class": "LlamaForCausalLM", "dtype": "float32"},
    "plan": {"text": "lora, init kaiming\n  model.layers.{0..11}.q_proj", "trainable": 1234, "total": 99999},
    "data": {
        **{"rows": 40, "held_out": 4, "tokens": 900, "supervised": 300},
        "lengths": {"edges": [8, 16, 24], "rows": [1, 30, 9], "supervised": [39, 1, 0]},
    },
    "layers": [layer(f"model.layers.{n}.self_attn.q_proj", 0.01 * n, 1 + n / 4) for n in range(12)]
    + [layer(f"model.layers.{n}.mlp.experts.{e}.up_proj", 0.02, 3.0 + e) for n in range(12) for e in range(3)]
    + [layer("lm_head", 0.5, 7.5)],
    "samples": [
        {"source": "/home/me/rows.jsonl:7", "prompt": HOSTILE, "answer": "4 & more", "before": "<b>?", "after": ""},
    ],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, without the training."""
    settings = {"model": "/home/me/models/tiny", "data": "/home/me/rows.jsonl", "lr": 0.001, "batch_size": 8, "r": 16}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "schedule": "cosine", "out": "/home/me/run"}))
    records: list[dict[str, Any]] = [
        {"step": n, "epoch": 0, "loss": 2 - n / 1000, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 100 + n % 7}
        for n in range(900)
    ]
    records[3] |= {"loss": None, "grad_norm": None}
    records[449]["eval_loss"], records[899]["eval_loss"] = 1.25, None
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    return tmp_path


class Tree(HTMLParser):
    """Every tag with its attributes; complains about one that is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_asks_for_nothing_and_runs_nothing(run: Path) -> None:
    text = page(read_run(run))
    tree = Tree(text)
    names = {tag for tag, _ in tree.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "a", "form", "base", "audio", "video"}
    for tag, attributes in tree.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "action", "xlink:href", "data"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "url(" not in (attributes.get("style") or "")
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policy = {a["content"] for tag, a in tree.tags if tag == "meta" and a.get("http-equiv")}
    assert policy == {POLICY}
    assert "default-src 'none'" in POLICY


def test_what_data_hold_is_text_on_the_page(run: Path) -> None:
    text = page(read_run(run))
    assert "<script" not in text
    assert "&lt;/pre&gt;&lt;script src=&quot;https://example.com/x.js&quot;&gt;" in text
    assert "&lt;b&gt;?" in text
    assert "/home/me" not in text  # a colleague need not know where it stood


def test_the_page_says_what_the_run_was(run: Path) -> None:
    text = page(read_run(run))
    for said in (
        "<h1>tiny on rows.jsonl</h1>",
        "1,234 (1.2 %)",
        "2.000 → 1.101",
        "held-out loss after step 450</td><td>1.2500 (perplexity 3.49), the best",
        "Of 899 steps, neighbours are drawn as one point. 1 steps were not taken",
        "40 to train on, 4 held out",
        "at most r = 8",
        "mlp.experts.*.up_proj, block 11: 4.0",  # the mean of 3, 4 and 5
        "lm_head, block –: 50",
        "9 to 16 tokens: 30",
        "<td>lr</td><td><strong>0.001</strong></td>",
        "<td>r</td><td>16</td>",
        "class LlamaForCausalLM",
    ):
        assert said in text, said


def test_a_run_that_kept_little_makes_a_page_that_says_so(run: Path) -> None:
    (run / "about.json").unlink()
    text = page(read_run(run))
    Tree(text)
    assert text.count('class="missing"') == 4  # answers, layers, data, plan
    (run / "log.jsonl").write_text("")
    text = page(read_run(run))
    Tree(text)
    assert "no step of this run was taken" in text
    (run / "about.json").write_text(json.dumps({**ABOUT, "samples": [], "no_samples": "the prompt has 900 tokens"}))
    assert "Not shown: the prompt has 900 tokens." in page(read_run(run))


def test_the_verb_writes_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", "--run", str(run), "--page", str(tmp_path / "to" / "page.html")]) == 0
    assert (tmp_path / "to" / "page.html").read_bytes() == (run / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "to")]) == 2
    assert "is no run: there is no config.yaml in it" in capsys.readouterr().err
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 900, "lo')  # cut off by a crash
    assert len(read_run(run).records) == 900
    (run / "log.jsonl").write_text('{"step": 0\n')
    assert main(["report", str(run)]) == 2
    assert "log.jsonl: cannot be read" in capsys.readouterr().err


# --- whether it can be read --------------------------------------------------------------------------


def themes() -> list[dict[str, str]]:
    """The colours of the light and of the dark page."""
    light, dark = re.findall(r":root \{([^}]*)\}", STYLE)
    colours = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in (light, dark)]
    return [colours[0], {**colours[0], **colours[1]}]


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    """WCAG 2.2: 4.5 is what text needs, 3 a line or a bar."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(colour: str, ground: str, share: float) -> str:
    parts = [(int(c[i : i + 2], 16)) for c in (colour, ground.ljust(7, ground[1])) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(parts[:3], parts[3:], strict=True))


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_and_lines_stand_out(theme: dict[str, str]) -> None:
    assert set(re.findall(r"var\(--(\w+)\)", STYLE)) == theme.keys()
    for ground in ("page", "box"):
        for text in ("text", "faint"):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["one"], theme[ground]) >= 3
        assert contrast(theme["two"], theme[ground]) >= 3
    for strength in (0.06, 0.3, 0.6, 0.9):  # numbers stand in the cells of a heat map
        assert contrast(theme["text"], mixed(theme["heat"], theme["page"], strength)) >= 4.5, strength


def test_both_themes_are_there() -> None:
    light, dark = themes()
    assert luminance(light["page"]) > 0.8
    assert luminance(dark["page"]) < 0.05
    assert "@media (prefers-color-scheme: dark)" in STYLE


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (on Debian: apt-get install chromium)")
def test_a_browser_draws_it_light_and_dark_and_asks_nobody(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    assert main(["report", str(run)]) == 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(run)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/report.html"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    grounds = {}
    for theme, number in (("dark", 0), ("light", 1)):
        shot, log = tmp_path / f"{theme}.png", tmp_path / f"{theme}.json"
        command = [str(BROWSER), *quiet, f"--blink-settings=preferredColorScheme={number}", f"--log-net-log={log}"]
        command += [f"--user-data-dir={tmp_path / theme}", "--window-size=1000,1400", f"--screenshot={shot}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            colours = image.convert("RGB").getcolors(2**24) or []
        counted = sorted(colours, reverse=True)
        grounds[theme] = counted[0][1]
        assert counted[0][0] < 0.97 * 1000 * 1400, "an empty page"
        asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))  # what the browser itself looks for is in it, too
        assert address in asked
        assert not [url for url in asked if "example.com" in url]  # what a row of the data would have fetched
    server.shutdown()
    server.server_close()
    assert min(grounds["light"]) > 240
    assert max(grounds["dark"]) < 40


# --- its pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 900), (-3.2, 7.9), (1e-6, 2e-3), (5, 5), (0, 3e9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 * abs(high) <= value <= high + 1e-9 * abs(high) for value in found)
    assert all(len(f"{value:g}") <= 7 for value in found)


def test_thinning_keeps_the_mean_and_the_order() -> None:
    points = [(float(x), float(x % 5)) for x in range(5000)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(2.0, abs=0.05)
    assert charts.thinned(points[:10]) == points[:10]


def test_a_curve_of_one_point_and_a_flat_one_are_drawn() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]):
        svg = charts.curves([charts.Line("loss", points, "one")], "step", "loss")
        assert "nan" not in svg
        Tree(svg)


def test_the_largest_value_has_the_strongest_cell() -> None:
    values = {("q", "0"): 1.0, ("q", "1"): 5.0, ("v", "1"): 3.0}
    svg = charts.heat(values, ["q", "v"], ["0", "1"], lambda value: f"{value:g}", "")
    strengths = dict(re.findall(r'fill-opacity="([\d.]+)"><title>(\w, block \d)', svg))
    order = [name for _, name in sorted((float(s), name) for s, name in strengths.items())]
    assert order == ["q, block 0", "v, block 1", "q, block 1"]


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn.q_proj", "3"),
        ("transformer.h.10.attn.c_attn", "attn.c_attn", "10"),
        ("model.layers.3.mlp.experts.17.up_proj", "mlp.experts.*.up_proj", "3"),
        ("lm_head", "lm_head", "–"),
        ("0.linear", "linear", "0"),
    ],
)
def test_a_layers_place(name: str, kind: str, block: str) -> None:
    assert place(name) == (kind, block)
