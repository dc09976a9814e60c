"""Directories in Hub format, `config.json` and `model.safetensors`, and their download.

Other files of a Hub repository, its code above all, are neither fetched nor read.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils import file_exists, partial_name

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What is known of the tokenizer, see `corpora.tokenizer_record`; other projects' lack it.
TOKENIZER = "tokenizer_record.json"
HUB_FILES = (CONFIG, TENSORS)
_DOWNLOADED = (CONFIG, INDEX, TOKENIZER, "*.safetensors")


def looks_like_hub_id(source: str) -> bool:
    """Whether this may be `owner/name` or `owner/name@revision`."""
    repository = source.partition("@")[0]
    return repository.count("/") == 1 and not source.startswith((".", "/", "~"))


def download(hub_id: str) -> str:
    """The directory of a Hub repository's files on this machine, fetched where they are not.

    Args:
        hub_id: `owner/name`, or `owner/name@revision` with a branch, tag or commit.

    Raises:
        FileNotFoundError: says which files to put where if the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=_DOWNLOADED)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id}: no such file here, and the Hub cannot be reached for it "
            f"({type(error).__name__}). Put its {' and '.join(HUB_FILES)} into a directory and "
            "give that directory instead; they are at "
            f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
        ) from error


def read_hub_directory(directory: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of config.json, and the tensors of one or several files.

    Raises:
        FileNotFoundError: names the file that is missing.
        ValueError: names the file that is damaged.
    """
    if not file_exists(f"{directory}/{CONFIG}"):
        raise FileNotFoundError(f"{directory}: a Hub-format directory needs {CONFIG}")
    config = read_json(f"{directory}/{CONFIG}")
    if file_exists(f"{directory}/{INDEX}"):
        return config, _read_shards(directory)
    if not file_exists(f"{directory}/{TENSORS}"):
        raise FileNotFoundError(
            f"{directory}: a Hub-format directory needs {TENSORS}, or {INDEX} and the files that "
            "it names"
        )
    return config, read_safetensors(f"{directory}/{TENSORS}")


def _read_shards(directory: str) -> dict[str, Tensor]:
    places = read_json(f"{directory}/{INDEX}").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{directory}/{INDEX}: has no weight_map")
    shards = sorted(set(map(str, places.values())))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{directory}/{INDEX}: {shard!r} is no name of a .safetensors file")
    missing = [shard for shard in shards if not file_exists(f"{directory}/{shard}")]
    if missing:
        raise FileNotFoundError(
            f"{directory}: {len(missing)} of {len(shards)} files that {INDEX} names are not here "
            f"(a download that was interrupted?): {', '.join(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_safetensors(f"{directory}/{shard}")
    absent = [name for name in places if name not in tensors]
    if absent:
        raise ValueError(
            f"{directory}: {INDEX} lists tensors that {places[absent[0]]} does not hold: "
            f"{', '.join(absent[:5])}"
        )
    return tensors


def read_json(path: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: names the file.
    """
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def read_safetensors(path: str) -> dict[str, Tensor]:
    """All tensors of a file; a local one is mapped into memory.

    Raises:
        ValueError: names the file; its header is checked against its length.
    """
    fs, name = fsspec.core.url_to_fs(path)
    try:
        if isinstance(fs, LocalFileSystem):
            return safetensors.torch.load_file(name)
        return safetensors.torch.load(fs.cat_file(name))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def read_safetensors_metadata(path: str, key: str) -> dict[str, Any] | None:
    """What `write_safetensors` left in a local file: its `config` or `tokenizer`; None without."""
    fs, name = fsspec.core.url_to_fs(path)
    if not isinstance(fs, LocalFileSystem):
        return None
    try:
        with safe_open(name, "pt") as file:
            content = json.loads((file.metadata() or {}).get(key, "null"))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    except ValueError:  # metadata of somebody else
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an error.

    Raises:
        OSError: names the file; what was there before is unchanged.
    """
    partial = Path(partial_name(str(path.with_name(f".{path.name}"))))
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner reads
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # full disks raise each of these
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    hub_config: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
) -> None:
    """A .safetensors file, whole or not at all, with the descriptions in its metadata."""
    metadata = {"format": "pt", "config": _json(hub_config)}
    if tokenizer is not None:
        metadata["tokenizer"] = _json(tokenizer)
    with replacing(path) as partial:
        safetensors.torch.save_file(_separate(tensors), partial, metadata=metadata)


def write_hub_directory(
    directory: Path | str, state_dict: Mapping[str, Tensor], hub_config: Mapping[str, Any]
) -> None:
    """Write config.json and model.safetensors; both are complete before either takes its place.

    Args:
        directory: made where it does not exist; its other files stay.
        state_dict: tensors under their checkpoint names (`backbone....`).
        hub_config: the contents of config.json; keys that are None are left out.

    Raises:
        OSError: names the file; what was there before is unchanged.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / CONFIG) as config, replacing(directory / TENSORS) as tensors:
        config.write_text(_json(hub_config) + "\n", encoding="utf-8")
        safetensors.torch.save_file(_separate(state_dict), tensors, metadata={"format": "pt"})


def write_tokenizer_record(directory: Path | str, record: Mapping[str, Any] | None) -> None:
    """Leave in a Hub-format directory what is known of the tokenizer, if anything."""
    if record is not None:
        with replacing(Path(directory, TOKENIZER)) as partial:
            partial.write_text(_json(record) + "\n", encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    known = {key: value for key, value in content.items() if value is not None}
    return json.dumps(known, indent=2, sort_keys=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory and have no gaps, which the format requires."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
