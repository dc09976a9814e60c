"""What the pages say: their commands, tables and links are those of the code."""

import ast
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable

import pytest
import yaml
from omegaconf import DictConfig

import configuration
from diffusion import Diffusion
from modes import starting_weights
from noise_schedule import SCHEDULES
from tests.docs.pages import (
    EXAMPLE,
    Page,
    bad_answers,
    bad_links,
    commands,
    commands_of,
    expanded,
    first_column,
    is_picture,
    long_lines,
    opens_with_command,
    page,
    pages,
    script_commands,
    slug,
    tables,
    words_of,
)
from tests.helpers.places import PROJECT

ALL = pages()
DOCS = [found for found in ALL if found.name.startswith("docs/")]
COMMANDS = {" ".join(overrides): overrides for overrides in commands()}
SCRIPTS = {
    " ".join([files[0], *overrides]): (files, overrides)
    for found in ALL
    for files, overrides in script_commands(found)
}


def name_of(found: Page) -> str:
    """Names a page in the test's id."""
    return found.name


@pytest.fixture(scope="module")
def composed(compose) -> Callable[[str], DictConfig]:
    """The configuration of a command of `COMMANDS`. Its values are computed when they are read."""
    return functools.cache(lambda command: compose(COMMANDS[command]))


# --- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("gpus", [1, 4])
def test_command_is_valid(composed, fake_gpus, gpus, command):
    """Every command composes and passes validation, and sets no key that does nothing."""
    fake_gpus(gpus)
    config = composed(command)
    configuration.validate(config)
    assert configuration.ignored_key_warnings(config) == []


def test_commands_cover_every_mode_and_algo(composed):
    """The parser finds commands, for each mode and algorithm at least one."""
    configs = [composed(command) for command in COMMANDS]
    assert {config["mode"] for config in configs} == {"train", "ppl_eval", "sample_eval"}
    assert {config["algo"]["name"] for config in configs} == {"ar", "bd3lm", "mdlm", "sedd"}


def test_the_papers_tables_name_every_script():
    """All but the one that the others read."""
    named = {file for files, _ in script_commands(page("docs/paper.md")) for file in files}
    there = {str(path.relative_to(PROJECT)) for path in PROJECT.glob("scripts/**/*.sh")}
    assert named | {"scripts/common.sh"} == there


@pytest.mark.parametrize("command", SCRIPTS)
def test_script_exists(compose, command):
    """A script that a page names is there, and what it appends composes."""
    files, overrides = SCRIPTS[command]
    for file in files:
        assert (PROJECT / file).is_file(), file
    if overrides:
        compose(overrides)


@pytest.mark.parametrize("found", ALL, ids=name_of)
def test_programs_exist(found):
    """`python -m MODULE`, `python FILE`, scripts and `make TARGET` name something that is there."""
    everything = "\n".join([*found.lines_of_code, *(code for _, code in found.blocks)])
    for module in re.findall(r"python -m ([\w.]+)", everything):
        path = PROJECT / module.replace(".", "/")
        is_ours = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert is_ours or module == "pytest", module
    # After a `cd` a path may begin at a folder of the run.
    for file in re.findall(r"python (?:\.\./)*([\w/.-]+\.py)\b", everything):
        assert (PROJECT / file).is_file(), file
    for file in re.findall(r"(?:scripts|benchmarks|ssd-lm)/[\w/-]+\.(?:sh|py|md)\b", everything):
        assert (PROJECT / file).is_file(), file
    makefile = (PROJECT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z0-9-]+)", everything, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_readme_begins_with_the_two_commands():
    everything = "\n".join(code for _, code in page("README.md").blocks)
    targets = re.findall(r"^make ([a-z0-9-]+)", everything, flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)


@pytest.mark.parametrize("found", ALL, ids=name_of)
def test_python_imports_what_is_there(found):
    """Code in Python parses, and the names that it imports exist."""
    for language, code in found.blocks:
        if language != "python" or found.name == EXAMPLE:  # of a file that is not there
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert importlib.util.find_spec(alias.name), alias.name


def test_python_of_sampling_runs(monkeypatch):
    """With a small model of random weights in place of a published one."""
    (code,) = [code for language, code in page("docs/sampling.md").blocks if language == "python"]
    replaced = {
        '"data=openwebtext-split"': '"data=text8", "model.hidden_size=8", "model.n_heads=2", '
        '"model.n_blocks=1", "model.cond_dim=4", "trainer.accelerator=cpu"',
        "length=256": "length=32",
    }
    for old, new in replaced.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.setattr(
        starting_weights, "load_model", lambda config, tokenizer: Diffusion(config, tokenizer)
    )
    names = {}
    # Hydra looks for `configs` beside the file that asks for it.
    exec(compile(code, str(PROJECT / "example.py"), "exec"), names)
    assert len(names["texts"]) == 4 and all(names["texts"])
    assert names["output"].lengths.tolist() == [32] * 4


