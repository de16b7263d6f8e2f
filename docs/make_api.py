"""Write the api pages from the docstrings of what `atcache` exports: `python docs/make_api.py`.

The pages are never edited by hand; a test compares them with what this script makes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import os.path
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import atcache

FOLDER = Path(__file__).parent
WIDTH = 120
MADE = "Arguments with a default are given by name. This page is made from docstrings, by `python docs/make_api.py`."
LOOKING = ("open", "Cache", "View", "corrupt")
LOOP = ("batches", "Batches", "TrainingBatch", "make_student", "Pairing", "regrid_maps")
MAKING = ("pack", "pretrain", "own_teacher", "plan", "build", "verify")
MOVING = ("merge", "push", "pull")
OF_A_MAP = ("rows", "places", "whole_maps")
OF_SEVERAL_MAPS = ("between_heads", "layers", "agreement")
TRAINING = ("probe", "train", "train_sweep", "evaluate", "report", "maps", "compare")
SHOWING = ("show",)

# A part of a docstring that begins with a word and a colon, and is indented.
SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?:    .*\n|\n)+)", re.MULTILINE)
# The beginning of an argument's or an error's text in such a part.
ENTRY = re.compile(r"^(\w+): ", re.MULTILINE)


def make_pages() -> dict[str, str]:
    """The text of each page, by file name."""
    below = {
        "api/statistics.md": ("Statistics", [*render_text(documented(atcache.stats)), *statistics(OF_A_MAP)]),
        "api/agreement.md": ("Statistics of several maps", statistics(OF_SEVERAL_MAPS)),
        "api/pictures.md": ("Pictures", [*functions_of(atcache.pictures), *render_names(SHOWING)]),
        "api/training.md": ("A training loop of your own", render_names(LOOP)),
        "api/caches.md": ("Making and verifying caches", render_names(MAKING)),
        "api/moving.md": ("Merging, publishing and fetching caches", render_names(MOVING)),
        "api/runs.md": ("Training and evaluating", render_names(TRAINING)),
    }
    links = "\n".join(f"- [{title}]({page})" for page, (title, _) in below.items())
    parts = {"api.md": ["# The API", *render_text(documented(atcache)), MADE, links, *api_parts()]}
    for page, (title, texts) in below.items():
        parts[page] = [f"# {title}", "A part of [the API](../api.md).", MADE, *texts]
    titles = {**{page: title for page, (title, _) in below.items()}, "format.md": "The format"}
    return {
        page: joined([*texts, f"Next: [{title}]({os.path.relpath(following, Path(page).parent)})"])
        for (page, texts), (following, title) in zip(parts.items(), titles.items(), strict=True)
    }


def api_parts() -> list[str]:
    """What api.md holds below its introduction."""
    errors = [name for name in atcache.__all__ if name.endswith("Error")]
    return [
        "## Looking into a cache",
        *render_names(LOOKING),
        "## Errors",
        "\n".join(bullet(name, documented(getattr(atcache, name))) for name in errors),
    ]


def statistics(modules: tuple[str, ...]) -> list[str]:
    """The text of those functions of `atcache.stats` that come from these modules, in their order."""
    functions = [value for value in vars(atcache.stats).values() if inspect.isfunction(value)]
    places = {f"atcache.statistics.{module}": number for number, module in enumerate(modules)}
    functions = [value for value in functions if value.__module__ in places]
    functions.sort(key=lambda value: (places[value.__module__], value.__code__.co_firstlineno))
    parts = (render_function(value, f"atcache.stats.{value.__name__}", "###") for value in functions)
    return [*itertools.chain.from_iterable(parts)]


def functions_of(module: ModuleType) -> list[str]:
    """The text of a public module and of each of its functions."""
    values = [value for name, value in vars(module).items() if not name.startswith("_")]
    functions = [value for value in values if inspect.isfunction(value) and value.__module__ == module.__name__]
    parts = (render_function(value, f"{module.__name__}.{value.__name__}", "###") for value in functions)
    return [*render_text(documented(module)), *itertools.chain.from_iterable(parts)]


def render_names(names: tuple[str, ...]) -> list[str]:
    """The classes and functions of these public names."""
    parts: list[str] = []
    for name in names:
        value = getattr(atcache, name)
        parts += render_class(value) if inspect.isclass(value) else render_function(value, f"atcache.{name}", "###")
    return parts


def render_function(function: Callable[..., object], title: str, heading: str) -> list[str]:
    """Heading, text, arguments with their defaults, results, errors and example."""
    signature = inspect.signature(function)
    returned = signature.return_annotation
    is_told = isinstance(returned, str) and returned not in ("None", "Any", "Array")
    arguments = {
        name: name if parameter.default is parameter.empty else f"{name}={_as_typed(parameter.default)}"
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    }
    return [
        f"{heading} `{title}`" + (f" -> `{returned}`" if is_told else ""),
        *render_text(documented(function), arguments=arguments),
    ]


def _as_typed(default: object) -> str:
    """A default as a caller would write it."""
    return repr(str(default) if isinstance(default, Path) else default)


def render_class(cls: type) -> list[str]:
    """Heading, text, fields and properties, then its methods."""
    members = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    lines = [bullet(name, text) for name, text in attribute_docs(cls).items()]
    methods: list[str] = []
    for name, value in members.items():
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            lines.append(bullet(name, documented(value)))
        elif inspect.isfunction(value) and name != "to_json":
            methods += render_function(value, f"{cls.__name__}.{name}", "####")
    return [f"### `atcache.{cls.__name__}`", *render_text(documented(cls)), "\n".join(lines), *methods]


def attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings below a class's fields, and below what its `__init__` sets, by name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for body in (tree.body, *(node.body for node in tree.body if isinstance(node, ast.FunctionDef))):
        for node, below in itertools.pairwise(body):
            if not (isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(below, ast.Expr)):
                continue
            name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
            field, value = name.removeprefix("self."), below.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and not field.startswith("_"):
                docs[field] = inspect.cleandoc(value.value)
    return docs


def render_text(docstring: str, *, arguments: dict[str, str] | None = None) -> list[str]:
    """A docstring as Markdown: its text, lists of arguments and errors, then its examples as code.

    Args:
        docstring: without the indent of its first lines.
        arguments: what a caller writes, by name, such as "size=3".
    """
    found = dict(SECTION.findall(docstring + "\n"))
    blocks = blocks_of(SECTION.sub("", docstring + "\n"))
    described = entries(found.get("Args", ""))
    parts = [block for block in blocks if not block.startswith("```pycon")]
    if arguments:
        parts.append("\n".join(bullet(shown, described.get(name, "")) for name, shown in arguments.items()))
    if "Returns" in found:
        parts.append(wrapped("Returns: " + found["Returns"]))
    if raised := entries(found.get("Raises", "")):
        parts.append(wrapped("Raises " + " ".join(f"`{name}`: {text}" for name, text in raised.items())))
    if "Example" in found:
        parts.append(code("python", found["Example"]))
    return parts + [block for block in blocks if block.startswith("```pycon")]


def blocks_of(text: str) -> list[str]:
    """Paragraphs as they are; indented code and doctests as fenced blocks."""
    blocks: list[str] = []
    # A block begins with a line that is not indented; blank lines within indented code do not end it.
    for block in re.split(r"\n\s*\n(?=\S)", text.strip("\n")):
        prose, _, indented = block.partition("\n\n    ")
        if prose.startswith(">>>"):
            blocks.append(code("pycon", prose))
        elif prose.strip():
            blocks.append(prose)
        if indented:
            blocks.append(code("python", "    " + indented))
    return blocks


def code(language: str, text: str) -> str:
    """A fenced block."""
    return f"```{language}\n{textwrap.dedent(text).strip()}\n```"


def entries(section: str) -> dict[str, str]:
    """The texts of "name: text" lines, by name."""
    pieces = ENTRY.split(textwrap.dedent(section).strip())
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def bullet(name: str, text: str) -> str:
    """A line of a list."""
    return wrapped(f"- `{name}`{': ' if text else ''}{text}", indent="  ")


def wrapped(text: str, indent: str = "") -> str:
    """A text in lines of the page's width."""
    words = " ".join(text.split())
    return textwrap.fill(words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def documented(value: object) -> str:
    """The docstring without its indent."""
    return inspect.getdoc(value) or ""


def joined(parts: list[str]) -> str:
    """A page of these parts."""
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    for name, text in make_pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
