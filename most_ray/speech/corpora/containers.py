"""What an audio file holds beside what its header announces: libsndfile decodes no more than that, and notes nothing.

Files that were joined byte by byte, headers that were written for less, MP3s that were cut off: part of the audio would be used with the
whole text. Only the structure of files is read; nothing is decoded, and memory does not grow with the file.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_SLACK = 0.05  # seconds of audio beyond the announced that are no fault: padding, tags that are not known here
_BLOCK = 1 << 20  # bytes that are read at once
_MOST_BYTES, _MOST_CHUNKS, _MOST_PAGES = 1 << 28, 10_000, 100_000  # that are looked at: no utterance has more, and none may take long
_PCM = {  # by libsndfile's name of the format: bytes before the first chunk, a chunk's size as `struct` has it, what chunks are padded to
    "WAV": (12, "<I", 2),
    "WAVEX": (12, "<I", 2),
    "AIFF": (12, ">I", 2),
    "CAF": (8, ">q", 1),
}
_SAMPLES = (b"data", b"SSND")  # ids of the chunk of samples
_BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff")  # ids with which only a file begins
_UNKNOWN = 0x7FFF_0000  # bytes: what a program writes as the size that it does not know yet is larger, or 0
_CHUNK_ID = re.compile(rb"[\x20-\x7e]{4}")
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")  # that players append to any file
_JOINED = "is several recordings joined in one file, of which only the first would be read"


def find_hidden_audio(path: Path, kind: str, samples: int, rate: int) -> str | None:
    """Why a file's audio is not what its header announces, as a rule that continues its name; None where it is, or that is unknown.

    Args:
        kind: libsndfile's name of the format.
        samples, rate: that libsndfile announces, for each channel, and in Hz.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        if kind in _PCM:
            return _check_chunks(stream, kind, samples, rate)
        check = _CHECKS.get(kind)
        return check(stream, samples, rate) if check else None


def _announces_less(seconds: float, samples: int, rate: int) -> str:
    return f"holds {seconds:.2f} s of audio, but its header announces {samples / rate:.2f} s"


def _cut_off(seconds: float, announced: float) -> str:
    return f"is cut off or damaged: it holds {seconds:.2f} s of the {announced:.2f} s that its header announces"


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size


def _read_at(stream: BinaryIO, position: int, count: int) -> bytes:
    stream.seek(position)
    return stream.read(count)


# Chunks


def _check_chunks(stream: BinaryIO, kind: str, samples: int, rate: int) -> str | None:
    """Samples that follow the chunk of samples, and are in no other chunk."""
    (position, form, pad), end = _PCM[kind], _size(stream)
    size, length = 4 + struct.calcsize(form), None  # of a chunk's head; of the samples, in bytes
    for _ in range(_MOST_CHUNKS):
        head = _read_at(stream, position, size)
        if len(head) < size:
            break
        (count,) = struct.unpack(form, head[4:])
        if head[:4] in _BEGINNINGS:
            return _JOINED
        if not _CHUNK_ID.fullmatch(head[:4]) or count < 0:
            break
        if head[:4] in _SAMPLES:
            if not 0 < count < _UNKNOWN:
                return None
            length = count
        elif position + size + count > end:
            return None if length is None else _check_rest(stream, position, length, samples, rate)
        position = _next_chunk(stream, position + size + count, pad)
    return None if length is None else _check_rest(stream, position, length, samples, rate)


def _next_chunk(stream: BinaryIO, position: int, pad: int) -> int:
    """Where the chunk after one that ends at `position` begins: some programs leave the padding out."""
    padded = position + position % pad
    return position if not _chunk_at(stream, padded) and _chunk_at(stream, position) else padded


def _chunk_at(stream: BinaryIO, position: int) -> bool:
    return _CHUNK_ID.fullmatch(_read_at(stream, position, 4)) is not None


def _check_rest(stream: BinaryIO, position: int, length: int, samples: int, rate: int) -> str | None:
    """What is in no chunk, from `position` on, by the `length` in bytes of the announced samples."""
    rest, each = _size(stream) - position, length / max(1, samples)
    if rest < _SLACK * rate * each or (beginning := _read_at(stream, position, _BLOCK)).startswith(_TAGS) or not any(beginning):
        return None
    return _announces_less((samples + rest / each) / rate, samples, rate)


def _check_au(stream: BinaryIO, samples: int, rate: int) -> str | None:
    head = _read_at(stream, 0, 12)
    if len(head) < 12:
        return None
    offset, length = struct.unpack("<II" if head[:4] == b"dns." else ">II", head[4:])
    return _check_rest(stream, offset + length, length, samples, rate) if 0 < length < _UNKNOWN else None


