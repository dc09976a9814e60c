"""`python -m scripts.harness`: lm-eval's own command on local tasks, against sums made by hand."""

import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from checkpointing.weights import Weights
from configuration.training_request import plain
from corpora.tokenization import encode, text8_tokenizer, train_bpe
from corpora.tokenizer_record import tokenizer_record
from diffusion import Diffusion
from hf import BD3LM, BD3LMConfig
from likelihood.scoring import token_log_likelihood
from models.masks import AttentionPattern
from sampling.options import SamplingOptions
from scripts import harness
from scripts.harness_config import SHORT, TOKENIZER, described_keys
from tests.docs.pages import page
from tests.helpers.references import generator
from tests.helpers.small_module import module
from tests.helpers.small_run import ALGOS, overrides, sentences

pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
from lm_eval._cli import HarnessCLI  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from scripts.harness_model import HarnessModel  # noqa: E402

N = 32
# Contexts end at every place of a block of 4; the third is empty, and the last needs no space.
CHOICES = [
    {"query": "the gate", "choices": ["opens", "is", "a star"], "gold": 0},
    {"query": "my sister", "choices": ["hums", "mends the net"], "gold": 1},
    {"query": "", "choices": ["roses", "rain"], "gold": 1},
    {"query": "a bridge of ", "choices": ["stone", "e"], "gold": 0},
]
CLOZE = [{"text": text} for text in ("a b", "she hums a song", "near the mill", "no one wakes")]
ROLLING = [{"text": text} for text in ("roses", sentences()[0].strip(" .\n").lower()[:N - 1],
                                       " ".join(sentences()[:2]).lower().replace(".\n", ""))]
QUESTIONS = [{"question": "what is it", "answer": "a"}, {"question": "who", "answer": "b"}]
TASKS = {
    "small_choice": (CHOICES, {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": ["acc", "acc_norm"],
    }),
    "small_cloze": (CLOZE, {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": ["perplexity", "acc"],
    }),
    "small_rolling": (ROLLING, {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": ["word_perplexity", "bits_per_byte"],
    }),
    "small_answer": (QUESTIONS, {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["z"], "max_gen_toks": 9},
        "filter_list": [{"name": "first", "filter": [
            {"function": "regex", "regex_pattern": "([a-m])"}, {"function": "take_first"},
        ]}],
        "metric_list": ["exact_match"],
    }),
}  # fmt: skip


