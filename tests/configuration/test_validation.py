"""Every rule of `configuration.validate`: what it refuses, what its message says, what it allows.

A message names the key, its value and what is allowed.
"""

import pytest

import configuration

LOCAL = ["data=local", "data.train_path=train.txt", "data.valid_path=valid.txt"]

# (overrides, fragments of the message); the machine has no GPU
REFUSED = [
    # names
    (["mode=tran"], "mode=tran: allowed are train, ppl_eval, sample_eval"),
    (["then=[ppl]"], "then=['ppl']: allowed is a list of train, ppl_eval, sample_eval"),
    (["then=ppl_eval"], "then=ppl_eval: allowed is a list of train, ppl_eval, sample_eval"),
    (["algo.name=gpt"], "algo.name=gpt: allowed are ar, bd3lm, mdlm, sedd"),
    (["algo.parameterization=d3pm"], "algo.parameterization=d3pm: allowed are ar, subs, sedd"),
    (["algo.backbone=unet"], "algo.backbone=unet: allowed are dit, hf_dit"),
    (["algo.sampler=ddpm"], "algo.sampler=ddpm: allowed are ar, semi_ar, analytic"),
    (["noise.type=linear"], "noise.type=linear: allowed are loglinear, square, square_root, log"),
    (
        ["model.attn_backend=xformers"],
        "model.attn_backend=xformers: allowed are flash_attn, auto, flex, sdpa",
    ),
    (["trainer.accelerator=tpu"], "trainer.accelerator=tpu: allowed are auto, cpu, cuda, gpu"),
    (
        ["eval.allow_missing=backbone.*"],
        "eval.allow_missing=backbone.*: allowed is a list of names of weights",
    ),
    (["eval.allow_missing=[1]"], "eval.allow_missing=[1]: allowed is a list of names of weights"),
    # devices
    (["trainer.accelerator=cuda"], "trainer.accelerator=cuda: no CUDA device is visible here"),
    (["trainer.devices=0"], "trainer.devices=0: allowed are a positive integer, a list"),
    (["trainer.devices=-2"], "trainer.devices=-2: allowed"),
    (["trainer.devices=[]"], "trainer.devices=[]: allowed"),
    (["trainer.devices=many"], "trainer.devices=many: allowed"),
    (["trainer.devices=true"], "trainer.devices=True: allowed"),
    (["trainer.devices=null"], "trainer.devices=None: allowed"),
    # numbers
    (["seed=-1"], "seed=-1: allowed is an integer in [0, 4294967295]"),
    (["block_size=four"], "block_size=four: allowed is an integer in [1, inf)"),
    (["block_size=0"], "block_size=0: allowed is an integer in [1, inf)"),
    (["model.length=12.5"], "model.length=12.5: allowed is an integer"),
    (["model.n_heads=0"], "model.n_heads=0: allowed is an integer in [1, inf)"),
    (["model.dropout=1"], "model.dropout=1: allowed is a number in [0, 1)"),
    (["loader.global_batch_size=0"], "loader.global_batch_size=0: allowed is an integer"),
    (["loader.global_batch_size=x"], "loader.global_batch_size=x: allowed is an integer"),
    (["loader.batch_size=-1"], "loader.batch_size=-1: allowed is an integer in [1, inf)"),
    (["loader.eval_batch_size=0"], "loader.eval_batch_size=0: allowed is an integer in [1, inf)"),
    (["loader.num_workers=-1"], "loader.num_workers=-1: allowed is an integer in [0, inf)"),
    (["trainer.num_nodes=0"], "trainer.num_nodes=0: allowed is an integer in [1, inf)"),
    (["sampling.nucleus_p=0"], "sampling.nucleus_p=0: allowed is a number in (0, 1]"),
    (["sampling.nucleus_p=1.5"], "sampling.nucleus_p=1.5: allowed is a number in (0, 1]"),
    (["sampling.num_sample_batches=0"], "sampling.num_sample_batches=0: allowed is an integer"),
    (["training.ema=1"], "training.ema=1: allowed is a number in [0, 1)"),
    (["training.ema=null"], "training.ema=None: allowed is a number in [0, 1)"),
    (["training.sampling_eps_min=0"], "training.sampling_eps_min=0: allowed is a number in (0, 1]"),
    (["training.sampling_eps_max=2"], "training.sampling_eps_max=2: allowed is a number in (0, 1]"),
    (["optim.lr=fast"], "optim.lr=fast: allowed is a number in (0, inf)"),
    (["algo.T=-1"], "algo.T=-1: allowed is an integer in [0, inf)"),
    (["algo.clip_search_delta=0"], "algo.clip_search_delta=0: allowed is a number in (0, 1)"),
    (["trainer.val_check_interval=0"], "trainer.val_check_interval=0: allowed is a number"),
    (["trainer.limit_val_batches=-1"], "trainer.limit_val_batches=-1: allowed is a number"),
    (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: allowed is a number"),
    (["trainer.max_steps=1e6"], "trainer.max_steps=1000000.0: allowed is an integer"),
    (["trainer.limit_val_batches=2.5"], "trainer.limit_val_batches=2.5: allowed are an integer"),
    (["trainer.val_check_interval=1.5"], "trainer.val_check_interval=1.5: allowed are an integer"),
    # switches
    (["sampling.kv_cache=1"], "sampling.kv_cache=1: allowed are true and false"),
    (["sampling.compile=true"], "sampling.compile=True: allowed with sampling.kv_cache=false"),
    (["sampling.compile=graph"], "sampling.compile=graph: allowed are true, false and graphs"),
    (["training.resample=maybe"], "training.resample=maybe: allowed are true and false"),
    (["data.wrap=[1]"], "data.wrap=[1]: allowed are true and false"),
    # texts, which Hydra may have read as something else
    (["data.cache_dir=1.5"], "data.cache_dir=1.5: allowed is a text that is not empty"),
    (["data.tokenizer_name_or_path=-1"], "data.tokenizer_name_or_path=-1: allowed is a text"),
    (["sampling.infill=-1"], "sampling.infill=-1: allowed are null and a text"),
    (["training.from_pretrained=''"], "training.from_pretrained=: allowed are null and a text"),
    (
        ["callbacks.checkpoint_monitor.dirpath=[]"],
        "callbacks.checkpoint_monitor.dirpath=[]: allowed are null and a text",
    ),
    (["trainer.gradient_clip_val=much"], "trainer.gradient_clip_val=much: allowed are null and"),
    (["data.num_proc=0"], "data.num_proc=0: allowed is an integer in [1, inf)"),
    # sizes
    (
        ["block_size=48"],
        "block_size=48: allowed are the divisors of model.length=1024; nearest: 32, 64",
    ),
    (["block_size=2048"], "model.length=1024; nearest: 1024"),
    (["model.n_heads=7"], "model.n_heads=7: allowed are numbers that cut model.hidden_size=768"),
    (["model.hidden_size=36"], "model.n_heads=12: allowed are numbers that cut"),
    # algorithms
    (
        ["algo=ar", "algo.parameterization=subs"],
        "algo.parameterization=subs: allowed with algo.name=ar is ar",
    ),
    (["algo=ar", "algo.sampler=semi_ar"], "algo.sampler=semi_ar: allowed with algo.name=ar is ar"),
    (["algo=sedd", "algo.sampler=semi_ar"], "allowed with algo.name=sedd is analytic"),
    (["algo.sampler=analytic"], "allowed with algo.name=bd3lm is semi_ar"),
    (["algo=ar", "block_size=4"], "block_size=4: allowed with mode=train, algo.name=ar"),
    (["algo=sedd", "block_size=4", "mode=sample_eval", "algo.T=9"], "is model.length=1024"),
    (["algo=mdlm", "block_size=4", "then=[sample_eval]"], "allowed with mode=sample_eval+train"),
    (["algo=mdlm", "block_size=4"], "smaller blocks need algo=bd3lm"),
    (["algo.cross_attn=false", "algo.var_min=false", "block_size=4"], "algo.cross_attn=False"),
    (
        ["algo=sedd", "algo.cross_attn=true"],
        "algo.cross_attn=True: allowed with algo.parameterization=sedd is False",
    ),
    (
        ["algo=mdlm", "algo.var_min=true"],
        "algo.var_min=True: allowed with algo.cross_attn=False is False",
    ),
    (
        ["sampling.prompts=a.txt", "sampling.infill=b.jsonl"],
        "sampling.infill=b.jsonl: allowed with sampling.prompts=a.txt is null",
    ),
    (
        ["sampling.max_new_tokens=0"],
        "sampling.max_new_tokens=0: allowed are null and an integer in [1, inf)",
    ),
    (
        ["sampling.infill=b.jsonl", "sampling.max_new_tokens=3"],
        "sampling.max_new_tokens=3: allowed with sampling.infill",
    ),
    (
        ["mode=ppl_eval", "trainer.limit_val_batches=0"],
        "trainer.limit_val_batches=0: allowed with mode=ppl_eval are positive numbers",
    ),
    (
        ["mode=sample_eval", "algo.time_conditioning=true"],
        "algo.time_conditioning=True: allowed with algo.sampler=semi_ar is False",
    ),
    (
        ["algo=ar", "algo.mdlm_loss_scale=true"],
        "algo.mdlm_loss_scale=True: allowed with algo.name=ar is False",
    ),
    # clipped ranges
    (
        ["training.sampling_eps_min=0.8", "training.sampling_eps_max=0.3"],
        "training.sampling_eps_min=0.8: allowed are values <= training.sampling_eps_max=0.3",
    ),
    (
        [
            "block_size=4",
            "training.resample=true",
            "training.sampling_eps_min=0.3",
            "training.sampling_eps_max=0.45",
        ],
        "training.resample=True: allowed with block_size=4 are ranges that hold a multiple of 1/4",
    ),
    (["algo.clip_search_widths=0.5"], "algo.clip_search_widths=0.5: allowed is a list"),
    (["algo.clip_search_widths=[0.5,1]"], "algo.clip_search_widths=[0.5, 1]: allowed are numbers"),
    (["algo.clip_search_widths=[wide]"], "algo.clip_search_widths=['wide']: allowed are numbers"),
    (
        ["algo.clip_search_widths=[0.2]", "training.resample=true", "block_size=4"],
        "algo.clip_search_widths=[0.2]: allowed with training.resample=True and block_size=4 are",
    ),
    # backends
    (["model.attn_backend=flex"], "model.attn_backend=flex: FlexAttention has no CPU backward"),
    (
        ["model.attn_backend=flex", "trainer.accelerator=auto"],
        "trainer.accelerator=auto are auto, sdpa, flash_attn",
    ),
    # sampling
    (
        ["mode=sample_eval", "sampling.first_hitting=false"],
        "algo.T=0: allowed with algo.sampler=semi_ar and sampling.first_hitting=False",
    ),
    (["mode=sample_eval", "algo=sedd"], "algo.T=0: allowed with algo.sampler=analytic"),
    (
        ["mode=sample_eval", "algo=ar", "sampling.tokens_per_step=2"],
        "sampling.tokens_per_step=2: allowed with algo.sampler=ar,",
    ),
    (
        ["mode=sample_eval", "sampling.tokens_per_step=2", "sampling.confidence_threshold=0.9"],
        "sampling.tokens_per_step=2: allowed with algo.sampler=semi_ar",
    ),
    (
        ["algo=mdlm", "sampling.kv_cache=true"],
        "sampling.kv_cache=True: allowed with algo.name=mdlm",
    ),
    # batch arithmetic
    (
        ["loader.global_batch_size=100", "loader.batch_size=16"],
        "loader.global_batch_size=100: loader.batch_size=16 x 1 devices x trainer.num_nodes=1 x "
        "trainer.accumulate_grad_batches=7 = 112 rows; allowed and near is "
        "loader.global_batch_size=96 or 112 or a loader.batch_size that divides 100",
    ),
    (
        ["loader.batch_size=16", "trainer.accumulate_grad_batches=2"],
        "trainer.accumulate_grad_batches=2 = 32 rows; allowed and near is "
        "trainer.accumulate_grad_batches=32",
    ),
    (
        ["loader.global_batch_size=8", "loader.batch_size=16"],
        "loader.global_batch_size=16 or a loader.batch_size that divides 8",
    ),
    (["trainer.devices=3"], "loader.global_batch_size=512: loader.batch_size=171 x 3 devices"),
]

ALLOWED = [
    [],
    ["block_size=1"],
    ["block_size=1024"],
    ["algo=mdlm", "block_size=1024", "model.length=2048", "mode=sample_eval"],
    ["algo=mdlm", "algo.mdlm_loss_scale=true"],
    ["algo=sedd", "algo.mdlm_loss_scale=true"],
    ["algo=ar", "sampling.kv_cache=true", "mode=sample_eval"],
    ["mode=sample_eval"],
    ["mode=sample_eval", "sampling.kv_cache=true", "sampling.compile=graphs"],
    ["then=[ppl_eval,sample_eval]"],
    ["mode=sample_eval", "sampling.first_hitting=false", "algo.T=64", "block_size=4"],
    ["mode=ppl_eval", "model.attn_backend=flex"],
    ["mode=ppl_eval", "loader.global_batch_size=100", "loader.batch_size=16"],
    ["loader.batch_size=16", "loader.global_batch_size=96"],
    ["trainer.devices=4", "trainer.num_nodes=2", "loader.batch_size=8"],
    ["trainer.devices='1'"],
    ["trainer.limit_val_batches=0", "trainer.max_steps=-1", "trainer.val_check_interval=0.5"],
    ["training.ema=0", "optim.weight_decay=0.1"],
    ["training.resample=true", "training.sampling_eps_min=0.3", "training.sampling_eps_max=0.8"],
    # The lower end of the full range is no bound: no masked token at all is inside.
    ["training.resample=true", "block_size=4", "training.sampling_eps_max=0.2"],
    ["training.resample=true", "block_size=1", "training.sampling_eps_min=1"],
    ["training.resample=true", "block_size=1", "algo.clip_search_widths=[0.5]"],
    ["training.resample=true", "block_size=4", "algo.clip_search_widths=[0.5,0.7]"],
    ["algo.time_conditioning=true", "block_size=4"],
    [*LOCAL, "model=tiny", "block_size=16"],
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused(compose, fake_gpus, overrides, message):
    """An invalid value or combination is a ValueError before anything is loaded."""
    fake_gpus(0)
    with pytest.raises(ValueError) as error:
        configuration.validate(compose(overrides))
    assert message in str(error.value)


@pytest.mark.parametrize("overrides", ALLOWED)
def test_allowed(compose, fake_gpus, overrides):
    """The rules refuse nothing that works."""
    fake_gpus(0)
    configuration.validate(compose(overrides))


def test_flex_trains_on_a_gpu(compose, fake_gpus):
    """FlexAttention has a backward pass on CUDA."""
    fake_gpus(1)
    configuration.validate(compose(["model.attn_backend=flex"]))
    configuration.validate(compose(["model.attn_backend=flex", "trainer.accelerator=auto"]))
