"""The pages: every block of Python in them runs, every link leads somewhere, the reference is that of the source.

Blocks of a page run in order in one namespace, in an empty folder. Directly before a block, an HTML comment

    <!-- not run: why -->      leaves it out
    <!-- runs before: code --> is run first, for what the page need not show
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import script
from torch import nn

import flatlora_kernels
from flatlora_kernels.methods import METHODS

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
BLOCK = re.compile(
    r"(?:<!-- (not run|runs before): ((?:(?!-->).)*)-->\n)?^```python\n(.*?)^```$", re.M | re.S
)
# The functions of the API as they are declared: no program, see test_signatures. And scripts for several processes, see
# test_distributed_page.py.
DECLARATIONS = ("api.md", "distributed.md")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and code of what is to be run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        marker, content, code = found.groups()
        if marker == "runs before":
            yield text.count("\n", 0, found.start(2)), content
        if marker != "not run":
            yield text.count("\n", 0, found.start(3)), code


def with_python() -> list[Path]:
    return [p for p in PAGES if p.name not in DECLARATIONS and "```python" in p.read_text(encoding="utf-8")]


class Attention(nn.Module):
    """What README.md's `model` is: something that has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> Any:
        return type("Output", (), {"loss": (self.q_proj(x) * self.v_proj(x)).square().mean()})


def names(page: Path) -> dict[str, Any]:
    """What a page takes for granted."""
    if page.name == "README.md":
        return {"model": Attention(), "data": [torch.randn(4, 32) for _ in range(3)]}
    return {}


@pytest.mark.parametrize("page", with_python(), ids=name_of)
def test_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    found = list(blocks(page))
    for package in ("peft", "transformers", "accelerate", "trl"):
        if any(re.search(rf"^\s*(from|import) (\w+\.)*{package}\b", code, re.M) for _, code in found):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        namespace = {"__name__": "page", **names(page)}
        for line, code in found:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_signatures() -> None:
    """The declarations of docs/api.md are those of the package."""
    declared = [code for _, code in blocks(ROOT / "docs" / "api.md")]
    assert declared
    for code in declared:
        text = re.sub(r" *#.*", "", code).rstrip()
        space: dict[str, Any] = {}
        exec(f"from __future__ import annotations\ndef {text}: ...", space)
        name = text.partition("(")[0]
        own = inspect.signature(getattr(flatlora_kernels, name)).parameters.values()
        shown = inspect.signature(space[name]).parameters.values()
        assert [(p.name, p.default, p.kind) for p in shown] == [(p.name, p.default, p.kind) for p in own]


def test_nothing_is_left_out_by_mistake() -> None:
    """A fence that is not found, a misspelt marker or one that stands before no block would go unnoticed."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(BLOCK.finditer(text))
        assert len(found) == len(re.findall(r"^\s*```py", text, re.M)), name_of(page)
        marked = sum(bool(f[1]) for f in found)
        assert marked == len(re.findall(r"-->\s*```py", text)), name_of(page)
        assert marked == len(re.findall(r"<!-- (?:not run|runs before)", text)), name_of(page)


def test_methods_page_has_every_method() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)`", (ROOT / "docs" / "methods.md").read_text(), re.M)
    assert dict(rows) == {name: method.__name__ for name, method in METHODS.items()}


def maker() -> Any:
    return script("docs/make_reference.py")


def test_reference_is_up_to_date() -> None:
    make = maker()
    assert make.PAGE.read_text(encoding="utf-8") == make.render(), "run: python docs/make_reference.py"
    assert make.public_names("flatlora_kernels") == flatlora_kernels.__all__


def test_reference_has_every_docstring() -> None:
    """Nothing public without one."""
    make = maker()
    for module in filter(make.source, make.MODULES):
        for name in make.public_names(module):
            node = make.find(module, name)
            if node is None:
                assert name.isupper(), f"{module}.{name} is neither a constant nor found"
                continue
            assert make.docstring(node), f"{module}.{name} has no docstring"


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r'<a name="([^"]+)"', text))
    return named | {anchor for _, anchor in maker().anchors(text)}


def test_anchors_are_githubs() -> None:
    page = "# One `two_3`: (four)\n```text\n# no heading\n```\n## Same\n## Same\n### [a-b](c.md), d?\n"
    assert [a for _, a in maker().anchors(page)] == ["one-two_3-four", "same", "same-1", "a-b-d"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    """Files and headings of the repository; the web is left alone."""
    text = re.sub(r"`[^`\n]+`(?!\])", "", without_code(page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_page_begins_with_its_readers_and_ends_with_the_next(page: Path) -> None:
    """A paragraph right below the title says for whom the page is, the last line where to go next; see test_links."""
    title, first, *rest = page.read_text(encoding="utf-8").strip().split("\n\n")
    assert title.startswith("# ") and "\n" not in title
    assert first.startswith("For ")
    last = rest[-1].splitlines()
    assert len(last) == 1 and last[0].startswith("Next: ")
    assert re.search(r"\]\([\w./#-]+\)", last[0])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_exist(page: Path) -> None:
    """Paths in backticks; what a build or a run makes is not there yet."""
    text = page.read_text(encoding="utf-8")
    folders = "docs|tests|examples|flatlora_kernels|csrc|triton_kernels|bench"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|md|h|cuh?|cpp|json|sh|txt))`", text):
        assert (ROOT / path).exists(), path
