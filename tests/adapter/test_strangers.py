"""A few hundred of the soak's mutated adapters: each loads as what it is, or is refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from soak import adapters, configs

CASES = 300


@pytest.mark.parametrize("run", [adapters.run, configs.run], ids=["weights", "configurations"])
def test_a_mutated_adapter_loads_as_what_it_is_or_is_one_line(
    run: Callable[[int, Path], str | None], tmp_path: Path
) -> None:
    broken = []
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        broken.append(run(case, folder))
    assert list(filter(None, broken)) == []
