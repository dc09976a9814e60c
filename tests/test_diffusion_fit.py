"""The Lightning module at work: training, validation, the range search, what is logged and kept."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from losses.forward_process import FULL, ClipInterval
from tests.helpers.small_module import batches, module, trainer
from tests.helpers.small_run import ALGOS
from training.callbacks import EMACallback

BD3LM = ALGOS["bd3lm"]


@pytest.fixture
def build(compose, tmp_path):
    """Builds a small module: `build("algo=ar", ...)`."""
    return lambda *changes: module(compose, tmp_path, *changes)


LOGGED = {
    "ar": set(),
    "mdlm": set(),
    "sedd": set(),
    "bd3lm": {
        "sampling_eps_min", "sampling_eps_max", "valid_var_0.0 - 1", "valid_var_0.0 - 0.5",
        "valid_var_0.05 - 0.55", "valid_var_0.5 - 1.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("algo", ALGOS)
def test_logged_names(algo, build, tmp_path):
    monitor = L.pytorch.callbacks.LearningRateMonitor("step")
    run, memory = trainer(tmp_path, callbacks=[monitor])
    run.fit(build(*ALGOS[algo]), batches(4), batches(2, seed=1))
    expected = {"trainer/loss", "train/nll", "val/nll", "val/bpd", "val/ppl", "trainer/lr"}
    assert memory.names >= expected | LOGGED[algo]
    if algo != "bd3lm":
        assert not any(name.startswith(("valid_var", "sampling_eps")) for name in memory.names)
    assert len(memory.values("val/nll")) == 2 and len(memory.values("trainer/loss")) == 4


def test_learning_rate_warms_up(build, tmp_path):
    monitor = L.pytorch.callbacks.LearningRateMonitor("step")
    run, memory = trainer(tmp_path, callbacks=[monitor])
    run.fit(build(*ALGOS["ar"], "lr_scheduler.num_warmup_steps=4"), batches(4), batches(1))
    assert memory.values("trainer/lr") == pytest.approx([0, 0.0025, 0.005, 0.0075])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_are_gone_before_the_next_forward_pass(accumulated, build, tmp_path):
    """Lightning would keep them beside its activations; within an accumulation they stay."""
    held = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            held.append(any(p.grad is not None for p in pl_module.parameters()))

    run, _ = trainer(tmp_path, steps=2, accumulate_grad_batches=accumulated, callbacks=[Watch()])
    run.fit(build(*ALGOS["ar"]), batches(2 * accumulated), batches(1))
    assert held == ([False, False] if accumulated == 1 else [False, True, False, True])


def test_the_search_sets_the_range_after_validation(build, tmp_path):
    run, memory = trainer(tmp_path, steps=2)
    model = build(*BD3LM)
    run.fit(model, batches(2), batches(3, seed=1))
    scores = {k: memory.values(k)[-1] for k in memory.names if k.startswith("valid_var")}
    best = min(scores, key=scores.get)
    assert best != "valid_var_0.0 - 1", "a clipped range varies less"
    low, high = best.removeprefix("valid_var_").split(" - ")
    assert model.interval.low == pytest.approx(max(float(low), 1e-3))
    assert model.interval.high == pytest.approx(float(high))
    assert model.sampling_eps_min.item() == pytest.approx(model.interval.low)
    assert memory.values("sampling_eps_max")[-1] == pytest.approx(model.interval.high)
    assert not model.clip_search.moments.any(), "the next validation starts anew"


@pytest.mark.parametrize("why_not", ["fixed", "sanity check", "evaluation"])
def test_the_range_stays(why_not, build, tmp_path):
    """Only a validation during training moves it, and only if the user has not fixed it."""
    model = build(*BD3LM, *(["algo.fix_clipping=true"] if why_not == "fixed" else []))
    settings = {"val_check_interval": 100} if why_not == "sanity check" else {}
    run, memory = trainer(tmp_path, steps=2, num_sanity_val_steps=2, **settings)
    if why_not == "evaluation":
        run.validate(model, batches(2), verbose=False)
        assert "valid_var_0.0 - 1" in memory.names
    else:
        run.fit(model, batches(2), batches(2, seed=1))
    assert model.interval == FULL and model.sampling_eps_max == 1.0


def test_validation_reports_the_full_range_whatever_is_trained_on(build, tmp_path):
    """The NELBO is over the full range; a clipped one would be no bound."""
    found = []
    for interval in (FULL, ClipInterval(0.4, 0.6)):
        model = build(*BD3LM)
        model.set_interval(interval)
        run, memory = trainer(tmp_path)
        run.validate(model, batches(3), verbose=False)
        found += memory.values("val/nll")
    assert found[0] == found[1]


def test_validations_repeat_their_noise(build, tmp_path):
    """The same weights get the same number, so that checkpoints compare."""
    model = build(*BD3LM)
    found = []
    for _ in range(2):
        run, memory = trainer(tmp_path)
        run.validate(model, batches(3), verbose=False)
        found += memory.values("val/nll")
        torch.rand(5)
    assert found[0] == found[1]


def test_validation_uses_the_average(build, tmp_path):
    """And training goes on from the weights: with the average it would have another loss."""
    ema = EMACallback(0.9)
    run, memory = trainer(tmp_path, callbacks=[ema], val_check_interval=4)
    model = build(*ALGOS["mdlm"])
    run.fit(model, batches(4), batches(3, seed=1))
    weights = [p.detach().clone() for p in model.parameters()]

    def validate() -> float:
        again, seen = trainer(tmp_path)
        again.validate(model, batches(3, seed=1), verbose=False)
        return seen.values("val/nll")[0]

    with_weights = validate()
    ema.ema.swap(model.parameters())
    with_average = validate()
    assert memory.values("val/nll") == [with_average] != [with_weights]
    assert any(
        not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)
    )


def test_the_number_of_validations_does_not_change_training(build, tmp_path):
    """Validation draws from a stream of its own and gives the weights back."""
    losses = []
    for interval in (1, 4):
        run, memory = trainer(tmp_path, callbacks=[EMACallback(0.9)], val_check_interval=interval)
        run.fit(build(*ALGOS["mdlm"], "model.dropout=0.1"), batches(4), batches(2, seed=1))
        losses.append(memory.values("trainer/loss"))
    assert losses[0] == losses[1]


def test_only_masked_attention_counts(build, tmp_path):
    """Padding carries no loss: rows whose second half is padding report the first half."""
    model = build(*ALGOS["ar"]).eval()
    (batch,) = list(batches(1))
    batch["attention_mask"][:, 8:] = 0
    run, memory = trainer(tmp_path)
    run.validate(model, DataLoader([batch], batch_size=None), verbose=False)
    with torch.no_grad():
        losses = model.token_losses(batch["input_ids"], interval=FULL)
    assert memory.values("val/nll")[0] == pytest.approx(losses[:, :7].mean().item(), rel=1e-5)
    assert memory.values("val/tokens")[0] == 28


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["bd3lm", "ar"])
def test_checkpoint_has_the_originals_keys(algo, build, tmp_path):
    """And only plain containers and tensors: it loads without unpickling objects.

    The original stored its config and tokenizer as pickled objects.
    """
    run, _ = trainer(tmp_path, callbacks=[EMACallback(0.9)], steps=2)
    model = build(*ALGOS[algo])
    run.fit(model, batches(2), batches(1))
    run.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    expected = {"state_dict", "ema", "loops", "optimizer_states", "lr_schedulers",
                "hyper_parameters", "epoch", "global_step"}  # fmt: skip
    assert set(checkpoint) >= expected
    assert list(checkpoint["state_dict"]) == list(model.state_dict())
    assert set(checkpoint["ema"]) == {"decay", "num_updates", "shadow_params"}
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert [tuple(p.shape) for p in checkpoint["ema"]["shadow_params"]] == shapes
    assert checkpoint["hyper_parameters"]["config"]["algo"]["name"] == algo
    ranges = {"sampling_eps_min", "sampling_eps_max"}
    assert set(checkpoint) & ranges == (ranges if algo == "bd3lm" else set())
    assert set(checkpoint["state_dict"]) & ranges == (ranges if algo == "bd3lm" else set())


def test_optimizer_of_the_configuration(build, tmp_path):
    run, _ = trainer(tmp_path, steps=1)
    model = build(*BD3LM, "optim.weight_decay=0.1", "optim.beta2=0.95")
    run.fit(model, batches(1))
    (group,) = run.optimizers[0].param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.1)
    assert len(group["params"]) == len(list(model.parameters()))
