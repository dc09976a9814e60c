"""Which likelihood an evaluation measures."""

from omegaconf import DictConfig

from likelihood.estimators import Estimator


def estimator_of(config: DictConfig) -> Estimator:
    """`eval.likelihood` and the keys that belong to it."""
    return Estimator(
        likelihood=config.eval.likelihood,
        num_draws=config.eval.num_draws,
        num_orders=config.eval.num_orders,
        tokens_per_pass=config.eval.tokens_per_pass,
    )
