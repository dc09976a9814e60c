"""Forward passes over rows of which some tokens are masked, and what they say of these tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from losses.token_losses import TokenLosses
from models.masks import AttentionPattern

# Tokens of one pass: several forms of a small batch share one.
TOKENS_AT_ONCE = 2**14


class Passes:
    """Passes over R forms of the same rows, which share what they see of the clean text.

    Args:
        losses: the network, and who sees whom in it.
        x_0: clean tokens (B, N); where they are masks, nothing is known or asked.
        skips: leave passes out in which no token is asked for. Processes that share a network's
            weights out must all make the same passes.
        on_pass: called with the number of forms after each pass.

    Attributes:
        at_once: R at most.
    """

    def __init__(
        self,
        losses: TokenLosses,
        x_0: Tensor,
        *,
        skips: bool = False,
        on_pass: Callable[[int], None] | None = None,
    ):
        self._denoiser, self._x_0 = losses.denoiser, x_0
        self._pattern = losses.pattern_of(x_0)
        self._skips, self._on_pass = skips, on_pass
        self.at_once = max(1, TOKENS_AT_ONCE // x_0.numel())
        self._clean = None
        if self._pattern is AttentionPattern.BLOCK_DIFFUSION:
            self._clean = self._denoiser.clean_half(x_0)

    def log_p(self, masked: Tensor) -> Tensor:
        """log p of each masked token, (R, B, N) float64; 0 elsewhere.

        Args:
            masked: (R, B, N) bool.
        """
        x_t, at, tokens = self._inputs(masked, masked)
        found = masked.new_zeros(masked.shape, dtype=torch.float64)
        if not self._is_skipped(at):
            scores = self._denoiser.target_scores(
                x_t, tokens=tokens, pattern=self._pattern, kv_cache=self._clean, logits_at=at
            )
            found.view(-1)[at] = scores.log_p.double()
        self._count(masked)
        return found

    def read(
        self,
        masked: Tensor,
        asked: Tensor,
        *,
        priority: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a pass says of those masked tokens that are asked for.

        Args:
            masked, asked: (R, B, N) bool.
            priority: of log p (m, V), how much a position wants to be revealed, (m,).

        Returns:
            log p of the token, float64, 0 elsewhere; whether it is the most probable one, True
            elsewhere; its priority, float32, minus infinity elsewhere. Each (R, B, N).
        """

        def of_log_probs(log_p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            of_token = log_p.gather(-1, tokens[:, None])[:, 0]
            is_best = log_p.argmax(dim=-1) == tokens
            return of_token, is_best, of_token if priority is None else priority(log_p)

        x_t, at, tokens = self._inputs(masked, asked)
        log_p = masked.new_zeros(masked.shape, dtype=torch.float64)
        is_best = torch.ones_like(masked)
        wanted = masked.new_full(masked.shape, -torch.inf, dtype=torch.float32)
        if not self._is_skipped(at):
            found = self._denoiser.read(
                x_t, tokens=tokens, read=of_log_probs,
                pattern=self._pattern, kv_cache=self._clean, logits_at=at,
            )  # fmt: skip
            for whole, part in zip((log_p, is_best, wanted), found, strict=True):
                whole.view(-1)[at] = part.to(whole.dtype)
        self._count(masked)
        return log_p, is_best, wanted

    def _inputs(self, masked: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (R B, N); positions asked for in it, flattened, (n,); and their tokens (n,)."""
        x_t = torch.where(masked, self._denoiser.mask_index, self._x_0).flatten(0, 1)
        at = asked.flatten().nonzero()[:, 0]
        return x_t, at, self._x_0.take(at % self._x_0.numel())

    def _is_skipped(self, at: Tensor) -> bool:
        return self._skips and not len(at)

    def _count(self, masked: Tensor) -> None:
        if self._on_pass is not None:
            self._on_pass(len(masked))
