"""State dicts of PyTorch: files in all formats, written byte by byte, and files that are damaged or hostile."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.conversion.state_dict import read_state_dict
from topwork.model.files.inspection import UnsafeFileError

VALUES = np.arange(24, dtype="<f4")
STORAGE_TYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + group(*arguments) + b"R"


def mapping(items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def ordered(items):
    """An OrderedDict, with the attribute that torch adds to state dicts."""
    attributes = mapping({"_metadata": call(name("collections", "OrderedDict"))}) + b"b"
    return call(name("collections", "OrderedDict")) + mapping(items)[1:] + attributes


def tensor(shape, strides, offset=0, storage="FloatStorage", key="0", count=24, view=None):
    pieces = [text("storage"), name("torch", storage), text(key), text("cpu"), number(count)]
    reference = group(*pieces, *([view] if view else [])) + b"Q"
    numbers = [group(*map(number, values)) for values in (shape, strides)]
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), reference, number(offset), *numbers, b"\x89", hooks)


def contiguous(**options):
    return tensor((2, 3, 4), (12, 4, 1), **options)


def write_archive(path, content, storages=None, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("weights/byteorder", entries.get("byteorder", "little"))
        for key, data in ({"0": VALUES.tobytes()} if storages is None else storages).items():
            archive.writestr(f"weights/data/{key}", data)
        for key in entries.get("more", ()):
            archive.writestr(f"weights/{key}", b"")


def write_legacy(path, content, storages=None, magic=0x1950A86A20F9469CFC6C, version=1001, little_endian=True):
    storages = {"0": (24, VALUES.tobytes())} if storages is None else storages
    system = {"protocol_version": version, "little_endian": little_endian, "type_sizes": {"short": 2}}
    pickles = [pickle.dumps(value, 2) for value in (magic, version, system)]
    pickles += [b"\x80\x02" + content + b".", pickle.dumps(list(storages), 2)]
    data = b"".join(struct.pack("<q", count) + values for count, values in storages.values())
    path.write_bytes(b"".join(pickles) + data)


def write_safetensors(path, header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.fixture(params=[write_archive, write_legacy], ids=["zip", "legacy"])
def write(request):
    return request.param


def test_strides_and_offsets_are_applied(write, path):
    cube = VALUES.reshape(2, 3, 4)
    expected = {
        "contiguous": cube,
        "transposed": cube.transpose(2, 0, 1),
        "row": cube[1, 2],
        "column": cube[:, 1, 3],
        "scalar": cube[1, 0, 2],
        "empty": np.zeros((0, 4), np.float32),
    }
    tensors = {
        "contiguous": contiguous(),
        "transposed": tensor((4, 2, 3), (1, 12, 4)),
        "row": tensor((4,), (1,), offset=20),
        "column": tensor((2,), (12,), offset=7),
        "scalar": tensor((), (), offset=14),
        "empty": tensor((0, 4), (4, 1), offset=24),
    }
    write(path, ordered(tensors))
    state = read_state_dict(path)
    assert list(state) == list(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(state[key], values)
        assert state[key].flags.writeable


@pytest.mark.parametrize(("storage", "dtype"), STORAGE_TYPES.items())
def test_every_type_keeps_its_values(storage, dtype, write, path):
    values = np.array([0, 1, 100, 3]).astype(dtype)
    data = {"0": values.tobytes()} if write is write_archive else {"0": (4, values.tobytes())}
    write(path, ordered({"a": tensor((2, 2), (1, 2), storage=storage, count=4)}), data)
    state = read_state_dict(path)
    assert state["a"].dtype == dtype
    np.testing.assert_array_equal(state["a"], values.reshape(2, 2).T)


def test_bfloat16_is_widened(path, tmp_path):
    values = np.array([1.0, -2.5, 3.140625, np.inf], np.float32)
    half = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    write_archive(path, ordered({"a": tensor((4,), (1,), storage="BFloat16Storage", count=4)}), {"0": half})
    header = {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    write_safetensors(tmp_path / "model.safetensors", header, half)
    np.testing.assert_array_equal(read_state_dict(path)["a"], values)
    state = read_state_dict(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(state["a"], values.reshape(2, 2))
    assert state["a"].dtype == np.float32


def test_safetensors_with_metadata_and_several_types(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "conv.weight": {"dtype": "F32", "shape": [2, 12], "data_offsets": [0, 96]},
        "bn.num_batches_tracked": {"dtype": "I64", "shape": [], "data_offsets": [96, 104]},
    }
    write_safetensors(tmp_path / "m.safetensors", header, VALUES.tobytes() + struct.pack("<q", 7))
    state = read_state_dict(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(state["conv.weight"], VALUES.reshape(2, 12))
    assert state["bn.num_batches_tracked"] == 7


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_and_wrappers_are_unwrapped(key, prefix, write, path):
    state = ordered({f"{prefix}conv.weight": contiguous(), f"{prefix}fc.bias": tensor((4,), (1,))})
    write(path, mapping({"epoch": number(3), key: state, "optimizer": mapping({"step": number(1)})}))
    assert list(read_state_dict(path)) == ["conv.weight", "fc.bias"]


def test_a_prefix_of_only_some_names_is_kept(write, path):
    write(path, ordered({"module.weight": contiguous(), "weight": contiguous()}))
    assert list(read_state_dict(path)) == ["module.weight", "weight"]


def test_counter_of_averaged_models_is_omitted(write, path):
    write(path, ordered({"n_averaged": tensor((), ()), "module.weight": contiguous()}))
    assert list(read_state_dict(path)) == ["weight"]


def test_parameters_and_old_views_are_read(write, path):
    parameter = call(
        name("torch._utils", "_rebuild_parameter"), contiguous(), b"\x88", call(name("collections", "OrderedDict"))
    )
    view = tensor((2, 2), (2, 1), view=group(text("1"), number(4), number(6)))
    write(path, ordered({"a": parameter, "b": view}))
    state = read_state_dict(path)
    np.testing.assert_array_equal(state["a"], VALUES.reshape(2, 3, 4))
    np.testing.assert_array_equal(state["b"], [[4, 5], [6, 7]])


def test_several_state_dicts_are_not_guessed_between(write, path):
    state = ordered({"weight": contiguous()})
    write(path, mapping({"model": state, "model_ema": state}))
    with pytest.raises(DataError, match=r"several state dicts: model, model_ema\. .* torch\.save\(checkpoint\['model_"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mapping({"epoch": number(3)}), r"contains no state dict: epoch is a value of type int\. It contains epoch\."),
        (mapping({"a": contiguous(), "_extra_state": b"N"}), r"_extra_state is None"),
        (ordered({}), r"It contains nothing\."),
        (contiguous(), r"contains a value of type Tensor, not a state dict"),
        (b"]", r"contains a value of type list, not a state dict"),
    ],
)
def test_other_content_is_rejected(content, message, write, path):
    write(path, content, None if b"FloatStorage" in content else {})
    with pytest.raises(DataError, match=message):
        read_state_dict(path)


HOSTILE = {
    "system": call(name("posix", "system"), text("touch EXECUTED")),
    "eval": call(name("builtins", "eval"), text("open('EXECUTED', 'w')")),
    "getattr": name("builtins", "getattr"),
    "import": name("torch.hub", "load"),
    "numpy": name("numpy.core.multiarray", "_reconstruct"),
    "model": name("torch.nn.modules.container", "Sequential"),
    "attribute": name("collections", "OrderedDict.__init__.__globals__"),
    "instance": b"(" + text("touch EXECUTED") + b"iposix\nsystem\n",
    "object": b"(" + name("posix", "system") + text("touch EXECUTED") + b"o",
    "extension": b"\x82\x01",
    "stack": text("posix") + text("system") + b"\x93" + group(text("touch EXECUTED")) + b"R",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_code_is_never_executed(content, write, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(path, ordered({"a": contiguous(), "b": content}))
    with pytest.raises(DataError, match=r"^weights\.pth "):
        read_state_dict(path)
    assert not (tmp_path / "EXECUTED").exists()


INVALID_TENSORS = {
    "beyond the storage": tensor((5, 5), (5, 1)),
    "large stride": tensor((2, 2), (100, 1)),
    "large offset": tensor((4,), (1,), offset=21),
    "repeated values": tensor((1 << 30,), (0,)),
    "negative stride": tensor((4,), (-1,), offset=10),
    "negative offset": tensor((4,), (1,), offset=-4),
    "negative size": tensor((-2, -2), (1, 1)),
    "too few strides": tensor((2, 2), (1,)),
    "size beyond 64 bits": tensor((1 << 40, 1 << 40), (0, 0)),
    "many dimensions": tensor((1,) * 40, (1,) * 40),
    "claimed size": tensor((2000,), (1,), count=2000),
    "unknown storage": tensor((4,), (1,), key="7"),
    "view beyond the storage": tensor((4,), (1,), view=group(text("1"), number(22), number(6))),
    "negative count": tensor((0,), (1,), count=-1),
}


@pytest.mark.parametrize("content", INVALID_TENSORS.values(), ids=INVALID_TENSORS)
def test_wrong_sizes_are_rejected(content, write, path):
    write(path, ordered({"a": content}))
    with pytest.raises(DataError):
        read_state_dict(path)


def test_many_tensors_on_the_same_values_are_rejected(write, path):
    write(path, ordered({f"layer{index}": contiguous() for index in range(5)}))
    assert len(read_state_dict(path)) == 5
    data = np.zeros(100_000, "<f4").tobytes()
    shared = {f"layer{index}": tensor((100_000,), (1,), count=100_000) for index in range(5)}
    write(path, ordered(shared), {"0": data} if write is write_archive else {"0": (100_000, data)})
    with pytest.raises(UnsafeFileError, match=r"its tensors have more than 4 times the file's size"):
        read_state_dict(path)


def test_two_types_of_the_same_values_are_rejected(write, path):
    write(path, ordered({"a": contiguous(), "b": tensor((3,), (1,), storage="IntStorage")}))
    with pytest.raises(DataError, match=r"^weights\.pth uses the same values with two types"):
        read_state_dict(path)


def test_compressed_archive_is_rejected(path):
    write_archive(path, ordered({"a": contiguous()}), {"0": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match=r"compressed data can be a decompression bomb"):
        read_state_dict(path)


def test_large_pickle_is_rejected(write, path):
    write(path, text("x" * (17 * 2**20)))
    with pytest.raises(UnsafeFileError, match=r"^weights\.pth contains more than 16777216 bytes besides its tensors"):
        read_state_dict(path)


def test_huge_memo_index_takes_no_memory(write, path):
    write(path, ordered({"a": contiguous()}) + b"r\xff\xff\xff\xff")
    assert list(read_state_dict(path)) == ["a"]


def test_damaged_values_are_rejected(path):
    write_archive(path, ordered({"a": contiguous()}))
    data = bytearray(path.read_bytes())
    data[data.index(VALUES.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"^weights\.pth is damaged or incomplete: Bad CRC-32"):
        read_state_dict(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_rejected(kind, share, path):
    if kind == "safetensors":
        write_safetensors(path, {"a": {"dtype": "F32", "shape": [24], "data_offsets": [0, 96]}}, VALUES.tobytes())
    else:
        {"zip": write_archive, "legacy": write_legacy}[kind](path, ordered({"a": contiguous()}))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=r"^weights\.pth "):
        read_state_dict(path)


SAFETENSORS = {
    "gap": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    },
    "wrong shape": {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
    "beyond the file": {"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}},
    "unknown type": {"a": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}},
    "no tensor": {"__metadata__": {"a": "b"}},
    "two of one name": b'{"a":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "no JSON": b"{" * 40,
}


@pytest.mark.parametrize("header", SAFETENSORS.values(), ids=SAFETENSORS)
def test_invalid_safetensors_are_rejected(header, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", header, bytes(16))
    with pytest.raises(DataError, match=r"^m\.safetensors "):
        read_state_dict(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byteorder": "big"}, "was not written on a little-endian machine"),
        ({"more": ["constants.pkl"]}, "is a TorchScript program"),
        ({"more": ["code/model.py"]}, "is a TorchScript program"),
    ],
)
def test_other_archives_of_torch_are_rejected(options, message, path):
    write_archive(path, ordered({"a": contiguous()}), **options)
    with pytest.raises(DataError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magic": 1}, "is a pickle that torch.save did not write"),
        ({"version": 1000}, "has version 1000 of the old format"),
        ({"little_endian": False}, "was not written on a little-endian machine"),
        ({"storages": {"0": (24, VALUES.tobytes() + b"more")}}, "has 4 bytes after its last tensor"),
        ({"storages": {"0": (-1, b"")}}, "is incomplete: storage 0"),
        ({"storages": {"0": (24, VALUES.tobytes()), "1": (0, b"")}}, "contains a storage that no tensor uses"),
    ],
)
def test_invalid_legacy_files_are_rejected(options, message, path):
    write_legacy(path, ordered({"a": contiguous()}), **options)
    with pytest.raises(DataError, match=message):
        read_state_dict(path)


def keras_file():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("config.json", "{}")
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, not a state dict"),
        (b"\x89HDF\r\n\x1a\n0000", "is an HDF5 file, not a state dict"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a file that starts with b'version ', not a state dict"),
        (b"<!DOCTYPE html>", "is a file that starts with"),
        (keras_file(), "is a zip archive without data.pkl"),
    ],
)
def test_other_files_are_rejected(content, message, path):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_state_dict(path)
