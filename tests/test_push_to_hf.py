"""`push_to_hf.py`: from any checkpoint to a directory, and from there to a Hub that is not one."""

import json
import re
import shlex
import string
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertTokenizer

import push_to_hf
from checkpointing.convert import convert
from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_weights
from corpora.tokenization import load_tokenizer, train_bpe
from corpora.tokenizer_record import tokenizer_record, what_differs
from diffusion import Diffusion
from hf import BD3LM
from tests.helpers.elsewhere import outside
from tests.helpers.places import PROJECT
from tests.helpers.references import generator
from tests.helpers.small_run import ALGOS, sentences
from tests.helpers.twins import tiny, twins
from tests.parity.rows import load_golden

RESULTS = {
    "val/nll": 3.25, "val/ppl": 25.79, "val/bpd": 4.689, "num_tokens": 123456, "num_rows": 121,
    "data": "wikitext103", "checkpoint": "/home/me/secret.ckpt", "config_hash": "0",
}  # fmt: skip


@pytest.fixture
def checkpoint(compose, tmp_path):
    """Writes a Lightning checkpoint with a moving average: `checkpoint("ar")` -> path, module."""

    def write(algo: str, *changes: str) -> tuple[str, torch.nn.Module]:
        module, _ = twins(compose, tmp_path, algo, *changes)
        path = str(tmp_path / f"{algo}.ckpt")
        content = {
            "state_dict": module.state_dict(),
            "ema": {
                "decay": 0.9,
                "num_updates": 1,
                "shadow_params": [p.detach() + 1 for p in module.parameters()],
            },
            "hyper_parameters": {"config": module.run_config},
        }
        torch.save(content, path)
        return path, module

    return write


def push(*arguments: object) -> None:
    push_to_hf.main([str(argument) for argument in arguments])


def refusal(capsys, *arguments: object) -> str:
    """The line that a failing command ends with."""
    with pytest.raises(SystemExit) as ended:
        push(*arguments)
    assert isinstance(ended.value.code, str), "a message, which Python prints, and exit status 1"
    return ended.value.code


