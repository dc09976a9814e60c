"""Detokenizers: the recorded pairs, and the rule sets for which none were recorded."""

import json
import pickle
from pathlib import Path

import pytest

from corpora import detokenizers

RECORDED = {
    "wt": detokenizers.wikitext,
    "lm1b": detokenizers.lm1b,
    "lambada": detokenizers.lambada,
}


@pytest.mark.parametrize("name", RECORDED)
def test_equals_recorded_pairs(shared: Path, name: str):
    pairs = json.loads((shared / "golden/detokenizers.json").read_text())[name]
    assert [RECORDED[name](text) for text, _ in pairs] == [expected for _, expected in pairs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pierre vinken N years old", "pierre vinken 1 years old"),
        ("rose N N N N percent", "rose 1 1 1 1 percent"),
        ("the company 's $ N million", "the company's $1 million"),
        ("they did n't say", "they didn't say"),
        ("the <unk> of the banks ' assets", "the ? of the banks' assets"),
        ("1\\/2 a share", "1/2 a share"),
    ],
)
def test_ptb(text: str, expected: str):
    assert detokenizers.ptb(text) == expected


def test_scientific_papers_apply_both_rule_sets():
    text = "we study graphs ( see [ 1 ] ) , which cost $ 5 .\n they 're large"
    expected = "we study graphs (see [1]), which cost $5 .\nthey're large"
    assert detokenizers.scientific_papers(text) == expected


@pytest.mark.parametrize("detokenize", [*RECORDED.values(), detokenizers.ptb])
def test_can_be_sent_to_another_process(detokenize: detokenizers.Detokenizer):
    text = 'It \'s " fine " , really .'
    assert pickle.loads(pickle.dumps(detokenize))(text) == detokenize(text)
