"""adapter_config.json: every field has its values, every pattern its meaning in PEFT, and nothing takes forever."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorafit import LoraConfig, add_lora, load_lora, save_lora
from lorafit.adapter import patterns as file_patterns
from lorafit.adapter import peft_config
from lorafit.adapter.peft_config import CONFIG, DEFAULTS, HISTORY, NEEDED, READ, UNSUPPORTED, read_config
from lorafit.errors import AdapterError, UsageError
from lorafit.lora import names as patterns

Tiny = Callable[..., Any]
QUICK = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, **fields: Any) -> Path:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", **fields}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(folder))
    return str(caught.value).removeprefix(f"{folder / CONFIG}: ").removeprefix(f"{folder}: ")


# --- the schema -----------------------------------------------------------------------------------


def test_every_field_of_peft_is_read_or_history_or_unsupported_with_pefts_value(tmp_path: Path) -> None:
    assert len(READ) + len(HISTORY) + len(UNSUPPORTED) == len(DEFAULTS)
    peft.LoraConfig(inference_mode=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written.pop("peft_version") == peft.__version__
    assert written | {"peft_version": None} == DEFAULTS
    assert read_config(tmp_path) == DEFAULTS | {"peft_version": peft.__version__}


PEFT_WRITES: dict[str, Any] = {
    "names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["lm_head"]},
    "patterns": {"target_modules": r".*\.q_proj", "exclude_modules": ".*head"},
    "blocks": {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["layers"]},
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
    "other ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 7.5}},
    "fractions": {"lora_alpha": 0.5, "lora_dropout": 0.25},
    "flags": {"use_dora": True, "use_rslora": True, "fan_in_fan_out": True, "inference_mode": True},
    "EVA": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "a task": {"task_type": "CAUSAL_LM", "revision": "main", "base_model_name_or_path": "someone/model"},
    "in full": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("case", PEFT_WRITES)
def test_what_peft_writes_is_read_as_it_stands(case: str, tmp_path: Path) -> None:
    peft.LoraConfig(**PEFT_WRITES[case]).save_pretrained(tmp_path)
    raw = {name: value for name, value in json.loads((tmp_path / CONFIG).read_text()).items() if value is not None}
    assert read_config(tmp_path) == DEFAULTS | raw


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_null_is_the_default_but_for_what_decides_the_scale(name: str, tmp_path: Path) -> None:
    write(tmp_path, **({"r": 4, "lora_alpha": 8} | {name: None}))
    if name in NEEDED:
        assert re.search(rf"{name}(=| is )None", refusal(tmp_path))
    else:
        assert read_config(tmp_path)[name] == DEFAULTS[name]


NAN, INFINITE = float("nan"), float("inf")
NO_NUMBERS: tuple[Any, ...] = ("8", True, [8], {"r": 8}, NAN, INFINITE, -INFINITE)
WRONG: dict[str, tuple[Any, ...]] = {
    "r": (*NO_NUMBERS, 0, -1, 8.0, 1.5, 10**9 + 1, 10**400),
    "lora_alpha": (*NO_NUMBERS, 0, -1, 0.0, 65_505, 10**400),
    "lora_dropout": (*NO_NUMBERS, 1, -0.1),
    "target_modules": (3, True, {"a": 1}, [1], [["q_proj"]], [None], [""], ["a" * 1001], ["a"] * 20_001, "a" * 100_001),
    "exclude_modules": (3, True, {"a": 1}, [1], [""]),
    "trainable_token_indices": (5, "5", True, [-1], [1.0], ["<a>"], [[1]], {"a": 1}, {"a": [True]}, NAN),
    "modules_to_save": ("norm", 3, {"norm": 1}, [1], [""]),
    "layers_to_transform": ("1", True, -1, 10**400, 1.0, [1, -1], [True], [1.5], {"1": 1}, NAN),
    "layers_pattern": (1, {"a": 1}, [1]),
    "rank_pattern": (["q_proj"], "q_proj", 4, {"q": 0}, {"q": 1.5}, {"q": "4"}, {"q": True}, {"q": None}, {"q": NAN},
                     {"q": 10**400}, {"a" * 100_001: 1}, {str(n): 1 for n in range(20_001)}),
    "alpha_pattern": (["q_proj"], "q_proj", 4, {"q": 0}, {"q": "4"}, {"q": True}, {"q": None}, {"q": NAN}, {"q": 1e5},
                      {"q": {"v": 1}}),
    "init_lora_weights": (1, 0, 1.0, ["gaussian"], {"a": 1}),
    "use_dora": (1, "true", [True], {"a": 1}),
    "use_rslora": (1, "false", 0),
    "target_parameters": ("down_proj", [1], [""], {"a": 1}),
    "fan_in_fan_out": (1, "yes"),
    "inference_mode": (0, "no"),
    "ensure_weight_tying": ("x",),
    "auto_mapping": (["x"], "x", 1),
    "base_model_name_or_path": (1, ["x"], {"a": "b"}, True),
    "eva_config": (1, "x", []),
    "corda_config": (1,),
    "lora_ga_config": (True,),
    "loftq_config": ([1], "x"),
    "velora_config": (1,),
    "megatron_core": (1, ["os"]),
    "peft_version": (1,),
    "qalora_group_size": ("16", 0, True, 10**400),
    "revision": (1,),
    "task_type": (1, ["CAUSAL_LM"]),
}  # fmt: skip


def test_every_field_with_values_of_a_kind_is_tried() -> None:
    assert WRONG.keys() == (READ | HISTORY).keys() - {"peft_type"}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_kind_is_one_line_with_the_field_the_value_and_what_is_expected(
    name: str, tmp_path: Path
) -> None:
    for value in WRONG[name]:
        said = refusal(write(tmp_path, **{name: value}))
        assert said.startswith(f"{name}={repr(value)[:80]}")
        assert said.endswith(f": {peft_config.KINDS[name].expected} is expected")
        assert len(said) < 250


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_built_is_refused_unless_it_is_off(name: str, tmp_path: Path) -> None:
    for value in (None, False, [], {}, 0, "", UNSUPPORTED[name]):
        read_config(write(tmp_path, **{name: value}))
    for value in (True, "all", 1, [1], {"a": 1}, NAN):
        assert refusal(write(tmp_path, **{name: value})).startswith(f"{name}={value!r} is not supported")


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga", "", "Pissa"])
def test_an_adapter_of_a_changed_base_is_refused(init: str, tmp_path: Path) -> None:
    assert "belongs to a changed base model" in refusal(write(tmp_path, init_lora_weights=init))


def test_no_module_is_imported_because_a_file_says_so(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, megatron_config={"tensor_model_parallel_size": 1}, megatron_core="antigravity"))
    assert said.startswith("megatron_config={'tensor_model_parallel_size': 1} is not supported")
    read_config(write(tmp_path, megatron_core="antigravity", auto_mapping={"parent_library": "antigravity"}))
    assert "antigravity" not in __import__("sys").modules


def test_an_unknown_field_is_refused_by_name_unless_it_is_off(tmp_path: Path) -> None:
    for value in (None, False, 0, "", [], {}):
        read_config(write(tmp_path, a_field_of_tomorrow=value))
    said = refusal(write(tmp_path, rank_patern={"q_proj": 4}))
    assert said == "unknown field rank_patern={'q_proj': 4} (did you mean 'rank_pattern'?); it may change the result"
    assert refusal(write(tmp_path, **{"a\n\x1b[2J\u202e": 1})).startswith(r"unknown field a \x1b[2J\u202e=1")
    assert len(refusal(write(tmp_path, **{"a" * 10_000: "b" * 10_000}))) < 400


# --- the file -------------------------------------------------------------------------------------

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not readable as JSON"),
    "cut short": (b'{"peft_type": "LOR', "not readable as JSON"),
    "text behind it": (b'{"peft_type": "LORA"} x', "not readable as JSON"),
    "latin-1": (b'{"peft_type": "LORA", "revision": "\xe9"}', "not readable as JSON"),
    "UTF-16": ('{"peft_type": "LORA"}'.encode("utf-16"), "not readable as JSON"),
    "a field twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', "'r' stands there twice"),
    "a field twice in disguise": (b'{"peft_type": "LORA", "r": 4, "\\u0072": 8}', "'r' stands there twice"),
    "a key twice inside": (b'{"peft_type": "LORA", "rank_pattern": {"q": 4, "q": 8}}', "'q' stands there twice"),
    "a tower": (b'{"a":' * 100_000, "not readable as JSON"),
    "a low tower": (b'{"peft_type": "LORA", "auto_mapping": ' + b'{"a":' * 25 + b"{}" + b"}" * 26, "nested deeper"),
    "too long": (b'{"peft_type": "LORA", "revision": "%s"}' % (b"x" * 2**20), "longer than 1,048,576 bytes"),
    "a number of many digits": (b'{"peft_type": "LORA", "r": %s}' % (b"9" * 5000), "not readable as JSON"),
    "a list": (b"[]", "a JSON object is expected, not list"),
    "null": (b"null", "a JSON object is expected, not NoneType"),
    "half a surrogate": (b'{"peft_type": "LORA", "x": "\\ud800"}', r"unknown field x='\ud800'"),
    "another method": (b'{"peft_type": "LOHA"}', "peft_type is 'LOHA'; lorafit opens LORA adapters only"),
    "another method of many lines": (b'{"peft_type": "a\\nb"}', r"peft_type is 'a\nb'"),
    "many methods": (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration_is_one_line(case: str, tmp_path: Path) -> None:
    data, words = FILES[case]
    (tmp_path / CONFIG).write_bytes(data)
    assert words in refusal(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CONFIG)
    assert refusal(tmp_path).startswith(f"no {CONFIG} here")


# --- patterns -------------------------------------------------------------------------------------

PIECES = (
    "a", "b", "1", ".", r"\.", "_", "-", r"\d", r"\w", r"\W", r"\b", r"\B", "^", "$", "|", "(", ")", "(?:", "[ab]",
    "[^a]", "[a-c.]", "]", "*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{1,}", "{,2}", "{", "}", r"\1", r"\Z", r"\A",
    "(?=a)", "(?i:", "[[:alpha:]]", "ab", "a.b",
)  # fmt: skip
NAMES = ("a", "b", "ab", "a.b", "a.a", "b.a1", "aa.b.ab", "a_b.1", "1.a-b", "{2}", "aab", "a.b.a.b")


def first_in_python(keys: list[str], name: str, frame: str) -> int | None:
    match = re.fullmatch if frame == "KEY" else re.match
    rules = [frame.replace("KEY", key) for key in keys]
    return next((number for number, rule in enumerate(rules) if match(rule, name)), None)


@QUICK
@given(keys=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), min_size=1, max_size=3))
@pytest.mark.parametrize("frame", ["KEY", r"(.*\.)?(KEY)$"])
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_a_pattern_means_what_it_means_in_peft_or_is_refused(frame: str, keys: list[str]) -> None:
    try:
        found = file_patterns.first_matches("rank_pattern", keys, NAMES, frame)
    except UsageError:
        return
    try:
        expected = {name: first_in_python(keys, name, frame) for name in NAMES}
    except re.error:
        return  # PEFT refuses it, too
    assert found == {name: number for name, number in expected.items() if number is not None}


@pytest.fixture
def adapter(tiny: Tiny, shaken: Tiny, tmp_path: Path) -> Path:
    """An adapter of two layers in each block, without our own notes: as if PEFT had written it."""
    model = tiny("llama")
    add_lora(model, LoraConfig(r=4, alpha=8, targets=("q_proj", "v_proj")))
    from safetensors.torch import load_file, save_file

    file = save_lora(shaken(model), tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    (tmp_path / "adapter/manifest.json").unlink()
    return tmp_path / "adapter"


def rewrite(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


CATASTROPHES = (
    "(a+)+$", "(.*)*x", "(.*a){25}", "(([a-z._0-9])+.)+x", "(x+x+)+y", "(.|..)*z", "((.*)(.*)(.*)(.*)(.*)(.*)(.*)x)*",
    "(.{0,900}.{0,900}.{0,900})*x", "(" * 900 + "a" + ")*" * 900, "|".join("." * n for n in range(400)),
    ".{1000}" * 500,
)  # fmt: skip


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_catastrophic_pattern_loads_or_is_refused(field: str, adapter: Path, tiny: Tiny) -> None:
    """Python's own matcher would be busy with most of these for longer than anybody waits."""
    model = tiny("llama")
    for pattern in CATASTROPHES:
        rewrite(adapter, **{field: {pattern: 4} if field.endswith("_pattern") else pattern})
        with suppress(AdapterError):
            load_lora(model, adapter)


