"""What mkdocs needs to make a site of pages that were written for a code host; see mkdocs.yml."""

from __future__ import annotations

import json
import posixpath
import re
import runpy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NOTEBOOKS = "examples/notebooks"
# Pages that do not lie in docs/: their name on the site, and their place in the repository.
OUTSIDE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    **{f"notebooks/{p.stem}.md": f"{NOTEBOOKS}/{p.name}" for p in sorted((ROOT / NOTEBOOKS).glob("*.ipynb"))},
}


def path_of(uri: str) -> str:
    """Of a page of the site in the repository."""
    return OUTSIDE.get(uri, f"docs/{uri}")


def uri_of(path: str) -> str | None:
    """Of a file of the repository on the site, None if it cannot be there."""
    inside = path.removeprefix("docs/") if path.startswith("docs/") else None
    return next((uri for uri, outside in OUTSIDE.items() if outside == path), inside)


class Links(Treeprocessor):
    """Relative links lead from a page's place in the repository; here they lead from its place on the site.

    A file that is no page is linked at `repo_url`; without that, its name is plain text. What is nowhere is left to
    mkdocs, which warns.
    """

    page: Any = None
    files: Any = None
    repository: str = ""

    def run(self, root: Element) -> None:
        here = self.page.file.src_uri
        for code in root.iterfind(".//td//code"):  # a code host drops the backslash
            code.text = (code.text or "").replace(r"\|", "|")
        for element in root.iter():
            key = {"a": "href", "img": "src"}.get(element.tag)
            url = urlsplit(element.get(key, "")) if key else None
            if key is None or url is None or url.scheme or url.netloc or not url.path:
                continue
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(here)), url.path))
            uri = uri_of(path) if path != path_of(here) else None  # a notebook names its own file
            file = self.files.get_file_from_path(uri) if uri else None
            if file and file.inclusion.is_included():
                place = posixpath.relpath(uri, posixpath.dirname(here) or ".")
                element.set(key, url._replace(path=place).geturl())
            elif (ROOT / path).exists() and self.repository:
                element.set(key, f"{self.repository.rstrip('/')}/blob/HEAD/{path}")
            elif (ROOT / path).exists():
                element.tag = "span"
                element.attrib.clear()


LINKS = Links()


class Pages(Extension):
    """Markdown as the pages have it: links of the repository, and no HTML, so that f<float> is text."""

    def extendMarkdown(self, md: Any) -> None:  # noqa: N802
        md.treeprocessors.register(
            LINKS, "repository", 5
        )  # after "inline" and before "relpath", which is mkdocs'
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


def on_config(config: Any) -> None:
    LINKS.repository = config.repo_url or ""
    config.markdown_extensions.append(Pages())


def on_files(files: Any, config: Any) -> None:
    for uri, path in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        content = notebook(text, path) if path.endswith(".ipynb") else text
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    LINKS.page, LINKS.files = page, files
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # its tab has no other page
    if page.file.src_uri == "reference.md":
        markdown = reference(markdown)
    return re.sub(r"^<!-- .*?-->\n", "", markdown, flags=re.M | re.S)


def notebook(text: str, path: str) -> str:
    """The cells as Markdown; a line below the title says where the notebook is."""
    title, *cells = json.loads(text)["cells"]
    place = f"The notebook is [`{path}`]({posixpath.basename(path)}); what it prints is seen when it runs."
    shown = ["".join(title["source"]), place]
    for cell in cells:
        source = "".join(cell["source"])
        shown.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(shown) + "\n"


def reference(markdown: str) -> str:
    """docs/reference.md with its headings and signatures, below which mkdocstrings puts what it reads in the source."""
    make = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    also = {path.rpartition(".")[2]: path for path in make["ALSO"]}

    def entry(found: re.Match[str]) -> str:
        name, signature = found.groups(default="")
        path = also.get(name, f"flatlora_kernels.{name}")
        if make["source"](path):  # a function in a module of its own name
            path += "." + path.rpartition(".")[2]
        return f"### `{name}`\n\n{signature.replace('```text', '```python', 1)}\n\n::: {path}\n\n"

    one = r"^### `(.*?)`\n\n(```text\n.*?^```\n)?.*?(?=^#{2,3} |^Next: )"
    entries = re.sub(one, entry, markdown, flags=re.M | re.S)
    # GitHub ends the anchor of a heading's second place with -1, Python-Markdown with _1.
    return re.sub(r"\(#([a-z_]+)-(\d)\)", r"(#\1_\2)", entries)
