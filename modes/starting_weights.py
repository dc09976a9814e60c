"""Models with weights from files: to evaluate, or to begin a training with."""

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from checkpointing.compatibility import check_same_model, check_sizes, print_what_changes
from checkpointing.description import from_run_config
from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_weights
from corpora.tokenization import mask_index_and_vocab_size
from diffusion import Diffusion


def load_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Diffusion:
    """The model with the weights of `eval.checkpoint_path`, averaged unless `eval.disable_ema`.

    Raises:
        ValueError: it was trained as another model or with another block size, or its weights do
            not fit.
    """
    weights = _read_fitting_weights(config, tokenizer, key="eval.checkpoint_path")
    model = Diffusion(config, tokenizer)
    load_weights(
        model,
        weights,
        use_ema=not config.eval.disable_ema,
        allow_missing=config.eval.allow_missing,
    )
    return model.eval()


def new_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Diffusion:
    """The model at the beginning of a training, with the weights of `training.from_pretrained`.

    They may be those of another algorithm or block size; the clipped range is the config's.

    Raises:
        ValueError: its weights do not fit.
    """
    if config.training.from_pretrained is None:
        return Diffusion(config, tokenizer)
    weights = _read_fitting_weights(config, tokenizer, key="training.from_pretrained")
    model = Diffusion(config, tokenizer)
    load_weights(
        model,
        weights.without_clipped_range(),
        use_ema=False,
        allow_missing=config.eval.allow_missing,
    )
    return model


def _read_fitting_weights(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, *, key: str
) -> Weights:
    """The weights that a key names, once their description suits the run."""
    weights = read_weights(OmegaConf.select(config, key))
    _, vocab_size = mask_index_and_vocab_size(tokenizer)
    wanted = from_run_config(
        OmegaConf.to_container(config, resolve=True), vocab_size=vocab_size
    )
    if key == "eval.checkpoint_path":
        check_same_model(weights, wanted, key=key, any_block_size=config.eval.any_block_size)
    check_sizes(
        weights,
        wanted,
        key=key,
        tokenizer=config.data.tokenizer_name_or_path,
        allow_missing=config.eval.allow_missing,
    )
    print_what_changes(weights, wanted, key=key)
    return weights
