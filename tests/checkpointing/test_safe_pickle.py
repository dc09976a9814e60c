"""Hostile checkpoints: what they would run does not run, and what they claim is not believed."""

import functools
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpointing.description import plain_config
from checkpointing.safe_pickle import Placeholder
from checkpointing.torch_file import MAX_PICKLE_BYTES, read_torch_file
from checkpointing.weights import read_checkpoint, read_weights


def write_archive(path: Path, data: bytes, *, members: dict[str, bytes] | None = None, **how):
    """A zip archive like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (members or {}).items():
            archive.writestr(f"archive/{name}", content)


# --- files that run something where they are unpickled -----------------------------------------


class Calls:
    """An object whose pickle calls a function, and then maybe sets a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class SetsState:
    """Runs a command where its state is set. Unpickling finds this class by its name."""

    def __init__(self, command: str):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


class Dictionary(OrderedDict):
    """A container that runs a command where it is filled."""

    def __setitem__(self, key, value):
        if key == "command":
            os.system(value)


def dictionary(command: str) -> Dictionary:
    made = Dictionary()
    OrderedDict.__setitem__(made, "command", command)
    return made


def object_array(command: str) -> np.ndarray:
    """An array of objects, whose elements are pickled one by one."""
    array = np.empty(1, dtype=object)
    array[0] = Calls(os.system, command)
    return array


EXPLOITS = {
    "os.system": lambda command: Calls(os.system, command),
    "subprocess": lambda command: Calls(subprocess.call, command.split()),
    "builtins.eval": lambda command: Calls(eval, f"__import__('os').system({command!r})"),
    "builtins.exec": lambda command: Calls(exec, f"import os; os.system({command!r})"),
    "chain of calls": lambda command: Calls(
        functools.reduce, Calls(getattr, Calls(__import__, "operator"), "call"),
        [Calls(getattr, Calls(__import__, "os"), "system"), command],
    ),
    "nested pickle": lambda command: Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
    "nested torch file": lambda command: Calls(
        functools.partial(torch.load, weights_only=False),
        io.BytesIO(torch_bytes(Calls(os.system, command))),
    ),
    "state": SetsState,
    "filling": dictionary,
    "items of a built-in": lambda command: Calls(list, Calls(map, os.system, [command])),
    "object array": object_array,
    "factory": lambda command: defaultdict(Calls, {"a": Calls(os.system, command)}),
}  # fmt: skip


