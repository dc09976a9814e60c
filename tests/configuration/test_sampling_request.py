"""The section `sampling`: defaults, what is refused, and the rows that it asks for."""

import pytest

from configuration.sampling_request import sampling_request
from corpora.tokenization import load_tokenizer
from sampling.options import SamplingOptions
from sampling.stopping import ENTROPY_WINDOW
from tests.helpers.small_run import overrides


def test_defaults_are_the_papers_procedure(compose):
    """Every control is off, from the command line as from Python."""
    options = sampling_request(compose(["mode=sample_eval"])).options
    assert options == SamplingOptions()
    assert options.first_hitting and options.tokens_per_step == 1 and options.temperature == 1
    assert (options.nucleus_p, options.nucleus_rule) == (1.0, "paper")
    assert (options.min_entropy, ENTROPY_WINDOW) == (4.0, 256)
    controls = ("top_k", "confidence_threshold", "infill_particles", "stop_strings", "decode",
                "kv_cache", "var_length", "stop_on_eos")  # fmt: skip
    assert not any(getattr(options, name) for name in controls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sampling.confidence_threshold=0", "sampling.confidence_threshold=0: allowed is null"),
        ("sampling.nucleus_rule=none", "sampling.nucleus_rule=none: allowed is paper and standard"),
        ("sampling.confidence_threshold=1.5", "sampling.confidence_threshold=1.5: allowed is"),
        ("sampling.confidence_threshold=high", "sampling.confidence_threshold=high: allowed is"),
        ("sampling.tokens_per_step=0", "sampling.tokens_per_step=0: allowed is an integer"),
        ("sampling.tokens_per_step=1.5", "sampling.tokens_per_step=1.5: allowed is an integer"),
        ("sampling.temperature=-1", "sampling.temperature=-1: allowed is a number"),
        ("sampling.temperature=hot", "sampling.temperature=hot: allowed is a number"),
        ("sampling.top_k=0", "sampling.top_k=0: allowed is null and an integer"),
        ("sampling.top_k=some", "sampling.top_k=some: allowed is null and an integer"),
        ("sampling.min_entropy=true", "sampling.min_entropy=True: allowed is null and a number"),
        ("sampling.stop_strings=null", "sampling.stop_strings=None: allowed is a list of texts"),
        ("sampling.stop_strings=end", "sampling.stop_strings=end: allowed is a list of texts"),
        ("sampling.stop_strings=['']", "allowed is a list of texts that are not empty"),
        ("sampling.infill_particles=4", "sampling.infill_particles=4: allowed without"),
        ("sampling.infill_particles=0", "sampling.infill_particles=0: allowed"),
    ],
)
def test_impossible_options_name_key_value_and_what_is_allowed(change, message, compose):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        sampling_request(compose(["mode=sample_eval", change]))


def test_blank_rows_follow_max_new_tokens(compose, tmp_path):
    config = compose(overrides(tmp_path, "mode=sample_eval", "sampling.max_new_tokens=9"))
    rows = sampling_request(config).canvas_rows(load_tokenizer("bytes"), mask_index=259)
    assert {row.limit for row in rows} == {10} and len(rows) == config.loader.eval_batch_size


def test_what_the_command_line_says_in_stop_strings(compose):
    """A newline is typed as one, `$'...'` in bash; a byte that is no UTF-8 is U+FFFD, which is
    what a text has in its place."""
    typed = 'sampling.stop_strings=["\n\n", "a \udcff"]'
    options = sampling_request(compose(["mode=sample_eval", typed])).options
    assert options.stop_strings == ("\n\n", "a \ufffd")


def test_special_tokens_in_prompts_are_text(compose, tmp_path, bert):
    """With BERT a prompt could say [SEP], and the model saw the end of a text."""
    (tmp_path / "p.txt").write_text("a [SEP] b [MASK]")
    config = compose(overrides(tmp_path, "mode=sample_eval", f"sampling.prompts={tmp_path}/p.txt"))
    (row,) = sampling_request(config).canvas_rows(bert, mask_index=103)
    assert bert.decode(row.tokens) == "[CLS] a [ sep ] b [ mask ]"
    assert not {102, 103} & set(row.tokens)
