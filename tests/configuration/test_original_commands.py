"""Every command the original ships composes and passes validation."""

import pytest

import configuration
from tests.helpers.original_commands import ZERO_SHOT, commands, filled


def cases() -> list[tuple[str, list[str]]]:
    """Returns one case per command, and one per data set where a command loops over them."""
    found = []
    for name, command in commands().items():
        sets = ZERO_SHOT if "data=$data" in command["overrides"] else ("",)
        for data in sets:
            found.append((f"{name} {data}".strip(), filled(command, data=data)))
    return found


CASES = cases()


def test_number_of_commands(shared):
    """All 31 commands are tested."""
    assert len(commands()) == 31


@pytest.mark.skipif(not CASES, reason="needs ../shared/reference/commands.json")
@pytest.mark.parametrize("overrides", [case[1] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("gpus", [1, 4])
def test_command_is_valid(compose, fake_gpus, gpus, overrides):
    """A step fits one GPU with accumulation and four, the most that rows of 128 allow."""
    fake_gpus(gpus)
    config = compose(overrides)
    configuration.validate(config)
    assert configuration.ignored_key_warnings(config) == []


@pytest.mark.skipif(not CASES, reason="needs ../shared/reference/commands.json")
def test_evaluation_commands_are_valid_without_gpu(compose, fake_gpus):
    """Only training with FlexAttention needs a GPU."""
    fake_gpus(0)
    for _, overrides in CASES:
        config = compose(overrides)
        if config["mode"] == "train" and config["model"]["attn_backend"] == "flex":
            with pytest.raises(ValueError, match="model.attn_backend=flex"):
                configuration.validate(config)
        else:
            configuration.validate(config)
