"""Models of this project as lm-eval sees them, under the name `bd3lm`.

Every row begins with the BOS of sampling, and holds `model.length` tokens at most. What lies behind
the end of a shorter row in a batch are masks that are never revealed, as a sampler has it.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from configuration.likelihood_request import estimator_of
from configuration.sampling_request import sampling_options
from configuration.training_request import lightning_precision
from corpora.tokenization import encode
from likelihood.estimators import Estimator
from likelihood.scoring import Scores, score
from modes.starting_weights import load_model, tokenizer_of
from sampling.options import SamplingOptions
from sampling.prompts import CanvasRow, stack
from scripts.harness_config import harness_config
from scripts.harness_sampling import asked_options
from utils import get_logger, in_batch_job, made_current, resolve_device

logger = get_logger(__name__)

MAX_GEN_TOKS = 256  # lm-eval's, of tasks that do not say how long their answers are

Row = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context and continuation


@register_model("bd3lm")
class HarnessModel(TemplateLM):
    """A checkpoint of this project.

    Args:
        batch_size: rows of a batch.
        device: such as `cuda:1`; nothing else than the CPU where `trainer.accelerator` means it.
        max_batch_size, trust_remote_code: lm-eval gives them to every model; they change nothing.
        keys: as in `harness_config`.

    Raises:
        ValueError, OSError, hydra.errors.HydraException: a key that is wrong, or a checkpoint that
            is not there.
    """

    def __init__(
        self,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        **keys: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: allowed is an integer in [1, inf)")
        config, weights = harness_config(keys)
        self.estimator = estimator_of(config)
        self.options = sampling_options(config)
        self.seed = config.seed
        self.is_bf16 = lightning_precision(config.trainer.precision).startswith("bf16")
        self.batch_size = int(batch_size)
        self.tokenizer = tokenizer_of(config, weights)
        self._device = resolve_device(config.trainer.accelerator)
        if device is not None and self._device.type != "cpu":  # lm-eval says cuda:0 also without
            self._device = made_current(torch.device(device))
        self.model = load_model(config, self.tokenizer, weights).to(self._device)
        self.generator = torch.Generator(self._device).manual_seed(self.seed)
        # For ar each token is a block, and what follows a token changes nothing.
        self.unit = 1 if self.model.is_ar else self.model.block_size
        self.losses = dataclasses.replace(self.model.losses, block_size=self.unit)
        self.is_sedd = self.losses.denoiser.parameterization == "sedd"
        self.num_changed: Counter[str] = Counter()
        if stand_in := self.estimator.stand_in(self.unit):
            logger.warning(stand_in)

    # --- what lm-eval asks every model -----------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_index

    @property
    def prefix_token_id(self) -> int:
        return self.model.bos_index

    @property
    def max_length(self) -> int:
        """Tokens of a row, BOS included."""
        return self.model.length

    @property
    def room(self) -> int:
        """Tokens behind BOS."""
        return self.max_length - 1

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """As in training, no special token among them: rows get their BOS where they are made."""
        return encode(self.tokenizer, [string])[0]

    def chat_template(self, chat_template: bool | str = False) -> None:
        """Raises ValueError: there is none."""
        raise ValueError("--apply_chat_template: bd3lm models have none; allowed is without")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its file of results."""
        return {
            "model_device": str(self.device),  # `device` is what was asked for
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            **self.estimator.settings(self.unit),
            **self.num_changed,
        }

    # --- likelihood ------------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As for lm-eval's `hf`: encoded together, and spaces between the two are scored."""
        if not context:
            return [], self.tok_encode(continuation)
        return super()._encode_pair(context, continuation)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p in nats of each continuation given its context, and whether it is the greedy one.

        An empty continuation has log p 0. For sedd nothing else is greedy: it has no such text.
        """
        rows = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        answers = self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)
        sizes = [(len(context), len(continuation)) for _, context, continuation in rows]
        window = f"longer than model.length={self.max_length} with BOS"
        self._say(
            "truncated_contexts", requests, [a > 0 and a + b > self.room for a, b in sizes],
            f"were {window}: their contexts were cut from the left",
        )  # fmt: skip
        self._say(
            "truncated_continuations", requests, [b > self.room for _, b in sizes],
            f"had a continuation {window}: only the end of it was scored",
        )  # fmt: skip
        self._say(
            "empty_continuations", requests, [b == 0 for _, b in sizes],
            "had a continuation without any token: log p is 0",
        )  # fmt: skip
        if self.is_sedd:
            logger.warning("sedd has no greedy text: accuracies as LAMBADA's, made of it, are 0")
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p in nats of whole texts, each by itself.

        Longer ones are cut into windows as lm-eval does it, so that each token is scored once. A
        window begins with BOS; behind it come the last token before the window's own ones, and in
        the last window as many as fit.
        """
        rows: list[Row] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(*request.args),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.room,
                context_len=2,  # of which the first becomes BOS
            )
            parts = [(None, a[1:], b) for a, b in map(make_disjoint_window, windows)]
            counts.append(len(parts))
            rows += parts
        answers = iter(self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(math.fsum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Row], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same of tokens; what does not fit behind BOS is cut from the left."""
        order = Collator(requests, sort_fn=lambda row: -len(row[1] + row[2]))
        name, passes = self.estimator.measured(self.unit), self.estimator.num_passes(self.unit)
        name = f"Likelihood ({name}, passes per batch: {passes})"
        answers = []
        with self._bar(name, total=len(requests), disable=disable_tqdm) as bar:
            for batch in order.get_batched(n=self.batch_size):
                found = self._answers([(a, b) for _, a, b in batch])
                for (texts, _, _), answer in zip(batch, found, strict=True):
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                answers += found
                bar.update(len(batch))
        return order.get_original(answers)

    def _answers(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """log p, and whether it is greedy, of a batch of contexts and continuations."""
        rows = [[self.prefix_token_id, *(a + b)[-self.room :]] for a, b in pairs]
        tokens, _ = self._canvas(rows, limits=map(len, rows))
        num_given = [max(1, len(row) - len(b)) for row, (_, b) in zip(rows, pairs, strict=True)]
        positions = torch.arange(tokens.shape[1], device=self.device)
        given = positions < torch.tensor(num_given, device=self.device)[:, None]
        found = self._score(tokens, given, self.estimator)
        if self.is_sedd:
            is_greedy = [not b for _, b in pairs]
        elif found.is_greedy is None:
            in_order = Estimator(likelihood="left_to_right")
            is_greedy = self._score(tokens, given, in_order).is_greedy.tolist()
        else:
            is_greedy = found.is_greedy.tolist()
        return list(zip(found.log_p.sum(dim=1).tolist(), is_greedy, strict=True))

    def _score(self, tokens: Tensor, given: Tensor, estimator: Estimator) -> Scores:
        with self._precision():
            return score(self.losses, tokens, estimator, given=given, generator=self.generator)

    # --- texts -----------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the sampler writes behind each context, up to the first text of `until`.

        Raises:
            ValueError: a generation argument that the sampler has not.
        """
        # Half of a row at most, so that a task without a length leaves room for contexts.
        longest = min(MAX_GEN_TOKS, self.max_length // 2)
        asked = [normalize_gen_kwargs(request.args[1], longest) for request in requests]
        for kwargs in asked:  # refused before the first text is drawn
            self._options(kwargs)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        order = Collator(
            list(zip(contexts, asked, (r.args for r in requests), strict=True)),
            sort_fn=lambda row: -len(row[0]),
            group_by="gen_kwargs",
            group_fn=lambda row: row[1],
        )
        texts: list[str] = []
        with self._bar("Texts", total=len(requests), disable=disable_tqdm) as bar:
            for batch in order.get_batched(n=self.batch_size):
                found = self._texts([row[0] for row in batch], batch[0][1], first_row=len(texts))
                for (_, _, arguments), text in zip(batch, found, strict=True):
                    self.cache_hook.add_partial("generate_until", arguments, text)
                texts += found
                bar.update(len(batch))
        is_cut = [
            len(context) + kwargs["max_gen_toks"] > self.room
            for context, kwargs in zip(contexts, asked, strict=True)
        ]
        self._say(
            "truncated_contexts", requests, is_cut,
            f"left no room for max_gen_toks in model.length={self.max_length}: their contexts were "
            "cut from the left",
        )  # fmt: skip
        return order.get_original(texts)

    def _texts(
        self, contexts: Sequence[list[int]], kwargs: Mapping[str, Any], *, first_row: int
    ) -> list[str]:
        """The texts behind a batch of contexts, all with the same arguments."""
        size, until = kwargs["max_gen_toks"], kwargs["until"]
        rows = [
            [self.prefix_token_id, *context[max(0, len(context) + size - self.room) :]]
            for context in contexts
        ]
        canvas, limits = self._canvas(rows, limits=[len(row) + size for row in rows])
        with self._precision():
            output = self.model.generate(
                canvas,
                limits=limits,
                options=self._options(kwargs),
                seed=self.seed,
                first_row=first_row,
            )
        ends = output.lengths.tolist()
        new = [
            tokens[len(row) : end]
            for tokens, row, end in zip(output.tokens.cpu(), rows, ends, strict=True)
        ]
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _options(self, kwargs: Mapping[str, Any]) -> SamplingOptions:
        return asked_options(
            self.options, kwargs, room=self.room, decode=self.tokenizer.decode
        )

    # --- what both need --------------------------------------------------------------------------

    def _canvas(self, rows: Sequence[list[int]], *, limits: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Rows as one tensor of whole blocks, (B, N), and where each ends, (B,)."""
        pairs = zip(rows, limits, strict=True)
        return stack(
            [CanvasRow(tokens=row, limit=limit, source="") for row, limit in pairs],
            block_size=self.unit,
            mask_index=self.model.mask_index,
            device=self.device,
        )

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_bf16)

    def _bar(self, name: str, *, total: int, disable: bool) -> tqdm:
        """How far it is: a bar, in the log of a batch job a line every half minute."""
        pause = 30 if in_batch_job() else 0.1
        return tqdm(desc=name, total=total, disable=disable, mininterval=pause)

    def _say(
        self, key: str, requests: Sequence[Instance], is_so: Sequence[bool], what: str
    ) -> None:
        """Count requests of which something is so, and say it in one line, with their tasks."""
        tasks = Counter(r.task_name for r, so in zip(requests, is_so, strict=True) if so)
        if tasks:
            self.num_changed[key] += tasks.total()
            named = ", ".join(f"{name}: {number}" for name, number in tasks.items())
            logger.warning("%d of %d requests %s (%s)", tasks.total(), len(requests), what, named)
