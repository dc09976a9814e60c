"""Generative perplexity: how likely a large language model finds our texts (paper, table 7)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from corpora.lines import without_surrogates
from evaluation.metrics import token_entropy

# The published generative perplexities were measured with a context of 1,024 tokens.
SCORER_WINDOW = 1024


class ScorerUnavailableError(OSError):
    """The model that scores samples cannot be used; the message says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class SampleScore:
    """How one sample fares with the scorer; `nll` and `gen_ppl` are NaN where nothing counts."""

    nll: float  # mean over the counted tokens, nats per token
    gen_ppl: float  # e to the nll
    entropy: float  # of the histogram of the scorer's tokens, nats
    num_tokens: int  # counted tokens: all but the first one and EOS


@dataclass(frozen=True)
class Window:
    """Tokens start..end-1 of one text, of which those from first_counted on are new."""

    text: int  # index of the text
    start: int
    end: int
    first_counted: int


def sliding_windows(length: int, *, size: int, stride: int, text: int = 0) -> list[Window]:
    """Overlapping windows that count each token but the first one once."""
    windows, end = [], 0
    while end < length:
        start = windows[-1].start + stride if windows else 0
        # Nothing precedes token 0, so there is no prediction of it.
        first_counted, end = max(end, 1), min(start + size, length)
        windows.append(Window(text, start, end, first_counted))
    return windows


class GenerativePerplexity:
    """Scores texts with any causal LM of transformers; its tokenizer needs no pad token or EOS."""

    def __init__(
        self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        # A learned position table ends at the context length, and ALiBi names none.
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.window = min(SCORER_WINDOW, context or SCORER_WINDOW)
        self.stride = self.window // 2
        # What the tokenizer puts before every text: BOS for llama, nothing for GPT-2.
        self.prefix = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
        self._check_causal()

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        device: torch.device | str,
        tokenizer_name_or_path: str | None = None,
        dtype: torch.dtype = torch.float32,
        key: str = "eval.gen_ppl_eval_model_name_or_path",
    ) -> Self:
        """Loads model and tokenizer; code from the Hub is never run.

        Args:
            name_or_path: a Hub id such as gpt2-large, or a directory in Hub format.
            device: where the model shall run.
            tokenizer_name_or_path: where the tokenizer lies, if not beside the model.
            dtype: of the weights; published numbers are float32.
            key: the option that named it, for the message.

        Raises:
            ScorerUnavailableError: unreachable, broken, not causal, or without some weights.
        """
        try:
            model, tokenizer = load_network(
                transformers.AutoModelForCausalLM,
                name_or_path,
                dtype=dtype,
                tokenizer=tokenizer_name_or_path,
            )
            return cls(model.to(device), tokenizer)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... here
            raise ScorerUnavailableError(
                f"{key}={name_or_path!r} cannot score samples. Allowed: a causal language model "
                "on the Hugging Face Hub, a local directory with its config.json, weights and "
                "tokenizer files (the way without a network), or "
                f"null to skip generative perplexity. Cause: {error}"
            ) from error

    def score(self, texts: Sequence[str], *, max_length: int, batch_size: int) -> list[SampleScore]:
        """Generative perplexity, entropy and counted length of each text.

        A text is tokenized by the scorer's tokenizer and truncated to max_length tokens. Windows
        of 1,024 tokens (or the scorer's context, if shorter) start every half window; in each,
        only tokens that no earlier window held count, and EOS never does.

        Args:
            max_length: scorer's tokens per text, `model.length`.
            batch_size: windows per forward pass; no number depends on it.
        """
        if max_length < 1 or batch_size < 1:
            raise ValueError(f"{max_length=} and {batch_size=} must be at least 1")
        eos = -1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        rows = [self._encode(text, max_length=max_length) for text in texts]
        windows = [
            window
            for i, ids in enumerate(rows)
            for window in sliding_windows(len(ids), size=self.window, stride=self.stride, text=i)
        ]
        windows.sort(key=lambda window: window.start - window.end)  # like lengths need few pads
        nlls, counts = [0.0] * len(rows), [0] * len(rows)
        for i in range(0, len(windows), batch_size):
            batch = windows[i : i + batch_size]
            chunks = [rows[window.text][window.start : window.end] for window in batch]
            for window, losses, chunk in zip(batch, self._losses(chunks), chunks, strict=True):
                new = window.first_counted - window.start
                # The loss at index j is that of token j + 1.
                counted = losses[new - 1 :][chunk[new:] != eos]
                nlls[window.text] += counted.sum().item()
                counts[window.text] += len(counted)
        return [
            sample_score(nll, count, ids[len(self.prefix) :])
            for nll, count, ids in zip(nlls, counts, rows, strict=True)
        ]

    def _encode(self, text: str, *, max_length: int) -> Tensor:
        """Token ids (n,) of a text, on the CPU."""
        # verbose: a text may be longer than the context, which is what the windows are for.
        text = without_surrogates(text)  # such as JSON can spell
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = (self.prefix + ids)[:max_length]
        vocab_size = self.model.get_input_embeddings().num_embeddings
        if max(ids, default=0) >= vocab_size:  # on a GPU this would end the whole process
            raise ValueError(
                f"the scorer's tokenizer made token {max(ids)}, and its model has {vocab_size} "
                "tokens: model and tokenizer do not belong together"
            )
        return torch.tensor(ids, dtype=torch.int64)

    @torch.inference_mode()
    def _losses(self, chunks: Sequence[Tensor]) -> list[Tensor]:
        """Next-token losses (n - 1,), float64 on the CPU, of each chunk of token ids (n,).

        Pads stand on the right, where causal attention does not reach them and where they move
        no position; so any id does for them, and no pad token is needed.
        """
        device = self.model.device
        ids = torch.nn.utils.rnn.pad_sequence(list(chunks), batch_first=True).to(device)  # (B, T)
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        with full_precision(device):
            logits = self.model(
                input_ids=ids, attention_mask=mask.long(), use_cache=False
            ).logits  # (B, T, V)
            losses = [  # row by row: log-probabilities of the whole batch are gigabytes
                F.cross_entropy(logits[i, : n - 1].float(), ids[i, 1:n], reduction="none")
                for i, n in enumerate(lengths.tolist())
            ]
        return [row.double().cpu() for row in losses]

    def _check_causal(self) -> None:
        """An encoder such as BERT loads too, but reads the token that it is to predict."""
        ids = torch.arange(1, 1 + min(4, self.window))
        losses = self._losses([ids, torch.cat([ids[:-1], ids[:1]])])
        tolerance = 100 * torch.finfo(self.model.dtype).eps
        if not torch.allclose(*(row[:-1] for row in losses), rtol=tolerance, atol=tolerance):
            raise ValueError("it is not causal: its prediction of a token depends on later tokens")