# --- tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["algo", "model", "data", "noise"])
def test_groups_are_complete(group):
    """A table lists every file of its config group, and nothing else does so in part."""
    files = {path.stem for path in PROJECT.glob(f"configs/{group}/*.yaml")} - {"_base"}
    found = tables(f"`{group}`")
    assert found
    for table in found:
        names = {name for name in table.first_column if "=" not in name and "." not in name}
        assert names == files, table.heading
    if group == "noise":
        assert files == set(SCHEDULES)


def rows_with(group: str, *headings: str) -> dict[str, dict[str, str]]:
    """The rows of the one table of a group that has these columns, by name."""
    (table,) = [t for t in tables(f"`{group}`") if set(headings) <= set(t.heading)]
    return {
        name: row for row in table.rows for name in re.findall(r"`([^`]+)`", row[table.heading[0]])
    }


def test_algo_and_model_tables():
    """Parameterization, sampler and sizes are those of the YAML files."""
    rows = rows_with("algo", "parameterization", "sampler")
    assert set(rows) == {"ar", "bd3lm", "mdlm", "sedd"}
    for name, row in rows.items():
        algo = yaml.safe_load((PROJECT / f"configs/algo/{name}.yaml").read_text())
        assert row["parameterization"].startswith(f"`{algo['parameterization']}`")
        assert row["sampler"].startswith(f"`{algo['sampler']}`")
    columns = {
        "hidden size": "hidden_size", "conditioning": "cond_dim",
        "layers": "n_blocks", "heads": "n_heads",
    }  # fmt: skip
    rows = rows_with("model", *columns)
    assert set(rows) == {"tiny", "small", "medium"}
    for name, row in rows.items():
        model = yaml.safe_load((PROJECT / f"configs/model/{name}.yaml").read_text())
        assert {key: int(row[column]) for column, key in columns.items()} == {
            key: model[key] for key in columns.values()
        }


def test_samplers_are_those_of_the_algorithms():
    """The page about sampling calls each algorithm's sampler by its name."""
    for table in page("docs/sampling.md").tables:
        if "`algo.sampler`" not in table.heading:
            continue
        for row in table.rows:
            for name in re.findall(r"`(ar|bd3lm|mdlm|sedd)`", row["`algo`"]):
                algo = yaml.safe_load((PROJECT / f"configs/algo/{name}.yaml").read_text())
                assert row["`algo.sampler`"] == f"`{algo['sampler']}`"
        return
    pytest.fail("there is no table of samplers")


def test_data_table(compose):
    """Tokenizers are those of the YAML files."""
    for name, row in rows_with("data", "tokenizer").items():
        data = compose([f"data={name}"])["data"]
        assert row["tokenizer"] == f"`{data['tokenizer_name_or_path']}`"


def test_keys_of_sampling_are_complete(compose):
    """The page about sampling has every key of its section, and those that do nothing nowhere."""
    named = set(first_column("docs/sampling.md", "key under `sampling`"))
    ignored = {key.removeprefix("sampling.") for key in configuration.IGNORED_KEYS}
    assert named == set(compose()["sampling"]) - ignored


def test_keys_in_tables_exist(compose):
    """A table with the heading `key` names keys of the configuration."""
    config = compose()
    for found in ("docs/speed.md",):
        for key in first_column(found, "key"):
            node = config
            for part in key.split("."):
                assert part in node, f"{found}: {key}"
                node = node[part]


def test_ignored_keys_are_listed():
    """Keys that do nothing are those that `configuration/` warns of."""
    text = page("docs/differences.md").section("Keys that are accepted and do nothing")
    first = text.split("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", first)) == set(configuration.IGNORED_KEYS)


# --- form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ALL, ids=name_of)
def test_links_lead_somewhere(found):
    """A relative link leads to a file, an anchor to a heading, and a picture is one."""
    assert bad_links(found) == []


@pytest.mark.parametrize("found", ALL, ids=name_of)
def test_line_length(found):
    """Lines other than rows of tables have at most 100 columns."""
    assert long_lines(found) == []


def test_readme_is_short():
    text = page("README.md").text
    assert len(text.encode()) <= 15_000
    assert len(text.splitlines()) <= 250


@pytest.mark.parametrize("found", DOCS, ids=name_of)
def test_page_is_linked_and_opens_with_a_command(found):
    assert found.name in {link.target.partition("#")[0] for link in page("README.md").links}
    assert opens_with_command(found)


def test_answers_are_short():
    """At most six lines, and a link or a command to go on from."""
    questions = page("docs/faq.md").sections[1:]
    assert questions and all(question.title.endswith("?") for question in questions)
    assert bad_answers(page("docs/faq.md")) == []