def test_many_patterns_for_many_layers_are_refused_when_they_cost_too_much(adapter: Path, tiny: Tiny) -> None:
    for keys in ({f".*{n}.*": 4 for n in range(15_000)}, {f".{{0,900}}{n}": 4 for n in range(400)}):
        rewrite(adapter, rank_pattern=keys)
        with pytest.raises(AdapterError, match=r"rank_pattern='.*' is too costly to match: list the layers by name"):
            load_lora(tiny("llama"), adapter)


def test_running_out_of_time_is_a_refusal(adapter: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_patterns, "MATCHING_SECONDS", -1.0)
    rewrite(adapter, alpha_pattern={"q_proj": 4})
    with pytest.raises(AdapterError, match="alpha_pattern='q_proj' is too costly to match"):
        load_lora(tiny("llama"), adapter)


def test_running_out_of_memory_is_never_taken_for_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of RE2 answers 'none' when its memory does not suffice."""
    names, refused = ["b" * 10, "a" * 40 + "x"], set()
    for memory in (2**10, 2**12, 2**14, 2**16):
        monkeypatch.setattr(file_patterns, "MATCHING_MEMORY", memory)
        outcomes = []
        with suppress(UsageError):
            outcomes.append(file_patterns.first_matches("rank_pattern", ["(a|.){40}x", ".*b.{9}"], names))
        assert outcomes in ([], [{"b" * 10: 1, "a" * 40 + "x": 0}])
        refused.add(not outcomes)
    assert refused == {True, False}


BEYOND = (r"(?=.*q_proj).*", r"(?!.*k_proj).*(q|v)_proj", r".*(?<=q_)proj", r"(.*)\1", r".*_proj\Z", "(?P<x>a)(?P=x)",
          "a{1001}", "a*+", "[[:alpha:]]+", "a{,3}", "ä", "\ud800", "(?#comment)a")  # fmt: skip


@pytest.mark.parametrize("pattern", BEYOND)
def test_a_target_pattern_beyond_re2_is_what_the_tensors_say(pattern: str, adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, target_modules=pattern)
    names = [target.name for target in load_lora(tiny("llama"), adapter).targets]
    assert names == [f"model.layers.{n}.self_attn.{layer}_proj" for n in (0, 1) for layer in ("q", "v")]


@pytest.mark.parametrize("pattern", BEYOND)
@pytest.mark.parametrize("field", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_any_other_pattern_beyond_re2_is_refused_with_the_reason(
    field: str, pattern: str, adapter: Path, tiny: Tiny
) -> None:
    rewrite(adapter, **{field: pattern if field == "exclude_modules" else {"k_proj": 1, pattern: 4}})
    with pytest.raises(AdapterError, match=rf"{field}=.*: list the layers by name") as caught:
        load_lora(tiny("llama"), adapter)
    assert repr(pattern)[:80] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("pattern", ["(q", "q)", "[q", "*", "q\\", "[z-a]"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_what_is_no_pattern_at_all_is_refused(field: str, pattern: str, adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, **{field: {pattern: 4} if field.endswith("_pattern") else pattern})
    with pytest.raises(AdapterError, match=rf"{field}=.* is no regular expression \(.+\)"):
        load_lora(tiny("llama"), adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "a|b", "(.*)*"]},
        {"exclude_modules": r"(.*\.)?(k|o|up|down|gate)_proj"},
        {"exclude_modules": ["k_proj", ".*"], "modules_to_save": [".*", "a+"]},
        {"rank_pattern": {r"(.*)q_proj": 4}, "alpha_pattern": {r".*(\.\d+\.)+.*": 3}},
        {"target_modules": None},
        {"target_modules": "(?=x)"},
    ],
)
def test_nothing_from_a_file_becomes_a_pattern_of_pythons(
    fields: dict[str, Any], adapter: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    compiled = patterns._expression
    monkeypatch.setattr(patterns, "_expression", lambda pattern: seen.append(pattern) or compiled(pattern))
    rewrite(adapter, **fields)
    assert len(load_lora(tiny("llama"), adapter).targets) == 4
    assert [pattern for pattern in seen if not re.fullmatch(r"\(\?:(\w|\\[.-]|\|)+\)", pattern)] == []


def test_the_first_matching_key_wins_in_the_order_of_the_file(adapter: Path, tiny: Tiny) -> None:
    for keys, alphas in (
        ({"q_proj": 3, ".*": 5}, (3, 5, 3, 5)),
        ({".*": 5, "q_proj": 3}, (5, 5, 5, 5)),
        ({"layers.1.*": 7, "q_proj": 3}, (3, 8, 7, 7)),
        ({"^q_proj": 7}, (8, 8, 8, 8)),
        ({"^model.layers.0.self_attn.v_proj": 7}, (8, 7, 8, 8)),
        ({"attn.q_proj": 7, "proj": 6, "v_proj|x": 5}, (8, 5, 8, 5)),
        ({"x)|(.*layers.1.*": 7}, (8, 8, 7, 7)),
        ({"model.layers.0)|(x": 7}, (7, 7, 8, 8)),
    ):
        rewrite(adapter, alpha_pattern=keys)
        assert tuple(target.alpha for target in load_lora(tiny("llama"), adapter).targets) == alphas


def test_a_pattern_that_names_no_layer_is_refused(adapter: Path, tiny: Tiny) -> None:
    for value in ("q_proj", "nothing", ["c_attn"]):
        rewrite(adapter, target_modules=value)
        with pytest.raises(AdapterError, match="names no layer of it"):
            load_lora(tiny("llama"), adapter)


def test_modules_in_full_that_the_file_lacks_are_missing(adapter: Path, tiny: Tiny) -> None:
    rewrite(adapter, modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"5 tensors missing: model\.layers\.0\.input_layernorm\.weight"):
        load_lora(tiny("llama"), adapter)
    rewrite(adapter, modules_to_save=["classifier", "score"])
    assert load_lora(tiny("llama"), adapter).trained == ()


# --- what is saved can be loaded ------------------------------------------------------------------


def test_what_could_not_be_loaded_is_not_written(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    add_lora(model, LoraConfig(alpha=1e5))
    with pytest.raises(UsageError, match=r"cannot be saved in PEFT's format: lora_alpha=100000: a number greater"):
        save_lora(model, tmp_path / "adapter")
    strange = nn.Sequential()
    strange.add_module("größe", nn.Linear(2, 2))
    add_lora(strange)
    with pytest.raises(UsageError, match=r"ASCII without blanks, not 'base_model\.model\.größe\.lora_A\.weight'"):
        save_lora(strange, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), max_size=8, unique=True),
    chosen=st.sets(st.integers(0, 7)),
)
def test_the_endings_written_for_some_layers_name_exactly_them(names: list[str], chosen: set[int]) -> None:
    some = [names[number] for number in sorted(chosen) if number < len(names)]
    said = peft_config.endings_or_regex(some, names)
    pattern = said if isinstance(said, str) else tuple(said)
    assert [name for name in names if patterns.matches(pattern, name)] == [name for name in names if name in some]
