"""Compiled and checkpointed layers beside plain ones: same numbers, counted, never timed."""

import copy
import dataclasses
import functools

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from tests.helpers import parallel_runs, small_module
from tests.helpers.references import generator
from tests.helpers.small_run import ALGOS, write_text
from training.acceleration import (
    checkpoint_layers,
    compile_layers,
    is_compiled,
    warn_without_c_compiler,
)

CONFIG = DITConfig(
    vocab_size=35, block_size=4, hidden_size=32, cond_dim=16, n_blocks=3, n_heads=2, dropout=0.0
)


def network(**changes) -> DIT:
    torch.manual_seed(0)
    net = DIT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def loss(net: DIT, *, masked_fraction: float = 0.5, rows: int = 2) -> torch.Tensor:
    """Of [x_t ; x_0] with N = 16, over a number of tokens that depends on the fraction."""
    indices = torch.randint(35, (rows, 32), generator=generator(1))
    at = torch.rand((rows, 16), generator=generator(2)) < masked_fraction
    logits = net(indices, pattern=AttentionPattern.BLOCK_DIFFUSION, logits_at=at)
    return logits.square().mean()


def gradients(net: DIT, **how) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(5)  # of dropout
    loss(net, **how).backward()
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def saved_bytes(function) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without weights."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    del kept
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_auto_compiles_on_gpus(setting, device, expected):
    assert is_compiled(setting, device=torch.device(device)) is expected


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal(dropout):
    """Bit for bit, and with dropout: the second time the same features are dropped."""
    plain = network(dropout=dropout)
    checkpointed = copy.deepcopy(plain)
    checkpoint_layers(checkpointed)
    checkpoint_layers(checkpointed)
    for expected, actual in zip(gradients(plain), gradients(checkpointed), strict=True):
        assert torch.equal(expected, actual)


def test_checkpointing_keeps_less():
    """Of a layer its input alone, D numbers a token; of the whole more than thirty times that."""
    kept = {}
    for layers in (1, 5):
        plain = network(n_blocks=layers)
        checkpointed = copy.deepcopy(plain)
        checkpoint_layers(checkpointed)
        for name, net in (("plain", plain), ("checkpointed", checkpointed)):
            kept[name, layers] = saved_bytes(functools.partial(loss, net))
    activations = 2 * 32 * 32 * 4  # a float32 (B, 2N, D)
    per_layer = {
        name: (kept[name, 5] - kept[name, 1]) / 4 for name in ("plain", "checkpointed")
    }
    assert per_layer["checkpointed"] <= 1.1 * activations
    assert per_layer["plain"] >= 10 * activations


def test_names_do_not_change():
    """torch.compile(module) and checkpoint wrappers add _orig_mod to the keys of checkpoints."""
    net = network()
    names = list(net.state_dict())
    checkpoint_layers(net)
    compile_layers(net)
    assert list(net.state_dict()) == names
    assert [name for name, _ in net.named_modules()] == [n for n, _ in network().named_modules()]


@pytest.mark.parametrize("version", ["2.11", "2.13"])
def test_layers_may_have_many_graphs_on_every_torch(monkeypatch, version):
    """`torch.compile` of torch 2.11 knows no `recompile_limit`: compiled trainings died there."""
    asked = []

    def compile_2_11(model=None, *, fullgraph=False, dynamic=None, backend="inductor", mode=None,
                     options=None, disable=False):  # fmt: skip
        asked.append((fullgraph, dynamic))
        return model

    if version == "2.11":
        monkeypatch.setattr(torch, "compile", compile_2_11)
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=500):
        net = network()
        compile_layers(net)
        assert torch._dynamo.config.recompile_limit == 64
        assert torch._dynamo.config.accumulated_recompile_limit == 500, "never less"
    assert asked == [(True, False)] * (2 * len(net.blocks) if version == "2.11" else 0)


