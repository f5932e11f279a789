import io
import os
import tarfile

import pytest

from maskgit_pl.data.tar import DamagedTarError, parse_header, read_members


def members(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(read_members(descriptor))
    finally:
        os.close(descriptor)


LONG = "folder/" * 30 + "a" * 120 + ".png"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.png", "d/" * 60 + "a.png", LONG, "\u00e9\u4e16.png"])
def test_members_agree_with_tarfile(tmp_path, kind, name):
    if kind == tarfile.USTAR_FORMAT and name == LONG:
        name = "folder/" * 20 + "a" * 90 + ".png"  # what ustar can hold
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as archive:
        for member_name, size in ((name, 0), (name, 700), ("b", 512)):
            member = tarfile.TarInfo(member_name)
            member.size, member.mtime = size, 0.5 if kind == tarfile.PAX_FORMAT else 0
            archive.addfile(member, io.BytesIO(bytes(size)))
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("l")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.size, m.offset_data) for m in archive]
    parsed = members(path)
    assert [(m.name.rstrip("/"), m.size, m.offset) for m in parsed] == expected
    assert [m.kind for m in parsed] == ["file", "file", "file", "folder", "link"]


def test_big_sizes_in_base_256_and_in_pax_are_read(tmp_path):
    header = bytearray(tarfile.TarInfo("x.bin").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (9 * 2**30).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    assert parse_header(bytes(header)) == ("x.bin", 9 * 2**30)
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(header)
        file.truncate(512 + 9 * 2**30 + 1024)
    assert members(tmp_path / "x.tar")[0].size == 9 * 2**30
    info = tarfile.TarInfo("y.bin")
    info.size = 9 * 2**30  # its own header states 0
    with open(tmp_path / "y.tar", "wb") as file:
        file.truncate(file.write(info.tobuf(tarfile.PAX_FORMAT)) + 9 * 2**30 + 1024)
    assert [(member.name, member.size) for member in members(tmp_path / "y.tar")] == [("y.bin", 9 * 2**30)]


def test_extended_headers_are_bounded_and_checked(tmp_path):
    for kind in (b"L", b"x", b"g"):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 2**30
        path = tmp_path / "x.tar"
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
        with open(path, "r+b") as file:
            file.truncate(2**30 + 4096)
        with pytest.raises(DamagedTarError, match=r"extended header at byte 0 .* 1048576 bytes, got 10737"):
            members(path)
    member.type, member.size = b"x", 8
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"99 a=b\n\0".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(DamagedTarError, match="damaged pax header at byte 0"):
        members(path)


def test_negative_lengths_do_not_walk_back(tmp_path):
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    for size in (b"-0000000512\0", b"\xff" * 12, b"zz".ljust(12, b"\0")):
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(1024))
        with pytest.raises(DamagedTarError, match="its length is not a number"):
            members(tmp_path / "x.tar")
