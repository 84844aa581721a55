"""Does an audio file end early? libsndfile reads what is there of a cut-off WAV, Ogg or MP3 file, and says nothing."""

import os
import re
import struct
from collections.abc import Iterator
from math import prod
from typing import BinaryIO

# Sizes that programs write who cannot know them, as when they write to a pipe: ffmpeg, SoX, arecord and others.
STREAMED = (range(0x7F000000, 0x80000001), range(0xFFFF0000, 0x100000000))
MAX_JUNK = 1 << 16  # bytes searched for an MP3's first frame
UNHEARD_FRAMES = 8  # of an MP3, at most: its header, the encoder's delay and padding

# MP3: kbit/s by MPEG version and layer, and Hz of MPEG 1.
V1, V2 = "MPEG 1", "MPEG 2 and 2.5"
KBITS = {
    (V1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (V1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (V1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (V2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (V2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (V2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLES_A_FRAME = {(V1, 1): 384, (V1, 2): 1152, (V1, 3): 1152, (V2, 1): 384, (V2, 2): 1152, (V2, 3): 576}
RATES = (44100, 48000, 32000)
MPEG_1 = 3  # its code in a frame's header
RATE_DIVISORS = {MPEG_1: 1, 2: 2, 0: 4}  # of MPEG 1, 2 and 2.5


def ends_early(file: BinaryIO, container: str, num_samples: int) -> bool:
    """Whether there is less of a file than its container announces.

    Args:
        file: The file, open at its beginning.
        container: soundfile's name of its kind.
        num_samples: What soundfile reads of it, a channel, at the file's own rate.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if container == "OGG":
        return _ogg_ends_early(file, size)
    if container == "MP3":
        return _mp3_ends_early(file.read(), num_samples)
    return any(end > size for end in _end_of_data(file))


def _end_of_data(file: BinaryIO) -> Iterator[int]:
    """Where the samples of a WAV (RIFF, RF64, Wave64), AIFF, AU, CAF or NIST file must end, if its header says so."""
    magic = file.read(4)
    if magic == b".snd":
        start, length = struct.unpack(">II", file.read(8))
        if length not in STREAMED[1]:
            yield start + length
    elif magic == b"NIST":
        header = file.read(1020)
        fields = (b"sample_count", b"sample_n_bytes", b"channel_count")
        numbers = [re.search(name + rb" -i (\d+)", header) for name in fields]
        if all(numbers) and b"shorten" not in header:
            yield 1024 + prod(int(number[1]) for number in numbers)
    elif magic == b"caff":
        place = 8
        while len(head := _at(file, place, 12)) == 12:
            length = int.from_bytes(head[4:], "big", signed=True)  # -1 where it is not known
            if head.startswith(b"data"):
                yield place + 12 + length
            if length < 0:
                return
            place += 12 + length
    elif magic == b"riff":  # Sony Wave64: names of 16 bytes, sizes that count name and size
        place = 40
        while len(head := _at(file, place, 24)) == 24:
            length = int.from_bytes(head[16:], "little")
            if head.startswith(b"data"):
                yield place + length
            if head.startswith(b"data") or length < 24:
                return
            place += -(-length // 8) * 8
    elif magic in (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM"):
        order = "big" if magic in (b"RIFX", b"FORM") else "little"
        place, long_length = 12, None
        while len(head := _at(file, place, 8)) == 8:
            length = int.from_bytes(head[4:], order)
            if head.startswith(b"ds64"):
                long_length = int.from_bytes(_at(file, place + 16, 8), "little")
            if head.startswith((b"data", b"SSND")):
                if length == 0xFFFFFFFF and long_length:
                    yield place + 8 + long_length
                elif not any(length in streamed for streamed in STREAMED):
                    yield place + 8 + length
                return
            place += 8 + length + length % 2


def _at(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def _ogg_ends_early(file: BinaryIO, size: int) -> bool:
    """Whether the last page is cut off, or does not end its stream; or a second one follows, which is not read."""
    place, ended = 0, False
    while len(head := _at(file, place, 27)) == 27 and head.startswith(b"OggS") and not ended:
        ended = bool(head[5] & 4)
        place += 27 + head[26] + sum(file.read(head[26]))
    return not ended or place > size or head.startswith(b"OggS")


def _mp3_ends_early(data: bytes, num_samples: int) -> bool:
    """Whether the last frame is cut off, or frames are missing: counted by a Xing or Info header, or not read.

    Of a file with variable bitrate and without such a header libsndfile guesses the length, and reads no further.
    """
    place = 0
    while data[place : place + 3] == b"ID3":
        size = 0
        for byte in data[place + 6 : place + 10]:  # 7 bits each
            size = size << 7 | byte & 127
        place += 10 + size
    for first in range(place, min(place + MAX_JUNK, len(data))):
        length = _mp3_frame(data, first)
        if length and (_mp3_frame(data, first + length) or first + length >= len(data)):
            break
    else:
        return False  # of a kind that is not known here
    frames, place = 0, first
    while length := _mp3_frame(data, place):
        place, frames = place + length, frames + 1
    if place > len(data) or (place < len(data) < place + 4 and data[place] == 0xFF):
        return True
    head = data[first : first + _mp3_frame(data, first)]
    xing = max(head[:64].find(b"Xing"), head[:64].find(b"Info"))
    counted = xing > 0 and int.from_bytes(head[xing + 4 : xing + 8], "big") & 1
    kind = V1 if head[1] >> 3 & 3 == MPEG_1 else V2, 4 - (head[1] >> 1 & 3)
    if num_samples < (frames - UNHEARD_FRAMES) * SAMPLES_A_FRAME[kind]:
        return True
    # The header's own frame is among ours, and some programs count it too: one missing frame (24 to 72 ms) may pass.
    return bool(counted) and frames < int.from_bytes(head[xing + 8 : xing + 12], "big")


def _mp3_frame(data: bytes, place: int) -> int:
    """Bytes of the MPEG audio frame whose header stands at ``place``; 0 if none does."""
    head = int.from_bytes(data[place : place + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    kbits, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if head >> 21 != 0x7FF or version not in RATE_DIVISORS or layer == 4 or kbits in (0, 15) or rate == 3:
        return 0
    kind = V1 if version == MPEG_1 else V2, layer
    slot = 4 if layer == 1 else 1  # bytes; a frame is of whole slots
    bytes_a_second = 125 * KBITS[kind][kbits]
    rate = RATES[rate] // RATE_DIVISORS[version]
    return (SAMPLES_A_FRAME[kind] * bytes_a_second // (slot * rate) + padding) * slot
