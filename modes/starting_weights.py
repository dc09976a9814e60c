"""Models with weights from files: to evaluate, or to begin a training with."""

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from checkpointing.compatibility import check_same_model, check_sizes, print_what_changes
from checkpointing.description import from_run_config
from checkpointing.loading import load_weights
from checkpointing.weights import Weights, read_weights
from configuration.data_request import data_request
from configuration.weights_request import WeightsRequest, weights_to_evaluate, weights_to_train
from corpora.tokenization import mask_index_and_vocab_size
from corpora.tokenizer_record import recorded_bpe, what_differs
from dataloader import get_tokenizer
from diffusion import Diffusion
from utils import get_logger

logger = get_logger(__name__)


def tokenizer_of(config: DictConfig, weights: Weights | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer_name_or_path`.

    A `bpe-N` is the one that the weights were trained with: trained again on a text that has grown
    meanwhile it would be another one.

    Args:
        config: the composed configuration.
        weights: what the mode starts from; None: it starts from nothing.
    """
    data = data_request(config)
    record, source = (weights.tokenizer, weights.source) if weights else (None, "")
    name = data.tokenizer_name_or_path
    tokenizer = recorded_bpe(record, name=name, source=source)
    if tokenizer is not None:
        logger.info("%s is the one in %s", name, source)
        return tokenizer
    return get_tokenizer(data)


def check_tokenizer(
    weights: Weights, tokenizer: PreTrainedTokenizerBase, *, key: str, name: str
) -> None:
    """Refuse another tokenizer than the one in whose ids the weights read and write.

    Args:
        weights: what is to be loaded. Those of earlier versions do not say, which is a warning.
        tokenizer: of this run.
        key: that names the weights, for messages.
        name: `data.tokenizer_name_or_path`.

    Raises:
        ValueError: says what differs.
    """
    if weights.tokenizer is not None:
        differs = what_differs(weights.tokenizer, tokenizer)
        if differs is not None:
            raise ValueError(
                f"data.tokenizer_name_or_path={name}: {differs}; allowed is the tokenizer that "
                f"{key}={weights.source} was trained with, {weights.tokenizer.get('name')}"
            )
    elif weights.run_config:
        logger.warning(
            "%s, of an earlier version, does not say which tokenizer it was trained with: that it "
            "was this %s is not checked", weights.source, name,
        )  # fmt: skip


def load_model(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, weights: Weights | None = None
) -> Diffusion:
    """The model with the weights of `eval.checkpoint_path`, averaged unless `eval.disable_ema`.

    Args:
        config: the composed configuration.
        tokenizer: of the run, see `tokenizer_of`.
        weights: what `eval.checkpoint_path` holds, where it has been read already.

    Raises:
        ValueError: it was trained as another model or with another block size, or its weights do
            not fit.
    """
    request = weights_to_evaluate(config)
    weights = weights or read_weights(request.source)
    check_fit(weights, request, tokenizer)
    model = Diffusion(config, tokenizer)
    load_weights(model, weights, use_ema=request.use_ema, allow_missing=request.allow_missing)
    return model.eval()


def new_model(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, weights: Weights | None = None
) -> Diffusion:
    """The model at the beginning of a training, with the weights of `training.from_pretrained`.

    They may be those of another algorithm or block size; the clipped range is the config's.

    Args:
        config: the composed configuration.
        tokenizer: of the run, see `tokenizer_of`.
        weights: what `training.from_pretrained` holds, where it has been read already.

    Raises:
        ValueError: its weights do not fit.
    """
    request = weights_to_train(config)
    if request is None:
        return Diffusion(config, tokenizer)
    weights = (weights or read_weights(request.source)).without_clipped_range()
    check_fit(weights, request, tokenizer)
    model = Diffusion(config, tokenizer)
    load_weights(model, weights, use_ema=request.use_ema, allow_missing=request.allow_missing)
    return model


def check_fit(
    weights: Weights, request: WeightsRequest, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare the description of weights with the run.

    Raises:
        ValueError: it does not suit.
    """
    key = request.key
    _, vocab_size = mask_index_and_vocab_size(tokenizer)
    wanted = from_run_config(request.run_config, vocab_size=vocab_size)
    if request.any_block_size is not None:
        check_same_model(weights, wanted, key=key, any_block_size=request.any_block_size)
    check_sizes(
        weights, wanted, key=key, tokenizer=request.tokenizer, allow_missing=request.allow_missing
    )
    if not request.allow_missing:
        check_tokenizer(weights, tokenizer, key=key, name=request.tokenizer)
    print_what_changes(weights, wanted, key=key)
