"""Two sets of texts, made equal in number and length."""

import pytest

from corpora.tokenization import byte_tokenizer
from evaluation.fair_sides import Sides, fair_sides

TOKENIZER = byte_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def sides(samples: list[str], reference: list[str], **changes) -> Sides:
    return fair_sides(
        samples, reference, **{"tokenizer": TOKENIZER, "keeps_special": True} | changes
    )


def test_equal_numbers_and_lengths():
    """The longest text of the shorter side sets the length."""
    made = sides(["abcdef", "abc", "x"], ["0123", "45", "6789", "01", "2345"])
    assert sorted(made.texts(made.samples)) == ["abc", "abcd", "x"]
    assert len(made.reference) == 3 and made.length == 4
    assert made.second == []  # five texts are not twice three
    assert "3 texts on each side, of 3 samples and 5 of the reference" in made.notes[0]


def test_the_second_set_holds_other_texts():
    """What MAUVE of the reference itself compares has no text twice."""
    reference = [f"{i:03}" for i in range(40)]
    made = sides(["abc"] * 20, reference)
    both = made.texts(made.reference) + made.texts(made.second)
    assert sorted(both) == reference and both != reference
    assert sides(["abc"] * 20, reference).reference == made.reference  # the same every time


def test_fewer_texts_where_they_are_enough():
    """From anywhere: neighbours are on one subject, on which entropies depend."""
    texts = [f"{i:03}" for i in range(200)]
    made = sides(texts, texts, num=5)
    assert [len(made.samples), len(made.reference), len(made.second)] == [5, 5, 5]
    assert max(map(int, made.texts(made.samples))) - min(map(int, made.texts(made.samples))) > 50


def test_exact_lengths():
    """What is shorter is left out, what is longer cut."""
    made = sides(["abcdef", "abc", "xyz1"], ["0123", "45", "67890"], exact=4)
    assert sorted(made.texts(made.samples)) == ["abcd", "xyz1"]
    assert sorted(made.texts(made.reference)) == ["0123", "6789"]
    with pytest.raises(ValueError, match="REFERENCE: none of its 1 texts has --length=4 tokens"):
        sides(["abcd"], ["abc"], exact=4)


def test_special_tokens():
    """What spells one is one token, and texts without any are not compared with texts that have."""
    sample = "[BOS]ab[EOS]cd"
    kept = sides([sample], [sample])
    assert kept.samples == [[BOS, 97, 98, EOS, 99, 100]] and kept.texts(kept.samples) == [sample]
    dropped = sides([sample], ["abcd"], keeps_special=False)
    assert dropped.samples == dropped.reference == [[97, 98, 99, 100]]


def test_a_cut_leaves_no_half_of_a_character():
    made = sides(["ab\u20ac"], ["wxyz"])  # the euro sign is three bytes
    assert len(made.samples[0]) == 4 and made.texts(made.samples) == ["ab"]


def test_unequal_lengths_are_said():
    """No cut makes short texts long."""
    texts = {True: ["a" * 10] * 4, False: ["b" * 4] * 3 + ["b" * 10]}
    (note,) = sides(texts[True], texts[False]).notes[2:]
    assert "samples have 10 tokens in the mean and the reference 6" in note
    assert sides(texts[True], texts[True]).notes[2:] == []


def test_a_side_without_text():
    with pytest.raises(ValueError, match="SAMPLES: none of its 2 texts has a token"):
        sides(["", ""], ["a"])