# --- the checkers themselves -----------------------------------------------------------------

BROKEN = """# A page

Intro with a [good link](faq.md), a [dead one](no_such_page.md), a [dead
anchor](#nowhere), [one elsewhere](faq.md#no-such-question), [a line](../main.py#L3),
[outside](../../secret.txt), [its own](#a-page) and ![](frontier.png).

![no picture](faq.md)

```bash
# no heading
[not a link](in_code.md)
```
"""


def test_dead_links_are_found():
    assert bad_links(Page("docs/broken.md", BROKEN)) == [
        "docs/broken.md: there is no no_such_page.md",
        "docs/broken.md: no heading of broken.md is #nowhere",
        "docs/broken.md: no heading of faq.md is #no-such-question",
        "docs/broken.md: no heading of main.py is #L3",
        "docs/broken.md: there is no ../../secret.txt",
        "docs/broken.md: frontier.png has no text for those who do not see it",
        "docs/broken.md: faq.md is no picture",
    ]
    whole = "# A\n\n[b](https://example.org/x) [c](#a) [![d](scaling.png)](faq.md) `e[0](f)`\n"
    assert bad_links(Page("docs/whole.md", whole)) == []
    assert len(Page("docs/whole.md", whole).links) == 4


def test_pictures_are_told_from_other_files(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert not is_picture(tmp_path / "text.png")
    assert not is_picture(tmp_path / "missing.png")
    assert is_picture(PROJECT / "docs/attention_mask.png")


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Two commands", "two-commands"),
        ("The paper's tables", "the-papers-tables"),
        ("Options of `generate_text.py`", "options-of-generate_textpy"),
        ("What [x_t ; x_0] is", "what-x_t--x_0-is"),
        ("See [the code](models/dit.py)!", "see-the-code"),
        ("Bit-equal, Größe", "bit-equal-größe"),
    ],
)
def test_slug(title, expected):
    assert slug(title) == expected


def test_headings_of_one_name_are_numbered():
    found = Page("docs/x.md", "# A\n\n## Same\n\n```bash\n# Comment\n```\n\n## Same\n")
    assert found.anchors == {"a", "same", "same-1"}


def test_long_lines_are_found():
    text = f"| {'a' * 120} |\n{'b' * 100}\n- [link]({'c' * 120}.md)\n```\n{'d' * 101}\n```\n"
    assert [line[0] for line in long_lines(Page("x.md", text))] == ["-", "d"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A\n\nIntro.\n\n```bash\nls\n```\n\n## B\n", True),
        ("# A\n\nIntro.\n\n## B\n\n```bash\nls\n```\n", False),
        ("# A\n\nIntro.\n\n```python\nls\n```\n", False),
        ("## A\n\nIntro.\n\n```bash\nls\n```\n", False),
    ],
)
def test_how_a_page_opens(text, expected):
    assert opens_with_command(Page("x.md", text)) is expected


def test_bad_answers_are_found():
    seven = "\n".join(f"line {i}, [a link](faq.md)" for i in range(7))
    six = "\n".join(f"line {i}" for i in range(4)) + "\n\n```bash\nmake test\nmake lint\n```"
    text = f"# Q\n\n## Long?\n\n{seven}\n\n## Right?\n\n{six}\n\n## Idle?\n\nYes, `always`.\n"
    assert bad_answers(Page("docs/faq.md", text)) == [
        "Long? 7 lines",
        "Idle? neither a link nor a command",
    ]


def test_tables_are_read():
    text = "# A\n\n| `algo` | b |\n|---|---|\n| `x`, `y` (default) | 1 |\n| `z` | 2 |\n\nEnd.\n"
    (table,) = Page("x.md", text).tables
    assert table.first_column == ["x", "y", "z"]
    assert [row["b"] for row in table.rows] == ["1", "2"]


def test_commands_are_read():
    text = (
        "# A\n\n`python main.py algo=ar\nseed=2` and `python main.py --cfg job`\n\n"
        "```bash\nCUDA_VISIBLE_DEVICES=0 python main.py a=[1,2] \\\n  b=$PWD/x  # why\n```\n\n"
        "```bash\nfor L in 4 8; do BLOCK_SIZE=$L scripts/train/a_{b,c}.sh 7 d=1; done\n```\n"
    )
    found = Page("x.md", text)
    assert commands_of(found) == [["a=[1,2]", "b=/runs/x"], ["algo=ar", "seed=2"]]
    assert script_commands(found) == [(["scripts/train/a_b.sh", "scripts/train/a_c.sh"], ["d=1"])]
    assert words_of("A=1 python main.py") == ["python", "main.py"]
    assert expanded("a{1,2}b{3}") == ["a1b3", "a2b3"]
