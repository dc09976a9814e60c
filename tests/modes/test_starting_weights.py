"""Every layout that users have weights in, built small: loaded by its keys, fine-tuned, refused.

The commands are those of the original: `eval.checkpoint_path` and `training.from_pretrained` with
Hub-format directories and with Lightning checkpoints that hold a pickled OmegaConf configuration.
"""

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from omegaconf import DictConfig

import main
from checkpointing import convert
from checkpointing.weights import read_weights
from corpora.tokenization import load_tokenizer, train_bpe
from diffusion import Diffusion
from modes.starting_weights import load_model, new_model
from tests.helpers.small_module import module
from tests.helpers.small_run import overrides, sentences, write_text

SMALL = ["data.tokenizer_name_or_path=text8", "model.length=16", "algo.backbone=hf_dit"]
# algo and keys of the published models, with rows of 16 tokens for 1024
PUBLISHED = {
    "bd3lm-owt-block_size4": ["algo=bd3lm", "block_size=4"],
    "bd3lm-owt-block_size8": ["algo=bd3lm", "block_size=8"],
    "bd3lm-owt-block_size16": ["algo=bd3lm", "block_size=16"],
    "bd3lm-owt-block_size1024-pretrain": ["algo=bd3lm", "block_size=16"],
    "mdlm-owt": ["algo=mdlm"],
    "mdlm-noeos-owt": ["algo=mdlm"],
    "sedd-noeos-owt": ["algo=sedd"],
    "ar-noeos-owt": ["algo=ar"],
}
EVERY_LAYOUT = [(name, layout) for name in PUBLISHED for layout in ("hub", "lightning")]
EVERY_LAYOUT += [
    (name, layout)
    for name in ("bd3lm-owt-block_size4", "ar-noeos-owt")
    for layout in ("sharded", "compiled lightning", "safetensors")
]


def config_json(model: Diffusion, name: str) -> dict:
    """`config.json` as published: two model types, and a pointer to code of its own."""
    config = model.composed
    sizes = {
        "vocab_size": 35, "model_length": 16, "hidden_dim": 32, "n_blocks": 2, "n_heads": 2,
        "cond_dim": 16, "dropout": 0.1, "time_conditioning": config.algo.time_conditioning,
        "auto_map": {"AutoModelForMaskedLM": f"kuleshov-group/{name}--modeling.Model"},
    }  # fmt: skip
    if name.startswith(("mdlm", "sedd")):
        return sizes | {"model_type": "mdlm"}
    return sizes | {
        "model_type": "bd3lm", "block_size": config.block_size, "attn_backend": "flex",
        "cross_attn": config.algo.cross_attn, "causal": model.is_ar, "adaln": not model.is_ar,
        "var_min": config.algo.var_min, "sampling_eps_min": 1e-3, "sampling_eps_max": 1.0,
    }  # fmt: skip


def original_config(config: DictConfig) -> DictConfig:
    """The configuration as the original pickles it: interpolations and all."""
    config = config.copy()
    if config.algo.name != "bd3lm":
        config.block_size = "${model.length}"
    return config


