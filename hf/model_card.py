"""The page of a published model: what it is, how to load it, how well it does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .configuration_bd3lm import BD3LMConfig

KINDS = {
    "ar": "An autoregressive language model (AR)",
    "bd3lm": "A block diffusion language model (BD3-LM)",
    "mdlm": "A masked diffusion language model (MDLM)",
    "sedd": "A score-entropy discrete diffusion language model (SEDD)",
}
TAGS = {"ar": "autoregressive", "bd3lm": "block-diffusion"}
# Arguments of `generate` that suit a model.
OPTIONS = {
    "ar": "nucleus_p=0.9, kv_cache=True",
    "bd3lm": "nucleus_p=0.9, kv_cache=True",
    "mdlm": "nucleus_p=0.9",
    "sedd": "num_steps=1000",
}
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- {tag}
- text-diffusion
- custom_code
{datasets}metrics:
- perplexity
---

# {title}

{kind}: {parameters:.1f} M parameters, texts of {config.model_length} tokens{blocks}, \
vocabulary of {config.vocab_size}.{weights} The code beside them needs \
`torch` and `transformers`.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{repo_id}", trust_remote_code=True)

tokens = model.generate(num_samples=2, {options})
print(tokenizer.batch_decode(tokens))

print(model(tokens, labels=tokens, seed=0).loss)  # {loss}
```

`generate` goes on from prompts too (`input_ids`, `max_new_tokens`; tokenized with \
`add_special_tokens=False`), and fills in what is `model.config.mask_index` in them.

## Evaluation

{evaluation}
## Citation

The method is that of [Block Diffusion](https://arxiv.org/abs/2503.09573) (Arriola et al., ICLR \
2025).
"""
COLUMNS = {"val/ppl": ".2f", "val/nll": ".4f", "val/bpd": ".4f", "num_tokens": ","}


def model_card(
    repo_id: str,
    config: BD3LMConfig,
    *,
    num_parameters: int,
    origin: str | None,
    dataset: str | None,
    results: Sequence[dict[str, Any]],
    license_name: str,
) -> str:
    """The text of README.md.

    Args:
        repo_id: where the model will be.
        config: its sizes and algorithm.
        num_parameters: of the network.
        origin: what the weights are, where that is known.
        dataset: id of the training data on the Hub.
        results: as `read_results` returns them.
        license_name: as the Hub calls it.
    """
    name = config.parameterization
    if name == "subs":
        name = "bd3lm" if config.cross_attn else "mdlm"
    is_block_diffusion = name == "bd3lm"
    return CARD.format(
        license=license_name,
        tag=TAGS.get(name, "masked-diffusion"),
        datasets=f"datasets:\n- {dataset}\n" if dataset else "",
        title=repo_id.split("/")[-1],
        kind=KINDS[name],
        parameters=num_parameters / 1e6,
        config=config,
        blocks=f", in blocks of {config.block_size}" if is_block_diffusion else "",
        weights=f" The weights are {origin}." if origin else "",
        repo_id=repo_id,
        options=OPTIONS[name],
        loss="NLL per token, nats" if name == "ar" else "NELBO of a draw per token, nats",
        evaluation=evaluation_table(results, is_bound=name != "ar"),
    )


def evaluation_table(results: Sequence[dict[str, Any]], *, is_bound: bool) -> str:
    """The results as Markdown, a row each."""
    if not results:
        return "Not evaluated yet.\n"
    kinds = [row.get("estimator", "nelbo" if is_bound else "nll") for row in results]
    bound = "The NELBO is an upper bound. " if is_bound and "nelbo" in kinds else ""
    lines = [
        f"{bound}NLL is in nats per token, BPD in bits per token.",
        "",
        "| data | perplexity | NLL | BPD | tokens | measured |",
        "|---|---|---|---|---|---|",
    ]
    for row, kind in zip(results, kinds, strict=True):
        # JSON has no infinity: such a number is null.
        cells = ("not finite" if row[k] is None else f"{row[k]:{f}}" for k, f in COLUMNS.items())
        data = str(row["data"]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {data} | {' | '.join(cells)} | {kind} |")
    return "\n".join(lines) + "\n"


def read_results(path: str) -> dict[str, Any]:
    """A file that `mode=ppl_eval` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--results {path}: there is no such file")
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--results {path}: not a JSON file ({error})") from error
    is_result = isinstance(results, dict) and "data" in results
    if not is_result or not all(
        key in results and type(results[key]) in (int, float, type(None)) for key in COLUMNS
    ):
        raise ValueError(
            f"--results {path}: not what mode=ppl_eval writes, which has data, {', '.join(COLUMNS)}"
        )
    return results
