"""Which checkpoint a training goes on from, and what is said where there is none."""

import pytest

import main
from configuration.paths import with_absolute_paths
from modes.train import checkpoint_to_resume
from tests.helpers.small_run import overrides, write_text


def test_a_missing_checkpoint_to_resume_is_an_error_if_it_was_named(compose, tmp_path):
    """The default place may be empty (a first run); a path the user typed may not."""

    def find(*changes: str):
        config = compose(overrides(tmp_path, *changes))
        return checkpoint_to_resume(with_absolute_paths(config, launch_dir=str(tmp_path)))

    assert find("checkpointing.save_dir=kept") is None
    assert find("checkpointing.resume_ckpt_path=null") is None
    with pytest.raises(FileNotFoundError, match="checkpointing.resume_ckpt_path=.*/typo.ckpt"):
        find("checkpointing.resume_ckpt_path=typo.ckpt")


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_resuming_from_no_checkpoint(content, compose, tmp_path, monkeypatch):
    write_text(tmp_path)
    (tmp_path / "bad.ckpt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    config = compose(overrides(tmp_path, "checkpointing.resume_ckpt_path=bad.ckpt"))
    with pytest.raises(ValueError, match="bad.ckpt: not a checkpoint that can be read safely"):
        main.run(config, launch_dir=str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
