"""Scoring of samples: equal to a plain reading of the rule, for any scorer and any batch size."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

from corpora.tokenization import byte_tokenizer
from evaluation import generative_perplexity
from evaluation.generative_perplexity import (
    GenerativePerplexity,
    SampleScore,
    ScorerUnavailableError,
    sliding_windows,
)
from evaluation.metrics import token_entropy

CONTEXT = 16
TEXTS = ["a text of several windows, and then some", "short", "", "x", "aaaaaaaa", "the last one"]
# Sizes of random scorers; llama has no pad token, OPT derives positions from the mask.
SCORERS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "llama": {"pad_token_id": None},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": None},
    "gpt_neox": {"rotary_pct": 1.0},
    "mamba": {"state_size": 4, "num_hidden_layers": 1},
}
COMMON = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def random_model(model_type: str) -> transformers.PreTrainedModel:
    """A random causal LM over bytes whose predictions are far from uniform."""
    tokenizer = byte_tokenizer()
    sizes = SCORERS.get(model_type, {}) if model_type == "gpt2" else COMMON | SCORERS[model_type]
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1.0)
    return model


@pytest.fixture(scope="module")
def gpt2() -> GenerativePerplexity:
    return GenerativePerplexity(random_model("gpt2"), byte_tokenizer())


def plain_score(scorer: GenerativePerplexity, text: str, *, max_length: int) -> SampleScore:
    """Token by token, one forward pass each: the rule as the contract words it."""
    ids = torch.tensor(scorer.tokenizer(text)["input_ids"][:max_length], dtype=torch.int64)
    size, nlls = scorer.window, []
    for position in range(1, len(ids)):
        if ids[position] == scorer.tokenizer.eos_token_id:
            continue
        start = 0
        while start + size <= position:  # the first window that holds the token
            start += size // 2
        with torch.no_grad():
            logits = scorer.model(ids[None, start:position]).logits[0, -1]
        nlls.append(-logits.double().log_softmax(-1)[ids[position]].item())
    nll = sum(nlls) / len(nlls) if nlls else math.nan
    return SampleScore(
        nll=nll, gen_ppl=math.exp(nll), entropy=token_entropy(ids), num_tokens=len(nlls)
    )


def assert_scores_equal(found: list[SampleScore], expected: list[SampleScore]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        # Some of these texts are nearly certain: what is left of a loss is float32's rounding.
        assert vars(a) == pytest.approx(vars(b), rel=1e-5, abs=1e-6, nan_ok=True)


def test_windows_count_every_token_but_the_first_once():
    """For all lengths; and what is counted late has at least half a window before it."""
    for length in range(60):
        counted = []
        for window in sliding_windows(length, size=16, stride=8):
            assert window.end - window.start <= 16 and window.end <= length
            assert window.first_counted >= window.start + (8 if window.start else 1)
            counted += range(window.first_counted, window.end)
        assert counted == list(range(1, length))
    assert len(sliding_windows(1024, size=1024, stride=512)) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_equal_to_the_rule_token_by_token(gpt2, batch_size):
    for max_length in (7, 24, 64):
        found = gpt2.score(TEXTS, max_length=max_length, batch_size=batch_size)
        assert_scores_equal(found, [plain_score(gpt2, t, max_length=max_length) for t in TEXTS])


@pytest.mark.parametrize("model_type", SCORERS)
def test_any_causal_model(model_type):
    """The original crashed with llama, and a scorer without a pad token could not have batches.

    Pads must not reach what is scored, by attention, by position or by a recurrent state.
    """
    scorer = GenerativePerplexity(random_model(model_type), byte_tokenizer())
    expected = [plain_score(scorer, text, max_length=40) for text in TEXTS]
    assert_scores_equal(scorer.score(TEXTS, max_length=40, batch_size=1), expected)
    assert_scores_equal(scorer.score(TEXTS, max_length=40, batch_size=4), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_to_the_original(shared, batch_size):
    entries = json.loads((shared / "golden/gen_ppl.json").read_text())[:3]
    scorer = GenerativePerplexity.load(
        str(shared / "golden/tiny-gpt2"),
        device="cpu",
        tokenizer_name_or_path=str(shared / "data/tokenizers/gpt2"),
    )
    assert (scorer.window, scorer.stride) == (1024, 512)
    texts = [entry["text"] for entry in entries]
    scores = scorer.score(texts, max_length=1024, batch_size=batch_size)
    for score, entry in zip(scores, entries, strict=True):
        assert score.gen_ppl == pytest.approx(entry["gen_ppl"], rel=1e-4)
        assert score.entropy == pytest.approx(entry["entropy"], rel=1e-4)
        assert score.num_tokens == entry["gen_length"]


def test_entropy_belongs_to_a_sample_not_to_its_batch(gpt2):
    """With more than one sample per batch the original counted each entropy several times."""
    alone = gpt2.score(["abcd"], max_length=64, batch_size=4)[0]
    beside = gpt2.score(["abcd", "wxyzwxyz", "abcd"], max_length=64, batch_size=4)
    assert alone.entropy == pytest.approx(math.log(4))
    assert [score.entropy for score in beside] == pytest.approx([math.log(4)] * 3)


def test_eos_is_context_but_does_not_count(gpt2):
    ids = gpt2.tokenizer("ab")["input_ids"]
    eos = gpt2.tokenizer.eos_token_id
    tokens = [ids[0], eos, ids[1], eos, eos]
    tokenizer = FixedTokenizer(tokens, like=gpt2.tokenizer)
    (score,) = GenerativePerplexity(gpt2.model, tokenizer).score(
        ["any"], max_length=64, batch_size=1
    )
    with torch.no_grad():
        logits = gpt2.model(torch.tensor([tokens])).logits[0, 1]
    assert score.num_tokens == 1
    assert score.nll == pytest.approx(-logits.log_softmax(-1)[ids[1]].item(), rel=1e-5)
    assert score.entropy == pytest.approx(token_entropy(torch.tensor(tokens)))


class FixedTokenizer:
    """Stands for a tokenizer that makes the same tokens of any text and maybe adds BOS."""

    def __init__(self, tokens, *, like, adds_bos=False, eos_token_id=-2):
        self.tokens, self.adds_bos = tokens, adds_bos
        self.bos_token_id = like.bos_token_id
        self.eos_token_id = like.eos_token_id if eos_token_id == -2 else eos_token_id

    def __call__(self, text, add_special_tokens=True, verbose=True):
        prefix = [self.bos_token_id] if self.adds_bos and add_special_tokens else []
        return {"input_ids": prefix + (self.tokens if text else [])}


def test_bos_of_the_tokenizer_is_context_and_no_part_of_the_text(gpt2):
    """Llama's tokenizer puts BOS before a text: its first token then has a prediction."""
    tokenizer = FixedTokenizer([10, 11, 12], like=gpt2.tokenizer, adds_bos=True)
    scorer = GenerativePerplexity(gpt2.model, tokenizer)
    (score,) = scorer.score(["any"], max_length=64, batch_size=1)
    assert score.num_tokens == 3
    assert score.entropy == pytest.approx(math.log(3)), "BOS is not in the histogram"
    (short,) = scorer.score(["any"], max_length=3, batch_size=1)
    assert short.num_tokens == 2, "and it is part of the truncated length"