def publish(model: Diffusion, folder, *, name: str, layout: str) -> str:
    """Write the weights in a layout; returns what a user types for it."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if layout == "safetensors":
        safetensors.torch.save_file(state, folder / "model.safetensors")
        return str(folder / "model.safetensors")
    if "lightning" in layout:
        prefix = "backbone._orig_mod." if "compiled" in layout else "backbone."
        names = {key.replace("backbone.", prefix): value for key, value in state.items()}
        content = {
            "state_dict": names,
            "hyper_parameters": {"config": original_config(model.composed), "tokenizer": object()},
            "ema": {"decay": 0.9999, "num_updates": 3,
                    "shadow_params": [p.detach().clone() for p in model.parameters()]},
        }  # fmt: skip
        torch.save(content, folder / "last.ckpt")
        return str(folder / "last.ckpt")
    (folder / "config.json").write_text(json.dumps(config_json(model, name)))
    (folder / "modeling.py").write_text("raise SystemExit('the code of the repository ran')")
    if layout == "hub":
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
        return str(folder)
    keys = sorted(state)
    shards = {"model-00001-of-00002.safetensors": keys[:9],
              "model-00002-of-00002.safetensors": keys[9:]}  # fmt: skip
    for shard, part in shards.items():
        safetensors.torch.save_file({key: state[key] for key in part}, folder / shard)
    places = {key: shard for shard, part in shards.items() for key in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def published(compose, tmp_path):
    """`published(name, layout)`: what to type for such weights, and the model they are of."""

    def make(name: str, layout: str) -> tuple[str, Diffusion]:
        model = module(compose, tmp_path, *PUBLISHED[name])
        folder = tmp_path / f"{name}-{layout}"
        folder.mkdir()
        return publish(model, folder, name=name, layout=layout), model

    return make


@pytest.fixture
def configured(compose, tmp_path):
    """`configured(*overrides)`: the configuration of a small run."""
    return lambda *changes: compose(overrides(tmp_path, *SMALL, *changes))


TEXT8 = load_tokenizer("text8")


@pytest.mark.parametrize(("name", "layout"), EVERY_LAYOUT)
def test_evaluated_and_fine_tuned(name, layout, published, configured):
    """All weights arrive, by either key; what a bare file does not say is not asked for."""
    source, model = published(name, layout)
    evaluated = load_model(configured(*PUBLISHED[name], f"eval.checkpoint_path={source}"), TEXT8)
    tuned = new_model(configured(*PUBLISHED[name], f"training.from_pretrained={source}"), TEXT8)
    for key, tensor in model.state_dict().items():
        assert torch.equal(evaluated.state_dict()[key], tensor), key
        if "eps" not in key:
            assert torch.equal(tuned.state_dict()[key], tensor), key


@pytest.mark.parametrize("layout", ["hub", "lightning"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_known_of_each(name, layout, published):
    found = read_weights(published(name, layout)[0]).hub_config
    algo = PUBLISHED[name][0].removeprefix("algo=")
    if layout == "hub" and algo == "sedd":  # its config.json may also be one of a timed mdlm
        assert found["algo"] is found["parameterization"] is None
    else:
        assert found["algo"] == algo
        assert found["cross_attn"] == (algo == "bd3lm") and found["causal"] == (algo == "ar")
    assert (found["vocab_size"], found["model_length"], found["n_heads"]) == (35, 16, 2)
    assert found["time_conditioning"] == (algo == "sedd")


def test_hub_ids_with_and_without_revision(published, configured, monkeypatch, tmp_path):
    """The commands of the original's README, with the Hub replaced by a folder."""
    folder, _ = published("bd3lm-owt-block_size4", "hub")
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for at in ("", "@v1.0", "@refs/pr/3"):
        source = f"kuleshov-group/bd3lm-owt-block_size4{at}"
        keys = ["algo=bd3lm", "block_size=4"]
        load_model(configured(*keys, f"eval.checkpoint_path={source}"), TEXT8)
        new_model(configured(*keys, f"training.from_pretrained={source}"), TEXT8)
    assert {revision for _, revision in asked} == {None, "v1.0", "refs/pr/3"}
    assert {repository for repository, _ in asked} == {"kuleshov-group/bd3lm-owt-block_size4"}


# --- keys that do not suit the weights -----------------------------------------------------------

