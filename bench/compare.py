"""Two runs side by side."""

from __future__ import annotations

from .results import Results, Row, key
from .table import case_name, markdown, microseconds, ratio


def compare(a: Results, b: Results) -> str:
    """Rows that both runs have, with B as a multiple of A.

    Where a row has a ratio to plain, that compares the runs better: both its parts were timed side by side. A
    star says that the two ratios' ranges from the 20th to the 80th percentile do not touch.
    """
    notes = [
        f"{name}: A has {a.meta.get(name)}, B has {b.meta.get(name)}"
        for name in ("hardware", "threads", "torch", "triton", "python", "commit", "dirty")
        if _text(a.meta.get(name)) != _text(b.meta.get(name))
    ]
    of_b = {key(r): r for r in b.rows}
    both = [(r, of_b.pop(key(r))) for r in a.rows if key(r) in of_b]
    only_a, only_b = len(a.rows) - len(both), len(of_b)
    if only_a or only_b:
        notes.append(f"rows that only one has: {only_a} in A, {only_b} in B")
    header = ["what", "M", "dtype", "mode", "noise", "provider", "A", "B", "B / A"]
    header += ["A to plain", "B to plain", "B / A"]
    return "\n\n".join([*notes, markdown(header, [_line(ra, rb) for ra, rb in both])])


def _text(value: object) -> str:
    """As a CSV has it."""
    return "" if value is None else str(value)


def _line(a: Row, b: Row) -> list[str]:
    what = case_name(a) if a.get("model") else f"{a['N']}x{a['K']}"
    what = what if a["kind"] == "linear" else f"{a['kind']} {what}"
    about = [what, *(str(a.get(k) or "") for k in ("M", "dtype", "mode", "noise", "provider"))]
    times = [*(microseconds(r["median_us"]) for r in (a, b)), ratio(b["median_us"] / a["median_us"])]
    if a.get("to_plain") is None or b.get("to_plain") is None:
        return [*about, *times, "", "", ""]
    apart = a["to_plain_p80"] < b["to_plain_p20"] or b["to_plain_p80"] < a["to_plain_p20"]
    change = ratio(b["to_plain"] / a["to_plain"]) + (" *" if apart else "")
    return [*about, *times, ratio(a["to_plain"]), ratio(b["to_plain"]), change]
