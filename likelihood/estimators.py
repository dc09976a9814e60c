"""Which likelihoods there are, what each asks of a model, and how many passes it takes."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from sampling.reveal import PRIORITIES

ORDERS = ("left_to_right", "strided", *PRIORITIES)
NAMES = ("nelbo", "nelbo_exact", "any_order", *ORDERS)
# The largest block whose subsets are gone through, 2^L - 1 of them.
MOST_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """The keys `eval.likelihood` and what belongs to it.

    Attributes:
        likelihood: one of `NAMES`.
        num_draws: of noise, for `nelbo`; and for `nelbo_exact` in blocks of more than 10 tokens.
        num_orders: for `any_order` in blocks of more than 10 tokens.
        tokens_per_pass: k, for a deterministic order (`ORDERS`).
    """

    likelihood: str = "nelbo"
    num_draws: int = 1
    num_orders: int = 4
    tokens_per_pass: int = 1

    def problems(
        self, *, parameterization: str, block_size: int, time_conditioning: bool = False
    ) -> Iterator[tuple[str, str]]:
        """Names of attributes that do not suit a model, and what is allowed instead."""
        if self.likelihood not in NAMES:
            yield "likelihood", f"allowed are {', '.join(NAMES)}"
        for name in ("num_draws", "num_orders", "tokens_per_pass"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                yield name, "allowed is an integer in [1, inf)"
        if parameterization == "sedd" and self.likelihood != "nelbo":
            yield "likelihood", "allowed with sedd is nelbo: a score says no token's probability"
        if parameterization == "subs" and time_conditioning and self.likelihood != "nelbo":
            yield (
                "likelihood",
                "allowed with algo.time_conditioning=True is nelbo: the others know no time",
            )
        is_drawn = self.likelihood == "nelbo" or self._is_stratified(block_size)
        if self.num_draws > 1 and not (is_drawn and parameterization != "ar"):
            yield "num_draws", f"allowed with eval.likelihood={self.likelihood}, drawn once, is 1"
        is_order = self.likelihood in ORDERS
        if self.tokens_per_pass > 1 and (not is_order or parameterization == "ar"):
            yield (
                "tokens_per_pass",
                f"allowed with eval.likelihood={self.likelihood} and this model is 1; with bd3lm "
                f"and mdlm more tokens go with {', '.join(ORDERS)}",
            )
        if block_size % self.tokens_per_pass:
            yield "tokens_per_pass", f"allowed are the divisors of block_size={block_size}"

    def check(self, **model: str | int | bool) -> None:
        """Raises ValueError: the first of `problems`, which says the arguments."""
        for name, allowed in self.problems(**model):
            raise ValueError(f"eval.{name}={getattr(self, name)}: {allowed}")

    def _is_stratified(self, block_size: int) -> bool:
        return self.likelihood == "nelbo_exact" and block_size > MOST_TOKENS

    def _is_over_orders(self, block_size: int) -> bool:
        return self.likelihood == "any_order" and block_size > MOST_TOKENS

    def measured(self, block_size: int) -> str:
        """The name of what is computed: where blocks are too large for subsets, of its stand-in."""
        if self._is_stratified(block_size):
            return "nelbo_stratified"
        return "any_order_bound" if self._is_over_orders(block_size) else self.likelihood

    def stand_in(self, block_size: int) -> str | None:
        """What to tell a user whose blocks are too large for subsets."""
        drawn = f"each number of masks once per block (eval.num_draws={self.num_draws} times)"
        if self._is_over_orders(block_size):
            drawn = f"the importance-weighted bound over eval.num_orders={self.num_orders} orders"
        elif not self._is_stratified(block_size):
            return None
        return (
            f"eval.likelihood={self.likelihood}: the largest block whose subsets are summed is "
            f"{MOST_TOKENS}; for block_size={block_size} the result is {self.measured(block_size)},"
            f" {drawn}"
        )

    def settings(self, block_size: int) -> dict[str, str | int]:
        """The estimator as a result names it: with the settings that it heeds."""
        found: dict[str, str | int] = {"estimator": self.measured(block_size)}
        if self.likelihood == "nelbo" or self._is_stratified(block_size):
            found["num_draws"] = self.num_draws
        if self._is_over_orders(block_size):
            found["num_orders"] = self.num_orders
        if self.likelihood in ORDERS:
            found["tokens_per_pass"] = self.tokens_per_pass
        return found

    def num_passes(self, block_size: int) -> int:
        """Forward passes over a batch, beside the one over the clean text."""
        if self.likelihood == "nelbo":
            return self.num_draws
        if self.likelihood in ORDERS:
            return block_size // self.tokens_per_pass
        if self._is_stratified(block_size):
            return self.num_draws * block_size
        if self._is_over_orders(block_size):
            return self.num_orders * block_size
        return 2**block_size - 1


SETTINGS = tuple(field.name for field in fields(Estimator))