def test_a_scorer_without_eos_counts_all(gpt2):
    tokenizer = FixedTokenizer([10, 11, 3], like=gpt2.tokenizer, eos_token_id=None)
    scorer = GenerativePerplexity(gpt2.model, tokenizer)
    assert scorer.score(["any"], max_length=64, batch_size=1)[0].num_tokens == 2


def test_precision_is_the_scorers_own(gpt2):
    """Samples may be drawn in bf16 and TF32; their score is float32 all the same."""
    expected = gpt2.score(TEXTS, max_length=40, batch_size=2)
    seen = set()
    hook = gpt2.model.register_forward_pre_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gpt2.score(TEXTS, max_length=40, batch_size=2)
        assert torch.get_float32_matmul_precision() == "medium", "it is put back"
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert seen == {"highest"}
    assert_scores_equal(found, expected)


def test_an_impossible_text_has_infinite_perplexity():
    assert generative_perplexity.sample_score(2000.0, 2, torch.tensor([1, 2])).gen_ppl == math.inf


@pytest.mark.parametrize("sizes", [{"max_length": 0}, {"batch_size": 0}])
def test_sizes_are_positive(gpt2, sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        gpt2.score(["a"], **{"max_length": 4, "batch_size": 1} | sizes)


def test_a_tokenizer_of_another_model(gpt2):
    """On a GPU an id past the vocabulary ends the process without saying why."""
    tokenizer = FixedTokenizer([10, 9999], like=gpt2.tokenizer)
    with pytest.raises(ValueError, match="9999.*260"):
        GenerativePerplexity(gpt2.model, tokenizer).score(["a"], max_length=4, batch_size=1)


@pytest.fixture
def directory(gpt2, tmp_path):
    """A scorer in Hub format."""
    gpt2.model.save_pretrained(tmp_path / "scorer")
    gpt2.tokenizer.save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


def test_loaded_from_a_directory(gpt2, directory):
    loaded = GenerativePerplexity.load(str(directory), device="cpu")
    scores = loaded.score(TEXTS, max_length=40, batch_size=4)
    assert_scores_equal(scores, gpt2.score(TEXTS, max_length=40, batch_size=1))


def test_weights_are_float32_whatever_the_file_holds(gpt2, directory):
    """transformers 5 keeps the precision of the file; published numbers are float32."""
    random_model("gpt2").bfloat16().save_pretrained(directory)
    loaded = GenerativePerplexity.load(str(directory), device="cpu")
    assert loaded.model.dtype == torch.float32
    loaded = GenerativePerplexity.load(str(directory), device="cpu", dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16


def assert_refused(name: str, cause: str) -> None:
    with pytest.raises(ScorerUnavailableError, match=cause) as caught:
        GenerativePerplexity.load(name, device="cpu")
    said = str(caught.value)
    assert repr(name) in said and "local directory" in said and "null to skip" in said
    assert isinstance(caught.value, OSError)


def test_a_directory_that_is_not_there(tmp_path):
    assert_refused(str(tmp_path / "nothing"), "no such directory")


def test_the_hub_out_of_reach(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    assert_refused("gpt2-large", "couldn't connect")


def test_missing_weights_are_not_made_up(directory):
    """transformers fills them with random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert_refused(str(directory), r"lack the weights .*h\.1\.mlp\.c_fc\.weight")


@pytest.mark.parametrize("content", [b"torn", b""])
def test_a_torn_file(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    assert_refused(str(directory), "Cause: ")


def test_an_encoder_is_no_scorer(tmp_path):
    """BERT loads as a causal LM but sees the token it predicts: its perplexity means nothing."""
    tokenizer = byte_tokenizer()
    config = transformers.BertConfig(vocab_size=len(tokenizer), **COMMON)
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert_refused(str(tmp_path), "not causal")


def test_code_beside_a_model_is_not_run(directory, tmp_path):
    """`trust_remote_code` let a model directory run anything."""
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "never_heard_of"
    config["auto_map"] = {"AutoConfig": "bad.Bad", "AutoModelForCausalLM": "bad.Bad"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "bad.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Bad: pass\n")
    assert_refused(str(directory), "trust_remote_code|custom code")
    assert not (tmp_path / "ran").exists()


def test_half_an_emoji_is_scored_as_the_replacement_character(gpt2):
    """JSON can spell it, and no tokenizer takes it."""
    half, replaced = gpt2.score(["a\ud83db", "a\ufffdb"], max_length=9, batch_size=2)
    # To rounding: rows of a batch are not added up in the same order on every CPU.
    assert dataclasses.astuple(half) == pytest.approx(dataclasses.astuple(replaced))
