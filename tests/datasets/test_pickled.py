"""The python layouts of CIFAR: read like pickles, without running them."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.datasets.cifar import parse_python
from ntkdyn.datasets.manifest import known_dataset
from ntkdyn.datasets.pickled import read_pickled
from ntkdyn.errors import DamagedData


class Python2:
    """Writes protocol 2 byte by byte like cPickle of Python 2, with which the official files were made."""

    def __init__(self) -> None:
        self.memo = 1  # cPickle counts from one, pickle from zero

    def put(self) -> bytes:
        self.memo += 1
        number = self.memo - 1
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<i", number)

    def text(self, value: bytes) -> bytes:
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value + self.put()

    def integer(self, value: int) -> bytes:
        if value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value)

    def list(self, items: list[Any]) -> bytes:
        out = b"]" + self.put()
        for start in range(0, len(items), 1000):  # in batches of a thousand; one that is alone is appended
            batch = [self.value(item) for item in items[start : start + 1000]]
            out += batch[0] + b"a" if len(batch) == 1 else b"(" + b"".join(batch) + b"e"
        return out

    def array(self, value: np.ndarray) -> bytes:
        out = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n" + self.put()
        out += b"K\0\x85" + self.put() + self.text(b"b") + b"\x87" + self.put() + b"R" + self.put()
        out += b"(K\1" + b"".join(map(self.integer, value.shape)) + b"\x86" + self.put()
        out += b"cnumpy\ndtype\n" + self.put() + self.text(b"u1") + b"K\0K\1\x87" + self.put() + b"R" + self.put()
        out += b"(K\3" + self.text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t" + self.put() + b"b"
        return out + b"\x89" + self.text(value.tobytes()) + b"t" + self.put() + b"b"

    def value(self, value: Any) -> bytes:
        kinds = {bytes: self.text, int: self.integer, list: self.list, np.ndarray: self.array}
        return kinds[type(value)](value)

    def dump(self, entries: dict[bytes, Any]) -> bytes:
        out = b"\x80\2}" + self.put() + b"("
        for key, value in entries.items():
            out += self.text(key) + self.value(value)
        return out + b"u."


def batch(count: int = 1201, *, classes: int = 10) -> dict[bytes, Any]:
    generator = np.random.default_rng(0)
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": generator.integers(0, classes, count).tolist(),
        b"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"camion_s_%06d.png" % number for number in range(count)],
    }


def test_official_files_byte_by_byte() -> None:
    """The files with the names of classes, whose MD5 torchvision publishes: they are known by heart, so to speak."""
    cifar_10 = {b"num_cases_per_batch": 10000, b"label_names": names("cifar-10"), b"num_vis": 3072}
    content = Python2().dump(cifar_10)
    assert hashlib.md5(content).hexdigest() == "5ff9c542aee3614f3951f8cda6e48888"
    read = read_pickled(content, where="batches.meta")
    assert read == {"num_cases_per_batch": 10000, "label_names": list(classes_of("cifar-10")), "num_vis": 3072}

    coarse = b"""aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
        household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
        large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
        vehicles_1 vehicles_2""".split()
    content = Python2().dump({b"fine_label_names": names("cifar-100"), b"coarse_label_names": coarse})
    assert hashlib.md5(content).hexdigest() == "7973b15100ade9c7d40fb424638fde48"
    assert read_pickled(content, where="meta")["fine_label_names"] == list(classes_of("cifar-100"))


def classes_of(name: str) -> tuple[str, ...]:
    return known_dataset(name).classes


def names(name: str) -> list[bytes]:
    return [name.encode() for name in classes_of(name)]


def test_writer_of_this_test_writes_pickles() -> None:
    entries = batch(300)
    read = pickle.loads(Python2().dump(entries), encoding="bytes")
    assert np.array_equal(read.pop(b"data"), entries.pop(b"data"))
    assert read == entries


def variants(entries: dict[bytes, Any]) -> dict[str, bytes]:
    as_text = {key.decode(): value for key, value in entries.items()}
    columns = {**as_text, "data": np.asfortranarray(as_text["data"])}
    return {
        "Python 2": Python2().dump(entries),
        "protocol 2": pickle.dumps(as_text, protocol=2),
        "protocol 3": pickle.dumps(as_text, protocol=3),
        "by columns": pickle.dumps(columns, protocol=2),
        "older numpy": pickle.dumps(as_text, protocol=2).replace(b"numpy._core", b"numpy.core"),
    }


@pytest.mark.parametrize("variant", ["Python 2", "protocol 2", "protocol 3", "by columns", "older numpy"])
def test_batches(variant: str) -> None:
    entries = batch()
    content = variants(entries)[variant]
    images, labels = parse_python(content, key="labels", classes=10, where="a batch")
    assert np.array_equal(images.reshape(-1, 3072), entries[b"data"])
    assert images.shape[1:] == (3, 32, 32)
    assert labels.tolist() == entries[b"labels"]


class Evil:
    """Runs a command where its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_hostile_pickles_do_not_run(tmp_path: Path) -> None:
    for protocol in range(6):
        content = pickle.dumps({"data": Evil(tmp_path / "run"), "labels": [1]}, protocol=protocol)
        with pytest.raises(DamagedData, match="nothing of it was run"):
            read_pickled(content, where="a batch")
        assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "run")))
    assert (tmp_path / "run").exists(), "it would have run"


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\1btR"
_U1 = b"cnumpy\ndtype\n(U\2u1K\0K\1tR"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x80\2cposix\nsystem\n(U\2lstR.", "the name 'posix system'"),
        (b"\x80\2cnumpy\nload\n.", "the name 'numpy load'"),
        (b"\x80\2c__builtin__\neval\n(U\1atR.", "the name '__builtin__ eval'"),
        (b"\x80\2cnumpy\ndtype\n(U\2f8K\0K\1tR.", "an array of type 'f8'"),
        (b"\x80\2cnumpy\ndtype\n(U\1OK\0K\1tR.", "an array of type 'O'"),
        (b"\x80\2cnumpy\ndtype\n(tR.", "an array of type None"),
        (b"\x80\2cnumpy\ndtype\n(NK\0K\1tR.", "NoneType in place of bytes"),
        (b"\x80\2cnumpy\nndarray\n(K\5tR.", "a call of something else"),
        (b"\x80\2U\1a(K\5tR.", "a call of something else"),
        (b"\x80\2cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\0\x85U\1btR.", "an array of another class"),
        (b"\x80\2c_codecs\nencode\n(X\1\0\0\0aX\5\0\0\0utf-7tR.", "text in another encoding than latin1"),
        (b"\x80\2}U\1ab.", "the state of an object"),
        (b"\x80\2" + _ARRAY + b".", "an array without content"),
        (b"\x80\2" + _ARRAY + b"K\1b.", "an array of something else than bytes"),
        (b"\x80\2" + _ARRAY + b"(K\1(K\3t" + _U1 + b"\x89U\2abtb.", "an array of shape [3] with 2 bytes"),
        (b"\x80\2" + _ARRAY + b"(K\1(J\xff\xff\xff\xfft" + _U1 + b"\x89U\2abtb.", "an array of shape (-1,)"),
        (b"\x80\2" + _ARRAY + b"(K\1)" + _U1 + b"\x89U\2abtb.", "an array of shape ()"),
        (b"\x80\2" + _U1 + b".", "a function or type as a value"),
        (b"\x80\2]cnumpy\nload\n.", "the name 'numpy load'"),
        (b"\x80\2]cnumpy\ndtype\na.", "a function or type as a value"),
        (b"\x80\2}K\1K\2s.", "entries that are no dictionary by names"),
        (b"\x80\2}(U\1au.", "entries that are no dictionary by names"),
        (b"\x80\2K\1K\2a.", "items for something that is no list"),
        (b"\x80\2K\1t.", "a list, tuple or dictionary without a beginning"),
        (b"\x80\2K\1K\2.", "2 values"),
        (b"\x80\2.", "0 values"),
        (b"\x80\2K\1\x87.", "too few values"),
        (b"\x80\2h\7.", "a reference to 7, which nothing put,"),
        (b"\x80\2K\1K\2\x30.", "operation POP"),
        (b"\x80\2K\1\x32\x86.", "operation DUP"),
        (b"\x80\2G\0\0\0\0\0\0\0\0.", "operation BINFLOAT"),
        (b"\x80\2\x82\1.", "operation EXT1"),
        (b"\x80\2P7\n.", "operation PERSID"),
        (b"\x80\2(i__builtin__\neval\n.", "operation INST"),
        (b"\x80\2cnumpy\nndarray\n)\x81.", "operation NEWOBJ"),
        (b"\x80\4K\1.", "protocol 4"),
        (b"\x80\4\x95\2\0\0\0\0\0\0\0K\1.", "protocol 4"),
    ],
)
def test_what_is_refused(content: bytes, found: str) -> None:
    with pytest.raises(DamagedData) as caught:
        read_pickled(content, where="a batch")
    message = str(caught.value)
    assert message.startswith(f"a batch: found {found}"), message
    assert message.endswith(
        "expected only dictionaries, lists, text, integers and arrays of bytes; nothing of it was run"
    )
    assert "\n" not in message