# (published as, keys of the run, message with SOURCE for the path)
REFUSED = [
    ("bd3lm-owt-block_size4", ["algo=bd3lm", "block_size=8"],
     "block_size=8: allowed with this eval.checkpoint_path is 4, which SOURCE was trained with; "
     "eval.any_block_size=true"),
    ("bd3lm-owt-block_size4", ["algo=mdlm"],
     "block_size=16: allowed with this eval.checkpoint_path is 4"),
    ("mdlm-owt", ["algo=bd3lm", "block_size=4"],
     "block_size=4: allowed with this eval.checkpoint_path is 16"),
    ("ar-noeos-owt", ["algo=mdlm"],
     "algo=mdlm: allowed with eval.checkpoint_path=SOURCE is ar"),
    ("mdlm-owt", ["algo=sedd"], "algo=sedd: allowed with eval.checkpoint_path=SOURCE is mdlm"),
    ("mdlm-owt", ["algo=ar"], "algo=ar: allowed with eval.checkpoint_path=SOURCE is mdlm"),
    ("sedd-noeos-owt", ["algo=mdlm"],
     "algo.time_conditioning=False: allowed with eval.checkpoint_path=SOURCE is True"),
    ("mdlm-owt", ["algo=mdlm", "model.hidden_size=64", "model.n_blocks=3"],
     "model.hidden_size=64, model.n_blocks=3: allowed with eval.checkpoint_path=SOURCE is "
     "model.hidden_size=32 model.n_blocks=2"),
    ("mdlm-owt", ["algo=mdlm", "model.n_heads=4"],
     "model.n_heads=4: allowed with eval.checkpoint_path=SOURCE is model.n_heads=2"),
    ("mdlm-owt", ["algo=mdlm", "model.cond_dim=8"],
     "model.cond_dim=8: allowed with eval.checkpoint_path=SOURCE is model.cond_dim=16"),
    ("ar-noeos-owt", ["algo=ar", "model.adaln=true"],
     "model.adaln=True (algo=ar): allowed with eval.checkpoint_path=SOURCE is False"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_keys_that_do_not_suit(case, published, configured):
    """Loading was silent: the samples were garbage, and nothing said why."""
    name, keys, message = REFUSED[case]
    source, _ = published(name, "hub")
    with pytest.raises(ValueError) as error:
        load_model(configured(*keys, f"eval.checkpoint_path={source}"), TEXT8)
    assert message.replace("SOURCE", source) in str(error.value)


def test_a_vocabulary_that_does_not_fit_the_tokenizer(published, configured):
    source, _ = published("mdlm-owt", "hub")
    config = configured("algo=mdlm", f"eval.checkpoint_path={source}",
                        "data.tokenizer_name_or_path=bytes")  # fmt: skip
    with pytest.raises(ValueError) as error:
        load_model(config, load_tokenizer("bytes"))
    assert str(error.value) == (
        "data.tokenizer_name_or_path=bytes: its 260 ids, the mask counted, do not fit "
        f"eval.checkpoint_path={source}, which has 35; allowed is the tokenizer that it was "
        "trained with"
    )


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bd3lm-owt-block_size1024-pretrain", ["algo=mdlm"]),
        ("mdlm-owt", ["algo=bd3lm", "block_size=16"]),
        ("bd3lm-owt-block_size4", ["algo=mdlm", "eval.any_block_size=true"]),
        ("bd3lm-owt-block_size4", ["algo=bd3lm", "block_size=8", "eval.any_block_size=true"]),
    ],
)
def test_one_block_is_mdlm(name, keys, published, configured):
    """A bd3lm of one block and an mdlm are the same network; others are named on purpose."""
    source, _ = published(name, "hub")
    load_model(configured(*keys, f"eval.checkpoint_path={source}"), TEXT8)


def test_overriding_on_purpose_is_printed(published, configured, caplog):
    """MDLM weights at a smaller block size and another length: the paper's recipe."""
    source, _ = published("mdlm-owt", "lightning")
    keys = ["algo=bd3lm", "block_size=4", "model.length=32"]
    with caplog.at_level(logging.INFO):
        new_model(configured(*keys, f"training.from_pretrained={source}"), TEXT8)
    said = [record.getMessage() for record in caplog.records]
    where = f"while training.from_pretrained={source} was trained with"
    assert f"algo.name=bd3lm, {where} mdlm" in said
    assert f"model.length=32, {where} 16" in said
    assert f"block_size=4, {where} 16" in said
    assert f"{source}: 31 weights matched, 2 missing, 0 unexpected, 0 reshaped" in " ".join(said)
    assert f"{source}: missing sampling_eps_min, as it may be" in said