def torch_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that an exploit makes where it runs."""
    return tmp_path / "it-ran"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", EXPLOITS)
def test_nothing_runs(name, protocol, marker, tmp_path):
    """The original unpickled checkpoints, which runs whatever their author put in."""
    hostile = EXPLOITS[name](f"touch {marker}")
    path = tmp_path / "hostile.ckpt"
    weights = {"backbone.weight": torch.ones(2)}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": hostile}}, path,
               pickle_protocol=protocol)  # fmt: skip
    torch.load(path, weights_only=False)
    assert marker.exists(), "the exploit is a real one"
    marker.unlink()
    assert torch.equal(read_weights(str(path)).state_dict["backbone.weight"], torch.ones(2))
    assert not marker.exists()


# Opcodes that Python's own pickler does not write any more.
OLD = {
    "INST": b"(S'touch %s'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch %s'\no.",
    "REDUCE": b"cos\nsystem\n(S'touch %s'\ntR.",
    "of the state": b"cos\nsystem\n(S'touch %s'\ntR}(S'__class__'\ncos\nsystem\nub.",
}


@pytest.mark.parametrize("name", OLD)
def test_nothing_runs_by_old_opcodes(name, marker, tmp_path):
    hostile = OLD[name] % str(marker).encode()
    write_archive(tmp_path / "hostile.ckpt", hostile)
    try:
        pickle.loads(hostile)
    except AttributeError:  # a number has no state; it ran before
        pass
    assert marker.exists(), "the exploit is a real one"
    marker.unlink()
    content = read_torch_file(str(tmp_path / "hostile.ckpt"))
    assert isinstance(content, Placeholder) and content.name in ("os.system", "posix.system")
    assert content.arguments == (f"touch {marker}",)
    assert not marker.exists()


def test_a_call_among_the_weights_is_no_weight(marker, tmp_path):
    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {"backbone.weight": Calls(os.system, f"touch {marker}")}}, path)
    with pytest.raises(ValueError, match="'backbone.weight' in it is no tensor but Placeholder"):
        read_weights(str(path))
    assert not marker.exists()


# --- honest files --------------------------------------------------------------------------------


def test_plain_content_is_what_torch_reads(tmp_path):
    """The slow twin is torch's own reader, on everything that both admit."""
    shared = torch.arange(12.0).view(3, 4)
    content = {
        "tensors": [shared, shared[1:, ::2], shared.t(), torch.zeros(0, 3), torch.tensor(2)],
        "types": [torch.ones(2, dtype=dtype) for dtype in
                  (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                   torch.int16, torch.int8, torch.uint8, torch.bool)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numbers": [1, -1, 2**40, 2**100, 0.5, float("inf"), True, None, "text", b"bytes"],
        "containers": ({"a": (1,), ("b", 2): []}, OrderedDict(x=1), {1, 2}, (1, 2, 3, 4)),
    }  # fmt: skip
    for protocol in (2, 4):
        path = tmp_path / f"{protocol}.pt"
        torch.save(content, path, pickle_protocol=protocol)
        expected = torch.load(path, weights_only=False)
        found = read_torch_file(str(path))
        for name in ("tensors", "types"):
            for a, b in zip(found[name], expected[name], strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(found["parameter"], expected["parameter"])
        numbers = [number for number in expected["numbers"] if number != b"bytes"]
        assert [x for x in found["numbers"] if not isinstance(x, bytes | Placeholder)] == numbers
        assert found["containers"] == expected["containers"]
        assert found["tensors"][0].data_ptr() != expected["tensors"][0].data_ptr()
        assert found["tensors"][0].data_ptr() == found["tensors"][2].data_ptr(), "one storage"


def test_reading_leaves_the_file_alone(tmp_path):
    """The file is mapped into memory, and what is done to the tensors stays there."""
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": {"a": torch.ones(3)}}, path)
    before = path.read_bytes()
    read_weights(str(path)).state_dict["a"].zero_()
    assert path.read_bytes() == before


def test_a_file_behind_fsspec():
    import fsspec

    with fsspec.open("memory://some.ckpt", "wb") as file:
        torch.save({"state_dict": {"a": torch.arange(3.0)}}, file)
    assert read_weights("memory://some.ckpt").state_dict["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["ar", "bd3lm", "mdlm", "sedd"])
def test_the_originals_checkpoints(name, shared):
    """Real ones: configuration and tokenizer are pickled objects of five packages."""
    (path,) = (shared / "golden" / "lightning").glob(f"{name}_text8*.ckpt")
    content = read_checkpoint(str(path))
    assert isinstance(content["hyper_parameters"]["tokenizer"], Placeholder)
    config = plain_config(content["hyper_parameters"]["config"])
    assert config["algo"]["name"] == name
    assert (config["model"]["length"], config["model"]["hidden_size"]) == (64, 64)
    assert config["wandb"] is None or isinstance(config["wandb"], dict)


# --- files that lie ------------------------------------------------------------------------------


def test_compressed_members_are_refused(tmp_path):
    """A zip bomb: megabytes of zeros in a file of a few kilobytes."""
    path = tmp_path / "bomb.ckpt"
    data = pickle.dumps({"state_dict": {}}, protocol=2)
    zeros = {"data/0": bytes(50 * 2**20)}
    write_archive(path, data, members=zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"archive/data.pkl in it is compressed"):
        read_weights(str(path))


def test_members_that_claim_more_than_the_file_holds(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"a": torch.ones(16)}}, path)
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    struct.pack_into("<II", content, place + 20, 2**31, 2**31)  # both sizes in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match="claim to be larger than the file"):
        read_weights(str(path))


def test_an_endless_structure_is_refused(tmp_path):
    write_archive(tmp_path / "big.ckpt", b"}" * (MAX_PICKLE_BYTES + 1))
    with pytest.raises(ValueError, match="its data.pkl is larger than"):
        read_weights(str(tmp_path / "big.ckpt"))


def rebuilt(offset: int, size: tuple, stride: tuple, *, count: int = 4, dtype="FloatStorage"):
    """A pickle of a tensor in a storage of four float32."""

    def ints(values: tuple) -> bytes:
        return b"(" + b"".join(b"L%dL\n" % value for value in values) + b"t"

    storage = b"(S'storage'\nctorch\n%s\nS'0'\nS'cpu'\nL%dL\ntQ" % (dtype.encode(), count)
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"L%dL\n" % offset
            + ints(size) + ints(stride) + b"I00\nNtR.")  # fmt: skip


