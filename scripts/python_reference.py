"""The names that a training script imports, read from the sources without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import elastic_ckpt

ROOT = Path(__file__).parents[1]


def python() -> Iterator[str]:
    """Yield a section per public name."""
    yield "## Python"
    yield f"`from elastic_ckpt import {', '.join(elastic_ckpt.__all__)}`"
    for name in elastic_ckpt.__all__:
        home = ROOT / (elastic_ckpt._HOMES[name].replace(".", "/") + ".py")
        tree = ast.parse(home.read_text(encoding="utf-8"))
        (node,) = (
            one
            for one in tree.body
            if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name
        )
        yield f"### {name}"
        if isinstance(node, ast.FunctionDef):
            yield signature(name, node)
            yield from docstring(node)
        else:
            yield from class_(node)


def class_(node: ast.ClassDef) -> Iterator[str]:
    """Yield the constructor, docstring and public members of a class."""
    methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
    if "__init__" in methods:
        yield signature(node.name, methods["__init__"])
    else:
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
        if fields:
            yield code(node.name, fields)
    yield from docstring(node)
    for name, method in methods.items():
        if name.startswith("_"):
            continue
        marks = {ast.unparse(mark) for mark in method.decorator_list}
        shown = f"{re.findall('[A-Z][a-z]+', node.name)[-1].lower()}.{name}"
        if "property" in marks and method.returns:
            yield code_line(f"{shown}: {ast.unparse(method.returns)}")
        else:
            yield signature(shown, method)
        yield from docstring(method)


def signature(name: str, node: ast.FunctionDef) -> str:
    """Return a call signature as a code block."""
    arguments = node.args
    if arguments.args and arguments.args[0].arg == "self":
        arguments.args.pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and name[0].islower() else ""
    return code(name, split(ast.unparse(arguments)), returns)


def split(arguments: str) -> list[str]:
    """Split arguments and restore their spacing: ``step: int = 0``."""
    depth, found = 0, [""]
    for char in arguments:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [re.sub(r"^(\w+: [^=]+?) ?= ?", r"\1 = ", one.strip()) for one in found if one]


def code(name: str, arguments: list[str], returns: str = "", width: int = 96) -> str:
    """Return a Python block, with one argument per line if it is too wide."""
    text = f"{name}({', '.join(arguments)}){returns}"
    if len(text) > width:
        text = f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){returns}"
    return f"```python\n{text}\n```"


def code_line(text: str) -> str:
    """Return an attribute as a Python block."""
    return f"```python\n{text}\n```"


def docstring(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Yield the paragraphs of a docstring, with arguments and errors as lists."""
    text = re.sub(r":\w+:`([^`]+)`|``([^`]+)``", r"`\1\2`", ast.get_docstring(node) or "")
    for part in text.split("\n\n"):
        head, _, body = part.partition("\n")
        if head in ("Args:", "Attributes:", "Returns:", "Raises:"):
            if head == "Returns:":
                yield f"Returns: {' '.join(body.split())}"
                continue
            items = re.split(r"\n(?=    \S)", "\n" + body)[1:]
            yield f"{head.replace('Args', 'Arguments')}\n\n" + "\n".join(map(item, items))
        else:
            yield " ".join(part.split())


def item(text: str) -> str:
    """Return one argument or error, with its name as code."""
    name, colon, meaning = " ".join(text.split()).partition(": ")
    if not colon or not re.fullmatch(r"[\w., ()]+", name):
        return f"- {' '.join(text.split())}"
    return f"- `{name}`: {meaning}"