# --- what is evaluated ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, and nothing that takes seconds: 14,000 other tasks, bootstrapped errors."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
    monkeypatch.setattr(lm_eval.api.metrics, "bootstrap_stderr", lambda *_, **__: 0.0)
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    monkeypatch.setattr(sys, "argv", ["lm_eval"])


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of task files."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, task) in TASKS.items():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines)
        files = {"data_files": {"test": f"{folder}/{name}.jsonl"}, "cache_dir": f"{folder}/cache"}
        metrics = [{"metric": metric} for metric in task["metric_list"]]
        content = {
            "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "metadata": {"version": 1}, **task, "metric_list": metrics,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="session")
def checkpoint(compose, tmp_path_factory) -> Callable[[str], tuple[str, Diffusion]]:
    """A Lightning checkpoint of an algorithm, whose moving average is the returned module."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def write(algo: str) -> tuple[str, Diffusion]:
        model = module(compose, folder, *ALGOS[algo], f"model.length={N}").eval()
        for parameter in model.parameters():  # sharp enough that some tokens are greedy ones
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator(2))
        path = f"{folder}/{algo}.ckpt"
        raw = model.state_dict() | {name: p + 0.1 for name, p in model.named_parameters()}
        average = {"decay": 0.9, "num_updates": 1}
        content = {
            "state_dict": raw,
            "ema": average | {"shadow_params": [p.detach() for p in model.parameters()]},
            "hyper_parameters": {"config": model.run_config},
            "tokenizer": tokenizer_record(model.tokenizer, name="text8"),
        }
        torch.save(content, path)
        return path, model

    return write


def evaluate(folder: Path, tasks: Path, *arguments: str) -> tuple[dict, dict[str, list[dict]]]:
    """Run the command on all tasks, or those named; returns the results and the samples."""
    if "--tasks" not in arguments:
        arguments = ("--tasks", ",".join(TASKS), *arguments)
    harness.main(
        [*arguments, "--include_path", str(tasks), "--output_path", str(folder), "--log_samples"]
    )
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for path in folder.rglob("samples_*.jsonl"):
        name = re.sub(r"samples_(.*)_\d{4}-.*", r"\1", path.stem)
        rows = map(json.loads, path.read_text().splitlines())
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text()), samples


def responses(samples: Sequence[dict]) -> list[list]:
    """What the model said to each document, flat: numbers are strings in the files."""
    return [[part for request in row["resps"] for part in request] for row in samples]


@functools.cache
def model_of(source: str, **keys) -> HarnessModel:
    return HarnessModel(checkpoint=source, batch_size=3, **keys)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i, ("a_task", i, 1)) for i, a in enumerate(arguments)]


# --- by hand -------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Diffusion, tokens: list[int], num_scored: int) -> tuple[float, bool]:
    """log p of the last tokens of a row, read left to right, a pass for each of them."""
    total, is_greedy, denoiser = 0.0, True, model.denoiser
    for i in range(len(tokens) - num_scored, len(tokens)):
        if model.is_ar:
            log_p = denoiser(torch.tensor([tokens[:i]]), pattern=AttentionPattern.CAUSAL)[0, -1]
        else:
            end = -(-(i + 1) // model.block_size) * model.block_size
            x = torch.tensor([tokens[:i] + [model.mask_index] * (end - i)])
            is_mdlm = model.block_size == model.length
            pattern = AttentionPattern.FULL if is_mdlm else AttentionPattern.BLOCK_CAUSAL
            log_p = denoiser(x, pattern=pattern)[0, i]
        total += log_p[tokens[i]].item()
        is_greedy &= log_p.argmax().item() == tokens[i]
    return total, is_greedy


def row(model: Diffusion, text: str) -> list[int]:
    return [model.bos_index, *encode(model.tokenizer, [text])[0]]


def pair_by_hand(model: Diffusion, context: str, continuation: str) -> tuple[float, bool]:
    """Of a character tokenizer, where texts and tokens are cut at the same places."""
    text, kept = context + continuation, context.rstrip()
    return by_hand(model, row(model, text), len(text) - len(kept))


def windows(tokens: list[int], bos: int) -> list[tuple[list[int], int]]:
    """Rows of N with BOS, and how many of their last tokens are scored in them."""
    found, done = [([bos, *tokens[: N - 1]], len(tokens[: N - 1]))], N - 1
    while done < len(tokens):
        new = min(N - 2, len(tokens) - done)
        done += new
        found.append(([bos, *tokens[done - (N - 1) : done]], new))
    return found


# --- the four kinds of tasks ---------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ar", "bd3lm", pytest.param("mdlm", marks=pytest.mark.slow)])
def test_tasks_on_the_command_line(algo, checkpoint, tasks, tmp_path):
    """Every answer of the model, and every figure that lm-eval makes of them."""
    source, model = checkpoint(algo)
    results, samples = evaluate(
        tmp_path / "out", tasks, f"checkpoint={source}", "--batch_size", "3",
        "--seed", "7", "--num_fewshot", "0",
    )  # fmt: skip
    found = results["results"]

    expected = [
        [pair_by_hand(model, d["query"], " " + c) for c in d["choices"]] for d in CHOICES
    ]
    for sums, said in zip(expected, responses(samples["small_choice"]), strict=True):
        assert [float(log_p) for log_p, _ in said] == pytest.approx([s[0] for s in sums], abs=1e-4)
        assert [is_greedy for _, is_greedy in said] == [str(s[1]) for s in sums]
    best = [max(range(len(s)), key=lambda i, s=s: s[i][0]) for s in expected]
    right = [i == d["gold"] for i, d in zip(best, CHOICES, strict=True)]
    assert found["small_choice"]["acc,none"] == sum(right) / len(right)

    cloze = [
        pair_by_hand(model, text.rpartition(" ")[0], " " + text.rpartition(" ")[2])
        for text in (document["text"] for document in CLOZE)
    ]
    log_ps = [log_p for log_p, _ in cloze]
    perplexity = math.exp(-sum(log_ps) / len(log_ps))
    assert found["small_cloze"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert found["small_cloze"]["acc,none"] == sum(g for _, g in cloze) / len(cloze)

    total = 0.0
    for document in ROLLING:
        parts = windows(row(model, document["text"])[1:], model.bos_index)
        total += sum(by_hand(model, *part)[0] for part in parts)
    words = sum(len(document["text"].split()) for document in ROLLING)
    size = sum(len(document["text"]) for document in ROLLING)
    rolling = found["small_rolling"]
    assert rolling["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert rolling["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)

    texts = [texts for (texts,) in responses(samples["small_answer"])]
    assert any(texts) and all(len(text) <= 9 and "z" not in text for text in texts)
    letters = [re.search("[a-m]", text) for text in texts]
    hits = [m is not None and m[0] == d["answer"] for m, d in zip(letters, QUESTIONS, strict=True)]
    assert found["small_answer"]["exact_match,first"] == sum(hits) / len(hits)
    assert results["config"]["model_args"] == {"pretrained": source}
    assert results["config"]["estimator"] == "left_to_right"


@pytest.mark.slow
def test_ar_is_what_hf_says(gpt2, tmp_path, tasks):
    """The same weights as a transformers model: lm-eval's own `hf` gives the same numbers.

    `hf` knows no mask, whose share of the softmax is nothing in a trained model.
    """
    config = BD3LMConfig(
        vocab_size=50_258, model_length=N, block_size=N, cross_attn=False, causal=True, adaln=False,
        hidden_dim=16, n_blocks=1, n_heads=2, var_min=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BD3LM(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator(3))
    model.backbone.output_layer.linear.bias.data[config.mask_index] = -1e4
    model.save_pretrained(tmp_path / "hub")
    bos = gpt2.bos_token
    begins = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, gpt2.bos_token_id)])
    gpt2.backend_tokenizer.post_processor, kept = begins, gpt2.backend_tokenizer.post_processor
    try:
        gpt2.save_pretrained(tmp_path / "hub")
    finally:
        gpt2.backend_tokenizer.post_processor = kept
    theirs = ["--model", "hf", "--device", "cpu", "--model_args", f"pretrained={tmp_path}/hub",
              "trust_remote_code=True"]  # fmt: skip
    likelihood = ("--tasks", "small_choice,small_cloze")
    evaluated = [
        (likelihood, [*theirs, "add_bos_token=True"]),
        # A text of its own gets BOS in any case, and would get two.
        (("--tasks", "small_rolling", "--samples", '{"small_rolling": [0, 1]}'),
         [*theirs, "add_bos_token=False"]),
    ]  # fmt: skip
    for number, (which, theirs) in enumerate(evaluated):
        ours, our_samples = evaluate(
            tmp_path / f"ours{number}", tasks, *which, f"checkpoint={tmp_path}/hub"
        )
        other, their_samples = evaluate(tmp_path / f"hf{number}", tasks, *which, *theirs)
        for name, figures in ours["results"].items():
            for key, value in figures.items():
                if "stderr" not in key and isinstance(value, float):
                    assert value == pytest.approx(other["results"][name][key], rel=1e-4), key
            said, expected = responses(our_samples[name]), responses(their_samples[name])
            assert len(said) == len(expected) > 1
            for one, two in zip(said, expected, strict=True):
                for a, b in zip(one, two, strict=True):
                    a, b = (x if isinstance(x, list) else [x] for x in (a, b))
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4) and a[1:] == b[1:]


# --- likelihoods ---------------------------------------------------------------------------------

PAIRS = [("the gate", " opens"), ("a", " b"), ("my sister hums a slow", " song"), ("", "rain")]


@pytest.mark.parametrize("algo", ["ar", "bd3lm", "mdlm"])
def test_batches_change_nothing(algo, checkpoint):
    """Rows of other lengths beside a row, and masks behind its end."""
    source, model = checkpoint(algo)
    found = model_of(source).loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for pair, (log_p, is_greedy) in zip(PAIRS, found, strict=True):
        expected = pair_by_hand(model, *pair)
        assert log_p == pytest.approx(expected[0], abs=1e-4) and is_greedy == expected[1]


@pytest.mark.parametrize(
    ("likelihood", "settings"),
    [("nelbo_exact", {}), ("any_order", {}), ("margin", {}), ("strided", {"tokens_per_pass": 2})],
)
def test_estimators(likelihood, settings, checkpoint):
    """Continuations are scored under `likelihood`; those that know no greedy text borrow it."""
    source, model = checkpoint("bd3lm")
    asked = requests("loglikelihood", *PAIRS)
    adapter = model_of(source, likelihood=likelihood, **settings)
    found = adapter.loglikelihood(asked, disable_tqdm=True)
    in_order = model_of(source).loglikelihood(asked, disable_tqdm=True)
    assert found != in_order
    for (context, continuation), (log_p, is_greedy), (_, other_greedy) in zip(
        PAIRS, found, in_order, strict=True
    ):
        tokens = torch.tensor([row(model, context + continuation)])
        given = torch.arange(tokens.shape[1])[None] < 1 + len(context)
        expected = token_log_likelihood(
            model, tokens, estimator=likelihood, given=given, **settings
        )
        assert log_p == pytest.approx(expected.sum().item(), abs=1e-4)
        if likelihood in ("nelbo_exact", "any_order"):
            assert is_greedy == other_greedy


@pytest.mark.slow
def test_drawn_noise_is_of_the_seed(checkpoint):
    source, _ = checkpoint("bd3lm")
    asked = requests("loglikelihood", *PAIRS)
    drawn = [
        HarnessModel(
            checkpoint=source, likelihood="nelbo", num_draws=draws, seed=seed, batch_size=4
        ).loglikelihood(asked, disable_tqdm=True)
        for draws, seed in ((2, 1), (2, 1), (2, 5), (100, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    exact = model_of(source, likelihood="nelbo_exact").loglikelihood(asked, disable_tqdm=True)
    means, expected = (sum(log_p for log_p, _ in answers) for answers in (drawn[3], exact))
    assert means == pytest.approx(expected, rel=0.1)


def test_sedd_has_its_bound(checkpoint, caplog):
    """And no greedy text, which is said."""
    source, _ = checkpoint("sedd")
    model = model_of(source)
    asked = requests("loglikelihood", *PAIRS, ("a", ""))
    *found, empty = model.loglikelihood(asked, disable_tqdm=True)
    assert model.estimator.likelihood == "nelbo" and empty == (0.0, True)
    assert all(log_p < 0 and not is_greedy for log_p, is_greedy in found)
    assert "sedd has no greedy text" in caplog.text
    (text,) = model.generate_until(generations({"max_gen_toks": 5}), disable_tqdm=True)
    assert 0 < len(text) <= 5


def test_what_does_not_fit_is_cut_and_said_once(checkpoint, caplog):
    """The window of 32 tokens has room for 31 behind BOS."""
    source, model = checkpoint("bd3lm")
    adapter = HarnessModel(checkpoint=source, batch_size=3)
    long = "the old gardener waters the roses behind the mill"
    asked = [(long, " and"), (long[:9], long), (long, long), ("a", " b"), ("a", ""), ("", "")]
    found = adapter.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (context, continuation), (log_p, _) in list(zip(asked, found, strict=True))[:4]:
        tokens = encode(model.tokenizer, [context + continuation])[0][-(N - 1) :]
        expected, _ = by_hand(model, [model.bos_index, *tokens], min(len(continuation), N - 1))
        assert log_p == pytest.approx(expected, abs=1e-4)
    assert found[4:] == [(0.0, True)] * 2
    said = [record.getMessage() for record in caplog.records if "6 requests" in record.getMessage()]
    assert said == [
        "3 of 6 requests were longer than model.length=32 with BOS: their contexts were cut from "
        "the left (a_task: 3)",
        "2 of 6 requests had a continuation longer than model.length=32 with BOS: only the end of "
        "it was scored (a_task: 2)",
        "2 of 6 requests had a continuation without any token: log p is 0 (a_task: 2)",
    ]
    counted = {"truncated_contexts": 3, "truncated_continuations": 2, "empty_continuations": 2}
    assert counted.items() <= adapter.get_model_info().items()


def test_an_empty_text_has_no_window(checkpoint):
    source, _ = checkpoint("ar")
    asked = requests("loglikelihood_rolling", ("",), ("a",))
    empty, other = model_of(source).loglikelihood_rolling(asked, disable_tqdm=True)
    assert empty == 0 and other < 0


def test_answers_are_kept(checkpoint, tasks, tmp_path, monkeypatch):
    """`--use_cache`: a second run asks the network nothing."""
    source, _ = checkpoint("bd3lm")
    kept = ("--tasks", "small_choice,small_rolling,small_answer", f"checkpoint={source}",
            "--use_cache", str(tmp_path / "answers"))  # fmt: skip
    first, _ = evaluate(tmp_path / "first", tasks, *kept)
    monkeypatch.setattr(HarnessModel, "_answers", None)
    monkeypatch.setattr(HarnessModel, "_texts", None)
    second, _ = evaluate(tmp_path / "second", tasks, *kept)
    assert first["results"] == second["results"]


# --- texts ---------------------------------------------------------------------------------------


def generations(kwargs: dict, *contexts: str) -> list[Instance]:
    return requests("generate_until", *((context, kwargs) for context in contexts or ("a b",)))


def test_greedy_texts(checkpoint):
    """ar: the most probable token behind the context, again and again, up to a stop string."""
    source, model = checkpoint("ar")
    contexts = ("who is it", "a", "near the mill")
    said = model_of(source).generate_until(
        generations({"max_gen_toks": 8}, *contexts), disable_tqdm=True
    )
    for context, text in zip(contexts, said, strict=True):
        tokens = row(model, context)
        for _ in range(8):
            with torch.no_grad():
                log_p = model.denoiser(torch.tensor([tokens]), pattern=AttentionPattern.CAUSAL)
            tokens.append(log_p[0, -1].argmax().item())
        new = [*tokens[1 + len(context) :], model.eos_index]
        new = new[: new.index(model.eos_index)]
        assert text == model.tokenizer.decode(new, skip_special_tokens=True)
    number = max(range(3), key=lambda i: len(said[i]))
    stop = said[number][2:4]
    (cut,) = model_of(source).generate_until(
        generations({"max_gen_toks": 8, "until": [stop, ""]}, contexts[number]), disable_tqdm=True
    )
    assert cut == said[number].split(stop)[0]


def test_sampled_texts(checkpoint):
    """bd3lm: those of the project's sampler, in rows that do not depend on their batch."""
    source, model = checkpoint("bd3lm")
    contexts = ("who is it", "a", "near")
    asked = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_gen_toks": 9}
    said = model_of(source, seed=4).generate_until(
        generations(asked, *contexts), disable_tqdm=True
    )
    again = HarnessModel(checkpoint=source, seed=4).generate_until(  # one by one
        generations(asked, *contexts), disable_tqdm=True
    )
    assert said == again and len(set(said)) == 3
    by_length = sorted(contexts, key=len, reverse=True)
    options = SamplingOptions(
        temperature=0.8, nucleus_p=0.9, nucleus_rule="standard", min_entropy=None, stop_on_eos=True
    )
    for number, context in enumerate(by_length):
        tokens = row(model, context)
        canvas = torch.full((1, N), model.mask_index)
        canvas[0, : len(tokens)] = torch.tensor(tokens)
        output = model.generate(
            canvas, limits=torch.tensor([len(tokens) + 9]), options=options, seed=4,
            first_row=number,
        )  # fmt: skip
        new = output.tokens[0, len(tokens) : output.lengths[0]]
        expected = model.tokenizer.decode(new, skip_special_tokens=True)
        assert said[contexts.index(context)] == expected


def test_long_contexts_leave_room(checkpoint, caplog):
    source, model = checkpoint("ar")
    long = "the old gardener waters the roses behind the mill"
    kwargs = {"max_gen_toks": 10}
    said = model_of(source).generate_until(generations(kwargs, long, "a"), disable_tqdm=True)
    kept = model_of(source).generate_until(generations(kwargs, long[-21:]), disable_tqdm=True)
    assert said[0] == kept[0]
    message = (
        "1 of 2 requests left no room for max_gen_toks in model.length=32: their contexts were cut "
        "from the left (a_task: 1)"
    )
    assert [r.getMessage() for r in caplog.records if "left no room" in r.getMessage()] == [message]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_gen_toks": 32}, "max_gen_toks=32: allowed are 1 to 31, one less than model.length"),
        ({"num_beams": 3}, "--gen_kwargs num_beams=3: allowed are do_sample, max_gen_toks"),
        ({"do_sample": True, "temperature": -1}, "sampling.temperature=-1: allowed is a number"),
    ],
)
def test_generation_arguments_are_refused(kwargs, message, checkpoint):
    source, _ = checkpoint("bd3lm")
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(source).generate_until(generations(kwargs), disable_tqdm=True)


