"""run.json: its checksum, and what becomes of one that was edited."""

from __future__ import annotations

from pathlib import Path

from ntkdyn.errors import DamagedRecording
from ntkdyn.store.manifest import encode_manifest, read_manifest

ENTRIES = {"config": {"rate": 0.25, "note": "é NaN"}, "seed": 3, "results": {"gap": float("nan")}}


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    content = encode_manifest(ENTRIES)
    target = tmp_path / "run.json"
    target.write_bytes(content)
    expected = read_manifest(tmp_path)
    noticed = older = 0
    for bit in range(8 * len(content)):
        spoiled = bytearray(content)
        spoiled[bit // 8] ^= 1 << bit % 8
        target.write_bytes(spoiled)
        try:
            found = read_manifest(tmp_path)
        except DamagedRecording:
            noticed += 1
            continue
        if repr(found) != repr(expected):
            # The name of the checksum was hit, so that it reads like one of before, with a strange entry more.
            older += 1
            assert [repr(found.pop(name)) for name in expected] == [repr(value) for value in expected.values()]
            assert len(found) == 1
    assert noticed > 7 * len(content)
    assert older <= 8 * len("crc32")
