"""Models with weights from files: to evaluate, or to begin a training with."""

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from checkpointing.compatibility import check_same_model, check_sizes, print_what_changes
from checkpointing.description import from_run_config
from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_weights
from configuration.weights_request import WeightsRequest, weights_to_evaluate, weights_to_train
from corpora.tokenization import mask_index_and_vocab_size
from diffusion import Diffusion


def load_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Diffusion:
    """The model with the weights of `eval.checkpoint_path`, averaged unless `eval.disable_ema`.

    Raises:
        ValueError: it was trained as another model or with another block size, or its weights do
            not fit.
    """
    request = weights_to_evaluate(config)
    weights = read_fitting_weights(request, tokenizer)
    model = Diffusion(config, tokenizer)
    load_weights(
        model, weights, use_ema=request.use_ema, allow_missing=request.allow_missing
    )
    return model.eval()


def new_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Diffusion:
    """The model at the beginning of a training, with the weights of `training.from_pretrained`.

    They may be those of another algorithm or block size; the clipped range is the config's.

    Raises:
        ValueError: its weights do not fit.
    """
    request = weights_to_train(config)
    if request is None:
        return Diffusion(config, tokenizer)
    weights = read_fitting_weights(request, tokenizer).without_clipped_range()
    model = Diffusion(config, tokenizer)
    load_weights(
        model, weights, use_ema=request.use_ema, allow_missing=request.allow_missing
    )
    return model


def read_fitting_weights(request: WeightsRequest, tokenizer: PreTrainedTokenizerBase) -> Weights:
    """The weights that are asked for, once their description suits the run.

    Raises:
        ValueError: it does not.
    """
    weights, key = read_weights(request.source), request.key
    _, vocab_size = mask_index_and_vocab_size(tokenizer)
    wanted = from_run_config(request.run_config, vocab_size=vocab_size)
    if request.any_block_size is not None:
        check_same_model(weights, wanted, key=key, any_block_size=request.any_block_size)
    check_sizes(
        weights, wanted, key=key, tokenizer=request.tokenizer, allow_missing=request.allow_missing
    )
    print_what_changes(weights, wanted, key=key)
    return weights
