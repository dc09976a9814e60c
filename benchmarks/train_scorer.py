"""A small GPT-2 that scores samples where the Hub is out of reach.

    python -m benchmarks.train_scorer DIRECTORY [--steps 600] [key=value ...]

Takes the overrides of `main.py` for the data and the tokenizer, trains transformers' GPT-2 on
`data.train`, and leaves a directory for `eval.gen_ppl_eval_model_name_or_path`. Its perplexities
compare settings of one model with each other, and with nothing published.
"""

import argparse
import itertools
from pathlib import Path

import rich.progress
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.steps import compose
from configuration import validate
from configuration.data_request import data_request
from configuration.training_request import lightning_precision
from dataloader import get_dataloaders, get_tokenizer
from utils import in_batch_job, keep_freed_memory, resolve_device


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as main.py takes them")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_intermixed_args()
    keep_freed_memory()
    config = compose(["mode=train", "then=[]", *arguments.overrides])
    validate(config)
    torch.manual_seed(config.seed)
    device = resolve_device(config.trainer.accelerator)
    data = data_request(config)
    tokenizer = get_tokenizer(data)
    train, valid = get_dataloaders(data, tokenizer)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.model.length,
            n_embd=config.model.hidden_size,
            n_layer=config.model.n_blocks,
            n_head=config.model.n_heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=arguments.steps)
    is_bf16 = lightning_precision(config.trainer.precision).startswith("bf16")
    endless = itertools.chain.from_iterable(itertools.repeat(train))

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            return model(input_ids=ids, labels=ids).loss

    batches = itertools.islice(endless, arguments.steps)
    batches = rich.progress.track(batches, "Training", total=arguments.steps)
    for step, batch in enumerate(batches, start=1):
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if in_batch_job() and step % 50 == 0:
            print(f"step {step} of {arguments.steps}: loss {value.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        losses = [loss(batch).item() for batch in itertools.islice(valid, 50)]
    print(f"Validation: {sum(losses) / len(losses):.3f} nats per token")
    model.save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
