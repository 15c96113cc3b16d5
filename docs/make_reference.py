"""Writes docs/reference.md from the docstrings: `python docs/make_reference.py`.

Reads the source and imports none of it, so that neither torch nor PEFT is needed.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
MODULES = (
    "flatlora_kernels",
    "flatlora_kernels.integrations.peft",
    "flatlora_kernels.integrations.transformers",
    "flatlora_kernels.methods",
    "flatlora_kernels.flatness",
)
ALSO = (
    "flatlora_kernels.train.attach.Attachment",
    "flatlora_kernels.choice.dispatch.Explanation",
    "flatlora_kernels.integrations.experts.FlatParamWrapper",
)
SECTIONS = ("Args", "Returns", "Raises", "Yields")

Definition = ast.ClassDef | ast.FunctionDef


def source(module: str) -> Path | None:
    """The file of `module`, None where there is none."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.exists()), None)


def tree(module: str) -> ast.Module:
    path = source(module)
    if path is None:
        raise FileNotFoundError(f"{module}: no such module")
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """`__all__`, in its order; without one the public classes and functions that the module defines."""
    body = tree(module).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return [n.name for n in body if isinstance(n, Definition) and not n.name.startswith("_")]


def find(module: str, name: str) -> Definition | None:
    """The definition of `name`, where need be in the module that it is imported from; None for a constant."""
    for node in tree(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            path = source(module)
            assert path is not None
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            return find(".".join([*package, *(node.module or "").split(".")]).rstrip("."), name)
    return None


def signature(name: str, node: ast.FunctionDef, bound: bool) -> str:
    arguments = ast.parse(ast.unparse(node)).body[0].args  # a copy
    if bound:
        (arguments.posonlyargs or arguments.args).pop(0)
    parts = ast.unparse(arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{name}({parts}){returns}"
    if len(line) <= 100:
        return line
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_argument(a, d) for a, d in zip(arguments.args, defaults, strict=True)]
    if arguments.vararg:
        shown.append("*" + ast.unparse(arguments.vararg))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        shown.append("**" + ast.unparse(arguments.kwarg))
    return "\n".join([f"{name}(", *(f"    {part}," for part in shown), f"){returns}"])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text}{' = ' if argument.annotation else '='}{ast.unparse(default)}"


def docstring(node: Definition) -> str:
    """The docstring as Markdown."""
    return "\n".join(_markdown(inspect.cleandoc(ast.get_docstring(node) or ""))).strip()


def _markdown(text: str) -> Iterator[str]:
    section = None
    for line in text.splitlines():
        bare = line.strip()
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = bare
            yield f"**{section}**"
            yield ""
        elif section and line.startswith("    "):
            entry = re.match(r"    (\S[^:`]*): (.*)", line)
            if section in ("Args:", "Raises:") and entry:
                names = ", ".join(f"`{n.strip()}`" for n in entry[1].split(","))
                yield f"- {names}: {entry[2]}"
            else:
                yield f"  {bare}" if section in ("Args:", "Raises:") else bare
        else:
            if bare:
                section = None
            yield "" if bare == "::" else line.removesuffix(":") if bare.endswith("::") else line


def entry(title: str, node: Definition, level: int = 3) -> Iterator[str]:
    heading = "#" * level
    if isinstance(node, ast.FunctionDef):
        yield from (f"{heading} `{title}`", "", "```text", signature(node.name, node, False), "```", "")
        yield docstring(node)
        yield ""
        return
    bases = [b for b in map(ast.unparse, node.bases) if b != "object"]
    yield from (f"{heading} `{title}`", "")
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    init = methods.get("__init__")
    if init:
        yield from ("```text", signature(node.name, init, True).removesuffix(" -> None"), "```", "")
    if bases:
        yield from (f"Base: {', '.join(f'`{b}`' for b in bases)}.", "")
    yield docstring(node)
    yield ""
    for name, method in methods.items():
        decorators = [ast.unparse(d) for d in method.decorator_list]
        if name.startswith("_") or not ast.get_docstring(method) or f"{name}.setter" in decorators:
            continue
        yield f"{heading}# `{node.name}.{name}`"
        yield ""
        if "property" in decorators:
            returns = f", {ast.unparse(method.returns)}" if method.returns is not None else ""
            yield f"Property{returns}."
        else:
            yield from ("```text", signature(name, method, "staticmethod" not in decorators), "```")
        yield ""
        yield docstring(method)
        yield ""


def anchors(page: str) -> list[tuple[str, str]]:
    """Each heading of a page outside its blocks of code, and the anchor that GitHub gives it."""
    found: dict[str, str] = {}
    headings = []
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name, number = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"), 0
        while (unique := f"{name}-{number}" if number else name) in found:
            number += 1
        found[unique] = heading
        headings.append((heading, unique))
    return headings


def title(module: str, name: str) -> str:
    """Two modules have functions of one name; those of the package itself need no prefix."""
    return f"{module}.{name}".removeprefix("flatlora_kernels.")


def render() -> str:
    """The whole page."""
    also = [tuple(path.rsplit(".", 1)) for path in ALSO]
    chapters = [(m, [(m, name) for name in public_names(m)]) for m in MODULES if source(m)]
    contents, body = [], []
    for module, names in [*chapters, (None, also)]:
        chapter = f"`{module}`" if module else "Returned by these"
        body += [f"## {chapter}", ""]
        if module and module != MODULES[0]:
            body += [(ast.get_docstring(tree(module)) or "").split("\n\n")[0].removesuffix(":"), ""]
        links = []
        for where, name in names:
            node, heading = find(where, name), title(where, name) if module else name
            if node is None and not name.isupper():
                raise LookupError(f"{where}.{name}: no such class or function")
            links.append((name, f"`{heading}`" if node else None))
            body += entry(heading, node) if node else []
        contents.append((chapter, links))
    text = "\n".join(line.rstrip() for line in "\n".join(body).splitlines())
    places = dict(anchors("# Reference\n" + text))
    lines = [
        "# Reference",
        "",
        "For those who look up a name. This page has every public name with its docstring, made by",
        "`python docs/make_reference.py`. [api.md](api.md) is the contract in short. `M` = rows of `x`,",
        "`N` = out_features, `K` = in_features, `r` = rank.",
        "",
    ]
    for chapter, links in contents:
        shown = [f"[`{name}`](#{places[heading]})" if heading else f"`{name}`" for name, heading in links]
        lines.append(f"* {chapter}: {', '.join(shown)}")
    following = (
        "Next: [guide.md](guide.md), the way in; or [faq.md](faq.md), when something is not as expected."
    )
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, "", text, "", following])).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
