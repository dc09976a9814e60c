"""The Markdown pages of the project, and what can be read off them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.helpers.places import PROJECT

OUTSIDE_DOCS = ("README.md", "SECURITY.md", "benchmarks/README.md", "ssd-lm/README.md")
MAX_COLUMNS = 100
# Its command needs the files that the page shows: tests/docs/test_add_an_algorithm.py runs it.
EXAMPLE = "docs/add_an_algorithm.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^(#+) +(.+?) *$", flags=re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*([^)\s]+)\s*\)")
_ELSEWHERE = ("https://", "mailto:")
_SCRIPT = re.compile(r"scripts/[\w{},/-]+\.sh")


@dataclass(frozen=True)
class Table:
    """A table: the cells of its heading, and a dictionary by heading for each row."""

    heading: tuple[str, ...]
    rows: tuple[dict[str, str], ...]

    @property
    def first_column(self) -> list[str]:
        """The names in backticks in it."""
        return [name for row in self.rows for name in _INLINE.findall(row[self.heading[0]])]


@dataclass(frozen=True)
class Section:
    """What stands between a heading and the next one, code included."""

    level: int
    title: str
    text: str


@dataclass(frozen=True)
class Link:
    """A link, or a picture that the page shows; its text is what others than the eye get."""

    text: str
    target: str
    is_picture: bool = False


@dataclass(frozen=True)
class Page:
    """A page of Markdown.

    Attributes:
        name: its path as seen from the project's root, `docs/faq.md`.
        text: what it says.
    """

    name: str
    text: str

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """(language, code) of every code block."""
        return _FENCE.findall(self.text)

    @cached_property
    def prose(self) -> str:
        """The text without code blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def inline(self) -> list[str]:
        """The code in backticks, on one line each."""
        return [" ".join(code.split()) for code in _INLINE.findall(self.prose)]

    @cached_property
    def lines_of_code(self) -> list[str]:
        """The command lines of bash blocks, each whole on one line, and the code in backticks."""
        blocks = [code for language, code in self.blocks if language == "bash"]
        return "\n".join(blocks).replace("\\\n", " ").splitlines() + self.inline

    @cached_property
    def sections(self) -> list[Section]:
        """The page cut at its headings; what precedes the first one is left out."""
        hidden = [match.span() for match in _FENCE.finditer(self.text)]
        found = [
            match
            for match in _HEADING.finditer(self.text)
            if not any(start <= match.start() < end for start, end in hidden)
        ]
        ends = [match.start() for match in found[1:]] + [len(self.text)]
        return [
            Section(len(match[1]), match[2], self.text[match.end() : end].strip("\n"))
            for match, end in zip(found, ends, strict=True)
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """What `#...` may be behind the page's name."""
        counts: dict[str, int] = {}
        found = set()
        for section in self.sections:
            name = slug(section.title)
            number = counts[name] = counts.get(name, -1) + 1
            found.add(f"{name}-{number}" if number else name)
        return found

    @cached_property
    def links(self) -> list[Link]:
        """Every link and picture, also a picture that is a link."""
        text = _INLINE.sub(lambda match: re.sub(r"[\[\]()]", "", match[1]), self.prose)
        found = _LINK.findall(text)
        found += [nested for _, text, _ in found for nested in _LINK.findall(text)]
        return [Link(text, target, is_picture=mark == "!") for mark, text, target in found]

    @cached_property
    def tables(self) -> list[Table]:
        """The tables, in order."""
        found = []
        for lines in re.findall(r"(?:^\|.*\n?)+", self.prose, flags=re.MULTILINE):
            heading, _, *rows = [_cells(line) for line in lines.splitlines()]
            pairs = [dict(zip(heading, row, strict=True)) for row in rows]
            found.append(Table(tuple(heading), tuple(pairs)))
        return found

    def section(self, title: str) -> str:
        """What stands under a heading, up to the next one."""
        (found,) = [section.text for section in self.sections if section.title == title]
        return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def page(name: str) -> Page:
    """The page of this path, as seen from the project's root."""
    return Page(name, (PROJECT / name).read_text(encoding="utf-8"))


def pages() -> list[Page]:
    """Every page of the project that is written for its readers."""
    names = [f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md"))]
    return [page(name) for name in (*OUTSIDE_DOCS, *names)]


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = _LINK.sub(lambda match: match[2], title)
    text = re.sub(r"[^\w\- ]", "", text.lower())
    return text.replace(" ", "-")


def tables(first_heading: str) -> list[Table]:
    """The tables of all pages whose first column has this heading."""
    return [t for p in pages() for t in p.tables if t.heading[0] == first_heading]


def first_column(name: str, heading: str) -> list[str]:
    """The names in backticks in the first column of a page's table with this first heading."""
    (table,) = [table for table in page(name).tables if table.heading[0] == heading]
    return table.first_column


# --- commands --------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words of a command line, without assignments of variables at its beginning."""
    words = shlex.split(line.replace("$PWD", "/runs"), comments=True)
    return list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))


