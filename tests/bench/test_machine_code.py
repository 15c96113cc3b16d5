"""The pages of `bench offline` and `bench compiled`: what is written, what is refused, and what is said to be wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.machine_code import compiled, offline, tables  # noqa: E402


class Row(NamedTuple):
    kernel: str
    target: str
    instr: float | None
    registers: int
    problems: tuple[str, ...] = ()


TEXT = "# A page\n\nIts text.\n\n| column | |\n| --- | --- |\n| instr | what |\n"
ROWS = [Row("b", "sm80", 2.5, 40), Row("a", "sm80", None, 30)]
WRITTEN = """
| kernel | target | instr | regs |
| --- | --- | ---: | ---: |
| a | sm80 |  | 30 |
| b | sm80 | 2.50 | 40 |
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tables.Page:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    columns = {"kernel": "", "target": "", "instr": ".2f", "registers": "d"}
    (tmp_path / "page.md").write_text(TEXT)
    return tables.Page(tmp_path / "page.md", "make it", columns, 2, ("instr", "registers"), 1.05)


def run(page: tables.Page, rows: list[Row], *words: str) -> int:
    parser = argparse.ArgumentParser()
    tables.add_arguments(parser, page, "rows that")
    return tables.conclude(page, {"": rows}, parser.parse_args(words))


def test_text_stays_and_tables_are_written_anew(page: tables.Page) -> None:
    for rows in ([*ROWS, Row("c", "sm80", 9.0, 90)], ROWS):
        assert run(page, rows, "--write") == 0
    assert page.path.read_text() == TEXT + WRITTEN
    assert run(page, ROWS) == 0
    assert run(page, [ROWS[0], ROWS[1]._replace(problems=("spills",))]) == 1


def test_figures_that_went_up_are_not_written_unless_accepted(
    page: tables.Page, capsys: pytest.CaptureFixture[str]
) -> None:
    run(page, ROWS, "--write")
    higher = [ROWS[0]._replace(instr=2.51), ROWS[1]]
    assert run(page, higher) == 0  # within the slack
    assert run(page, higher, "--write") == 1 and page.path.read_text() == TEXT + WRITTEN
    assert "Not written:" in capsys.readouterr().out
    assert run(page, higher, "--write", "--accept") == 0 and "2.51" in page.path.read_text()
    with pytest.raises(SystemExit, match="--only"):
        run(page, ROWS, "--write", "--only", "b")


def test_what_does_not_match_is_said(page: tables.Page, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(page, ROWS) == 1
    assert "no table in page.md; make it" in capsys.readouterr().out
    run(page, ROWS, "--write")
    for rows, said in (
        (
            [ROWS[0]._replace(registers=43), ROWS[1]],
            "b | sm80: registers 43, page.md has 40, which may only go down",
        ),
        ([*ROWS, Row("c", "sm80", 1.0, 1)], "c | sm80: not in page.md; make it"),
        (ROWS[:1], "page.md has a row that nothing compiles: a | sm80; make it"),
    ):
        capsys.readouterr()
        assert run(page, rows) == 1
        assert capsys.readouterr().out.partition("Wrong:")[2].split("\n  ")[1].strip() == said
    assert run(page, ROWS[:1], "--only", "b") == 0  # the rest was not compiled


@pytest.mark.parametrize("page", [offline.PAGE, compiled.PAGE], ids=["offline", "compiled"])
def test_committed_pages_are_read_whole(page: tables.Page) -> None:
    lines = page.path.read_text().partition(page.header)[2].splitlines()
    rows = {line for line in lines if line.startswith("| ")} - {page.header}
    assert sum(map(len, tables.read(page).values())) >= len(rows) - 1 > 100  # the line of dashes
