"""The YAML files: names, defaults, groups and resolvers, against ../shared/reference."""

import json
import math
import os
import re

import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import configuration
from configuration import resolvers

GROUPS = {
    "algo": ["ar", "bd3lm", "mdlm", "sedd"],
    "data": [
        "ag_news",
        "lambada",
        "lm1b-gpt2",
        "lm1b-wrap",
        "lm1b_wrap",
        "local",
        "openwebtext",
        "openwebtext-split",
        "openwebtext-streaming",
        "ptb",
        "python_docs",
        "scientific_papers_arxiv",
        "scientific_papers_pubmed",
        "text8",
        "text8-crop",
        "wikitext103",
        "wikitext2",
    ],
    "model": ["medium", "small", "tiny"],
    "noise": ["cosine", "log", "loglinear", "square", "square_root"],
    "lr_scheduler": ["constant", "constant_warmup", "cosine_decay_warmup"],
    "strategy": ["ddp", "fsdp"],
    "logger": ["csv", "tensorboard", "wandb"],
    "callbacks": ["checkpoint_every_n_steps", "checkpoint_monitor", "learning_rate_monitor"],
    "experiment": ["quickstart"],
}

# Defaults the original computes with `eval`, reads from a cluster's path or fixes to a GPU.
MACHINE_SAFE = {
    "loader.batch_size",
    "loader.eval_batch_size",
    "loader.num_workers",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",
    "data.cache_dir",
}

# A run of a million steps would leave 2,000 checkpoints; -1 keeps them all as the original does.
BOUNDED = {"callbacks.checkpoint_every_n_steps.save_top_k": 3}

# parameterization, time_conditioning, causal_attention, ignore_bos, cross_attn, var_min, sampler
PRESETS = {
    "ar": ("ar", False, True, False, False, False, "ar"),
    "bd3lm": ("subs", False, False, True, True, True, "semi_ar"),
    "mdlm": ("subs", False, False, True, False, False, "semi_ar"),
    "sedd": ("sedd", True, False, True, False, False, "analytic"),
}
PRESET_KEYS = (
    "parameterization",
    "time_conditioning",
    "causal_attention",
    "ignore_bos",
    "cross_attn",
    "var_min",
    "sampler",
)


