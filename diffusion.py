"""The Lightning module: one training step, validation with the range search, the optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configuration.training_request import plain
from corpora.tokenization import mask_index_and_vocab_size
from corpora.tokenizer_record import tokenizer_record
from evaluation.metrics import NLL as NLLMetric
from evaluation.metrics import error_metrics, likelihood_metrics
from likelihood.estimators import Estimator
from likelihood.scoring import score
from losses.clipped_schedule import (
    MAX_BATCHES,
    ClippedScheduleSearch,
    candidate_intervals,
    logged_name,
)
from losses.forward_process import FULL, NLL, ClipInterval
from losses.objectives import masked_mean
from losses.token_losses import TokenLosses
from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from models.sharding import shard
from noise_schedule import get_noise
from sampling.base import SamplerOutput, blank_canvas
from sampling.generation import TextModel
from sampling.options import SamplingOptions
from training.acceleration import (
    checkpoint_layers,
    compile_layers,
    is_compiled,
    warn_without_c_compiler,
)
from training.high_loss import HighLoss
from training.instantiation import instantiated
from training.optimizer import fused_adamw
from utils import TRAIN_STREAM, VALIDATION_STREAM, derive_seed


class Diffusion(L.LightningModule):
    """AR, MDLM, SEDD and block diffusion language models.

    A batch is {"input_ids": (B, N) int64, "attention_mask": (B, N) 0/1}.

    Args:
        config: the composed configuration.
        tokenizer: gives the mask token and the size of the vocabulary.

    Attributes:
        denoiser: the network with its parameterization; samplers take it.
        losses: per token, of fresh noise.
        estimator: of the likelihood, for an evaluation; None: as trainings validate, by one draw of
            noise and without an error bar.
        on_pass: called with the number of forward passes after some of an evaluation's.
        interval: the range t is drawn from in training. Where `algo.var_min` the two buffers
            `sampling_eps_min` and `sampling_eps_max` carry it through checkpoints.
    """

    def __init__(self, config: DictConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        algo, training = config.algo, config.training
        self.run_config = plain(config)  # kept for the checkpoint and the optimizer's sections
        self.tokenizer = tokenizer  # likewise for the checkpoint
        self.compile_setting = training.compile
        self.checkpoints_layers = training.activation_checkpointing == "blocks"
        self.seed = config.seed
        self.fix_clipping = algo.fix_clipping
        self.is_ar = algo.parameterization == "ar"
        self.ignore_bos = algo.ignore_bos
        self.block_size = config.block_size
        self.length = config.model.length
        self.sampler_name = algo.sampler
        self.mask_index, vocab_size = mask_index_and_vocab_size(tokenizer)
        self.bos_index, self.eos_index = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.noise = get_noise(config.noise.type)
        self.backbone = DIT(
            DITConfig(
                vocab_size=vocab_size,
                block_size=config.block_size,
                hidden_size=config.model.hidden_size,
                cond_dim=config.model.cond_dim,
                n_blocks=config.model.n_blocks,
                n_heads=config.model.n_heads,
                dropout=config.model.dropout,
                adaln=not self.is_ar or config.model.adaln,
                attn_backend=config.model.attn_backend,
            )
        )
        self.denoiser = Denoiser(
            backbone=self.backbone,
            parameterization=algo.parameterization,
            mask_index=self.mask_index,
            time_conditioning=algo.time_conditioning,
        )
        self.pattern = AttentionPattern.FULL
        if algo.cross_attn:
            self.pattern = AttentionPattern.BLOCK_DIFFUSION
        self.losses = TokenLosses(
            denoiser=self.denoiser,
            noise=self.noise,
            pattern=self.pattern,
            block_size=self.block_size,
            antithetic=training.antithetic_sampling,
            resample=training.resample,
            mdlm_loss_scale=algo.mdlm_loss_scale,
            ignore_bos=self.ignore_bos,
        )
        self.interval = ClipInterval(training.sampling_eps_min, training.sampling_eps_max)
        self.clip_search = None
        if algo.var_min:
            self._register_clipped_range(algo)
        reports_nll = self.block_size == 1 and training.eval_nll and not self.is_ar
        self.validation_interval = NLL if reports_nll else FULL
        self.train_nll = NLLMetric()
        self.val_metrics = likelihood_metrics("val/")
        self.val_errors = error_metrics("val/")
        self.estimator: Estimator | None = None
        self.on_pass: Callable[[int], None] | None = None
        self.high_loss = HighLoss(vocab_size=vocab_size, decode=tokenizer.decode)

    # --- the clipped range ---------------------------------------------------------------------

    def _register_clipped_range(self, algo: DictConfig) -> None:
        self.register_buffer("sampling_eps_min", torch.tensor(self.interval.low))
        self.register_buffer("sampling_eps_max", torch.tensor(self.interval.high))
        self.register_load_state_dict_post_hook(_read_clipped_range)
        self.clip_search = ClippedScheduleSearch(
            candidate_intervals(
                block_size=self.block_size,
                widths=algo.clip_search_widths,
                delta=algo.clip_search_delta,
            )
        )

    def set_interval(self, interval: ClipInterval) -> None:
        """Train on another range from now on."""
        self.interval = interval
        self.sampling_eps_min.fill_(interval.low)
        self.sampling_eps_max.fill_(interval.high)

    # --- losses ----------------------------------------------------------------------------------

    def token_losses(self, x_0: Tensor, *, interval: ClipInterval) -> Tensor:
        """Losses with fresh noise of tokens (B, N), (B, N) or for ar (B, N - 1)."""
        return self.losses(x_0, interval=interval)

    def loss_mask(self, attention_mask: Tensor, *, is_training: bool) -> Tensor:
        """Which tokens the mean runs over.

        A clean position 0 leaves the denominator in evaluation but not in training, as in the
        original: published likelihoods depend on it.
        """
        if self.is_ar:
            return attention_mask[:, 1:]
        if self.ignore_bos and not is_training:
            attention_mask = attention_mask.clone()
            attention_mask[:, 0] = 0
        return attention_mask

    # --- training --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Changes how the network computes: checkpointed, compiled, its weights spread.

        They are spread over the processes where the strategy made a mesh of them.
        """
        if self.checkpoints_layers:
            checkpoint_layers(self.backbone)
        device = self.trainer.strategy.root_device
        compiles = is_compiled(self.compile_setting, device=device)
        if compiles:
            compile_layers(self.backbone)
        is_flex = device.type == "cuda"  # where it is compiled in any case
        if compiles or is_flex:
            warn_without_c_compiler(device)
        if compiles or is_flex or self.device_mesh is not None:
            rows = self.run_config["loader"]["eval_batch_size"]
            self.losses = dataclasses.replace(self.losses, min_rows=rows)
        if self.device_mesh is not None:
            shard(self.backbone, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[L.Callback]:
        return [self.high_loss]

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # The noise (and dropout) of a batch depends on seed, rank and its number alone: no two
        # ranks share any, and a resumed run draws what an uninterrupted one would have drawn.
        self._seed(TRAIN_STREAM, self.trainer.fit_loop.total_batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.token_losses(batch["input_ids"], interval=self.interval)
        mask = self.loss_mask(batch["attention_mask"], is_training=True)
        loss = masked_mean(losses, mask=mask)
        self.train_nll.update(losses, mask)
        self.high_loss.see(
            losses, mask=mask, x_0=batch["input_ids"], low=self.interval.low,
            batch_idx=batch_idx, is_training=True,
        )  # fmt: skip
        size = len(losses)
        # Not prog_bar=True: Lightning would read it, and so wait for the GPU, after every batch.
        # Not sync_dist=True: the processes would wait for one another after every batch.
        self._shown, self._is_shown = loss.detach(), False
        self._show_loss(batch_size=size)
        self.log("train/nll", self.train_nll, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def on_train_batch_end(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if self.trainer.should_stop and not self._is_shown:  # a callback has ended the training
            self._show_loss(batch_size=len(batch["input_ids"]))

    def _show_loss(self, *, batch_size: int) -> None:
        """Log the loss: the mean of all processes where it is written down, else their own."""
        trainer, shown = self.trainer, self._shown
        # Lightning's own conditions.
        self._is_shown = (
            not trainer.fit_loop._should_accumulate()
            and trainer._logger_connector.should_update_logs
        )
        if self._is_shown:
            shown = trainer.strategy.reduce(shown.clone(), reduce_op="mean")
        self.log("trainer/loss", shown, on_step=True, batch_size=batch_size)

    def optimizer_settings(self) -> dict[str, Any]:
        """The section `optim` under torch's names."""
        optim = self.run_config["optim"]
        return {
            "lr": optim["lr"],
            "betas": (float(optim["beta1"]), float(optim["beta2"])),  # 0 is read as an integer
            "eps": optim["eps"],
            "weight_decay": optim["weight_decay"],
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, and the schedule of `lr_scheduler` stepped after every optimizer step."""
        optimizer = fused_adamw(self.backbone.parameters(), **self.optimizer_settings())
        section = self.run_config["lr_scheduler"]
        scheduler = instantiated(section, key="lr_scheduler", optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "trainer/lr"},
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning frees the gradients after the next forward pass, which they need not be beside.
        optimizer.zero_grad()

    # --- validation ------------------------------------------------------------------------------

    def on_validation_batch_start(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(VALIDATION_STREAM, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self._extra_passes = range(0)
        if self.device_mesh is not None:
            is_check, trainer = self.trainer.sanity_checking, self.trainer
            (own,) = trainer.num_sanity_val_batches if is_check else trainer.num_val_batches
            most = trainer.strategy.reduce(torch.tensor(own, device=self.device), reduce_op="max")
            self._extra_passes = range(own, int(most))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        x_0 = batch["input_ids"]
        mask = self.loss_mask(batch["attention_mask"], is_training=False)
        low, losses = self.validation_interval.low, {}
        if self._draws_once:
            losses, variance = self._validation_losses(x_0, batch_idx=batch_idx), None
            reported = losses[self.validation_interval]
        else:
            reported, variance = self._estimated_losses(x_0, mask)
        self.val_metrics.update(reported, mask)
        if self.estimator is not None:
            self.val_errors.update(reported, mask, variance=variance)
            self.log_dict(self.val_errors, on_step=False, on_epoch=True, batch_size=len(x_0))
        self.high_loss.see(
            reported, mask=mask, x_0=x_0, low=low, batch_idx=batch_idx, is_training=False
        )
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True, batch_size=len(x_0))
        if losses and self._searches(batch_idx):
            for interval, losses_of in losses.items():
                per_block = losses_of.unflatten(1, (-1, self.block_size)).mean(dim=-1)
                self.clip_search.update(interval, per_block, batch_idx=batch_idx)

    @property
    def has_exact_nll(self) -> bool:
        """Whether the losses of one pass are the exact nll, so that nothing need be estimated."""
        is_asked = self.estimator is None or self.estimator.likelihood == "nelbo"
        return self.is_ar or (is_asked and self.validation_interval == NLL)

    @property
    def _draws_once(self) -> bool:
        """Whether the losses of one pass are what is reported."""
        asked = self.estimator or Estimator()
        return self.has_exact_nll or (asked.likelihood == "nelbo" and asked.num_draws == 1)

    def _estimated_losses(self, x_0: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """-log p of tokens (B, N) by `self.estimator`, and the variance of each row's sum (B,).

        What is known of a block is shared out evenly among its tokens that count. Padding is for
        samplers what lies behind a text's end.
        """
        counted = mask.bool()
        is_bound = self.estimator.likelihood in ("nelbo", "nelbo_exact")
        known = x_0
        if not is_bound:
            behind = ~counted
            behind[:, 0] &= not self.ignore_bos
            known = x_0.masked_fill(behind, self.mask_index)
        found = score(
            self.losses, known, self.estimator,
            counted=counted if is_bound else None, on_pass=self.on_pass,
        )  # fmt: skip
        per_block = -found.log_p / counted.unflatten(1, (-1, self.block_size)).sum(-1).clamp(min=1)
        return per_block.repeat_interleave(self.block_size, dim=1), found.variance

    def _searches(self, batch_idx: int) -> bool:
        return self.clip_search is not None and batch_idx < MAX_BATCHES

    def _validation_losses(self, x_0: Tensor, *, batch_idx: int) -> dict[ClipInterval, Tensor]:
        """Losses per token of a batch on the range that is reported and on the candidates."""
        candidates = self.clip_search.intervals if self._searches(batch_idx) else []
        intervals = list(dict.fromkeys((self.validation_interval, *candidates)))
        return self.losses.on_all(x_0, intervals)

    def on_validation_batch_end(
        self, outputs: None, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # With sharded weights every pass gathers them from all processes: one that had no batch
        # any more would leave the others waiting. So it computes as often as the one with the most
        # and counts nothing of it: here, after callbacks have met and before metrics do.
        if batch_idx + 1 == self._extra_passes.start:
            x_0, mask = batch["input_ids"], batch["attention_mask"]
            with self.trainer.precision_plugin.val_step_context():
                for extra in self._extra_passes:
                    if self._draws_once:
                        self._validation_losses(x_0, batch_idx=extra)
                    else:
                        self._estimated_losses(x_0, mask)

    def on_validation_epoch_end(self) -> None:
        if self.clip_search is None or not self._draws_once:
            return
        scores = self.clip_search.compute()
        for interval, variance in zip(self.clip_search.intervals, scores, strict=True):
            self.log(logged_name(interval), variance)
        is_training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if is_training and not self.fix_clipping:
            self.set_interval(self.clip_search.best())
        self.log("sampling_eps_min", self.sampling_eps_min)
        self.log("sampling_eps_max", self.sampling_eps_max)
        self.clip_search.reset()

    # --- sampling --------------------------------------------------------------------------------

    def generate(
        self,
        canvas: Tensor | None = None,
        *,
        limits: Tensor | None = None,
        num_samples: int = 1,
        length: int | None = None,
        options: SamplingOptions | None = None,
        seed: int = 0,
        first_row: int = 0,
        max_retries: int = 10,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> SamplerOutput:
        """Sample token rows with this algorithm's sampler.

            output = model.generate(num_samples=4, options=SamplingOptions(nucleus_p=0.9))
            texts = [tokenizer.decode(row[:n]) for row, n in zip(output.tokens, output.lengths)]

        Every row has its own stream of random numbers, which depends on `seed` and the row's
        number alone: the same rows come out in batches of any size.

        Args:
            canvas: (B, N) int64, tokens to keep and `mask_index` where to write; position 0 is
                given. None: `num_samples` rows of BOS and masks.
            limits: where each row of the canvas ends at the latest, (B,); None: N.
            num_samples: B where there is no canvas.
            length: N where there is no canvas; by default the length of training.
            options: what to ask of the sampler; the default is the paper's procedure.
            seed: of all rows.
            first_row: number of the first row; a later batch goes on where the last one ended.
            max_retries: how often a row that degenerates is drawn again.
            on_step: called with the tokens (B, N) after each forward pass.

        Returns:
            The rows. One that degenerated in the last attempt too has `accepted` False.
        """
        if canvas is None:
            canvas = blank_canvas(
                num_samples,
                length or self.length,
                bos_index=self.bos_index,
                mask_index=self.mask_index,
                device=self.device,
            )
        model = TextModel(
            denoiser=self.denoiser,
            sampler=self.sampler_name,
            block_size=self.block_size,
            is_block_causal=self.pattern is AttentionPattern.BLOCK_DIFFUSION,
            mask_index=self.mask_index,
            eos_index=self.eos_index,
            noise=self.noise,
        )
        return model.generate(
            canvas,
            options=options or SamplingOptions(),
            seed=seed,
            limits=limits,
            first_row=first_row,
            max_retries=max_retries,
            on_step=on_step,
        )

    # --- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the original's keys; plain containers and tensors only, safe to load."""
        checkpoint["hyper_parameters"] = {"config": self.run_config}
        checkpoint["tokenizer"] = self._tokenizer_record
        if self.clip_search is not None:
            checkpoint["sampling_eps_min"] = self.sampling_eps_min
            checkpoint["sampling_eps_max"] = self.sampling_eps_max

    @functools.cached_property
    def _tokenizer_record(self) -> dict[str, Any]:
        name = self.run_config["data"]["tokenizer_name_or_path"]
        return tokenizer_record(self.tokenizer, name=name)

    def _seed(self, stream: int, batch_number: int) -> None:
        torch.manual_seed(derive_seed(self.seed, stream, self.global_rank, batch_number))


def _read_clipped_range(module: Diffusion, _incompatible_keys: Any) -> None:
    module.interval = ClipInterval(module.sampling_eps_min, module.sampling_eps_max)