def load_network(
    auto_class: type,
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    spare: str | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A network of transformers and its tokenizer; code from the Hub is never run.

    Args:
        auto_class: of transformers, such as `AutoModel`.
        name_or_path: a Hub id, or a directory in Hub format.
        dtype: of the weights.
        tokenizer: where it lies, if not beside the network.
        spare: the first letters of weights that its files may lack.

    Raises:
        Exception: whatever transformers raises, and ValueError where weights are missing.
    """
    if name_or_path.startswith(("/", ".", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError("there is no such directory")
    loaded = transformers.AutoTokenizer.from_pretrained(
        tokenizer or name_or_path, trust_remote_code=False
    )
    model, info = auto_class.from_pretrained(
        name_or_path, trust_remote_code=False, dtype=dtype, output_loading_info=True
    )
    missing = sorted(k for k in info["missing_keys"] if spare is None or not k.startswith(spare))
    if missing:  # transformers would fill them with random numbers
        raise ValueError(f"its files lack the weights {missing[:3]}")
    return model, loaded


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 inside: scores must not depend on how samples were drawn."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def sample_score(total_nll: float, num_tokens: int, tokens: Tensor) -> SampleScore:
    """The score of a text from its summed nll and the scorer's tokens (n,)."""
    nll = total_nll / num_tokens if num_tokens else math.nan
    return SampleScore(
        nll=nll,
        gen_ppl=torch.tensor(nll, dtype=torch.float64).exp().item(),  # infinity, no OverflowError
        entropy=token_entropy(tokens),
        num_tokens=num_tokens,
    )