def leaves(config: DictConfig, prefix: str = "") -> dict[str, object]:
    """Returns every leaf below a node by its dotted key, interpolations as written."""
    found = {}
    for key, value in OmegaConf.to_container(config, resolve=False).items():
        if isinstance(value, dict):
            found |= leaves(OmegaConf.create(value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def test_default_keys(shared, compose):
    """Every key of the original's default composition exists here with the same default."""
    actual = leaves(compose())
    for line in (shared / "reference/config_keys.txt").read_text().splitlines():
        key, _, default = line.partition(" = ")
        assert key in actual, key
        if key in BOUNDED:
            assert (actual[key], json.loads(default)) == (BOUNDED[key], -1)
        elif key not in MACHINE_SAFE:
            assert actual[key] == json.loads(default), key


def test_new_keys(compose):
    """The keys the original lacks are few, and they leave its behaviour alone."""
    config = compose()
    assert config["eval"]["results_path"] is None
    assert config["eval"]["allow_missing"] == []
    assert config["then"] == []
    assert config["training"]["compile"] == "auto"
    assert config["training"]["activation_checkpointing"] == "none"
    assert config["training"]["tf32"] is False
    assert "offline" not in config["wandb"], "the scripts add wandb.offline with a plus"


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_batch_arithmetic(compose, fake_gpus, gpus):
    """The original divides by the number of GPUs while it composes: by zero on a laptop."""
    fake_gpus(gpus)
    config = compose(["loader.global_batch_size=512"])
    devices = max(1, gpus)
    assert config["trainer"]["accelerator"] == ("cuda" if gpus else "cpu")
    assert config["trainer"]["devices"] == devices
    assert config["loader"]["batch_size"] == config["loader"]["eval_batch_size"] == 512 // devices
    assert config["trainer"]["accumulate_grad_batches"] == 1
    small = compose(["loader.batch_size=16", "trainer.num_nodes=2"])
    assert small["trainer"]["accumulate_grad_batches"] == 512 // (16 * 2 * devices)


@pytest.mark.parametrize(
    ("devices", "count"),
    [("4", 4), ("'4'", 4), ("[0,2]", 2), ("'0,2'", 2), ("'0,'", 1), ("auto", 8), ("-1", 8)],
)
def test_forms_of_devices(compose, fake_gpus, devices, count):
    """The batch arithmetic reads `trainer.devices` as Lightning does."""
    fake_gpus(8)
    assert compose([f"trainer.devices={devices}"])["loader"]["batch_size"] == 512 // count


def test_devices_on_the_cpu_of_a_gpu_machine(compose, fake_gpus):
    """`auto` counts the devices of the accelerator that was asked for."""
    fake_gpus(8)
    config = compose(["trainer.accelerator=cpu", "trainer.devices=auto"])
    assert config["loader"]["batch_size"] == 512


@pytest.mark.parametrize(
    ("cpus", "gpus", "threads", "slurm", "expected"),
    [
        (8, 0, 8, None, 0),  # torch computes on all of them
        (8, 0, 2, None, 6),
        (8, 1, 8, None, 7),  # threads do not matter on a GPU
        (32, 4, 8, None, 7),  # four processes
        (4, 8, 4, None, 0),
        (224, 8, 8, None, 16),
        (8, 4, 8, "8", 7),  # each task has eight of its own
        (32, 4, 8, "8", 7),  # Slurm has not bound them
    ],
)
def test_num_workers(compose, fake_gpus, monkeypatch, cpus, gpus, threads, slurm, expected):
    """Each process had as many workers as there are CPUs: eight times too many on eight GPUs."""
    fake_gpus(gpus)
    monkeypatch.setattr(resolvers, "num_cpus", lambda: cpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert compose()["loader"]["num_workers"] == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
@pytest.mark.parametrize("quota", [math.inf, 0.5, 1.0])
def test_num_cpus_is_what_the_process_may_use(monkeypatch, quota):
    """A Slurm step or a container may own fewer CPUs than the machine has."""
    monkeypatch.setattr(resolvers, "cpu_quota", lambda cgroup: quota)
    expected = len(os.sched_getaffinity(0)) if quota == math.inf else 1
    assert resolvers.num_cpus() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_quota_of_a_container(tmp_path, files, expected):
    """`docker run --cpus=2` leaves all CPUs visible and gives the time of two."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resolvers.cpu_quota(tmp_path) == expected


def test_paths_follow_the_working_directory(compose, tmp_path, monkeypatch):
    """Hydra changes into the run directory after composing; paths are read there."""
    config = compose()
    monkeypatch.chdir(tmp_path)
    assert config["checkpointing"]["save_dir"] == str(tmp_path)
    assert config["eval"]["checkpoint_path"] == f"{tmp_path}/checkpoints/last.ckpt"


def test_registering_twice(compose):
    """Resolvers may be registered again, by every test and by a notebook."""
    resolvers.register_resolvers()
    resolvers.register_resolvers()
    assert compose()["trainer"]["devices"] >= 1


def test_no_eval_resolver(project, compose):
    """The original evaluates Python from configuration strings; here there is no such resolver."""
    compose()
    assert not OmegaConf.has_resolver("eval")
    for path in (project / "configs").rglob("*.yaml"):
        assert "${eval" not in path.read_text(), path


def test_no_machine_paths(project):
    """No default points into somebody's file system."""
    for path in (project / "configs").rglob("*.yaml"):
        values = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"(?<![\w}.~])/(home|mnt|root|scratch|share|tmp|usr|work)", values), (
            path
        )


def test_groups_are_complete(project):
    """Every group holds exactly the documented choices."""
    for group, choices in GROUPS.items():
        files = sorted(path.stem for path in (project / "configs" / group).glob("[!_]*.yaml"))
        assert files == choices, group


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group in GROUPS if group != "callbacks" for choice in GROUPS[group]],
)
def test_every_choice_composes_and_resolves(compose, fake_gpus, group, choice):
    """Every choice composes, resolves without a GPU and passes validation."""
    fake_gpus(0)
    overrides = [f"{group}={choice}"]
    if (group, choice) == ("data", "local"):
        overrides += ["data.train_path=train.txt", "data.valid_path=valid.txt"]
    config = compose(overrides)
    OmegaConf.to_container(config, resolve=True)
    configuration.validate(config)
    assert configuration.ignored_key_warnings(config) == []


