"""The sections `data` and `loader` as a request: every key is in it, and flags have defaults."""

import dataclasses

import pytest

from configuration.data_request import DataRequest, data_request


@pytest.mark.parametrize("name", ["openwebtext-split", "text8", "lm1b-wrap", "python_docs"])
def test_every_key_is_in_the_request(name, compose):
    """A key that a section gets later is not silently left out."""
    config = compose([f"data={name}"])
    fields = {field.name for field in dataclasses.fields(DataRequest)}
    # The share of a device follows from it, which is what loaders take.
    keys = {*config.data.keys(), *config.loader.keys()} - {"eval_global_batch_size"}
    assert keys <= fields
    elsewhere = {"length", "seed", "repeats_epoch"}
    assert fields - keys - elsewhere <= {f for f in fields if f.startswith("insert_")}
    request = data_request(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.wrap = False


def test_special_tokens_as_the_set_or_the_user_says(compose):
    """Running text has none, documents have; `+` adds the keys."""
    for name, expected in (("text8", False), ("wikitext2", True), ("openwebtext-split", True)):
        request = data_request(compose([f"data={name}"]))
        for role in ("train", "valid"):
            assert request.insert_eos(role) is request.insert_special(role) is expected
    changed = data_request(compose(["data=text8", "+data.insert_valid_eos=true"]))
    assert changed.insert_eos("valid") and not changed.insert_eos("train")
