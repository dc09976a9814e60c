"""English that ships inside every CPython: a corpus that needs no download.

Documents are the topics of the language reference (`pydoc_data.topics`) and, for each module of
the standard library, its docstrings. Modules are parsed, never imported, so nothing runs.
"""

import ast
import functools
import hashlib
import inspect
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_VALIDATION_PERCENT = 5
# Tests and code kept for compatibility, whose docstrings are terse or repeat another module's.
_SKIPPED_DIRECTORIES = {"test", "tests", "site-packages", "lib2to3", "idlelib", "__pycache__"}
_SHORTEST_DOCSTRING = 40


def documents(split: str) -> list[str]:
    """Returns the documents of `train` or `validation`, about 95 and 5 percent, in a fixed order.

    A document's side depends on its name alone, so it stays put when others come or go.
    """
    return [
        text for name, text in _all_documents() if _is_validation(name) == (split == "validation")
    ]


def _is_validation(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _VALIDATION_PERCENT


@functools.cache  # parsing the library takes seconds, and both splits need it
def _all_documents() -> list[tuple[str, str]]:
    """Returns (name, text) of every topic and every module with docstrings, sorted."""
    texts = {f"topic {name}": _tidy(text) for name, text in pydoc_data.topics.topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if _SKIPPED_DIRECTORIES.isdisjoint(relative.parts):
            texts[f"module {relative.as_posix()}"] = _module_text(path)
    return sorted((name, text) for name, text in texts.items() if text)


def _module_text(path: Path) -> str:
    """Returns the docstrings of one module, in source order, separated by blank lines."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or source of another Python version
        return ""
    docstrings = (_tidy(text) for text in _docstrings(tree))
    kept = dict.fromkeys(text for text in docstrings if len(text) >= _SHORTEST_DOCSTRING)
    return "\n\n".join(kept)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Yields the docstring of a definition, then those of the definitions in its body."""
    yield ast.get_docstring(node) or ""
    for statement in node.body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(statement)


def _tidy(text: str) -> str:
    """Dedents a text and strips the spaces at the ends of its lines."""
    lines = inspect.cleandoc(text).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()
