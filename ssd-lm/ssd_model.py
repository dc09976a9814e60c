"""SSD-LM's network: a RoBERTa masked LM that reads distributions over tokens, and its files.

Weights come from the Hub or a directory. Nothing here runs code from a file: the two `.pt` files
and a `pytorch_model.bin` are read as tensors and plain containers, and no remote code is used.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PUBLISHED = "xhan77/ssdlm"
TOKENIZER = "roberta-large"
EMBED_SUM, TIMESTEP = "embed_sum_layer.pt", "timestep_layer.pt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one of them
MODEL_FILES = ("config.json", *WEIGHTS, EMBED_SUM, TIMESTEP)
WHAT_TO_PUT = f"config.json, {' or '.join(WEIGHTS)}, {EMBED_SUM} and {TIMESTEP}"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json")


class SSDModel(nn.Module):
    """Predicts the clean tokens of a noisy block, given the block before it.

    The input is the context's word embeddings, then per noisy position
    softmax(x_t) W + timestep(t / T), where W (V, D) maps a distribution to an embedding.
    """

    def __init__(self, roberta: PreTrainedModel, *, embed_sum: nn.Linear, timestep: nn.Linear):
        super().__init__()
        self.roberta = roberta
        self.embed_sum = embed_sum
        self.timestep = timestep

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embed_sum.in_features

    @property
    def max_block_size(self) -> int:
        """The largest L: context and block have a position each."""
        config = self.roberta.config
        # RoBERTa counts positions from pad_token_id + 1.
        return (config.max_position_embeddings - config.pad_token_id - 1) // 2

    def forward(self, x_t: Tensor, context: Tensor, progress: float) -> Tensor:
        """Logits of the clean block.

        Args:
            x_t: noisy logits, (B, L, V).
            context: ids, (B, C).
            progress: t / T, in (0, 1].

        Returns:
            (B, L, V).
        """
        time = self.timestep(x_t.new_full((1, 1, 1), progress))  # (1, 1, D)
        noisy = self.embed_sum(x_t.softmax(dim=-1)) + time  # (B, L, D)
        clean = self.roberta.get_input_embeddings()(context)  # (B, C, D)
        embeddings = torch.cat((clean, noisy), dim=1)  # (B, C + L, D)
        return self.roberta(inputs_embeds=embeddings).logits[:, context.shape[1] :]


def load_model(source: str) -> SSDModel:
    """The network with its weights, in float32 and in evaluation mode.

    Args:
        source: a directory with `WHAT_TO_PUT`, or a Hub id (`name/name`, `@revision` may follow).

    Raises:
        FileNotFoundError: the directory or one of its files is missing, or the Hub does not answer.
        ValueError: a file is damaged, holds something else than tensors, or does not fit.
    """
    folder = find_folder(source)
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    missing = [n for n in ("config.json", EMBED_SUM, TIMESTEP) if not (folder / n).is_file()]
    missing += [] if has_weights else [" or ".join(WEIGHTS)]
    if missing:
        raise FileNotFoundError(
            f"--model {source}: {folder} lacks {', '.join(missing)}; needed are {WHAT_TO_PUT}"
        )
    roberta = _load_roberta(folder)
    hidden, vocab_size = roberta.config.hidden_size, roberta.config.vocab_size
    embed_sum = nn.Linear(vocab_size, hidden, bias=False)
    timestep = nn.Linear(1, hidden)
    _load_layer(embed_sum, folder / EMBED_SUM)
    _load_layer(timestep, folder / TIMESTEP)
    return SSDModel(roberta, embed_sum=embed_sum, timestep=timestep).eval()


def load_tokenizer(name: str | None, *, model: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer, which must have a token for the beginning of a text and V tokens.

    Args:
        name: a directory or Hub id; None takes the model's directory if a tokenizer lies there,
            else `roberta-large`.
        model: `--model`, as given.
        vocab_size: V of the model.

    Raises:
        FileNotFoundError: it cannot be loaded.
        ValueError: it is not the model's.
    """
    if name is None:
        has_own = any((Path(model) / file).is_file() for file in TOKENIZER_FILES)
        name = model if has_own else TOKENIZER
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... here
        raise FileNotFoundError(
            f"--tokenizer {name}: could not be loaded. Allowed are a Hub id and a directory; "
            f"without a network, put the files of https://huggingface.co/{TOKENIZER} "
            "(vocab.json, merges.txt, tokenizer_config.json or tokenizer.json) into a directory "
            f"and give that directory. Cause: {_first_line(error)}"
        ) from error
    if len(tokenizer) != vocab_size or tokenizer.bos_token_id is None:
        raise ValueError(
            f"--tokenizer {name}: has {len(tokenizer)} tokens and bos_token "
            f"{tokenizer.bos_token}; needed are the model's {vocab_size} tokens and a bos_token"
        )
    return tokenizer


def find_folder(source: str) -> Path:
    """The directory `source`, or the local copy of the Hub repository `source`.

    Raises:
        FileNotFoundError: neither exists, or the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"--model {source}: no such directory. Allowed are a directory that holds "
            f"{WHAT_TO_PUT}, and a Hub id such as {PUBLISHED}"
        )
    from huggingface_hub import snapshot_download  # a directory needs no Hub client

    repository, _, revision = source.partition("@")
    try:
        path = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(MODEL_FILES)
        )
    except Exception as error:  # network, permission, name, disk: many types, one remedy
        raise FileNotFoundError(
            f"--model {source}: no such directory, and the Hub cannot deliver it. Put "
            f"{WHAT_TO_PUT} of https://huggingface.co/{repository}/tree/main into a directory "
            f"and give --model DIRECTORY. Cause: {_first_line(error)}"
        ) from error
    return Path(path)


def _load_roberta(folder: Path) -> PreTrainedModel:
    """The masked LM; every weight must come from the file.

    transformers gives weights that a file lacks random values and says so in a log line only.
    """
    try:
        roberta, loaded = AutoModelForMaskedLM.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise ValueError(
            f"{folder}: its config.json and weights cannot be read as a masked LM "
            f"({_first_line(error)})"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: the weights lack {', '.join(missing[:5])}")
    if roberta.config.model_type != "roberta":
        raise ValueError(
            f"{folder}: config.json has model_type {roberta.config.model_type}; allowed: roberta"
        )
    return roberta


def _load_layer(layer: nn.Linear, path: Path) -> None:
    """Fill a linear layer from a `.pt` file of tensors, whose keys may start with `module.`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in every possible way
        raise ValueError(
            f"{path}: cannot be read safely, it is damaged or holds more than tensors "
            f"({_first_line(error)})"
        ) from error
    expected = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    found = content if isinstance(content, Mapping) else {}
    found = {str(key).removeprefix("module."): value for key, value in found.items()}
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in found.items()}
    if shapes != expected:
        shown = str(shapes)[:200] if found else type(content).__name__
        raise ValueError(f"{path}: holds {shown}; needed are tensors {expected}")
    layer.load_state_dict(found)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