def test_an_honest_tensor(tmp_path):
    """The twin of the lies below."""
    write_archive(tmp_path / "a.pt", rebuilt(1, (2,), (2,)), members={"data/0": bytes(16)})
    assert read_torch_file(str(tmp_path / "a.pt")).tolist() == [0, 0]


LIES = {
    "beyond its storage": (rebuilt(0, (5,), (1,)), r"shape \(5,\) in 4 numbers"),
    "far beyond": (rebuilt(2**40, (1,), (1,)), r"shape \(1,\) in 4 numbers"),
    "steps beyond": (rebuilt(0, (2,), (4,)), r"shape \(2,\) in 4 numbers"),
    "one number a trillion times": (rebuilt(0, (10**12,), (0,)), "in 4 numbers"),
    "negative": (rebuilt(-1, (1,), (1,)), "strange sizes"),
    "negative step": (rebuilt(3, (2,), (-1,)), "strange sizes"),
    "other count": (rebuilt(0, (4,), (1,), count=2**40), "has not 1099511627776 numbers"),
    "other type": (rebuilt(0, (4,), (1,), dtype="QInt8Storage"), "tensors of torch.QInt8Storage"),
    "no storage": (rebuilt(0, (1,), (1,)).replace(b"S'0'", b"S'1'"), "lacks archive/data/1"),
    "other persistent id": (b"S'module'\nQ.", "not a checkpoint"),
    "cut off": (rebuilt(0, (1,), (1,))[:-5], "not a checkpoint"),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1 at byte 2 is not admitted"),
    "empty stack": (b"a.", "damaged pickle"),
    "no mark": (b"t.", "damaged pickle"),
    "memo": (b"h\x05.", "damaged pickle"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_errors(name, tmp_path):
    data, message = LIES[name]
    path = tmp_path / "lie.ckpt"
    write_archive(path, data, members={"data/0": bytes(16)})
    with pytest.raises(ValueError, match=message) as error:
        read_weights(str(path))
    assert str(error.value).startswith(f"{path}: not a checkpoint that can be read safely")


def test_deeply_nested_keys_do_not_crash_the_process(tmp_path):
    """The hash of a tuple of tuples of ... takes a C stack that a million of them overflow."""
    write_archive(tmp_path / "deep.ckpt", b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.")
    with pytest.raises(ValueError, match="a key that is not plain"):
        read_weights(str(tmp_path / "deep.ckpt"))


def test_one_list_copied_over_and_over(tmp_path):
    """Each copy takes four bytes in the file, and as much memory as the list."""
    copy = b"c__builtin__\nlist\nq\x01h\x00\x85Rq\x02"
    many = b"](" + b"N" * 100_000 + b"eq\x00" + copy + b"h\x01h\x00\x85R" * 1_000 + b"."
    write_archive(tmp_path / "copies.ckpt", many)
    with pytest.raises(ValueError, match="copies one container over and over"):
        read_weights(str(tmp_path / "copies.ckpt"))


def test_a_configuration_that_grows_without_end():
    """Ten lists, each twice in the next, are a thousand; forty are more than there is memory."""
    node: list = ["text"]
    for _ in range(40):
        node = [node, node]
    circle: list = []
    circle.append(circle)
    shared: dict = {"a": 1}
    for _ in range(12):
        shared = {str(i): shared for i in range(8)}
    for hostile in (node, circle, shared):
        assert plain_config({"block_size": 4, "rest": hostile})["block_size"] == 4


def test_old_formats_say_what_to_do(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="files of PyTorch before 1.6 are not read"):
        read_weights(str(path))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damage_of_every_kind_is_an_error_or_harmless(tmp_path):
    """Three hundred files with a few changed bytes: read, or refused with the file's name."""
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.ckpt"
    config = {"algo": {"name": "bd3lm"}, "block_size": 4, "model": {"length": 16}}
    torch.save(
        {
            "state_dict": OrderedDict({"backbone.a": torch.ones(3), "b": torch.ones(2, 2).t()}),
            "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": [torch.ones(3)]},
            "hyper_parameters": {"config": Calls(dict, list(config.items()))},
        },
        path,
    )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = archive.read(next(name for name in names if name.endswith("data.pkl")))
    whole, refused = path.read_bytes(), 0
    for trial in range(300):
        content = bytearray(pickled if trial % 2 else whole)
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.integers(256)
        if trial % 2:
            storages = {f"data/{key}": bytes(16) for key in range(3)}
            write_archive(path, bytes(content), members=storages)
        else:
            path.write_bytes(content)
        try:
            read_weights(str(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100
