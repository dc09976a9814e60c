"""Training steps and evaluations that benchmarks time: the project's own and the reference's."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.flops import forward_flops
from benchmarks.reference import Reference, ReferenceAverage, reference_optimizer
from benchmarks.sampling import MODELS
from configuration.resolvers import register_resolvers
from diffusion import Diffusion
from likelihood.estimators import Estimator
from losses.forward_process import ClipInterval
from losses.objectives import masked_mean
from models.ema import ExponentialMovingAverage
from training.acceleration import checkpoint_layers, compile_layers, is_compiled

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the paper's OpenWebText runs
WEIGHT_NOISE = 0.02  # fresh weights are zero in places, and so would be gradients
# A search by the original takes minutes per batch, and each range as long as any other.
REFERENCE_RANGES = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to time: `work` is train, eval or search; `side` is ours or reference."""

    work: str
    side: str
    algo: str = "bd3lm"
    model: str = "small"
    length: int = 1024
    block_size: int = 16
    batch_size: int = 2
    vocab_size: int = 50_257  # GPT-2's; the mask comes on top
    precision: str = "float32"
    device: str = "cpu"
    attn_backend: str = "auto"
    compiled: str = "auto"  # training.compile
    activation_checkpointing: str = "none"
    likelihood: str = "nelbo"  # eval.likelihood, of an evaluation
    warmup: int = 1
    steps: int = 2
    profiled: int = 0  # steps behind them that are profiled
    peak_size: int | None = None  # of the matrix product that is called the peak
    overrides: tuple[str, ...] = ()  # more of the configuration


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Attributes:
        run: does it and returns its loss.
        share: of the whole that it does.
        state_mb: what is held from step to step beside the weights: two moments and an average.
    """

    run: Callable[[], Tensor]
    share: float = 1.0
    state_mb: float = 0.0


class StubTokenizer:
    """Ids without a tokenizer's files; the last one begins and ends a text, as GPT-2's does."""

    mask_token_id = None

    def __init__(self, size: int):
        self.size = size
        self.bos_token_id = self.eos_token_id = size - 1

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(len(self))}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def make_config(job: Job) -> DictConfig:
    """The composed configuration of a job."""
    hidden_size, cond_dim, n_blocks, n_heads = MODELS[job.model]
    overrides = [
        f"algo={job.algo}",
        "model=small",
        f"model.hidden_size={hidden_size}",
        f"model.cond_dim={cond_dim}",
        f"model.n_blocks={n_blocks}",
        f"model.n_heads={n_heads}",
        f"model.length={job.length}",
        f"block_size={job.block_size}",
        f"model.attn_backend={job.attn_backend}",
        f"training.compile={job.compiled}",
        f"training.activation_checkpointing={job.activation_checkpointing}",
        f"eval.likelihood={job.likelihood}",
        "wandb=null",
    ]
    if job.algo == "bd3lm":
        overrides.append(f"algo.var_min={job.work == 'search'}")
        overrides.append(f"algo.clip_search_widths=[{','.join(map(str, WIDTHS))}]")
    return compose([*overrides, *job.overrides])


def compose(overrides: Sequence[str]) -> DictConfig:
    """The project's configuration with these overrides, as `main.py` takes them."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra.compose("config", list(overrides))


def make_model(job: Job, config: DictConfig) -> Diffusion:
    """The model with random weights everywhere, the same ones each time."""
    torch.manual_seed(0)
    model = Diffusion(config, StubTokenizer(job.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_NOISE)
    return model.to(job.device)


def make_batch(job: Job) -> dict[str, Tensor]:
    """Random rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (job.batch_size, job.length)
    ids = torch.randint(job.vocab_size, shape, generator=generator).to(job.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def autocast(job: Job) -> torch.autocast:
    """As Lightning's bf16-mixed has it, around the forward pass alone."""
    device_type = torch.device(job.device).type
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=job.precision == "bf16")


