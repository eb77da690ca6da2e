"""The benchmark measures what it says: rows, useful operations, the gate before it and the report after it."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, growth, small
from benchmarks.dora_step import run as dora_run
from benchmarks.init_cost import cost
from benchmarks.speed import measure, report
from benchmarks.speed.gate import gate
from benchmarks.speed.ladder import BUILDERS, RUNGS, Shape, ladder, predicted_flops, rung_has
from benchmarks.speed.measure import forget_peak, machine, matrix_peak, memory, useful_flops
from benchmarks.speed.peers import PEERS, Peer, go_on, seed
from benchmarks.speed.run import measured
from benchmarks.speed.runs import run_once
from benchmarks.speed.tasks import Goal, Task, held_out_loss
from benchmarks.speed.workloads import (
    WORKLOADS,
    Setup,
    initial,
    make_model,
    real,
    rows_of,
    supervised,
    tiny_model,
)
from lorafit import Batches
from lorafit.training import compiling

COSTS = [name for name, work in WORKLOADS.items() if work.lengths is not None]


@pytest.mark.parametrize("name", COSTS)
def test_rows_are_a_pure_function_of_the_workload(name: str) -> None:
    rows = rows_of(WORKLOADS[name], 20, 512)
    assert rows_of(WORKLOADS[name], 30, 512)[:20] == rows
    assert all(len(row.ids) == len(row.labels) and supervised([row]) > 0 for row in rows)


def test_the_lengths_of_w1() -> None:
    work = WORKLOADS["W1"]
    rows = rows_of(work, 4000, 512)
    padded = sum(
        work.batch * max(len(row.ids) for row in rows[i : i + work.batch]) for i in range(0, len(rows), work.batch)
    )
    assert padded / real(rows) == pytest.approx(1.31, abs=0.02)
    assert supervised(rows) / real(rows) == pytest.approx(0.43, abs=0.01)


def test_useful_operations_by_hand() -> None:
    model = make_model(
        1, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2, vocab_size=50
    )
    rows = rows_of(WORKLOADS["W3"], 1, 50, shrink=64)
    assert len(rows[0].ids) == 4
    N = 4 * 8 * 8 + 3 * 8 * 12
    a = 16 * (4 * (8 + 8) + 3 * (8 + 12))
    attention = 6 * (2 * 10 * 4) * 2  # six products, 10 causal pairs, heads of 4, two of them
    assert supervised(rows) == 3
    assert useful_flops(model, rows, 3, Setup()) == (4 * N + 6 * a) * 4 + 4 * (8 * 50) * 3 + attention


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in BUILDERS if "compile" not in name])
def test_every_peer_passes_the_gate(name: str) -> None:
    verdict = gate([name])[name]
    assert verdict.wrong == ""
    assert verdict.config["adapter dtype"] == "float32"


@pytest.mark.filterwarnings("ignore")
def test_what_train_would_do_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "no such backend")
    assert "compiling does not work here" in gate(["lorafit-compile"])["lorafit-compile"].wrong


def test_the_gate_sees_a_wrong_scale_and_survives_what_breaks() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such library")

    def forgetful(task: Task, start: Any) -> Peer:
        """Right in the first step alone: another rate."""
        return seed(replace(task, setup=replace(task.setup, lr=2e-4)), start)

    builders = {"lorafit": PEERS["lorafit"], "off": partial(seed, scale=2.01), "broken": broken, "late": forgetful}
    found = {name: verdict.wrong for name, verdict in gate(["off", "broken", "late"], builders).items()}
    assert found["off"]
    assert found["broken"] == "RuntimeError: no such library"
    assert "step 2" in found["late"] or "step 3" in found["late"]


@pytest.mark.parametrize("rung", range(len(RUNGS)))
def test_predicted_operations_are_those_that_torch_counts(rung: int) -> None:
    """Exactly, for all products but those of attention, which torch counts only where it is by hand."""
    counts = []
    for steps in (1, 0):  # what it takes to begin is no step
        model, setup = tiny_model(), Setup()
        shape, rows = Shape.of(model), rows_of(WORKLOADS["W1"], 4, 512)
        peer = ladder(rung, Task(model, Batches(rows, 4, shuffle=False), setup), initial(model, setup))
        mapping = {torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            peer.run(steps, go_on)
        counts.append(counter.get_flop_counts().get("Global", {}))
    linear = sum(n - counts[1].get(op, 0) for op, n in counts[0].items() if op is not torch.ops.aten.bmm)
    no_attention = replace(shape, layers=0)
    assert predicted_flops(no_attention, rows, setup, rung_has(rung)) == linear
    pairs = sum(len(row.ids) * (len(row.ids) + 1) / 2 for row in rows)
    if rung == 0:
        pairs = 4 * max(len(row.ids) for row in rows) ** 2
    attention = predicted_flops(shape, rows, setup, rung_has(rung)) - linear
    assert attention == 6 * 2 * pairs * 64 * 2  # six products, heads of 64 in all, two layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", ["lorafit", "trl"])
def test_a_run_ends_at_its_goal(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZES", (64,))
    model, setup = tiny_model(), Setup(lr=1e-2)
    rows = rows_of(WORKLOADS["W1"], 8, 512, shrink=8)
    before = held_out_loss(model, rows)
    task = Task(model, Batches(rows, 4, shuffle=False), setup, Goal(rows, before - 0.01, every=2))
    found = measured(task, BUILDERS[peer], steps=0, warmup=1)
    steps, loss = found["held_out"][-1]
    assert loss <= before - 0.01 < before
    assert steps == len(found["losses"]) == len(found["seconds"]) + 1
    assert found["seconds_to_target"] > 0


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "one.json"
    like = {"machine": machine(1), "settings": {"steps": 1}}
    found, there = run_once("no_such_module", {"peer": "lorafit"}, out, like)
    assert not there
    assert "no_such_module" in found["failed"]
    _, there = run_once("no_such_module", {"peer": "lorafit"}, out, like)
    assert not there, "a failed run is tried again"
    report.write_json(out, like | {"seconds": [1.0]})
    assert run_once("no_such_module", {}, out, like) == (like | {"seconds": [1.0]}, True)
    found, there = run_once("no_such_module", {}, out, like | {"settings": {"steps": 2}})
    assert not there
    assert "failed" in found


def test_memory_and_peak_are_measured() -> None:
    assert matrix_peak(torch.float32, repeats=1) > 1e8
    forget_peak()
    peak, now = memory("VmHWM"), memory("VmRSS")
    if peak is not None and now is not None:
        assert 0 < now <= peak


def test_a_system_without_a_peak_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CLEAR", Path("/no/such/file"))
    assert not forget_peak()


def record(peer: str, number: int, seconds: list[float], above: int, **changes: Any) -> dict[str, Any]:
    return {
        "workload": "W1",
        "peer": peer,
        "round": number,
        "dtype": "float32",
        "settings": {"steps": 2, "warmup": 1, "layers": 24},
        "machine": {"cpu": "a processor", "capability": "AVX2", "threads": 2, "versions": {"torch": "2"}},
        "matrix_peak": {"before": 1000.0, "after": 900.0},
        "seconds": seconds,
        "losses": [2.0, 1.0, 1.0],
        "real": [100, 200],
        "supervised": [40, 80],
        "useful_flops": [500.0, 1000.0],
        "memory": {"loaded": 2**20, "peak": 2**20 + above, "above": above, "peak_reset": True},
        "beside_steps": 1.0,
        "config": {"rows": "packed"},
        "notes": [],
    } | changes


def test_the_report_pairs_steps(tmp_path: Path) -> None:
    # The second step has twice the tokens; the second round ran on a machine that was half as fast.
    records = [
        record("lorafit", 0, [1.0, 2.0], 2**20),
        record("lorafit", 1, [2.0, 4.0], 2**20),
        record("peft", 0, [2.0, 4.0], 2**22),
        record("peft", 1, [4.0, 8.0], 2**22),
        record("seed", 0, [1.0, 1.0], 2**20, losses=[2.0, 1.1, 1.0]),
        record("peft-tuned", 0, [1.0, 1.0], 2**20),
        {key: record("trl", 0, [], 0)[key] for key in ("workload", "peer", "round", "dtype", "settings", "machine")}
        | {"failed": "killed by SIGKILL"},
    ]
    ours, *_, theirs = report.summarise(records[:4])
    assert theirs["times_lorafit"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ours["times_lorafit"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["step_seconds"]["median"] == 2
    assert ours["real_per_second"] == 75
    assert ours["supervised_per_second"] == 30
    assert ours["useful_mfu"] == 0.375
    assert ours["memory_over_peft"] == 0.25
    assert (theirs["memory_mb"], theirs["memory_total_mb"]) == (4, 5)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    text = report.write(records, {"peft-tuned": "loss 2 instead of 1", "peft": ""}, tmp_path, readme)
    assert "| PEFT, plain loop | 4 (2–8) | 2.00 (2.00–2.00) |" in text
    assert "| PEFT, tuned loop, padded |" not in text
    assert "| tutorial's layer and loop |" not in text
    for sentence in (
        "PEFT, tuned loop, padded: not timed, loss 2 instead of 1",
        "tutorial's layer and loop: not timed, its loss is off by 1.0e-01 on W1",
        "TRL SFTTrainer, defaults, round 1: killed by SIGKILL",
        "TRL SFTTrainer, tuned: not run yet",
    ):
        assert sentence in text
    written = readme.read_text()
    assert written.startswith(f"before\n<!-- speed -->\n{text}\n\nEvery")
    assert written.endswith("<!-- /speed -->\nafter\n")
    assert "- **lorafit**: rows: packed" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_the_ladder_stands_beside_its_prediction() -> None:
    records = [
        record("ladder-0", 0, [8.0, 8.0], 1, predicted_flops=[300.0, 300.0]),
        record("ladder-1", 0, [4.0, 4.0], 1, predicted_flops=[200.0, 200.0]),
        record("ladder-2", 0, [2.0, 2.0], 1, predicted_flops=[100.0, 100.0]),
    ]
    first, _, third = report.rungs(records)
    assert first["predicted"] is first["measured"] is None
    assert (third["predicted"], third["measured"]["median"]) == (2, 2)
    assert (third["predicted_in_all"], third["measured_in_all"]["median"]) == (3, 4)
    assert "| 2: + head on supervised rows only | 2 (2–2) | 2.00 | 2.00 (2.00–2.00) | 3.00 | 4.00 (4.00–4.00) |" in (
        report.page(records, {})
    )


def test_peers_take_turns_and_nothing_is_skipped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.speed import __main__ as speed

    plan = [*speed._plan(["W1", "W3"], ["lorafit", "trl"], ["ladder-0"], 2)]
    assert [peer for name, peer, _ in plan if name == "W1"] == [
        *("lorafit", "trl", "ladder-0"),
        *("ladder-0", "trl", "lorafit"),
    ]
    assert [peer for name, peer, _ in plan if name == "W3"] == ["lorafit", "trl", "trl", "lorafit"]
    monkeypatch.setattr("sys.argv", ["speed", "--only", "W3", "--ladder"])
    with pytest.raises(SystemExit):
        speed._arguments()
    monkeypatch.setattr("sys.argv", ["speed", "--only", "W1", "--ladder", "0,7"])
    assert speed._arguments().ladder == ["ladder-0", "ladder-7"]


def test_a_report_of_one_machine(tmp_path: Path) -> None:
    here = record("peft", 0, [1.0, 2.0], 1)
    report.write_json(tmp_path / "W1-a.json", here)
    report.write_json(tmp_path / "W1-b.json", here | {"machine": {"cpu": "another"}})
    report.write_json(tmp_path / "W1-c.json", here | {"settings": {**here["settings"], "layers": 2}})
    report.write_json(tmp_path / "gate.json", {"refused": {}})
    settings = {"settings": {**here["settings"], "steps": None}}  # runs of more and fewer steps stand together
    found = report.read_records(tmp_path, {key: here[key] for key in ("machine", "dtype")} | settings)
    assert found == [here]
    (line,) = report.summarise(found)
    assert line["times_lorafit"] is None  # without lorafit's run there is nothing to compare with


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_the_cost_of_an_init_is_measured(init: str) -> None:
    found = cost(init, 2, 4, **SMALL)
    assert found["seconds"] > found["of these looking at data"] > (0.01 if init == "eva" else 0)
    if init == "pissa":  # fp32, rank 16, two blocks, and the start that is kept beside A and B
        assert found["adapter"] == 4 * 16 * 2 * (4 * (64 + 64) + 3 * (64 + 96)) * 2


def test_the_four_steps_take_turns() -> None:
    found = dora_run(2, 1, **SMALL)
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert len(found["seconds"]) == 4
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_a_curve_names_what_failed_and_draws_the_rest(tmp_path: Path) -> None:
    about = {"dtype": "float32", "steps": 3, "machine": record("peft", 0, [], 0)["machine"]}
    points = [
        about
        | asdict(point)
        | {"peer": "lorafit", "seconds": [float(rank), 9.0, float(rank)], "memory": {"above": rank * 2**20}}
        | {"predicted_flops": 500.0 * rank, "matrix_peak": {"before": 1000.0, "after": 900.0}}
        for rank, point in ((4, replace(growth.MIDDLE, rank=4)), (16, growth.MIDDLE))
    ]
    points.append(about | asdict(replace(growth.MIDDLE, rank=4)) | {"peer": "peft", "failed": "killed by SIGKILL"})
    page = tmp_path / "cost.md"
    page.write_text("<!-- growth -->\n<!-- /growth -->\nwhy\n")
    growth.report(points, tmp_path, page)
    text = page.read_text()
    assert "| 4 | 2 | 4 | 4 | killed by SIGKILL | – |" in text
    assert "| 16 | 8 | 16 | 16 | – | – |" in text
    assert text.endswith("<!-- /growth -->\nwhy\n")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_every_axis_is_held_at_the_middle_but_for_itself() -> None:
    for axis, (_, points) in growth.AXES.items():
        values = [asdict(point)[axis] for point in points]
        assert values == sorted(set(values))
        for point in points:
            held = {"rows": 1} if axis == "length" else {}
            assert replace(point, **{axis: getattr(growth.MIDDLE, axis)}) == replace(growth.MIDDLE, **held)
            rows = growth.make_point_rows(point, 2)
            assert supervised(rows) == 2 * max(1, round(point.share * point.length)) - 2 * (point.share == 1)


def test_a_point_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZES", (64,))
    point = growth.Point(rows=1, length=16, rank=2, layers=1)
    found = growth.measure_point(point, "lorafit", 1, torch.float32, quick=True)
    assert len(found["seconds"]) == 1
    assert found["predicted_flops"] > 0


def test_the_small_table_says_how_much_faster_and_what_failed() -> None:
    about = {"dtype": "float32", "machine": record("peft", 0, [], 0)["machine"]}
    rows = [
        {"what": "an answer", "unit": "tok/s", "ours": 30.0, "theirs": 20.0, "beside": "transformers' generate"},
        {"what": "merge", "unit": "s", "ours": 1.0, "theirs": 2.0, "beside": "PEFT"},
    ]
    text = small.table([about | {"part": "answers", "rows": rows}, about | {"part": "dora", "failed": "no PEFT"}])
    assert "| an answer | 30 tok/s | transformers' generate | 20 tok/s | 1.50 |" in text
    assert "| merge | 1 s | PEFT | 2 s | 2.00 |" in text
    assert "Not measured: dora (no PEFT)." in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["adapters", "dora", "merge"])
def test_small_parts_run(part: str) -> None:
    for row in small.PARTS[part](small.How(torch.float32, quick=True)):
        assert min(row["ours"], row["theirs"]) > 0


def test_without_a_gpu_a_line_is_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out.startswith("There is no CUDA GPU here")


def test_the_gpu_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZES", (64,))
    monkeypatch.setattr(gpu, "SIZES", {"rows4": 0, "tokens16k": 700})
    rows, batch = gpu.steps_of(700, 3, 512)
    assert len(rows) == 3 * batch
    assert real(rows) / 3 == pytest.approx(700, rel=0.2)
    narrow = {"layers": 1, "vocab_size": 512, **growth.TINY}
    machine = record("peft", 0, [], 0)["machine"] | {"gpu": "a GPU"}
    about = {"size": "rows4", "round": 0, "machine": machine}
    peers = ("lorafit", "peft")
    records = [about | {"peer": peer} | gpu.measure("rows4", peer, 1, 0, device="cpu", **narrow) for peer in peers]
    for one, above in zip(records, (1, 4), strict=True):
        one["memory"]["above"] = above * 2**20
    lines = gpu.summarise(records)
    assert [line["memory_over_peft"] for line in lines] == [0.25, 1]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.02)  # bf16
    text = gpu.page(lines, records, {"peft-liger": "liger-kernel is not installed"})
    assert "Not in these tables: PEFT, plain loop, Liger: liger-kernel is not installed." in text