@pytest.mark.parametrize("algo", PRESETS)
def test_algo_presets(compose, algo):
    """The presets are the contract's table."""
    preset = compose([f"algo={algo}"])["algo"]
    assert preset["name"] == algo
    assert preset["T"] == 0
    assert tuple(preset[key] for key in PRESET_KEYS) == PRESETS[algo]


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("tiny", (256, 64, 8, 8)), ("small", (768, 128, 12, 12)), ("medium", (1024, 128, 24, 16))],
)
def test_model_sizes(compose, model, sizes):
    """The three sizes share length, dropout and backend."""
    config = compose([f"model={model}"])["model"]
    keys = ("hidden_size", "cond_dim", "n_blocks", "n_heads")
    assert tuple(config[key] for key in keys) == sizes
    assert (config["length"], config["dropout"]) == (1024, 0.1)
    assert config["attn_backend"] == "flash_attn"


def test_special_token_keys_are_only_in_openwebtext_split(compose):
    """The scripts add these keys with a plus, which fails where a file already has them."""
    keys = {f"insert_{role}_{kind}" for role in ("train", "valid") for kind in ("eos", "special")}
    for choice in GROUPS["data"]:
        data = compose([f"data={choice}"])["data"]
        if choice == "openwebtext-split":
            assert all(data[key] is True for key in keys)
        else:
            assert not keys & set(data), choice


def test_targets_exist(compose):
    """Every `_target_` names something that can be imported."""
    overrides = [
        [],
        *([f"lr_scheduler={choice}"] for choice in GROUPS["lr_scheduler"]),
        *([f"strategy={choice}"] for choice in GROUPS["strategy"]),
    ]
    for override in overrides:
        for key, value in leaves(compose(override)).items():
            if key.endswith("_target_"):
                assert callable(get_object(value)), value


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("training.compile=fast", "allowed are true, false and auto"),
        ("training.activation_checkpointing=all", "allowed are none, blocks"),
        ("loader.batch_size=max", "allowed is an integer"),
    ],
)
def test_wrong_speed_and_memory(compose, override, allowed):
    with pytest.raises(ValueError, match=f"{override}: {allowed}"):
        configuration.validate(compose([override]))


def test_cosine_schedule_ends_with_the_run(compose):
    """Warm-up is a tenth of the run and the decay fills the rest."""
    schedule = compose(["lr_scheduler=cosine_decay_warmup", "trainer.max_steps=1005"])[
        "lr_scheduler"
    ]
    assert (schedule["warmup_t"], schedule["t_initial"]) == (101, 904)


def test_ignored_keys(compose):
    """A changed key without effect is named once; presets and other groups warn of nothing."""
    for algo in GROUPS["algo"]:
        assert configuration.ignored_key_warnings(compose([f"algo={algo}"])) == []
    config = compose(["diffusion=other", "algo.dropout=0.2", "algo.causal_attention=true"])
    warnings = configuration.ignored_key_warnings(config)
    assert [text.split(" ")[0] for text in warnings] == [
        "diffusion=other",
        "algo.dropout=0.2",
        "algo.causal_attention=True",
    ]


def test_quickstart_is_small(compose, fake_gpus):
    """The quickstart runs on one CPU device, without wandb and with a limit on its time."""
    fake_gpus(0)
    config = compose(["experiment=quickstart"])
    assert config["data"]["train"] == "python_docs"
    assert config["algo"]["name"] == "bd3lm"
    assert config["wandb"] is None
    assert config["trainer"]["devices"] == 1
    assert config["trainer"]["max_time"] == "00:00:07:00"
