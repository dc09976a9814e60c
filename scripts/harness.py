"""Tasks of lm-eval: `python -m scripts.harness --tasks TASK ... checkpoint=SOURCE`.

This is the `lm_eval` command with one more model, `bd3lm`, and takes all its arguments. Others are
`key=value`: `checkpoint` (what `eval.checkpoint_path` takes), `likelihood`, `num_draws`,
`num_orders` and `tokens_per_pass` (keys under `eval`), and any key of the configuration. They may
not follow an argument that takes such pairs itself, as `--gen_kwargs` does.
"""

import json
import sys
from collections.abc import Sequence

from scripts.composing import USER_ERRORS
from utils import one_line, print_without_fail

COMMANDS = ("run", "ls", "validate")
# Arguments of lm-eval whose values are pairs key=value.
PAIRS = (
    "-a", "--model_args", "--gen_kwargs", "--wandb_args", "--wandb_config_args",
    "--hf_hub_log_args", "--trackio_args", "--metadata",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs lm-eval; errors that the user can mend end the program with a line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print("The arguments of lm_eval: python -m scripts.harness run --help")
        return
    try:
        from lm_eval.__main__ import cli_evaluate

        import scripts.harness_model  # noqa: F401  registers the model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit("lm-eval is missing: pip install -r requirements-eval.txt -c constraints.txt")
    try:
        sys.argv = ["lm_eval", *lm_eval_arguments(arguments)]
        cli_evaluate()
    except USER_ERRORS as error:
        sys.exit(one_line(error))


def lm_eval_arguments(arguments: Sequence[str]) -> list[str]:
    """The same with `key=value` as arguments of the model `bd3lm`.

    Raises:
        ValueError: there are such keys, but no model of this project is asked for.
    """
    theirs: list[str] = []
    keys: dict[str, str] = {}
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument
        key, sign, value = argument.partition("=")
        if sign and not argument.startswith("-") and option not in PAIRS:
            keys[key] = value
        else:
            theirs.append(argument)
    command = theirs.pop(0) if theirs and theirs[0] in COMMANDS else "run"
    named = {argument.partition("=")[0] for argument in theirs}
    if command == "run" and not named & {"-M", "--model"}:
        theirs = ["--model", "bd3lm", *theirs]
    if keys and command != "run":
        raise ValueError(f"{next(iter(keys))}=...: allowed is key=value with tasks to run")
    if "checkpoint" in keys:  # lm-eval names its results by the word that its other models take
        keys["pretrained"] = keys.pop("checkpoint")
    return [command, *theirs, *(["--model_args", json.dumps(keys)] if keys else [])]


if __name__ == "__main__":
    print_without_fail()
    main()