def commands_of(found: Page) -> list[list[str]]:
    """The overrides of every `python main.py` command of a page, in blocks and in lines."""
    lines = [line for line in found.lines_of_code if "python main.py " in line]
    words = [words_of(line) for line in lines]
    overrides = [line[2:] for line in words if line[:2] == ["python", "main.py"]]
    return [line for line in overrides if not line[0].startswith("--")]


def commands() -> list[list[str]]:
    """The same of all pages but `EXAMPLE`, each once, however often it is repeated."""
    found = [each for each in pages() if each.name != EXAMPLE]
    every = [tuple(overrides) for each in found for overrides in commands_of(each)]
    return [list(overrides) for overrides in dict.fromkeys(every)]


def expanded(text: str) -> list[str]:
    """Expands the braces of a file name as the shell does."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(pick) for pick in itertools.product(*choices)]


def script_commands(found: Page) -> list[tuple[list[str], list[str]]]:
    """(files, overrides) of every shell script in `scripts/` that a page names."""
    commands = []
    for line in found.lines_of_code:
        if not _SCRIPT.search(line):
            continue
        words = [word.rstrip(";") for word in shlex.split(line, comments=True)]
        for i, word in enumerate(words):
            if _SCRIPT.fullmatch(word):
                rest = itertools.takewhile(lambda w: w != "done", words[i + 1 :])
                commands.append((expanded(word), [w for w in rest if "=" in w]))
    return commands


# --- what may be wrong with a page -----------------------------------------------------------


def bad_links(found: Page) -> list[str]:
    """Links of a page that lead nowhere, one sentence each."""
    return list(_bad_links(found))


def _bad_links(found: Page) -> Iterator[str]:
    folder = (PROJECT / found.name).parent
    for link in found.links:
        target = link.target
        path, _, anchor = target.partition("#")
        if link.is_picture and not link.text:
            yield f"{found.name}: {target} has no text for those who do not see it"
        if target.startswith(_ELSEWHERE):
            continue
        file = (folder / path).resolve() if path else PROJECT / found.name
        if not file.is_relative_to(PROJECT) or (path and not file.exists()):
            yield f"{found.name}: there is no {target}"
        elif link.is_picture:
            if not is_picture(file):
                yield f"{found.name}: {target} is no picture"
        elif anchor and anchor not in _anchors(file, found if not path else None):
            yield f"{found.name}: no heading of {file.name} is #{anchor}"


def _anchors(file: Path, own: Page | None) -> set[str]:
    if own is not None:
        return own.anchors
    is_page = file.suffix == ".md"  # lines of other files move
    return page(str(file.relative_to(PROJECT))).anchors if is_page else set()


def is_picture(file: Path) -> bool:
    """Whether a file is a PNG."""
    return file.is_file() and file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def long_lines(found: Page) -> list[str]:
    """Lines other than rows of tables that have more columns than allowed."""
    lines = found.text.splitlines()
    return [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")]


def opens_with_command(found: Page) -> bool:
    """Whether a bash block comes before the second heading."""
    first = found.sections[0]
    beginning = Page(found.name, first.text)
    return first.level == 1 and any(language == "bash" for language, _ in beginning.blocks)


def bad_answers(found: Page, *, max_lines: int = 6) -> list[str]:
    """Questions whose answer is too long, or has neither a link nor a command."""
    problems = []
    for section in found.sections[1:]:
        answer = Page(found.name, section.text)
        lines = [line for line in section.text.splitlines() if line and line[:3] != "```"]
        if len(lines) > max_lines:
            problems.append(f"{section.title} {len(lines)} lines")
        has_command = any(language == "bash" for language, _ in answer.blocks)
        if not has_command and not answer.links:
            problems.append(f"{section.title} neither a link nor a command")
    return problems