def test_tokenizer_of_bert_makes_what_the_model_takes(checkpoint, tmp_path):
    """`generate(**tokenizer(text))` ended in an error over token_type_ids."""
    path, _ = checkpoint("bd3lm")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *"0123"]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "bert")
    push(path, "me/mine", "--dry-run", tmp_path / "out", "--tokenizer", tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["a b c", "d"], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"}
    model = BD3LM.from_pretrained(tmp_path / "out")
    assert model.generate(**inputs, max_new_tokens=3).shape == (2, 8)
    inputs["token_type_ids"] = 0 * inputs["input_ids"]  # of another copy of the tokenizer
    assert model(**inputs, sample_mode=True).logits.shape == (2, 5, 35)


def test_export_of_an_earlier_version_is_replaced(checkpoint, tmp_path):
    """Its config.json names fewer Auto classes."""
    path, _ = checkpoint("ar")
    push(path, "me/mine", "--dry-run", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["auto_map"]["AutoModel"], config["auto_map"]["AutoModelForCausalLM"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    push(path, "me/mine", "--dry-run", tmp_path / "out")
    assert "AutoModelForCausalLM" in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize("algo", ALGOS)
def test_dry_run_from_our_checkpoints(algo, checkpoint, tmp_path):
    """Average or last weights, the configuration, the ids, and the tokenizer."""
    path, module = checkpoint(algo, "noise=cosine", "training.sampling_eps_min=0.3")
    for flags, shift in (([], 1), (["--raw"], 0)):
        push(path, "me/mine", "--dry-run", tmp_path / "out", *flags)
        model, loading = BD3LM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(loading.values())
        own = dict(module.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, own[name] + shift), name
        config = model.config
        assert config.noise == "cosine" and config.block_size == module.block_size
        assert config.parameterization == module.composed.algo.parameterization
        assert (config.mask_index, config.bos_token_id, config.eos_token_id) == (
            module.mask_index, module.bos_index, module.eos_index,
        )  # fmt: skip
        if algo == "bd3lm":
            assert config.sampling_eps_min == 0.3 and model.sampling_eps_min == torch.tensor(0.3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer("a dog")["input_ids"] == load_tokenizer("text8")("a dog")["input_ids"]


def test_the_tokenizer_is_that_of_the_training(checkpoint, tmp_path, capsys):
    path, _ = checkpoint("ar")
    content = torch.load(path, weights_only=True)
    content["tokenizer"] = tokenizer_record(load_tokenizer("text8"), name="text8")
    torch.save(content, path)
    push(path, "me/mine", "--dry-run", tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert what_differs(content["tokenizer"], exported) is None
    assert read_weights(str(tmp_path / "out")).tokenizer == content["tokenizer"]
    said = refusal(capsys, path, "me/mine", "--dry-run", tmp_path / "b", "--tokenizer", "bytes")
    assert "--tokenizer: it has 260 entries instead of 35; allowed with" in said


def test_a_bpe_is_the_one_in_the_checkpoint():
    """It was made again of the training text, where that was still there."""
    bpe = train_bpe(sentences(), vocab_size=300)
    weights = Weights("a.ckpt", {}, tokenizer=tokenizer_record(bpe, name="bpe-300"))
    args = push_to_hf.parse(["a.ckpt", "me/mine"])
    found = push_to_hf.find_tokenizer(args, OmegaConf.create({}), weights)
    assert what_differs(weights.tokenizer, found) is None


@pytest.mark.parametrize("algo", ALGOS)
def test_dry_run_from_the_originals_checkpoints(algo, shared, tmp_path):
    """The originals' likelihoods; what is pickled around the weights does nothing but tell names.

    Exactly for ar; else a mean over 4 seeds, within 3 standard errors of the one over 64.
    """
    name = f"{algo}_text8" + ("_block_size4" if algo == "bd3lm" else "")
    source = shared / "golden/lightning" / f"{name}.ckpt"
    golden = load_golden(source.with_suffix(".expected.safetensors"))
    push(source, "me/mine", "--dry-run", tmp_path / "out")
    model = BD3LM.from_pretrained(tmp_path / "out")
    rows, num_seeds = golden["x0"], 1 if algo == "ar" else 4
    with torch.no_grad():
        losses = [model(rows, labels=rows, seed=seed).loss.item() for seed in range(num_seeds)]
    found = sum(losses) / num_seeds
    if algo == "ar":
        assert found == pytest.approx(golden.meta["nll"], rel=1e-5)
    else:
        error = golden.meta["nelbo_std_over_seeds"] * (1 / num_seeds + 1 / 64) ** 0.5
        assert abs(found - golden.meta["nelbo_mean"]) <= 3 * error


def test_dry_run_from_a_published_directory(shared, tmp_path, capsys):
    """It lacks a tokenizer, which must be named and have as many ids."""
    source = shared / "golden/hub/mdlm"
    assert "--tokenizer names it" in refusal(capsys, source, "me/m", "--dry-run", tmp_path / "out")
    message = refusal(
        capsys, source, "me/m", "--tokenizer", "text8", "--dry-run", tmp_path / "out"
    )
    assert "--tokenizer: 35 ids with the mask, allowed" in message and "are 101" in message
    assert not (tmp_path / "out").exists()


def test_gpt2_vocabulary_with_a_mask_behind_it(shared, tmp_path):
    """As the published models on OpenWebText are: files without ids, and GPT-2's tokenizer."""
    unset = {name: None for name in ("mask_index", "bos_token_id", "eos_token_id")}
    tiny(vocab_size=50258, **unset).save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    published = {name: value for name, value in config.items() if name not in unset}
    (tmp_path / "theirs/config.json").write_text(json.dumps(published))
    tokenizer = shared / "data/tokenizers/gpt2"
    push(tmp_path / "theirs", "me/m", "--tokenizer", tokenizer, "--dry-run", tmp_path / "ours")
    model = BD3LM.from_pretrained(tmp_path / "ours")
    config = model.config
    assert (config.mask_index, config.bos_token_id, config.eos_token_id) == (50257, 50256, 50256)
    tokens = model.generate(num_samples=1, min_entropy=None)
    saved = AutoTokenizer.from_pretrained(tmp_path / "ours", trust_remote_code=False)
    assert saved.decode(tokens[0]).startswith("<|endoftext|>")
    assert "The weights are" not in (tmp_path / "ours/README.md").read_text()


def test_an_exported_directory_can_be_published_again(checkpoint, tmp_path):
    """Its tokenizer and schedule come along."""
    push(checkpoint("sedd", "noise=square")[0], "me/m", "--dry-run", tmp_path / "one")
    push(tmp_path / "one", "me/m", "--dry-run", tmp_path / "two")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling_bd3lm.py"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("algo", ALGOS)
def test_round_trip_to_the_lightning_module(algo, checkpoint, compose, tmp_path):
    """Ours -> Hub -> ours, and through `checkpointing.convert`: bit for bit."""
    path, module = checkpoint(algo)
    push(path, "me/m", "--raw", "--dry-run", tmp_path / "out")
    convert(str(tmp_path / "out"), tmp_path / "again.ckpt", to="lightning")
    convert(str(tmp_path / "again.ckpt"), tmp_path / "hub", to="hub", which="raw")
    for source in (tmp_path / "out", tmp_path / "again.ckpt", tmp_path / "hub"):
        other = Diffusion(module.composed, load_tokenizer("text8"))
        load_weights(other, read_weights(str(source)), use_ema=False)
        found, expected = other.state_dict(), module.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    converted = BD3LM.from_pretrained(tmp_path / "hub")
    exported = BD3LM.from_pretrained(tmp_path / "out")
    x = torch.randint(8, 35, (2, 16), generator=generator(0))
    assert torch.equal(converted(x).logits, exported(x).logits)


def test_commands_of_the_page_parse():
    """Flags of every `python push_to_hf.py` in docs/weights.md."""
    text = (PROJECT / "docs/weights.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python push_to_hf.py (.*)", text, flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert push_to_hf.parse(shlex.split(command)).repo_id == "OWNER/NAME"


def test_tensors_alone_do_not_say_enough(checkpoint, tmp_path, capsys):
    _, module = checkpoint("mdlm")
    save_file(module.state_dict(), tmp_path / "bare.safetensors")
    message = refusal(capsys, tmp_path / "bare.safetensors", "me/m", "--tokenizer", "text8",
                      "--dry-run", tmp_path / "out")  # fmt: skip
    assert "does not say algo, model_length" in message


# --- the card -------------------------------------------------------------------------------------


def test_card(checkpoint, tmp_path):
    """Front matter, the table of results, and code that runs; no path of this machine."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    path, _ = checkpoint("bd3lm")
    out = tmp_path / "out"
    push(path, "me/mine", "--dry-run", out, "--results", tmp_path / "results.json")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0"
    assert "block-diffusion" in front["tags"] and front["metrics"] == ["perplexity"]
    assert "| wikitext103 | 25.79 | 3.2500 | 4.6890 | 123,456 |" in card
    assert str(tmp_path) not in card and "secret" not in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    run = outside(["-c", code.replace("me/mine", str(out))], cwd=tmp_path, home=tmp_path / "home")
    assert run.returncode == 0, run.stderr
    assert "tensor(" in run.stdout


def test_card_names_the_data_where_the_hub_has_it(checkpoint, tmp_path):
    path, _ = checkpoint("mdlm")
    content = torch.load(path)
    content["hyper_parameters"]["config"]["data"]["train"] = "wikitext103"
    torch.save(content, path)
    push(path, "me/mine", "--dry-run", tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert front["datasets"] == ["Salesforce/wikitext"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{cut", "not a JSON file"),
        ("[]", "not what mode=ppl_eval writes"),
        (json.dumps(RESULTS | {"val/ppl": "low"}), "not what mode=ppl_eval writes"),
        (None, "no such file"),
    ],
)
def test_results_that_are_none(content, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert message in refusal(
        capsys, "any.ckpt", "me/m", "--dry-run", tmp_path / "out", "--results", path
    )


# --- files that stay ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failure_leaves_the_previous_export(checkpoint, tmp_path, capsys, monkeypatch):
    """Whatever fails, and whenever: at the start, half way, or in the last rename."""
    path, _ = checkpoint("mdlm")
    out = tmp_path / "out"
    push(path, "me/mine", "--dry-run", out)
    before = contents(out)
    assert "no such checkpoint" in refusal(capsys, "gone.ckpt", "me/mine", "--dry-run", out)
    with monkeypatch.context() as patch:
        patch.setattr(push_to_hf, "model_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            push(path, "me/mine", "--dry-run", out)
    assert contents(out) == before

    rename = Path.rename

    def fail_in_the_end(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("disk full")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_in_the_end)
        assert "disk full" in refusal(capsys, path, "me/mine", "--dry-run", out)
    assert contents(out) == before
    push(path, "me/other", "--dry-run", out)
    assert contents(out) != before, "without a failure it is replaced"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_weights_that_are_no_numbers(checkpoint, tmp_path, capsys):
    path, _ = checkpoint("ar")
    content = torch.load(path)
    content["ema"]["shadow_params"][2][0] = float("nan")
    torch.save(content, path)
    message = refusal(capsys, path, "me/mine", "--dry-run", tmp_path / "out")
    assert "backbone.blocks.0.attn_qkv.weight holds NaN" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["mine.txt", "config.json", ".git/HEAD"])
def test_other_directories_are_not_replaced(place, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    if place.startswith(".git"):  # a clone of an export
        push(checkpoint("mdlm")[0], "me/mine", "--dry-run", out)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("{}")
    message = refusal(capsys, "any.ckpt", "me/mine", "--dry-run", out)
    assert "allowed is a new or empty directory" in message and (out / place).exists()


# --- the Hub --------------------------------------------------------------------------------------


class FakeHub:
    """Remembers the calls; raises what it is told to."""

    calls: list[tuple[str, dict]]

    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id: str, **settings: object) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **settings}))
        if self.error is not None:
            raise self.error

    def create_branch(self, repo_id: str, **settings: object) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **settings}))

    def upload_folder(self, folder_path: str, **settings: object) -> None:
        settings["files"] = {path.name for path in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", settings))


class Refused(Exception):
    """An error of the transport, which is neither an OSError nor a ValueError."""

    response = SimpleNamespace(status_code=401)


@pytest.fixture
def hub(monkeypatch):
    """Puts a fake in the place of the Hub: `hub()`, `hub(error)`."""

    def put(error: Exception | None = None) -> FakeHub:
        fake = FakeHub(error)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        return fake

    return put


def test_upload(checkpoint, hub):
    """One commit with all files, on the branch that was asked for."""
    fake = hub()
    push(checkpoint("ar")[0], "me/mine", "--private", "--revision", "v2")
    (created, branched, uploaded) = fake.calls
    assert created == ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True})
    assert branched[1] == {"repo_id": "me/mine", "branch": "v2", "exist_ok": True}
    assert uploaded[1]["repo_id"] == "me/mine" and uploaded[1]["revision"] == "v2"
    assert {"README.md", "config.json", "model.safetensors", "modeling_bd3lm.py",
            "tokenizer.json"} <= uploaded[1]["files"]  # fmt: skip


def test_dry_run_and_failures_upload_nothing(checkpoint, hub, tmp_path, capsys):
    fake = hub()
    path, _ = checkpoint("mdlm")
    push(path, "me/mine", "--dry-run", tmp_path / "out")
    assert "REPO_ID a b" in refusal(capsys, path, "a b")
    assert "--tokenizer: 260 ids" in refusal(capsys, path, "me/mine", "--tokenizer", "bytes")
    assert fake.calls == []


@pytest.mark.parametrize(
    "error",
    [
        Refused("401 for hf_secret"),
        LocalTokenNotFoundError("no hf_secret"),
        OSError("hf_secret"),
    ],
    ids=["refused", "no token", "no network"],
)
def test_a_hub_that_refuses(error, checkpoint, hub, capsys):
    """The message says what to do, and never contains what the library quotes of the request."""
    hub(error)
    message = refusal(capsys, checkpoint("mdlm")[0], "me/mine")
    printed = capsys.readouterr()
    assert (", status 401" in message) == isinstance(error, Refused)
    assert "hf auth login" in message and "--dry-run" in message
    assert "hf_secret" not in message + printed.out + printed.err
