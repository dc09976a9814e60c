"""The code that a saved model needs, as flat files that load without this project.

transformers copies a custom model's code from one flat folder, and reads its relative imports to
know which files belong to it. Here the code is in packages, some of it imported absolutely. So the
modules that the model needs are collected, named after their paths (`sampling/base.py` becomes
`sampling_base.py`), and their imports of one another made relative. In a flat folder that was made
so, the same code writes the same files again.
"""

import ast
import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ENTRY = "modeling_bd3lm.py"
# The project's root; None in a flat folder.
ROOT = PACKAGE.parent if __package__ == "hf" else None


def write_sources(directory: str | os.PathLike) -> None:
    """Writes the model's module, and all that it imports of this project, into a directory.

    Raises:
        ValueError: if a module is imported in a way that a flat folder has no place for.
    """
    for path in needed_modules():
        (Path(directory) / flat_name(path)).write_text(flattened(path), encoding="utf-8")


def needed_modules() -> list[Path]:
    """The files of this project that the model needs, its own first."""
    found = [PACKAGE / ENTRY]
    for path in found:  # grows meanwhile
        found += [file for file in project_imports(path).values() if file not in found]
    return found


def flat_name(path: Path) -> str:
    """A file's name in the flat folder; what is in this package keeps its own."""
    return path.name if path.parent == PACKAGE else "_".join(path.relative_to(ROOT).parts)


def flattened(path: Path) -> str:
    """The text of a module whose imports of the project are `from .name import ...`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, file in project_imports(path).items():
        start = f"from .{flat_name(file).removesuffix('.py')} import"
        lines[number - 1] = re.sub(r"from\s+\S+\s+import", start, lines[number - 1], count=1)
    return "".join(lines)


def project_imports(path: Path) -> dict[int, Path]:
    """Where in a module the project is imported: line number, and the file that is meant."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [name for name in node.names if _project_file(name.name, 0, path=path)]
            if named:
                raise ValueError(
                    f"{path.name}, line {node.lineno}: `import {named[0].name}` cannot be "
                    f"exported; allowed is `from {named[0].name} import ...`"
                )
        elif isinstance(node, ast.ImportFrom):
            file = _project_file(node.module or "", node.level, path=path)
            if file is not None:
                found[node.lineno] = file
    return found


def _project_file(module: str, level: int, *, path: Path) -> Path | None:
    """The file of a module as imported in `path`; None where it is another project's."""
    base = path.parents[level - 1] if level > 0 else ROOT
    if base is None:
        return None
    file = base.joinpath(*module.split(".")).with_suffix(".py") if module else base
    if file.is_file():
        return file
    if file.with_suffix("").joinpath("__init__.py").is_file() or level > 0:
        raise ValueError(
            f"{path.name}: {'.' * level}{module} is a package, which cannot be exported; allowed "
            "is the import of a module in it"
        )
    return None
