"""A saved model loads with transformers alone: without this project, from any folder."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from safetensors.torch import save_file

from corpora.tokenization import load_tokenizer
from hf import BD3LM, export
from tests.helpers.elsewhere import outside
from tests.helpers.small_module import batches
from tests.helpers.small_run import ALGOS
from tests.helpers.twins import OPTIONS, tiny, twins

# What somebody else's machine has: fsspec and filelock come with torch, the last two with
# transformers.
ALLOWED = {"torch", "transformers", "fsspec", "filelock", "numpy", "huggingface_hub"}

# Run by an interpreter that knows nothing of the project; arguments: the folder of the models.
SCRIPT = """
import importlib.util, sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, pipeline

assert not any(importlib.util.find_spec(name) for name in ("models", "sampling", "losses"))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    options = {"num_steps": 5} if config.parameterization == "sedd" else {"nucleus_p": 0.9}
    if config.parameterization != "sedd":
        options["kv_cache"] = config.cross_attn or config.causal
    with torch.device("meta"):
        AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    for source in (folder, folder / "again"):
        model, loading = AutoModelForMaskedLM.from_pretrained(
            source, trust_remote_code=True, output_loading_info=True
        )
        assert not any(loading.values()), loading
        assert "transformers_modules" in type(model).__module__
        x = expected["x"]
        output = model(x, labels=x, seed=5, output_hidden_states=True)
        assert torch.equal(output.logits, expected["logits"])
        assert torch.equal(output.loss, expected["loss"]) and len(output.hidden_states) == 3
        assert torch.equal(model.generate(num_samples=2, seed=4, **options), expected["tokens"])
        model.save_pretrained(folder / "again")
    half = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    assert half(x, sample_mode=True).logits.dtype == torch.bfloat16
    prompts = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(
        ["a dog"], return_tensors="pt"
    )
    assert model.generate(**prompts, max_new_tokens=3, **options).shape == (1, 9)
    if "AutoModelForCausalLM" in config.auto_map:
        pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True)
        text = pipe("a dog", max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert text.startswith("a dog"), text
    print(folder.name, "ok")
from_hub = AutoModelForMaskedLM.from_pretrained("me/mine", trust_remote_code=True)
assert ".me.mine." in type(from_hub).__module__
print(from_hub.generate(seed=2).tolist())
"""


def in_cache(model: BD3LM, *, home: Path) -> BD3LM:
    """Saves a model as if it had been downloaded as me/mine; returns it as it was saved."""
    repository, commit = home / "hub/models--me--mine", "0" * 40
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    return BD3LM.from_pretrained(repository / "snapshots" / commit)


def test_third_party_loads_saved_models(compose, tmp_path):
    """Bit-equal logits, loss and samples of all algorithms; what it saves is the same again."""
    saved = tmp_path / "models"
    x = next(iter(batches(1, batch_size=2)))["input_ids"]
    for algo in ALGOS:
        twins(compose, tmp_path, algo)[1].save_pretrained(saved / algo)
        load_tokenizer("text8").save_pretrained(saved / algo)
        model = BD3LM.from_pretrained(saved / algo)
        with torch.no_grad():
            output = model(x, labels=x, seed=5)
        options = OPTIONS[algo]
        if algo == "mdlm":
            options = {"nucleus_p": 0.9}
        tokens = model.generate(num_samples=2, seed=4, **options)
        expected = {"x": x, "logits": output.logits, "loss": output.loss, "tokens": tokens}
        save_file(expected, saved / algo / "expected.safetensors")
    home = tmp_path / "home"
    downloaded = in_cache(tiny(), home=home)
    run = outside(["-c", SCRIPT, str(saved)], cwd=tmp_path, home=home)
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, from_hub = run.stdout.splitlines()
    assert lines == [f"{algo} ok" for algo in sorted(ALGOS)]
    assert json.loads(from_hub) == downloaded.generate(seed=2).tolist()
    for algo in ALGOS:
        files = list((saved / algo / "again").iterdir())
        assert len(files) > 20
        for path in files:
            assert path.read_bytes() == (saved / algo / path.name).read_bytes(), path


def test_exported_code_needs_torch_and_transformers_alone(tmp_path):
    """Flat relative imports of files that are there, and no framework of training."""
    export.write_sources(tmp_path)
    names = {path.stem for path in tmp_path.iterdir()}
    assert {"modeling_bd3lm", "configuration_bd3lm", "models_dit", "sampling_options"} <= names
    for path in tmp_path.iterdir():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module in names, (path.name, node.module)
                continue
            else:
                continue
            tops = {module.split(".")[0] for module in modules}
            assert tops <= ALLOWED | sys.stdlib_module_names, (path.name, tops)


def test_exported_code_is_the_project_s_but_for_its_imports(tmp_path):
    export.write_sources(tmp_path)
    for path in export.needed_modules():
        ours = path.read_text().splitlines()
        theirs = (tmp_path / export.flat_name(path)).read_text().splitlines()
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        assert all(a.startswith("from ") and b.startswith("from .") for a, b in changed)


@pytest.mark.parametrize(
    ("changes", "is_causal"),
    [({"causal": True}, True), ({}, True), ({"cross_attn": False}, False),
     ({"parameterization": "sedd"}, False)],
)  # fmt: skip
def test_auto_classes(changes, is_causal, tmp_path):
    """`AutoModelForCausalLM` where a text goes on and on: pipelines look for it."""
    tiny(**changes).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"} <= set(said)
    assert ("AutoModelForCausalLM" in said) == is_causal


@pytest.mark.parametrize("changes", [{"causal": True}, {}])
def test_text_generation_pipeline(changes):
    """It pads prompts on the left, and asks with transformers' names and a generation_config."""
    sizes = {"vocab_size": 35, "mask_index": 4, "bos_token_id": 2, "eos_token_id": 3}
    pipe = transformers.pipeline(
        "text-generation", model=tiny(**(sizes | changes)), tokenizer=load_tokenizer("text8")
    )
    found = pipe(["a dog", "a"], batch_size=2, max_new_tokens=6, num_return_sequences=2, top_p=0.9)
    for prompt, texts in zip(["a dog", "a"], found, strict=True):
        assert len(texts) == 2
        assert all(text["generated_text"].startswith(prompt) for text in texts)
    greedy = [pipe("a", max_new_tokens=6, do_sample=False, seed=seed) for seed in (0, 1)]
    if changes:  # others draw the order of the positions
        assert greedy[0] == greedy[1]
    assert pipe("", max_new_tokens=3)[0]["generated_text"] is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import noise_schedule", "`import noise_schedule` cannot be exported"),
        ("from models import dit", "models is a package"),
        ("from . import dit", r"\. is a package"),
    ],
)
def test_imports_that_cannot_be_exported(line, message, tmp_path):
    """A change that third parties could not load is an error here, not there."""
    path = tmp_path / "module.py"
    path.write_text(f"import torch\n{line}\n")
    with pytest.raises(ValueError, match=message):
        export.project_imports(path)


def test_saving_replaces_the_code_of_other_repositories(shared, tmp_path):
    """A published file names remote code; a saved one names the code beside it."""
    model = BD3LM.from_pretrained(shared / "golden/hub/bd3lm-block_size4")
    assert "kuleshov-group" in str(model.config.auto_map)
    model.save_pretrained(tmp_path)
    assert "kuleshov-group" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "modeling_bd3lm.py").is_file()


@pytest.mark.parametrize("through_save", [True, False], ids=["save_pretrained", "push_to_hub"])
def test_pushed_models_have_their_code(through_save, monkeypatch, tmp_path):
    """Both ways of transformers upload the code, not only the tensors."""
    uploaded = []
    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id),
        create_branch=lambda **_: None,
        create_commit=lambda operations, **_: uploaded.extend(
            operation.path_in_repo for operation in operations
        ),
    )
    card = SimpleNamespace(save=lambda path: open(path, "w").close())
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    if through_save:
        tiny().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
        assert (tmp_path / "mine/model.safetensors").is_file()
    else:
        tiny().push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "modeling_bd3lm.py", "export.py"} <= set(uploaded)