# --- what may differ -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["eval.checkpoint_path", "training.from_pretrained"])
def test_another_vocabulary_by_name(key, published, configured, caplog):
    """Fine-tuning with another tokenizer: the named weights start anew, and are listed."""
    source, model = published("mdlm-owt", "hub")
    changed = [f"{key}={source}", "data.tokenizer_name_or_path=bytes", "algo=mdlm"]
    load = load_model if key == "eval.checkpoint_path" else new_model
    with pytest.raises(ValueError, match="data.tokenizer_name_or_path=bytes"):
        load(configured(*changed), load_tokenizer("bytes"))
    with pytest.raises(ValueError, match=r"linear.weight is \(35, 32\) in the file, \(260, 32\)"):
        load(
            configured(*changed, "eval.allow_missing=[backbone.vocab_embed.embedding]"),
            load_tokenizer("bytes"),
        )
    allowed = "eval.allow_missing=[backbone.vocab_embed.embedding,backbone.output_layer.linear.*]"
    found = load(configured(*changed, allowed), load_tokenizer("bytes"))
    assert torch.equal(found.backbone.blocks[0].norm1.weight, model.backbone.blocks[0].norm1.weight)
    assert "as eval.allow_missing says" in caplog.text
    assert "embedding is (35, 32) in the file, (260, 32) in the model" in caplog.text


def test_a_mistyped_name_is_an_error(published, configured):
    source, _ = published("mdlm-owt", "hub")
    config = configured("algo=mdlm", f"eval.checkpoint_path={source}",
                        "eval.allow_missing=[backbone.ouput_layer.*]")  # fmt: skip
    with pytest.raises(ValueError, match=r"eval.allow_missing=\[backbone.ouput_layer.\*\]: no wei"):
        load_model(config, TEXT8)


@pytest.fixture
def trained(compose, tmp_path, monkeypatch):
    """Trains on `bpe-280`, then lets the text grow: another bpe-280 would come of it."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*changes: str) -> None:
        small = ["algo=ar", "model.n_blocks=1", "data.tokenizer_name_or_path=bpe-280"]
        config = compose(overrides(tmp_path, *small, *changes))
        main.run(config, launch_dir=str(tmp_path))

    run("trainer.max_steps=1")
    with open(tmp_path / "train.txt", "a") as file:
        file.write("xyzzy plugh " * 100)
    return run


def evaluate(trained, *changes: str) -> float:
    trained("mode=ppl_eval", "eval.checkpoint_path=checkpoints/last.ckpt", *changes)
    return json.loads(Path("ppl_eval.json").read_text())["val/nll"]


def test_a_bpe_is_the_one_of_the_checkpoint(trained, tmp_path, caplog):
    """The old weights were evaluated, trained on and fine-tuned with the ids of the new one."""
    before = evaluate(trained, "data.train_path=null")  # which the text is not even needed for
    with caplog.at_level(logging.INFO):
        assert evaluate(trained) == before
    assert "bpe-280 is the one in" in caplog.text and "Trained bpe-280" not in caplog.text
    weights = read_weights("checkpoints/last.ckpt")
    for changes in (
        ["trainer.max_steps=2"],
        ["training.from_pretrained=checkpoints/last.ckpt", "checkpointing.save_dir=tuned"],
    ):
        trained(*changes)
    for path in ("checkpoints/last.ckpt", "tuned/checkpoints/last.ckpt"):
        assert read_weights(path).tokenizer == weights.tokenizer
    for name in ("hub", "w.safetensors", "again.ckpt"):
        assert convert.main(["checkpoints/last.ckpt", name]) == 0
        assert read_weights(name).tokenizer == weights.tokenizer


def test_another_tokenizer_is_refused_and_an_unknown_one_warned_of(trained, tmp_path, caplog):
    other = tmp_path / "other"
    train_bpe((line[::-1] for line in sentences()), vocab_size=280).save_pretrained(other)
    for changes in (
        ["mode=ppl_eval", "eval.checkpoint_path=checkpoints/last.ckpt"],
        ["mode=sample_eval", "eval.checkpoint_path=checkpoints/last.ckpt"],
        ["training.from_pretrained=checkpoints/last.ckpt", "checkpointing.save_dir=tuned"],
        ["trainer.max_steps=2"],
    ):
        with pytest.raises(ValueError, match=r"data\.tokenizer_name_or_path=.*other: it has .*"
                           r"entries.*allowed is the tokenizer that .*last\.ckpt was trained with"):
            trained(*changes, "data.tokenizer_name_or_path=other")  # fmt: skip
    checkpoint = torch.load("checkpoints/last.ckpt", weights_only=True)
    del checkpoint["tokenizer"]
    torch.save(checkpoint, "checkpoints/last.ckpt")
    evaluate(trained)
    assert "does not say which tokenizer it was trained with" in caplog.text
