"""Tar shards as they come from the web: order, parts, resume, and everything that can be wrong with them."""

import io
import itertools
import json
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from mmgem.data import shards
from mmgem.data.pairs import BadDataError
from mmgem.data.shards import ShardStream, expand_shards, read_samples
from tests.conftest import make_picture, write_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six shards of ten samples; the caption of sample i of shard s is "s i"."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(6):
        samples = [(f"{s:02}{i:03}", make_picture(10 * s + i), f"{s} {i}") for i in range(10)]
        write_shard(folder / f"{s:05}.tar", samples)
    return folder


def stream(folder, **options):
    return ShardStream([expand_shards(str(folder / "{00000..00005}.tar"))], **{"window": 4, "seed": 3, **options})


def take(dataset, number):
    return list(itertools.islice(dataset, number))


def test_every_sample_comes_once_an_epoch_whoever_reads_it(folder):
    everything = {f"{s} {i}" for s in range(6) for i in range(10)}
    whole = take(stream(folder), 120)
    captions = [example["caption"] for example in whole]
    assert set(captions[:60]) == set(captions[60:]) == everything and captions[:60] != captions[60:]
    assert captions[:10] != sorted(captions[:10])
    parts = [[e["caption"] for e in take(stream(folder, rank=r, world_size=3), 20)] for r in range(3)]
    assert set(itertools.chain(*parts)) == everything
    loader = torch.utils.data.DataLoader(stream(folder), batch_size=5, num_workers=2, collate_fn=list)
    assert {example["caption"] for batch in take(loader, 12) for example in batch} == everything
    assert np.array_equal(np.asarray(whole[0]["image"]).shape, (40, 48, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_exactly_where_it_stood(folder, workers):
    def batches(dataset):
        return torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=list)

    def contents(batch):
        return [(example["caption"], example["image"].tobytes()) for example in batch]

    options = {"augmentation_scale": 0.5, "weights": [3, 1]}
    paths = [expand_shards(str(folder / "{00000..00003}.tar")), expand_shards(str(folder / "{00004..00005}.tar"))]
    reference = take(batches(ShardStream(paths, window=4, **options)), 33)  # into the second epoch
    for stop in (1, 8, 21):
        positions = dict(batch[-1]["position"] for batch in reference[:stop])
        again = ShardStream(paths, window=4, **options)
        again.start_from(stop, dict(json.loads(json.dumps(list(positions.items())))))  # as a checkpoint keeps them
        resumed = take(batches(again), 33 - stop)
        assert list(map(contents, resumed)) == list(map(contents, reference[stop:])), stop


def test_resume_decodes_nothing_of_what_lies_before(folder, monkeypatch):
    position = take(stream(folder), 30)[-1]["position"]
    opened = []
    monkeypatch.setattr(shards, "augmented_image", lambda *args: opened.append(1) or make_picture(0))
    again = stream(folder)
    again.start_from(30, dict([position]))
    take(again, 2)
    assert len(opened) == 2


def test_sources_are_mixed_by_weight(folder):
    paths = [expand_shards(str(folder / "00000.tar")), expand_shards(str(folder / "00001.tar"))]
    captions = [example["caption"] for example in take(ShardStream(paths, weights=[3, 1]), 400)]
    share = sum(caption.startswith("0 ") for caption in captions) / 400
    assert 0.68 < share < 0.82
    with pytest.raises(ValueError, match="as many weights"):
        ShardStream(paths, weights=[1])


def png_header(width, height):
    """A PNG that claims to be this large, in a few bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


FAULTS = {
    "unreadable image": {"jpg": b"\xff\xd8\xff\xe0 no jpeg", "txt": b"a"},
    "too many pixels": {"png": png_header(40_000, 40_000), "txt": b"a"},
    "empty caption": {"jpg": None, "txt": b"  \n"},
    "invalid UTF-8": {"jpg": None, "txt": b"\xff\xfe caption"},
    "invalid JSON": {"jpg": None, "json": b"{"},
    "unreadable image ": {"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "txt": b"a"},
    "invalid caption": {"jpg": None, "json": b'{"caption": "\\ud83d"}'},
    "invalid caption ": {"jpg": None, "json": b'{"caption": {"en": "a"}}'},
    "invalid caption  ": {"jpg": None, "txt": b"['a', 'b']"},
    "invalid JSON  ": {"jpg": None, "json": b'["a caption"]'},
    "no caption ": {"jpg": None, "json": b'{"url": "http://a"}'},
    "empty caption ": {"jpg": None, "json": b'{"caption": [null, " "]}'},
    "invalid JSON ": {"jpg": None, "json": b'{"caption": ' + b"9" * 5000 + b"}"},
    "no caption": {"jpg": None},
    "no image": {"txt": b"a"},
    "unsafe path": {"../../outside.jpg": None},
}


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_are_passed_over_and_counted_by_kind(tmp_path, workers):
    buffer = io.BytesIO()
    make_picture(0).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for k, members in enumerate([{"jpg": None, "txt": b"good"}, *FAULTS.values(), {"jpg": None, "txt": b"good"}]):
            for extension, content in members.items():
                name = extension if "/" in extension else f"{k:03}.{extension}"
                content = buffer.getvalue() if content is None else content
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("folder")  # no fault: tar writes one for each folder
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_shard(tmp_path / "cut.tar", [(f"{i}", make_picture(i), "whole") for i in range(3)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:4000])
    (tmp_path / "none.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    names = ["bad", "cut", "none", "empty", "gone"]
    dataset = ShardStream([[str(tmp_path / f"{name}.tar") for name in names]])
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=list)
    bad, good = {}, Counter()
    for example in itertools.chain.from_iterable(take(loader, 12)):
        bad.update(example["bad"])
        good[example["caption"]] += 1
    kinds = Counter(reason.partition(":")[0] for reason in bad.values())
    assert kinds == {
        **Counter(kind.strip() for kind in FAULTS),
        "no plain file": 1,
        "incomplete file": 1,
        "broken shard": 4,
    }
    assert good.keys() == {"good", "whole"}
    assert all(reason.count(":") for reason in bad.values() if not reason.startswith("empty"))


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_what_comes_twice_is_counted_and_what_macos_adds_is_passed_over(tmp_path):
    buffer = io.BytesIO()
    make_picture(0).save(buffer, "JPEG")
    jpg = buffer.getvalue()
    path = str(tmp_path / "0.tar")
    names = (
        "._0.jpg",
        "0.jpg",
        "._0.txt",
        "0.txt",
        "1.jpg",
        "2.txt",
        "1.txt",
        "3.txt",
        "3.txt",
        "3.jpg",
        "a/.DS_Store",
    )
    write_members(path, [(name, jpg if name.endswith("jpg") else b"a dog") for name in names])
    faults = [sample.fault and sample.fault.partition(":")[0] for sample in read_samples(path)]
    assert faults == [None, None, None, "key twice", "file twice", "macOS metadata"]
    assert list(next(read_samples(path)).members) == ["jpg", "txt"]
    assert [sample.fault for sample in read_samples(path, 5)] == [
        "macOS metadata: 3 members without a sample, the last a/.DS_Store"
    ]
    (first, second) = take(ShardStream([[path]], window=1), 2)
    assert first["caption"] == second["caption"] == "a dog"
    kinds = Counter(reason.partition(":")[0] for reason in second["bad"].values())
    assert kinds == {"no caption": 1, "no image": 1, "key twice": 1, "file twice": 1, "macOS metadata": 1}


@pytest.mark.parametrize(
    ("column", "members", "expected"),
    [
        ("caption", {"txt": "\ufeff a dog \n", "json": '{"caption": "other"}'}, ["a dog"]),
        ("long", {"txt": "a dog", "json": '{"long": "a brown dog"}'}, ["a brown dog"]),
        ("caption", {"json": '\ufeff{"caption": ["a", " ", "b"]}'}, ["a", "b"]),
        ("long", {"txt": "a dog", "json": '{"caption": "a"}'}, "no caption: its json has no 'long', only caption"),
        ("long", {"txt": "a dog"}, "no caption: only jpg, txt, and no json with 'long'"),
    ],
)
def test_the_caption_is_the_one_that_is_asked_for(tmp_path, column, members, expected):
    buffer = io.BytesIO()
    make_picture(0).save(buffer, "JPEG")
    contents = [(f"{i}.{name}", text.encode()) for i in range(2) for name, text in members.items()]
    contents += [(f"{i}.jpg", buffer.getvalue()) for i in range(2)]
    contents.sort()
    write_members(tmp_path / "0.tar", contents)
    stream = ShardStream([[str(tmp_path / "0.tar")]], caption_column=column)
    if isinstance(expected, list):
        example = take(stream, 1)[0]
        assert example["captions"] == expected and example["caption"] in expected
        assert stream.captions() == [expected] * 2
    else:
        assert stream.captions() == []
        with pytest.raises(shards.BadSampleError, match=expected):
            shards.captions_of(next(read_samples(str(tmp_path / "0.tar"))), column)


def test_a_stream_of_nothing_but_faults_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BAD_IN_A_ROW", 20)
    write_shard(tmp_path / "0.tar", [(f"{i}", make_picture(i), "") for i in range(3)])
    with pytest.raises(BadDataError, match=r"20 samples in a row could not be read; the last, .*empty caption"):
        take(ShardStream([[str(tmp_path / "0.tar")]]), 1)


def test_shards_without_a_sample_end_with_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(10_240))
    with pytest.raises(BadDataError, match=r"1 shards hold no sample, such as .*0\.tar"):
        take(ShardStream([[str(tmp_path / "0.tar")]]), 1)


def set_header(content, index, start, value):
    """A tar with one field of its header number `index` overwritten, and the checksum to match."""
    offset = index * 1024  # members of at most a block
    header = bytearray(content[offset : offset + 512])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:offset] + bytes(header) + content[offset + 512 :]


@pytest.mark.parametrize(
    "start, value",
    [
        (124, b"\x80" + (2**80).to_bytes(11, "big")),
        (124, b"\xff" * 11 + b"\x00"),
        (156, b"L"),
        (0, b"\0" * 100),
        (148, b"garbage!"),
    ],
    ids=["huge size", "negative size", "long name", "no name", "bad checksum"],
)
def test_corrupt_headers_neither_crash_nor_hang(tmp_path, start, value):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
    content = set_header((tmp_path / "0.tar").read_bytes(), 1, start, value)
    if start == 148:
        content = content[: 1024 + 148] + value + content[1024 + 156 :]
    (tmp_path / "0.tar").write_bytes(content)
    samples = take(read_samples(str(tmp_path / "0.tar")), 10)
    assert samples[0].members == {"txt": b"text"} and len(samples) <= 3


@pytest.mark.parametrize("length", [2048, 2048 + 100, 2048 + 600, 3072])
def test_a_cut_shard_is_said_to_be_broken_once(tmp_path, length):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 512
            tar.addfile(member, io.BytesIO(bytes(512)))
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:length])
    samples = list(read_samples(str(tmp_path / "0.tar")))
    incomplete = ["incomplete file"] if length % 1024 > 512 else []
    faults = [sample.fault and sample.fault.partition(":")[0] for sample in samples]
    assert faults == [None] * (length // 1024) + incomplete + ["broken shard"]
    # From behind the fault on there is nothing.
    assert list(read_samples(str(tmp_path / "0.tar"), len(samples))) == []


def test_whatever_a_file_system_raises_is_a_broken_shard(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("connection reset")

    monkeypatch.setattr("fsspec.open", refuse)
    (sample,) = shards.read_samples("hf://datasets/org/name/0.tar")
    assert sample.fault == "broken shard: RuntimeError: connection reset"
    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(OSError, match=r"name/\*.tar could not be listed: RuntimeError: connection reset"):
        expand_shards("hf://datasets/org/name/*.tar")


def test_large_members_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 100)
    write_shard(tmp_path / "0.tar", [("a", make_picture(0), "caption")])
    (sample,) = read_samples(str(tmp_path / "0.tar"))
    assert sample.fault.startswith("too large: a.jpg has") and "jpg" not in sample.members


def test_patterns(folder, tmp_path):
    names = [f"{folder}/0000{i}.tar" for i in range(6)]
    assert expand_shards(str(folder / "{00000..00005}.tar")) == expand_shards(str(folder / "*.tar")) == names
    with pytest.raises(FileNotFoundError, match=r"00006\.tar"):
        expand_shards(str(folder / "{00004..00006}.tar"))
    with pytest.raises(ValueError, match=r"\{5..1\}\.tar counts down.*write \{1..5\}"):
        expand_shards(str(folder / "{5..1}.tar"))
    with pytest.raises(FileNotFoundError, match="No shard matches"):
        expand_shards(str(tmp_path / "*.tar"))


def test_more_readers_than_shards_are_refused(folder):
    with pytest.raises(ValueError, match=r"7 readers \(7 processes x 1 workers\) share 6 shards"):
        take(stream(folder, world_size=7), 1)
