"""The benchmark measures what it says: rows, useful operations, the gate before it and the report after it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dora_step import run as dora_run
from benchmarks.init_cost import cost
from benchmarks.speed import report
from benchmarks.speed.gate import gate
from benchmarks.speed.measure import forget_peak, matrix_peak, memory, useful_flops
from benchmarks.speed.peers import BUILDERS, PEERS, seed
from benchmarks.speed.workloads import WORKLOADS, make_model, real, rows_of, supervised


@pytest.mark.parametrize("name", WORKLOADS)
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
    assert useful_flops(model, rows, 3) == (4 * N + 6 * a) * 4 + 4 * (8 * 50) * 3 + attention


@pytest.mark.filterwarnings("ignore")
def test_every_peer_passes_the_gate() -> None:
    assert gate(BUILDERS) == dict.fromkeys(BUILDERS, "")


def test_the_gate_sees_a_wrong_scale_and_survives_what_breaks() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such library")

    builders = {"lorafit": PEERS["lorafit"], "off": partial(seed, scale=2.01), "broken": broken, "seed": seed}
    found = gate(["off", "broken", "seed"], builders)
    assert found["off"]
    assert found["broken"] == "RuntimeError: no such library"
    assert found["seed"] == ""


def test_memory_and_peak_are_measured() -> None:
    import torch

    assert matrix_peak(torch.float32, 1) > 1e8
    forget_peak()
    peak, now = memory("VmHWM"), memory("VmRSS")
    if peak is not None and now is not None:
        assert 0 < now <= peak


def record(peer: str, number: int, seconds: list[float], memory: int) -> dict[str, Any]:
    machine = {"cpu": "a processor", "capability": "AVX2", "threads": 2, "torch": "2"}
    return {
        "workload": "W1",
        "peer": peer,
        "round": number,
        "dtype": "float32",
        "settings": {"steps": 2, "warmup": 1, "layers": 24},
        "machine": machine,
        "matrix_peak": 1000.0,
        "seconds": seconds,
        "losses": [1.0, 1.0],
        "real": [100, 200],
        "supervised": [40, 80],
        "useful_flops": [500.0, 1000.0],
        "memory": memory,
    }


def test_the_report_pairs_steps(tmp_path: Path) -> None:
    # The second step has twice the tokens; the second round ran on a machine that was half as fast.
    records = [
        record("lorafit", 0, [1.0, 2.0], 2**20),
        record("lorafit", 1, [2.0, 4.0], 2**20),
        record("peft", 0, [2.0, 4.0], 2**22),
        record("peft", 1, [4.0, 8.0], 2**22),
    ]
    ours, theirs = report.summarise(records)
    assert theirs["times_lorafit"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ours["times_lorafit"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["real_per_second"] == 75
    assert ours["supervised_per_second"] == 30
    assert ours["useful_mfu"] == 0.375
    assert ours["memory_over_peft"] == 0.25
    assert theirs["memory_mb"] == 4
    (tmp_path / "README.md").write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    text = report.write(records, {"trl": "loss 2 instead of 1"}, tmp_path, tmp_path / "README.md")
    assert "| PEFT, plain loop | 4 | 2.00 (2.00–2.00) |" in text
    assert "Not timed: TRL SFTTrainer, defaults (loss 2 instead of 1)." in text
    written = (tmp_path / "README.md").read_text()
    assert written == f"before\n<!-- speed -->\n{text}\n<!-- /speed -->\nafter\n"
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_a_report_of_one_machine(tmp_path: Path) -> None:
    here = record("peft", 0, [1.0, 2.0], 1)
    report.write_json(tmp_path / "a.json", here)
    report.write_json(tmp_path / "b.json", here | {"machine": {"cpu": "another"}})
    found = report.read_records(tmp_path, here["machine"], "float32", here["settings"])
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
