"""log p of texts under a model, by any of the estimators."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.token_losses import TokenLosses
from models.masks import AttentionPattern
from sampling.reveal import PRIORITIES

from .estimators import MOST_TOKENS, Estimator
from .orders import fixed_order, in_chosen_order, in_order, random_orders
from .passes import Passes
from .subsets import any_order, exact_nelbo, stratified_nelbo


class Scores(NamedTuple):
    """Of B rows with K blocks.

    Attributes:
        log_p: log probability of each block's tokens in nats, or a lower bound, (B, K) float64.
        variance: of each row's sum, as far as it comes from drawn noise or orders, (B,). None where
            nothing is drawn, or only once.
        is_greedy: whether every token was the most probable one when it was revealed, (B,); None
            where there is not one order.
    """

    log_p: Tensor
    variance: Tensor | None = None
    is_greedy: Tensor | None = None


class HasLosses(Protocol):
    """`diffusion.Diffusion`, or the class of `hf/`."""

    @property
    def losses(self) -> TokenLosses: ...


def token_log_likelihood(
    model: HasLosses,
    tokens: Tensor,
    *,
    estimator: str = "left_to_right",
    given: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_pass: Callable[[int], None] | None = None,
    **settings: int,
) -> Tensor:
    """log p of texts in nats per block.

        log_p = token_log_likelihood(model, tokens, estimator="any_order").sum(dim=1)

    Args:
        model: its denoiser, block size and so on are those of `model.losses`.
        tokens: ids (B, N) int64. Where there is a mask no token is known: it stays a mask, as it
            does for a sampler behind a row's limit. So texts of several lengths share a batch.
        estimator: one of `estimators.NAMES`.
        given: tokens that are conditioned on, (B, N) bool, anywhere. None: position 0 alone, the
            BOS.
        generator: of noise and orders, on the device of `tokens`; None: torch's own stream.
        on_pass: called with the number of passes, after some of them.
        settings: other attributes of `Estimator`.

    Returns:
        (B, ceil(N / L)) float64, at most 0; for the bounds a lower bound. Tokens that are given or
        masks have no share in it.

    Raises:
        ValueError: the model has no such estimator, or `given` is of another shape.
    """
    chosen = Estimator(likelihood=estimator, **settings)
    return score(
        model.losses, tokens, chosen, given=given, generator=generator, on_pass=on_pass
    ).log_p


@torch.no_grad()
def score(
    losses: TokenLosses,
    tokens: Tensor,
    estimator: Estimator,
    *,
    given: Tensor | None = None,
    counted: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_pass: Callable[[int], None] | None = None,
) -> Scores:
    """The same, and what else there is to know; arguments as in `token_log_likelihood`.

    Args:
        losses: the network and what belongs to it.
        tokens: see above.
        estimator: see above.
        given: see above.
        counted: with `nelbo` and `nelbo_exact`, whose terms count, (B, N) bool: others take part in
            the noise as `losses` has it. None: all that are free.
        generator, on_pass: see above.
    """
    denoiser = losses.denoiser
    estimator.check(
        parameterization=denoiser.parameterization,
        block_size=losses.block_size,
        time_conditioning=denoiser.time_conditioning,
    )
    if given is not None and given.shape != tokens.shape:
        raise ValueError(
            f"given of shape {tuple(given.shape)}: allowed is that of tokens, {tuple(tokens.shape)}"
        )
    network = denoiser.backbone
    was_training = network.training
    network.eval()
    try:
        return _score(
            losses, tokens, estimator,
            given=given, counted=counted, generator=generator, on_pass=on_pass,
        )  # fmt: skip
    finally:
        network.train(was_training)


def _score(
    losses: TokenLosses,
    tokens: Tensor,
    estimator: Estimator,
    *,
    given: Tensor | None,
    counted: Tensor | None,
    generator: torch.Generator | None,
    on_pass: Callable[[int], None] | None,
) -> Scores:
    mask_index, num_rows, size = losses.denoiser.mask_index, len(tokens), losses.block_size
    is_ar = losses.denoiser.parameterization == "ar"
    has_context = given is not None
    if given is None:
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        given = (first & (losses.ignore_bos or is_ar)).expand(tokens.shape)
    missing = (0, 0 if is_ar else -tokens.shape[1] % size)
    x_0 = losses.padded(F.pad(tokens, missing, value=mask_index))
    free = losses.padded(F.pad(~given, missing)) & (x_0 != mask_index)
    free[num_rows:] = False
    counted = free if counted is None else losses.padded(F.pad(counted, missing)) & free
    if is_ar:
        found = _of_ar(losses, x_0, free)
    elif estimator.likelihood == "nelbo":
        is_plain = not has_context and not (tokens == mask_index).any()
        found = _of_draws(
            losses, x_0[:num_rows], estimator.num_draws,
            given=None if is_plain else ~free[:num_rows],
            counted=counted[:num_rows], generator=generator, on_pass=on_pass,
        )  # fmt: skip
    else:
        passes = Passes(losses, x_0, skips=has_context, on_pass=on_pass)
        blocks = [x.unflatten(1, (-1, size)) for x in (free, counted)]
        found = _of_blocks(passes, *blocks, estimator=estimator, generator=generator)
    return Scores(*(part if part is None else part[:num_rows] for part in found))


def _of_ar(losses: TokenLosses, x_0: Tensor, free: Tensor) -> Scores:
    """Each token given those before it."""

    def read(log_p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return log_p.gather(-1, tokens[:, None])[:, 0].double(), log_p.argmax(dim=-1) == tokens

    at = free[:, 1:].flatten().nonzero()[:, 0]
    per_token = x_0.new_zeros(free[:, 1:].shape, dtype=torch.float64)
    is_best = torch.ones_like(free[:, 1:])
    found = losses.denoiser.read(
        x_0[:, :-1],
        tokens=x_0[:, 1:].take(at),
        read=read,
        pattern=AttentionPattern.CAUSAL,
        logits_at=at,
    )
    for whole, part in zip((per_token, is_best), found, strict=True):
        whole.view(-1)[at] = part
    missing = -x_0.shape[1] % losses.block_size
    per_block = F.pad(per_token, (1, missing)).unflatten(1, (-1, losses.block_size))
    return Scores(per_block.sum(dim=-1), is_greedy=is_best.all(dim=1))


def _of_draws(
    losses: TokenLosses,
    x_0: Tensor,
    num_draws: int,
    *,
    given: Tensor | None,
    counted: Tensor,
    generator: torch.Generator | None,
    on_pass: Callable[[int], None] | None,
) -> Scores:
    """The mean NELBO of some draws of noise."""
    found = []
    draws = losses.draws(x_0, num_draws=num_draws, given=given, generator=generator)
    for per_token in draws:
        per_token = per_token.double().where(counted, 0.0)
        found.append(-per_token.unflatten(1, (-1, losses.block_size)).sum(dim=-1))
        if on_pass is not None:
            on_pass(1)
    return _mean_of(torch.stack(found))


def _mean_of(draws: Tensor) -> Scores:
    """Of independent estimates of log p, (D, B, K)."""
    num, variance = len(draws), None
    if num > 1:
        variance = draws.sum(dim=-1).var(dim=0) / num
    return Scores(draws.mean(dim=0), variance)


def _of_blocks(
    passes: Passes,
    free: Tensor,
    counted: Tensor,
    *,
    estimator: Estimator,
    generator: torch.Generator | None,
) -> Scores:
    """What enumerates or draws sets and orders, of blocks (B, K, L)."""
    size, name, per_pass = free.shape[-1], estimator.likelihood, estimator.tokens_per_pass
    if name == "nelbo_exact" and size <= MOST_TOKENS:
        return Scores(-exact_nelbo(passes, free, counted=counted))
    if name == "nelbo_exact":
        draws = stratified_nelbo(
            passes, free, counted=counted, num_draws=estimator.num_draws, generator=generator
        )
        return _mean_of(-draws)
    if name == "any_order" and size <= MOST_TOKENS:
        return Scores(-any_order(passes, free))
    if name == "any_order":
        num = estimator.num_orders
        log_p = random_orders(passes, free, num_orders=num, generator=generator)
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(num, dtype=torch.float64).log()
        if num == 1:
            return Scores(log_mean)
        # The delta method: the log of a mean has the variance of the mean over its square.
        weights = (log_p - log_mean).exp()
        return Scores(log_mean, weights.var(dim=0).sum(dim=-1) / num)
    if name in PRIORITIES:
        log_p, is_greedy = in_chosen_order(
            passes, free, priority=PRIORITIES[name], tokens_per_pass=per_pass
        )
    else:
        number = fixed_order(name, block_size=size, tokens_per_pass=per_pass).to(free.device)
        log_p, is_greedy = in_order(
            passes, free, number[None, None, None], num_passes=size // per_pass
        )
    return Scores(log_p[0], is_greedy=is_greedy[0])