def test_a_missing_c_compiler_is_named_early(monkeypatch, caplog):
    """Triton builds with one, and says so at the first step, below a long traceback."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setenv("CC", "/opt/bin/cc")
    monkeypatch.setenv("PATH", "")
    warn_without_c_compiler(cuda)
    monkeypatch.delenv("CC")
    warn_without_c_compiler(cpu)
    assert not caplog.messages
    warn_without_c_compiler(cuda)
    assert "Failed to find C compiler" in caplog.text and "install gcc" in caplog.text


@pytest.mark.parametrize(("setting", "rows"), [("true", 4), ("auto", 0)])
def test_compiled_validations_have_full_batches(compose, tmp_path, monkeypatch, setting, rows):
    """The last batch is padded where shapes are compiled, and only there."""
    monkeypatch.setattr(torch, "compile", lambda function, **_how: function)
    model = small_module.module(
        compose, tmp_path, *ALGOS["bd3lm"],
        f"training.compile={setting}", "loader.eval_batch_size=4",
    )  # fmt: skip
    trainer, _ = small_module.trainer(tmp_path)
    trainer.validate(model, small_module.batches(1, batch_size=2), verbose=False)
    assert model.losses.min_rows == rows


@pytest.fixture
def fresh_compiler():
    """Counts of this test alone."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_compute_the_same(fresh_compiler, checkpointed):
    """Three graphs for all layers, none in later steps; graph breaks are errors (fullgraph).

    Before the attention, after it, and after it in the last layer, which has half the tokens.
    """
    plain = network(n_blocks=5)
    compiled = copy.deepcopy(plain)
    if checkpointed:
        checkpoint_layers(compiled)
    compile_layers(compiled)
    graphs = []
    for fraction in (0.5, 0.1, 0.9, 1.0):
        expected = gradients(plain, masked_fraction=fraction)
        actual = gradients(compiled, masked_fraction=fraction)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert counters["stats"]["unique_graphs"] <= 3
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_dropout_in_compiled_layers_is_drawn_again(fresh_compiler):
    """Which features are dropped is the compiler's own choice; a second time it is the same one."""
    compiled = network(dropout=0.3)
    compile_layers(compiled)
    checkpointed = network(dropout=0.3)
    compile_layers(checkpointed)
    checkpoint_layers(checkpointed)
    for a, b in zip(gradients(compiled), gradients(checkpointed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ar", "bd3lm", "sedd"])
def test_a_compiled_training_is_the_plain_one(compose, tmp_path, fresh_compiler, algo):
    """Losses, validation and weights; after the first round nothing is compiled any more."""
    weights, losses, graphs = {}, {}, []

    class CountGraphs(L.Callback):
        def on_train_batch_end(self, trainer, *_args):
            graphs.append(counters["stats"]["unique_graphs"])

    for setting in ("false", "true"):
        model = small_module.module(compose, tmp_path, *ALGOS[algo], f"training.compile={setting}")
        trainer, memory = small_module.trainer(tmp_path, callbacks=[CountGraphs()], steps=6)
        trainer.fit(model, small_module.batches(6), small_module.batches(2, seed=1))
        weights[setting] = model.state_dict()
        losses[setting] = memory.values("trainer/loss") + memory.values("val/nll")
    assert list(weights["true"]) == list(weights["false"])
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    uncompiled, compiled = graphs[:6], graphs[6:]
    assert uncompiled == [0] * 6
    assert compiled[0] > 0
    assert len(set(compiled[2:])) == 1, "the first validation comes after the second step"
    assert not counters["graph_break"]


@pytest.mark.slow
def test_sharded_and_parallel_trainings_are_the_plain_ones(tmp_path, monkeypatch):
    """Compiled layers within FSDP's and DDP's hooks, with and without checkpointing."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    common = [*ALGOS["bd3lm"], "model.dropout=0", "optim.eps=1e-3"]
    both = ["training.compile=true", "training.activation_checkpointing=blocks"]
    changes = {
        "plain": ["strategy=fsdp"],
        "fsdp": ["strategy=fsdp", *both],
        "ddp": both[:1],
    }
    parallel_runs.start_pair(tmp_path, {name: common + more for name, more in changes.items()})
    weights = {
        name: torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in changes
    }
    for name in ("fsdp", "ddp"):
        assert list(weights[name]) == list(weights["plain"])
        for key, value in weights["plain"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=0, atol=1e-5)