def _check_nist(stream: BinaryIO, samples: int, rate: int) -> str | None:
    """NIST's sphere files, whose length libsndfile takes from the file's, against the number in their header."""
    match = re.search(rb"\nsample_count -i (\d{1,12})\s", _read_at(stream, 0, 1024))
    announced = int(match[1]) if match else samples
    if samples > announced + _SLACK * rate:
        return _announces_less(samples / rate, announced, rate)
    return _cut_off(samples / rate, announced / rate) if samples < announced - _SLACK * rate else None


# FLAC

_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # the beginning of a stream, with the head of its first block
_FLAC_FRAME = re.compile(rb"\xff[\xf8\xf9]", re.DOTALL)
_FLAC_TAIL = 1 << 20  # bytes that hold the last two frames
_FLAC_BLOCKS = (0, 192, 576, 1152, 2304, 4608, 0, 0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # samples, by their code


def _check_flac(stream: BinaryIO, samples: int, rate: int) -> str | None:
    """A second stream, or a frame beyond the announced end that continues the one before it."""
    if _count_streams(stream) > 1:
        return _JOINED
    start = _find(stream, b"fLaC")
    block = int.from_bytes(_read_at(stream, start + 10, 2), "big")  # samples of a frame but the last, where all have the same
    position = max(start, _size(stream) - _FLAC_TAIL)
    tail = _read_at(stream, position, _FLAC_TAIL)
    frames = [found for match in _FLAC_FRAME.finditer(tail) if (found := _flac_frame(tail[match.start() : match.start() + 16], block))]
    ends = {end for _, end in frames}
    last = max((end for begin, end in frames if begin in ends), default=0)
    return _announces_less(last / rate, samples, rate) if last > samples else None


def _count_streams(stream: BinaryIO) -> int:
    count, before, position = 0, b"", 0
    while position < _MOST_BYTES and (block := _read_at(stream, position, _BLOCK)):
        count, before, position = count + len(_FLAC.findall(before + block)), block[-7:], position + len(block)
    return count


def _find(stream: BinaryIO, what: bytes) -> int:
    return max(0, _read_at(stream, 0, _BLOCK).find(what))


def _flac_frame(head: bytes, block: int) -> tuple[int, int] | None:
    """The first sample of a frame and the one after its last, by its head (RFC 9639, 9.1); None where this is no frame."""
    if len(head) < 16 or head[3] & 1:
        return None
    size_code, rate_code, ones = head[2] >> 4, head[2] & 15, 8 - (head[4] ^ 0xFF).bit_length()
    if size_code == 0 or rate_code == 15 or ones in (1, 8):
        return None
    extra = max(0, ones - 1)  # bytes of the number after its first, as in UTF-8
    number = head[4] & (0x7F >> ones)
    for byte in head[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    at = 5 + extra
    wide = {6: 1, 7: 2}.get(size_code, 0)  # bytes of the number of samples
    length = int.from_bytes(head[at : at + wide], "big") + 1 if wide else _FLAC_BLOCKS[size_code]
    at += wide + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    begin = number if head[1] & 1 else number * block
    return begin, begin + length


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07) & 0xFF if value & 0x80 else value << 1
    return value


# MP3

_MPEG_RATES = (44100, 48000, 32000)  # Hz of MPEG 1; halves in MPEG 2, quarters in 2.5
_MPEG_KBITS = {  # by whether it is MPEG 1, and the layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MPEG_SLACK = 5  # frames by which an estimate may be too short
_LENGTHS = {b"Xing": 8, b"Info": 8, b"VBRI": 14}  # marks of a frame that says how many there are, and how many bytes after it
_SEARCHED = 1 << 16  # bytes in which the next frame is looked for after damage


class _MpegFrame(NamedTuple):
    kind: tuple[int, int, int]  # version, layer, Hz: equal in all frames of a stream
    length: int  # bytes
    samples: int


def find_wrong_count(path: Path) -> str | None:
    """Why an MP3 does not hold the frames that its first one announces, as a rule that continues its name; None where it does, where it
    announces none, and for other files. Before libsndfile opens it, whose MP3 decoder would print a warning. Raises OSError."""
    with path.open("rb") as stream:
        head = stream.read(4)
        if not head.startswith(b"ID3") and _mpeg_frame(head) is None:
            return None
        found, stated, seconds, each = _count_frames(stream, None)
    if seconds > stated * each + max(_SLACK, each) and stated:
        return f"holds {seconds:.2f} s of audio, but its header announces {stated * each:.2f} s"
    return _cut_off(seconds, stated * each) if found < stated - 1 else None


def _check_mp3(stream: BinaryIO, samples: int, rate: int) -> str | None:
    """Frames, counted, against libsndfile's estimate of the length, where nothing announces it."""
    _, stated, seconds, each = _count_frames(stream, samples / rate)
    return _announces_less(seconds, samples, rate) if not stated and seconds > samples / rate + max(_SLACK, _MPEG_SLACK * each) else None


def _count_frames(stream: BinaryIO, estimate: float | None) -> tuple[int, int, float, float]:
    """How many frames of audio there are, how many are announced (0: it is not said), seconds of all and of one. They are counted either to
    be compared with what is announced, or with an `estimate` in seconds; not where the other is known, and not much further than that."""
    found, stated, seconds, each = 0, 0, 0.0, 0.0
    for frame, content in _mpeg_frames(stream):
        number = _stated_frames(content)
        if number is None:
            each = each or frame.samples / frame.kind[2]
            found, seconds = found + 1, seconds + frame.samples / frame.kind[2]
        elif not found:
            stated = number
        if (found and bool(stated) == (estimate is not None)) or seconds > 2 * max(estimate or 0.0, stated * each) + 60:
            break
    return found, stated, seconds, each


def _stated_frames(content: bytes) -> int | None:
    """How many frames follow one that holds nothing but that; 0 where it does not say, None where it is one of audio."""
    for mark, at in _LENGTHS.items():
        if (begin := content.find(mark)) >= 0:
            flags = int.from_bytes(content[begin + 4 : begin + 8], "big")
            return int.from_bytes(content[begin + at : begin + at + 4], "big") if flags & 1 or mark == b"VBRI" else 0
    return None


def _mpeg_frames(stream: BinaryIO) -> Iterator[tuple[_MpegFrame, bytes]]:
    """Each frame with its first 200 bytes; tags are skipped, and so is damage where another frame follows."""
    position, end, kind = 0, min(_size(stream), _MOST_BYTES), None
    while position < end:
        head = _read_at(stream, position, 200)
        frame = _mpeg_frame(head)
        if frame and (frame.kind == kind or _continues(stream, position, frame)):
            yield frame, head
            kind, position = frame.kind, position + frame.length
        elif head[:3] == b"ID3" and len(head) >= 10:
            position += 10 + sum((byte & 0x7F) << 7 * (3 - index) for index, byte in enumerate(head[6:10])) + 10 * bool(head[5] & 16)
        else:
            behind = _read_at(stream, position + 1, _SEARCHED)
            steps = (match.start() for match in re.finditer(rb"\xff", behind) if _follows(behind, match.start(), kind))
            if (step := next(steps, None)) is None:
                return
            position += 1 + step


def _continues(stream: BinaryIO, position: int, frame: _MpegFrame) -> bool:
    """Whether a frame of a kind that was not there before is one: another of its kind follows, or nothing."""
    behind = _mpeg_frame(_read_at(stream, position + frame.length, 4))
    return position + frame.length >= _size(stream) if behind is None else behind.kind == frame.kind


def _follows(data: bytes, position: int, kind: tuple[int, int, int] | None) -> bool:
    """Whether a frame begins here, and after it another one, or the end of the file."""
    first = _mpeg_frame(data[position : position + 4])
    if first is None or kind not in (None, first.kind):
        return False
    second = _mpeg_frame(data[position + first.length : position + first.length + 4])
    return second is not None and second.kind == first.kind


def _mpeg_frame(head: bytes) -> _MpegFrame | None:
    """What a frame's head announces (ISO 11172-3, 2.4.2.3); None where this is none, or one of a free bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, kbits, hertz = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or kbits in (0, 15) or hertz == 3:
        return None
    first = version == 3
    rate = _MPEG_RATES[hertz] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    bits, padding = _MPEG_KBITS[first, layer][kbits - 1] * 1000, head[2] >> 1 & 1
    length = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    return _MpegFrame((version, layer, rate), length, samples)


# Ogg


def _check_ogg(stream: BinaryIO, _samples: int, _rate: int) -> str | None:
    """A stream that begins after pages of another one."""
    position, begun = 0, False
    for _ in range(_MOST_PAGES):
        head = _read_at(stream, position, 27 + 255)
        if len(head) < 27 or head[:4] != b"OggS":
            break
        first = bool(head[5] & 2)
        if first and begun:
            return _JOINED
        begun, position = begun or not first, position + 27 + head[26] + sum(head[27 : 27 + head[26]])
    return None


_CHECKS: dict[str, Callable[[BinaryIO, int, int], str | None]] = {
    "AU": _check_au,
    "FLAC": _check_flac,
    "MP3": _check_mp3,
    "MPEG": _check_mp3,
    "NIST": _check_nist,
    "OGG": _check_ogg,
}
