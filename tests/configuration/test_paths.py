"""Paths and names of the configuration, as seen from where the command was typed."""

from configuration.paths import with_absolute_paths


def test_relative_paths_are_seen_from_the_launch_directory(compose, tmp_path):
    """A run changes into its own directory; what the user typed is relative to where it began.

    The original looked for last.ckpt in the fresh run directory, and so never resumed.
    """
    (tmp_path / "tokenizer").mkdir()
    config = compose([
        "data=local",
        "data.train_path=text/*.txt",
        "data.valid_path=/abs/valid.txt",
        "data.tokenizer_name_or_path=tokenizer",
        "checkpointing.save_dir=kept",
        "eval.results_path=out.json",
        "training.from_pretrained=kuleshov-group/mdlm-owt",
        "eval.gen_ppl_eval_model_name_or_path=gpt2-large",
    ])  # fmt: skip
    config = with_absolute_paths(config, launch_dir=str(tmp_path))
    assert config.data.train_path == f"{tmp_path}/text/*.txt"
    assert config.data.valid_path == "/abs/valid.txt"
    assert config.data.tokenizer_name_or_path == f"{tmp_path}/tokenizer"
    assert config.eval.results_path == f"{tmp_path}/out.json"
    assert config.checkpointing.resume_ckpt_path == f"{tmp_path}/kept/checkpoints/last.ckpt"
    assert config.callbacks.checkpoint_monitor.dirpath == f"{tmp_path}/kept/checkpoints"
    assert config.training.from_pretrained == "kuleshov-group/mdlm-owt", "not a path: no such file"
    assert config.eval.gen_ppl_eval_model_name_or_path == "gpt2-large"


def test_urls_and_the_home_directory(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = compose(
        ["data=local", "data.train_path=s3://bucket/x.txt", "data.valid_path='~/v.txt'"]
    )
    config = with_absolute_paths(config, launch_dir=str(tmp_path))
    assert config.data.train_path == "s3://bucket/x.txt"
    assert config.data.valid_path == "/home/someone/v.txt"
