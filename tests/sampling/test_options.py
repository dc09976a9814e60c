"""Options that suit a model."""

from sampling.options import SamplingOptions, suit_vocabulary


def test_the_entropy_rule_is_off_for_small_vocabularies(caplog):
    """Entropy below 4 nats rejected every sample of a vocabulary under 55 tokens."""
    options = SamplingOptions(min_entropy=4.0)
    assert suit_vocabulary(options, vocab_size=50_258) is options
    assert suit_vocabulary(options, vocab_size=260).min_entropy is None
    assert "sampling.min_entropy=4.0 is off" in caplog.text
