"""Tables are printed whole wherever output goes."""

from __future__ import annotations

import pytest
from rich.table import Table

from clover_vllm.base.show import print_table


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_no_number_is_cut_in_a_narrow_output(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    numbers = [f"{10**8 + i}.25 [{10**8}, {10**9}]" for i in range(12)]
    table = Table(title="many columns")
    for i in range(len(numbers)):
        table.add_column(f"column {i}")
    table.add_row(*numbers)
    print_table(table)
    printed = capsys.readouterr().out
    assert all(number in printed for number in numbers)
    assert "…" not in printed
