"""PEFT on an exported model: adapters are trained, sampled with, and equal to what they merge into.

They had no gradient on some layers, made the backward pass fail on others, and `generate` ignored
all of them.
"""

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.helpers.references import generator
from tests.helpers.twins import tiny

IDS = torch.randint(0, 19, (16, 8), generator=generator(0))
IDS[:, 1::2] = IDS[:, ::2]  # something to learn
EVERYWHERE = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "linear", "adaLN_modulation"]


def trained(**changes):
    model = tiny(dropout=0.0, **changes).eval()
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator(1))
    return model


def adapted(**options):
    """A model with LoRA that already does something."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False} | options
    return peft.get_peft_model(trained(), peft.LoraConfig(**options)).eval()


def loss(model) -> float:
    return model(input_ids=IDS, labels=IDS, seed=0).loss


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["mlp.2"]},
        {"target_modules": ["linear"]},
        {"target_modules": ["attn_qkv", "attn_out"]},
        {"target_modules": EVERYWHERE, "use_dora": True},
        {"target_modules": ["mlp.0"], "modules_to_save": ["linear", "norm1"]},
        {"target_modules": ["attn_qkv"], "modules_to_save": ["mlp", "vocab_embed"]},
    ],
    ids=str,
)
def test_what_is_adapted_counts(options):
    """In the loss, with gradients and without, and in samples, as after merging."""
    model = adapted(**options)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator(2))
    found = loss(model)
    found.backward()
    wanted = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert wanted and [name for name, grad in wanted if grad is None or not grad.any()] == []
    with torch.no_grad():
        torch.testing.assert_close(loss(model), found)
        with model.disable_adapter():
            assert not torch.isclose(loss(model), found, rtol=1e-6)
    how = {"input_ids": IDS[:, :3], "seed": 0, "temperature": 0.5}
    tokens = [model.generate(**how), model.generate(**how, kv_cache=True)]
    merged = model.merge_and_unload()
    torch.testing.assert_close(loss(merged), found, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(each, merged.generate(**how)) for each in tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fine_tuning_with_transformers_trainer(checkpointing, tmp_path):
    """The loss falls; the adapter that was saved, put on the model anew, samples as merged."""
    torch.manual_seed(0)
    options = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=EVERYWHERE)
    model = peft.get_peft_model(trained(), options)
    with torch.no_grad():
        before = loss(model.eval())
    rows = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=8, learning_rate=2e-2,
        gradient_accumulation_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] < 1.3 * before, "not summed over what is accumulated"
    with torch.no_grad():
        after = loss(model.eval())
    assert after < 0.9 * before
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(trained(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loss(again), after)
    how = {"input_ids": IDS[:4, :3], "max_new_tokens": 5, "seed": 1}
    tokens = again.generate(**how)
    assert torch.equal(again.merge_and_unload().generate(**how), tokens)
    assert not torch.equal(trained().generate(**how), tokens)