def make_step(job: Job, config: DictConfig, model: Diffusion) -> Step:
    """The step of a job; `model` gives its weights."""
    if job.side == "reference":
        if job.work == "train":
            return _train_reference(job, config, model)
        return _evaluate_reference(job, model)
    # What `Diffusion.configure_model` does once there is a trainer.
    if config.training.activation_checkpointing == "blocks":
        checkpoint_layers(model.backbone)
    if is_compiled(config.training.compile, device=torch.device(job.device)):
        compile_layers(model.backbone)
    return _train_ours(job, config, model) if job.work == "train" else _evaluate_ours(job, model)


def _train_ours(job: Job, config: DictConfig, model: Diffusion) -> Step:
    """A step as `mode=train` carries it out, without logging."""
    optimizers = model.train().configure_optimizers()
    optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    average = ExponentialMovingAverage(model.parameters(), decay=config.training.ema)
    batch = make_batch(job)

    def run() -> Tensor:
        with autocast(job):
            losses = model.token_losses(batch["input_ids"], interval=model.interval)
            mask = model.loss_mask(batch["attention_mask"], is_training=True)
            loss = masked_mean(losses, mask=mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update(model.parameters())
        return loss.detach()

    return Step(run=run, state_mb=_state_mb(model))


def _train_reference(job: Job, config: DictConfig, model: Diffusion) -> Step:
    """The same step as the original carries it out."""
    reference, interval = Reference(model).train(), model.interval
    parameters = list(reference.parameters())
    optimizer = reference_optimizer(parameters, config.optim)
    scheduler = hydra.utils.instantiate(config.lr_scheduler, optimizer=optimizer)
    average = ReferenceAverage(parameters, decay=config.training.ema)
    batch = make_batch(job)
    mask = model.loss_mask(batch["attention_mask"], is_training=True)

    def run() -> Tensor:
        with autocast(job):
            losses = reference.token_losses(batch["input_ids"], interval=interval)
            loss = masked_mean(losses, mask=mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.trainer.gradient_clip_val)
        optimizer.step()
        scheduler.step()
        average.update()
        return loss.detach()

    return Step(run=run, state_mb=_state_mb(model))


def _state_mb(model: Diffusion) -> float:
    return 3 * sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def _evaluate_ours(job: Job, model: Diffusion) -> Step:
    """A validation batch as `mode=ppl_eval` and the validations of a training see it."""
    warnings.filterwarnings("ignore", message="You are trying to `self.log")  # there is no trainer
    model.eval()
    model.estimator = Estimator(likelihood=job.likelihood)
    batch = make_batch(job)

    @torch.inference_mode()
    def run() -> Tensor:
        model.val_errors.reset()
        model.val_metrics.reset()
        with autocast(job):
            model.validation_step(batch, 0)
        return model.val_metrics.compute()["val/nll"]

    return Step(run=run)


def _evaluate_reference(job: Job, model: Diffusion) -> Step:
    """The same batch as the original evaluates it; of a search, some of the ranges."""
    reference, batch = Reference(model).eval(), make_batch(job)
    mask = model.loss_mask(batch["attention_mask"], is_training=False)
    ranges = evaluated_ranges(model)
    timed = ranges[: REFERENCE_RANGES if job.work == "search" else 1]

    @torch.inference_mode()
    def run() -> Tensor:
        with autocast(job):
            losses = [reference.token_losses(batch["input_ids"], interval=r) for r in timed]
        return masked_mean(losses[0], mask=mask)

    return Step(run=run, share=len(timed) / len(ranges))


def evaluated_ranges(model: Diffusion) -> list[ClipInterval]:
    """The ranges of t on which a validation batch is evaluated, the reported one first."""
    candidates = [] if model.clip_search is None else model.clip_search.intervals
    return list(dict.fromkeys((model.validation_interval, *candidates)))


def model_flops(job: Job, model: Diffusion) -> float:
    """Model FLOPs of one step, all rows together; see `benchmarks.flops`."""
    ranges = [model.interval] if job.work == "train" else evaluated_ranges(model)
    passes = [
        forward_flops(model.backbone.config, algo=job.algo, length=job.length, interval=interval)
        for interval in ranges
    ]
    # An estimator's passes need the logits of about as many tokens as a draw of noise.
    times = Estimator(likelihood=job.likelihood).num_passes(job.block_size)
    forward = passes[0].clean + times * sum(p.noisy for p in passes)
    return job.batch_size * forward * (3 if job.work == "train" else 1)