def test_truncated_and_prolonged() -> None:
    content = Python2().dump(batch(3))
    for end in (0, 1, 2, 50, len(content) // 2, len(content) - 1):
        with pytest.raises(DamagedData, match=r"^a batch: no whole pickle ") as caught:
            read_pickled(content[:end], where="a batch")
        assert "\n" not in str(caught.value)
    with pytest.raises(DamagedData, match="found 4 bytes behind the pickle, expected none"):
        read_pickled(content + b"more", where="a batch")


def test_every_flipped_byte_is_data_or_an_error_of_ours() -> None:
    content = Python2().dump({b"labels": [1, 2], b"data": np.zeros((2, 3072), np.uint8), b"names": [b"a", b"b"]})
    places = [place for place in range(len(content)) if content[place] or place % 500 == 0]
    assert len(places) > 200
    for place in places:
        for mask in (1, 0x20, 0xFF):
            changed = bytearray(content)
            changed[place] ^= mask
            with suppress(DamagedData):
                parse_python(bytes(changed), key="labels", classes=10, where="a batch")


def test_many_operations_are_refused() -> None:
    with pytest.raises(DamagedData, match="found more than 500000 operations"):
        read_pickled(b"\x80\2" + b"N" * 510_000 + b".", where="a batch")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1], "found NoneType as data, expected an array [images, 3072]"),
        ({"labels": [1]}, "found NoneType as data, expected an array [images, 3072]"),
        ({"data": np.zeros((2, 3071), np.uint8)}, "found an array [2, 3071] as data, expected an array [images, 3072]"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "found NoneType as labels, expected a list of integers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": ["1", "2"]}, "found list as labels, expected a list of int"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "found 2 images and 1 labels, expected as many"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, "found label 10 of sample 1, expected 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [-1, 1]}, "found label -1 of sample 0, expected 0 to 9"),
    ],
)
def test_plain_data_that_are_no_batch(entries: Any, message: str) -> None:
    with pytest.raises(DamagedData) as caught:
        parse_python(pickle.dumps(entries, protocol=2), key="labels", classes=10, where="a batch")
    assert str(caught.value).startswith(f"a batch: {message}")
