"""Sentence pairs: Multi30k and files of one's own; languages that do not pair are refused."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
from pathlib import Path

import pytest

from ntkdyn.datasets import parallel_text
from ntkdyn.datasets.text import pair_lines
from ntkdyn.errors import ConfigurationError, DamagedData, MissingData, NtkdynError, UnknownName

NAMES = ("train.en", "train.de")


def write(folder: Path, **changes: bytes) -> Path:
    contents = {
        "train.en": "A dog.\nTwo men\u2028run.\n".encode(),
        "train.de": "Ein Hund.\r\nZwei Männer laufen.".encode(),
        "val.en": b"A cat.\n",
        "val.de": b"Eine Katze.\n",
        "test.en": gzip.compress(b"A bird.\n"),
        "test.de": lzma.compress(b"Ein Vogel.\n"),
    } | changes
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        suffix = {b"\x1f\x8b": ".gz", b"\xfd7": ".xz"}.get(content[:2], "")
        (folder / f"{name}{suffix}").write_bytes(content)
    return folder


def test_own_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    text = parallel_text(folder)
    assert text.train.sources == ("A dog.", "Two men\u2028run.")
    assert text.train.targets == ("Ein Hund.", "Zwei Männer laufen.")
    assert (len(text.train), len(text.validation), len(text.test)) == (2, 1, 1)
    assert text.test[0] == ("A bird.", "Ein Vogel.")
    assert text.languages == ("en", "de")
    assert text.provenance["name"] == "mine"
    assert [entry["file"] for entry in text.provenance["files"]] == [
        "train.en", "train.de", "val.en", "val.de", "test.en.gz", "test.de.xz",
    ]  # fmt: skip
    stored = (folder / "test.en.gz").read_bytes()
    assert text.provenance["files"][4]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert parallel_text(str(folder), languages=("de", "en")).test[0] == ("Ein Vogel.", "A bird.")


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (b"a\nb\nc\n", b"x\ny\n", "text: found 3 lines in train.en and 2 in train.de, expected as many: line i of one"),
        (b"a\nb\n", b"x\n\n", "text: train.de: found line 2 empty, expected a sentence; leave that pair out"),
        (b"a\n \nb", b"x\ny\nz", "text: train.en: found line 2 empty"),
        (b"", b"x", "text: train.en: found line 1 empty"),
        (b"a\nb\n", b"x\n\xe4\n", "text: train.de: found byte 0xe4 in line 2, expected UTF-8; convert the file"),
        (b"a\nb\nc\xc3", b"x\ny\nz", "text: train.en: found byte 0xc3 in line 3, expected UTF-8"),
        (b"\xff\xfea\0", b"x", "text: train.en: found byte 0xff in line 1, expected UTF-8"),
    ],
)
def test_languages_that_do_not_pair(sources: bytes, targets: bytes, message: str) -> None:
    with pytest.raises(DamagedData, match=f"^{re.escape(message)}") as caught:
        pair_lines(sources, targets, names=NAMES, where="text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "languages", "error", "message"),
    [
        (
            "mine",
            ("en", "fr"),
            MissingData,
            "text mine: found no train.fr, expected train.fr, train.fr.gz or train.fr.x",
        ),
        (
            "multi30",
            ("en", "de"),
            UnknownName,
            "text 'multi30' is neither a folder nor a known data set; did you mean mu",
        ),
        ("", ("en", "de"), UnknownName, "text '' is neither a folder nor a known data set; known: cifar-10, "),
        ("mnist", ("en", "de"), ConfigurationError, "data set mnist: found images, expected text; use named_data"),
        ("multi30k", ("en", "de"), MissingData, "data set multi30k: not found in mine; put train.en, train.de, val.en"),
    ],
)
def test_names_that_mean_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    languages: tuple[str, str],
    error: type[NtkdynError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine")
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        parallel_text(name, data_dir="mine", languages=languages)


def test_damaged_own_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", **{"test.en": gzip.compress(b"A bird.\n")[:-9]})
    with pytest.raises(DamagedData, match=r"test\.en\.gz: truncated gzip file, it ends after 8 bytes of content; copy"):
        parallel_text(folder)


def test_multi30k(data_folder: Path) -> None:
    text = parallel_text("multi30k", data_dir=data_folder)
    assert (len(text.train), len(text.validation), len(text.test)) == (29_000, 1_014, 1_000)
    assert text.train[0] == (
        "Two young, White males are outside near many bushes.",
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    )
    assert text.provenance["partial"] is None
    assert "non-commercial" in text.provenance["license"]
    assert len(text.provenance["files"]) == 6
    with pytest.raises(UnknownName, match=r"^data set multi30k: found no language 'fr', expected de, en$"):
        parallel_text("multi30k", data_dir=data_folder, languages=("en", "fr"))


def test_multi30k_with_a_line_less_is_refused(data_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "multi30k-task1"
    shutil.copytree(data_folder / "multi30k-task1", folder)
    path = folder / "val.de.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.chmod(0o644)
    path.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(DamagedData, match=r"val\.de\.gz: found 1013 lines, expected 1014, one a sentence; replace"):
        parallel_text("multi30k", data_dir=tmp_path)
