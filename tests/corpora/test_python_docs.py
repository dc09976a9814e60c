"""The corpus that ships with Python."""

from collections.abc import Callable

from omegaconf import DictConfig

from configuration.data_request import data_request
from corpora import python_docs
from dataloader import get_dataloaders, get_tokenizer


def test_documents_are_plenty_readable_and_split():
    train, valid = python_docs.documents("train"), python_docs.documents("validation")
    characters = sum(map(len, train)), sum(map(len, valid))
    assert characters[0] > 1_000_000
    assert 0.02 < characters[1] / sum(characters) < 0.10
    assert not set(train) & set(valid)
    assert all(text == text.strip() and "\t\n" not in text and " \n" not in text for text in train)
    assert train == python_docs.documents("train")


def test_docstrings_come_in_source_order_without_running_the_module(tmp_path):
    source = '''
"""What the module is about, in a sentence that is long enough."""
raise RuntimeError("imported!")

class A:
    """A class of its own, described
    in two lines:

        and an example
    """

    def method(self):
        """A method that does something worth a whole sentence."""

def f():
    """short"""
'''
    (tmp_path / "module.py").write_text(source)
    assert python_docs._module_text(tmp_path / "module.py") == (
        "What the module is about, in a sentence that is long enough.\n\n"
        "A class of its own, described\nin two lines:\n\n    and an example\n\n"
        "A method that does something worth a whole sentence."
    )
    (tmp_path / "module.py").write_text("def broken(:")
    assert python_docs._module_text(tmp_path / "module.py") == ""


def test_loads_without_network_or_download(data_config: Callable[..., DictConfig]):
    config = data_config("data=python_docs", "model.length=128")
    tokenizer = get_tokenizer(data_request(config))
    train, valid = get_dataloaders(data_request(config), tokenizer)
    assert len(tokenizer) == 1024
    assert len(train.dataset) > 3_000 and len(valid.dataset) > 100
