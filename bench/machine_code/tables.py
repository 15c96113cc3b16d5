"""Pages with what compilers made of the kernels: their tables written, read back, and compared with what is measured.

The text above the first table and below the last belongs to the page; it is edited there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

Rows = list[Any]
Key = tuple[str, ...]
Known = dict[str, dict[Key, dict[str, float]]]  # by heading of a table, names of a row, compared field
# Of columns, where they are not the fields'.
_HEADINGS = {"dtype": "type", "case": "call", "registers": "regs"}


class Page(NamedTuple):
    path: Path
    regenerate: str
    columns: dict[str, str]  # fields of a row; of those that are numbers the format
    names: int  # the first columns, which name a row; the second of them is the target
    compared: tuple[str, ...]  # fields that may only go down
    slack: float
    between: str = " | "  # of a row's names in messages

    @property
    def place(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def header(self) -> str:
        return _line([_HEADINGS.get(field, field) for field in self.columns])

    def cells(self, row: Any) -> list[str]:
        values = [(getattr(row, field), form) for field, form in self.columns.items()]
        return ["" if value is None else format(value, form) for value, form in values]

    def key(self, row: Any) -> Key:
        return tuple(self.cells(row)[: self.names])

    def name(self, heading: str, row: Any) -> str:
        return (f"{heading}: " if heading else "") + self.between.join(self.key(row))

    def figures(self, cells: list[str]) -> dict[str, float]:
        named = dict(zip(self.columns, cells, strict=True))
        return {field: json.loads(named[field] or "0") for field in self.compared}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render(page: Page, tables: dict[str, Rows]) -> str:
    """tables: rows by heading; "" = none."""
    dashes = _line(["---:" if form else "---" for form in page.columns.values()])
    found = []
    for heading, rows in tables.items():
        lines = [_line(page.cells(row)) for row in sorted(rows, key=page.key)]
        found.append("\n".join([*([f"## {heading}\n"] if heading else []), page.header, dashes, *lines]))
    return "\n\n".join(found)


def document(page: Page, tables: dict[str, Rows]) -> str:
    """The page as it is, with these tables in place of its own."""
    first = re.compile(rf"^(## .+\n\n)?{re.escape(page.header)}$", re.MULTILINE)
    text = page.path.read_text()
    above = first.split(text, maxsplit=1)[0].rstrip()
    below = text.rpartition("\n|")[2].partition("\n")[2].strip()
    return "\n\n".join([above, render(page, tables), below]).rstrip() + "\n"


def read(page: Page, text: str | None = None) -> Known:
    """The tables of a page; text: in place of what is committed."""
    found: Known = {}
    heading, table = "", None
    for line in (page.path.read_text() if text is None else text).splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line == page.header:
            table = found[heading] = {}
        elif not line.startswith("|"):
            table = None
        elif table is not None and "---" not in cells:
            table[tuple(cells[: page.names])] = page.figures(cells)
    return found


def problems(page: Page, heading: str, rows: Rows) -> list[str]:
    """What is wrong whatever the tables say."""
    return [f"{page.name(heading, row)}: {problem}" for row in rows for problem in row.problems]


def compare(
    page: Page, heading: str, rows: Rows, known: Known, targets: Collection[str], slack: float | None = None
) -> list[str]:
    """Where what was measured does not match the tables, or exceeds them by more than `slack`.

    A heading without a table is held to the highest figure of the others. targets: those of which all rows were
    measured.
    """
    if not known:
        return [f"no table in {page.place}; {page.regenerate}"]
    tables = [known[heading]] if heading in known else list(known.values())
    found = []
    for row in rows:
        name = page.name(heading, row)
        before = [table[page.key(row)] for table in tables if page.key(row) in table]
        if not before:
            found.append(f"{name}: not in {page.place}; {page.regenerate}")
        for field, value in page.figures(page.cells(row)).items():
            most = max((figures[field] for figures in before), default=value)
            if value > most * (slack or page.slack):
                found.append(f"{name}: {field} {value}, {page.place} has {most}, which may only go down")
    stale = {key for table in tables for key in table if key[1] in targets} - set(map(page.key, rows))
    for key in sorted(stale):
        name = page.between.join(key)
        found.append(f"{page.place} has a row that nothing compiles: {name}; {page.regenerate}")
    return found


# --- The commands ---


def add_arguments(parser: argparse.ArgumentParser, page: Page, only: str) -> None:
    parser.add_argument("--write", action="store_true", help=page.place)
    parser.add_argument("--accept", action="store_true", help="with --write: figures that went up, too")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help=f"{only} contain these words")


def conclude(page: Page, tables: dict[str, Rows], args: argparse.Namespace, *wrong: str) -> int:
    """Prints the tables, writes them or compares, and says what is wrong."""
    if args.write and args.only:
        raise SystemExit("--write takes no --only")
    known = read(page)
    targets = () if args.only else {key[1] for table in known.values() for key in table}
    found = [p for heading, rows in tables.items() for p in problems(page, heading, rows)] + list(wrong)
    print(render(page, tables))
    slack = 1.0 if args.write else None
    differs = [p for table in tables.items() for p in compare(page, *table, known, targets, slack)]
    if args.write:
        higher = [p for p in differs if p.endswith("may only go down")]
        if higher and not args.accept:
            print("\nNot written:", *higher, sep="\n  ")
            return 1
        page.path.write_text(document(page, tables))
        print(f"\nWritten: {page.path}")
    else:
        found += differs
    if found:
        print("\nWrong:", *found, sep="\n  ")
    return 1 if found else 0
