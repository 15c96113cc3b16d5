"""The site's plan, without mkdocs: every page has its line in `nav`, and every line its page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLAN = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def named() -> list[str]:
    """The pages of `nav`."""
    return re.findall(r"^ +- .*: (\S+\.md)$", PLAN.partition("\nnav:\n")[2], re.M)


def outside() -> dict[str, str]:
    """Pages that docs/site_hooks.py takes from elsewhere, as it writes them down, and those of the notebooks."""
    tree = ast.parse((ROOT / "docs" / "site_hooks.py").read_text(encoding="utf-8"))
    (value,) = (
        n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "OUTSIDE"
    )
    assert isinstance(value, ast.Dict)
    pages = {
        ast.literal_eval(k): ast.literal_eval(v) for k, v in zip(value.keys, value.values, strict=True) if k
    }
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    return pages | {f"notebooks/{p.stem}.md": str(p.relative_to(ROOT)) for p in notebooks}


def test_nav_has_every_page_once() -> None:
    docs = ROOT / "docs"
    pages = [p.relative_to(docs).as_posix() for p in docs.rglob("*.md")]
    assert sorted(named()) == sorted([*pages, *outside()]), "mkdocs.yml: nav"


def test_pages_from_elsewhere_exist() -> None:
    assert "README.md" in outside().values() and "CHANGELOG.md" in outside().values()
    assert all((ROOT / path).exists() for path in outside().values())


def test_files_of_the_plan_exist() -> None:
    hooks = re.findall(r"^hooks: \[(\S+)\]$", PLAN, re.M)
    styles = [f"docs/{name}" for name in re.findall(r"^extra_css: \[(\S+)\]$", PLAN, re.M)]
    assert len(hooks) == len(styles) == 1
    assert all((ROOT / path).exists() for path in hooks + styles)


def test_nothing_is_fetched_from_elsewhere() -> None:
    """By readers' browsers: fonts and scripts are the system's and the theme's own."""
    assert re.search(r"^  font: false\b", PLAN, re.M)
    assert not re.findall(r"https?://", PLAN)


def test_what_builds_it_is_pinned() -> None:
    lines = (ROOT / "requirements-site.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]
    assert len(wanted) > 2 and all(re.fullmatch(r"[\w-]+==[\d.]+", w) for w in wanted), wanted
    assert [w for w in wanted if w.startswith("ruff==")] == [
        w
        for w in (ROOT / "requirements-lint.txt").read_text(encoding="utf-8").split()
        if w.startswith("ruff==")
    ], "signatures are formatted by the ruff of make lint"
