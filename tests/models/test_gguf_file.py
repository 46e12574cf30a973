"""GGUF containers: what they hold is read right, and what is damaged is refused by name."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from graphllm.errors import CheckpointError
from graphllm.models.gguf_file import GGUFFile, is_gguf_file
from tests.models.small_gguf import (
    ARCHITECTURE_FIELD,
    field,
    raw_gguf,
    string,
    tensor_entry,
    write_small_llama,
)


def test_fields_and_tensors_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", {"general.sampling.temp": 0.5, "general.tags": ["a", "b"]})
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    expected = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.fields) == expected
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert file.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert file.tensors[tensor.name].offset == tensor.data_offset
        np.testing.assert_array_equal(file.read_float32(tensor.name), tensor.data)


SCALARS = {
    GGUFValueType.UINT8: ("<B", 200),
    GGUFValueType.INT8: ("<b", -3),
    GGUFValueType.UINT16: ("<H", 60000),
    GGUFValueType.INT16: ("<h", -300),
    GGUFValueType.UINT32: ("<I", 2**32 - 1),
    GGUFValueType.INT32: ("<i", -(2**31)),
    GGUFValueType.UINT64: ("<Q", 2**64 - 1),
    GGUFValueType.INT64: ("<q", -(2**63)),
    GGUFValueType.FLOAT32: ("<f", 0.25),
    GGUFValueType.FLOAT64: ("<d", 0.1),
    GGUFValueType.BOOL: ("<?", True),
}


@pytest.mark.parametrize("value_type", SCALARS, ids=lambda value_type: value_type.name)
def test_every_scalar_type_is_read_alone_and_in_an_array(tmp_path: Path, value_type: GGUFValueType) -> None:
    format, value = SCALARS[value_type]
    data = struct.pack(format, value)
    path = tmp_path / "m.gguf"
    array = struct.pack("<IQ", value_type, 2) + data + data
    path.write_bytes(raw_gguf([field("one", value_type, data), field("two", GGUFValueType.ARRAY, array)]))
    fields = GGUFFile(path).fields
    assert fields["one"] == value
    assert fields["two"] == [value, value]
    assert type(fields["one"]) is type(fields["two"][0]) is type(value)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_in_use_are_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([ARCHITECTURE_FIELD], version=version))
    assert GGUFFile(path).fields == {"general.architecture": "llama"}


def test_own_alignment_moves_the_data(tmp_path: Path) -> None:
    header = [field("general.alignment", GGUFValueType.UINT32, struct.pack("<I", 256))]
    text = raw_gguf(header, [tensor_entry("x"), tensor_entry("y", offset=256)])
    values = np.arange(8, dtype=np.float32)
    data = values.tobytes().ljust(256, b"\0") + (values + 8).tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(text.ljust(256, b"\0") + data)
    assert GGUFFile(path).read_float32("y").tolist() == list(range(8, 16))


def test_values_can_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf(tensors=[tensor_entry("x")], data=bytes(32)))
    before = path.read_bytes()
    GGUFFile(path).read_float32("x")[:] = 1.0
    assert path.read_bytes() == before


def test_only_a_regular_file_with_the_magic_is_gguf(tmp_path: Path) -> None:
    (tmp_path / "yes").write_bytes(raw_gguf())
    (tmp_path / "no").write_bytes(b"GGU")
    assert is_gguf_file(tmp_path / "yes")
    assert not is_gguf_file(tmp_path / "no")
    assert not is_gguf_file(tmp_path)
    assert not is_gguf_file(tmp_path / "missing")


UINT32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
HUGE = struct.pack("<Q", 2**62)
DAMAGED = {
    "empty": (b"", "the file is empty"),
    "another format": (raw_gguf(magic=b"PK\3\4"), "not a GGUF file"),
    "an old version": (raw_gguf(version=1), "GGUF version 1 is not supported"),
    "a future version": (raw_gguf(version=4), "GGUF version 4 is not supported"),
    "big-endian": (raw_gguf(version=3 << 24), "big-endian"),
    "unknown value type": (raw_gguf([field("k", 77, b"\0" * 8)]), "'k' has the unknown value type 77"),
    "key named twice": (raw_gguf([ARCHITECTURE_FIELD] * 2), "'general.architecture' appears twice"),
    "key not in UTF-8": (raw_gguf([field(b"\xff", UINT32, b"\0" * 4)]), "is not valid UTF-8"),
    "value not in UTF-8": (raw_gguf([field("k", STRING, string(b"\xff"))]), "'k' is not valid UTF-8"),
    "token not in UTF-8": (
        raw_gguf([field("k", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string(b"\xff"))]),
        "entry 1 of metadata key 'k' is not valid UTF-8",
    ),
    "string beyond the end": (raw_gguf([field("k", STRING, HUGE)]), "the file ends inside metadata key 'k'"),
    "array beyond the end": (
        raw_gguf([field("k", ARRAY, struct.pack("<I", UINT32) + HUGE)]),
        "the file ends inside metadata key 'k'",
    ),
    "array of strings beyond the end": (
        raw_gguf([field("k", ARRAY, struct.pack("<I", STRING) + HUGE)]),
        "the file ends inside metadata key 'k'",
    ),
    "array of arrays": (
        raw_gguf([field("k", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
        "'k' is an array of arr",
    ),
    "too many fields": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40),
        "ends inside the name of metadata field 1 of 1099511627776",
    ),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "ends inside the entry of tensor 1 of"),
    "alignment of three": (
        raw_gguf([field("general.alignment", UINT32, struct.pack("<I", 3))]),
        "general.alignment is 3",
    ),
    "alignment of text": (
        raw_gguf([field("general.alignment", STRING, string("32"))]),
        "general.alignment is '32'",
    ),
    "tensor named twice": (raw_gguf(tensors=[tensor_entry("x")] * 2, data=bytes(32)), "'x' appears twice"),
    "no dimensions": (raw_gguf(tensors=[tensor_entry("x", ())]), "tensor 'x' has 0 dimensions"),
    "five dimensions": (raw_gguf(tensors=[tensor_entry("x", (1,) * 5)]), "tensor 'x' has 5 dimensions"),
    "dimension of zero": (raw_gguf(tensors=[tensor_entry("x", (2, 0))]), "tensor 'x' is empty"),
    "unknown tensor type": (raw_gguf(tensors=[tensor_entry("x", (8,), 999)]), "'x' has the unknown type 999"),
    "unsupported tensor type": (
        raw_gguf(tensors=[tensor_entry("x", (256,), GGMLQuantizationType.Q8_K)], data=bytes(1000)),
        "tensor 'x' has type Q8_K, which is not supported",
    ),
    "rows that split a block": (
        raw_gguf(tensors=[tensor_entry("x", (2, 48), GGMLQuantizationType.Q8_0)], data=bytes(1000)),
        "tensor 'x' has rows of 48 elements, not a multiple of the 32",
    ),
    "data not aligned": (
        raw_gguf(tensors=[tensor_entry("x", offset=4)], data=bytes(64)),
        "the data of tensor 'x' is not aligned to 32 bytes",
    ),
    "data of two tensors overlapping": (
        raw_gguf(tensors=[tensor_entry("x", (16,)), tensor_entry("y", offset=32)], data=bytes(64)),
        "the data of tensor 'y' overlaps another tensor's",
    ),
    "data beyond the end": (
        raw_gguf(tensors=[tensor_entry("x", offset=2**60)], data=bytes(64)),
        "the data of tensor 'x' ends at byte 1152921504606847",
    ),
    "more data than bytes can count": (
        raw_gguf(tensors=[tensor_entry("x", (2**62,) * 4)], data=bytes(64)),
        "beyond the file's end",
    ),
    "data cut off": (raw_gguf(tensors=[tensor_entry("x")], data=bytes(31)), "the file is truncated"),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message


def test_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    fields = [
        ARCHITECTURE_FIELD,
        field("k", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
    ]
    whole = raw_gguf(fields, [tensor_entry("x"), tensor_entry("y", (2, 4), offset=32)], data=bytes(64))
    path.write_bytes(whole)
    assert len(GGUFFile(path).tensors) == 2
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf: .*(ends inside|truncated|is empty)"):
            GGUFFile(path)


def test_random_damage_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    fields = [
        ARCHITECTURE_FIELD,
        field("k", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
    ]
    entries = [tensor_entry("x"), tensor_entry("y", (2, 32), GGMLQuantizationType.Q4_1, offset=32)]
    whole = raw_gguf(fields, entries, data=random.Random(0).randbytes(72))
    source = random.Random(1)
    num_refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(len(damaged))] = source.choice(
                (0, 1, 9, 127, 255, source.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            for name in file.tensors:
                assert file.read_float32(name).shape == file.tensors[name].shape
        except CheckpointError as error:
            assert str(path) in error.message
            num_refused += 1
    assert 100 < num_refused < 1000


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=r"no such file, or not a regular one"):
            GGUFFile(path)