def test_neutral_generation_arguments(checkpoint):
    """Tasks of lm-eval ask for one beam; `top_k` 0 keeps every token, as in transformers."""
    source, _ = checkpoint("bd3lm")
    said = [
        model_of(source).generate_until(
            generations({"max_gen_toks": 4, **more}), disable_tqdm=True
        )
        for more in ({}, {"num_beams": 1, "top_k": 0, "do_sample": False, "temperature": 0.7})
    ]
    assert said[0] == said[1]


def test_a_task_without_a_length_leaves_half_of_the_row(checkpoint):
    source, _ = checkpoint("bd3lm")
    (text,) = model_of(source).generate_until(generations({}), disable_tqdm=True)
    assert 0 < len(text) <= N // 2


# --- checkpoints ---------------------------------------------------------------------------------


def test_weights_are_averaged_unless_asked(checkpoint):
    source, _ = checkpoint("ar")
    asked = requests("loglikelihood", *PAIRS)
    averaged, raw = (
        model_of(source, **keys).loglikelihood(asked, disable_tqdm=True)
        for keys in ({}, {"eval.disable_ema": True})
    )
    assert averaged != raw


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("lightning/ar_text8.ckpt", {}),
        ("lightning/bd3lm_text8_block_size4.ckpt", {}),
        ("lightning/mdlm_text8.ckpt", {"tokens_per_pass": 16}),
        ("lightning/sedd_text8.ckpt", {}),
        ("hub/bd3lm-block_size4", {"data.tokenizer_name_or_path": "bpe"}),
    ],
)
def test_sources(name, keys, shared, tmp_path):
    """The original's checkpoints, and directories in Hub format, say what their model is."""
    if "data.tokenizer_name_or_path" in keys:  # of 101 ids with the mask
        alphabet = text8_tokenizer()
        alphabet.add_tokens([f"x{i}" for i in range(101 - len(alphabet))])
        alphabet.save_pretrained(tmp_path / "bpe")
        keys = {"data.tokenizer_name_or_path": str(tmp_path / "bpe")}
    model = model_of(str(shared / "golden" / name), **keys)
    ((log_p, _),) = model.loglikelihood(requests("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert log_p < 0
    if "bd3lm" in name:
        assert model.model.block_size == 4


def test_a_bpe_is_in_its_checkpoint(compose, tmp_path):
    """Nothing but the checkpoint is named: neither text nor tokenizer."""
    name = "bpe-280"
    tokenizer = train_bpe(sentences(), vocab_size=280)
    config = compose(overrides(tmp_path, *ALGOS["bd3lm"], f"data.tokenizer_name_or_path={name}"))
    content = {
        "state_dict": Diffusion(config, tokenizer).state_dict(),
        "hyper_parameters": {"config": plain(config)},
        "tokenizer": tokenizer_record(tokenizer, name=name),
    }
    torch.save(content, tmp_path / "of bpe=1.ckpt")
    model = model_of(str(tmp_path / "of bpe=1.ckpt"))
    assert model.tok_encode("the gate") == encode(tokenizer, ["the gate"])[0]


def test_a_bare_file_needs_keys(checkpoint, tmp_path):
    """Tensors show sizes, but neither algorithm, blocks and length, nor a tokenizer."""
    _, model = checkpoint("bd3lm")
    path = str(tmp_path / "model.safetensors")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    keys = {"algo": "bd3lm", "block_size": 4, "model.length": N, TOKENIZER: "text8"}
    asked = requests("loglikelihood", *PAIRS)
    found = model_of(path, **keys).loglikelihood(asked, disable_tqdm=True)
    expected = [pair_by_hand(model, *pair)[0] for pair in PAIRS]
    assert [log_p for log_p, _ in found] == pytest.approx(expected, abs=1e-4)


def test_keys_of_the_user_win(checkpoint):
    source, _ = checkpoint("mdlm")
    assert model_of(source, **{"model.length": 64}).max_length == 64
    other = model_of(source, algo="bd3lm", block_size=N)
    assert other.model.block_size == N and other.losses.pattern is AttentionPattern.BLOCK_DIFFUSION


def test_half_precision(checkpoint):
    source, _ = checkpoint("bd3lm")
    asked = requests("loglikelihood", *PAIRS)
    whole, half = (
        model_of(source, **{"trainer.precision": precision}).loglikelihood(asked, disable_tqdm=True)
        for precision in ("32", "bf16")
    )
    assert whole != half
    assert [log_p for log_p, _ in half] == pytest.approx([log_p for log_p, _ in whole], rel=0.02)


def test_large_blocks_have_bounds(checkpoint, caplog):
    """What takes the place of sums over subsets is named, here and in the file of results."""
    source, _ = checkpoint("mdlm")
    model = HarnessModel(checkpoint=source, likelihood="any_order", num_orders=2)
    assert model.get_model_info()["estimator"] == "any_order_bound"
    assert "the largest block whose subsets are summed is 10" in caplog.text


# --- the command ---------------------------------------------------------------------------------


def test_arguments():
    """`key=value` is the model's, unless an argument before it takes such pairs."""
    found = harness.lm_eval_arguments(
        ["--tasks", "piqa", "arc_easy", "checkpoint=a=b", "likelihood=nelbo", "--limit", "3",
         "model.length=64", "--gen_kwargs", "temperature=1"]
    )  # fmt: skip
    *rest, option, keys = found
    assert rest == ["run", "--model", "bd3lm", "--tasks", "piqa", "arc_easy", "--limit", "3",
                    "--gen_kwargs", "temperature=1"]  # fmt: skip
    assert option == "--model_args"
    assert json.loads(keys) == {"pretrained": "a=b", "likelihood": "nelbo", "model.length": "64"}
    assert harness.lm_eval_arguments(["ls", "tasks"]) == ["ls", "tasks"]
    other = ["run", "--model=hf", "--model_args", "pretrained=x", "--tasks", "piqa"]
    assert harness.lm_eval_arguments(other) == other


BAD = {
    "no checkpoint": ([], "checkpoint=...: allowed is what eval.checkpoint_path takes"),
    "nothing there": (["checkpoint=nowhere.ckpt"], "nowhere.ckpt: there is no such checkpoint"),
    "estimator": (["checkpoint={bd3lm}", "likelihood=guess"], "eval.likelihood=guess: allowed are"),
    "sedd": (["checkpoint={sedd}", "likelihood=left_to_right"], "eval.likelihood=left_to_right: "),
    "key": (["checkpoint={bd3lm}", "modle.length=3"], "modle"),
    "block size": (["checkpoint={bd3lm}", "block_size=8"], "block_size=8: allowed with"),
    "batch": (["checkpoint={bd3lm}", "--batch_size", "auto"], "--batch_size auto: allowed is an i"),
    "template": (["checkpoint={bd3lm}", "--apply_chat_template"], "--apply_chat_template: bd3lm"),
    "task": (["checkpoint={bd3lm}", "--tasks", "no_such_task"], "Tasks not found: no_such_task"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name, checkpoint, tasks, tmp_path):
    arguments, message = BAD[name]
    paths = {algo: checkpoint(algo)[0] for algo in ("bd3lm", "sedd")}
    with pytest.raises(SystemExit) as stopped:
        evaluate(tmp_path / "out", tasks, *(a.format(**paths) for a in arguments))
    assert message in stopped.value.code and "\n" not in stopped.value.code


def test_a_vocabulary_that_does_not_fit(shared, tasks, tmp_path, monkeypatch):
    """A directory without a tokenizer is taken for one of GPT-2's, and the error says the key."""
    key = f"data.tokenizer_name_or_path={shared}/data/tokenizers/gpt2"
    with pytest.raises(SystemExit) as stopped:
        evaluate(tmp_path, tasks, f"checkpoint={shared}/golden/hub/mdlm", key)
    assert f"{key}: its 50258 ids" in stopped.value.code


COMMANDS = [line for name in ("README.md", "docs/harness.md") for line in page(name).lines_of_code
            if line.startswith("python -m scripts.harness --")]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages(command, compose):
    """lm-eval takes their arguments, and the configuration their keys."""
    arguments = harness.lm_eval_arguments(shlex.split(command)[3:])
    parser = HarnessCLI()
    sys.argv = ["lm_eval", *arguments]
    found = parser.parse_args()
    assert found.model == "bd3lm" and found.tasks and "pretrained" in found.model_args
    compose([f"{SHORT.get(key, key)}={value}" for key, value in found.model_args.items()])


def test_what_a_file_says_is_no_reference():
    """A tokenizer called `${oc.env:HOME}` would have told the Hub what is in the environment."""
    weights = Weights("x", {}, run_config={"data": {"tokenizer_name_or_path": "${oc.env:HOME}"}})
    assert described_keys(weights) == {"eval.checkpoint_path": "x"}


def test_keys_need_tasks_to_run():
    with pytest.raises(SystemExit, match="checkpoint=...: allowed is key=value with tasks to run"):
        harness.main(["ls", "tasks", "checkpoint=x"])


def test_without_lm_eval(monkeypatch):
    """Everything else works without; this command says what to install."""
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="missing: pip install -r requirements-eval.txt"):
        harness.main(["--tasks", "piqa", "checkpoint=x"])


def test_help(capsys):
    harness.main([])
    assert "checkpoint=SOURCE" in capsys.readouterr().out
