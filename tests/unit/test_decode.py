"""Recordings of every kind, whole, broken and hostile."""

import struct
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from dispatchers.audio.decode import decode, load, plain, probe, spool
from dispatchers.errors import AudioError, AudioTooLong, AudioTooShort, EmptyAudio, NotAudio, UnsupportedAudio

ROOT = Path(__file__).parents[2]
SPEECH = ROOT / "tests/fixtures/speech/go-forward.wav"
MALFORMED = ROOT / "tests/fixtures/malformed"
RATE = 16_000
TONE_HZ = 440


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    at = np.arange(int(seconds * rate))
    return (8_000 * np.sin(2 * np.pi * TONE_HZ * at / rate)).astype(np.int16)


def wav(samples: np.ndarray, rate: int = RATE, channels: int = 1, claim: int | None = None) -> bytes:
    data = samples.astype("<i2").tobytes()
    size = len(data) if claim is None else claim
    align = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * align & 0xFFFFFFFF, align, 16)
    head = b"RIFF" + struct.pack("<I", min(size + 36, 0xFFFFFFFF)) + b"WAVEfmt " + struct.pack("<I", len(form)) + form
    return head + b"data" + struct.pack("<I", size) + data


def encoded(path: Path, container: str, codec: str, rate: int, layout: str = "mono", *, seconds: float = 2.0) -> Path:
    import av

    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=size)
        frame = av.AudioFrame.from_ndarray(tone(seconds, rate)[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = rate
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


def pitch(samples: np.ndarray) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples.astype(float)))
    return float(np.argmax(spectrum) * RATE / len(samples))


@pytest.fixture
def file(tmp_path: Path):
    def write(data: bytes, name: str = "upload") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout"),
    [
        ("webm", "libopus", 48_000, "stereo"),
        ("ogg", "libopus", 48_000, "mono"),
        ("mp3", "libmp3lame", 44_100, "stereo"),
        ("mp4", "aac", 44_100, "mono"),
        ("ipod", "aac", 48_000, "stereo"),
        ("adts", "aac", 22_050, "mono"),
        ("flac", "flac", 44_100, "mono"),
        ("aiff", "pcm_s16be", 22_050, "mono"),
        ("au", "pcm_mulaw", 8_000, "mono"),
        ("caf", "pcm_s16be", 48_000, "mono"),
        ("wav", "pcm_f32le", 96_000, "stereo"),
    ],
)
def test_containers(tmp_path: Path, container: str, codec: str, rate: int, layout: str):
    path = encoded(tmp_path / "upload", container, codec, rate, layout)
    samples = load(path)
    assert samples.dtype == np.int16
    assert abs(len(samples) - 2 * RATE) < RATE // 10  # codecs pad at both ends
    assert abs(pitch(samples) - TONE_HZ) < 2
    assert probe(path).sample_rate in (rate, 48_000)


def test_sixteen_kilohertz_pcm_is_exact(file):
    samples = tone(0.5)
    assert np.array_equal(load(file(wav(samples))), samples)


@pytest.mark.parametrize("name", [None, "upload"])
def test_plain_wav_is_read_as_ffmpeg_reads_it(file, name: str | None):
    whole = wav(tone(0.5))
    chunk = b"LIST\x05\x00\x00\x00abcde\x00"
    for content in (whole, whole[:12] + chunk + whole[12:], whole[:36] + chunk + whole[36:], whole + chunk):
        samples = plain(content)
        assert samples is not None
        assert np.array_equal(samples, load(content if name is None else file(content, name)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        wav(tone(0.5))[:-1],
        wav(tone(0.5))[:-2],
        wav(tone(0.5))[:40],
        wav(tone(0.5), rate=8_000),
        wav(tone(0.5), channels=2),
        wav(tone(0.5), claim=0),
        wav(tone(0.5), claim=15_999),
        wav(tone(0.5), claim=0xFFFFFFFF),
        wav(tone(0.5)) + b"data\x02\x00\x00\x00ab",
        wav(tone(0.5)).replace(b"fmt \x10", b"fmt \x12"),
        wav(tone(0.5)).replace(b"fmt ", b"data"),
        wav(tone(0.5)).replace(b"fmt ", b"what"),
        wav(tone(0.5)).replace(b"RIFF", b"RF64"),
        wav(tone(0.5))[:12] + 16 * b"JUNK\x04\x00\x00\x00abcd" + wav(tone(0.5))[12:],
        wav(tone(0.5)).replace(b"\x01\x00\x01\x00", b"\x11\x00\x01\x00"),
    ],
)
def test_a_wav_that_leaves_a_doubt_is_not_plain(content: bytes):
    assert plain(content) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_header_is_either_doubted_or_read_as_ffmpeg_reads_it(seed: int):
    chance = np.random.default_rng(seed)
    for _ in range(50):
        content = bytearray(wav(tone(0.2)))
        for at in chance.integers(0, 48, 1 + seed % 3):
            content[at] = chance.choice([0, 1, 2, 0x10, 0xFF, content[at] ^ 1, chance.integers(256)])
        with suppress(AudioError):
            samples = plain(bytes(content))
            assert samples is None or np.array_equal(samples, load(bytes(content)))


def test_plain_wav_has_limits_too():
    assert len(plain(wav(tone(0.5)), limit_ms=500)) == RATE // 2
    with pytest.raises(AudioTooLong):
        plain(wav(tone(0.5)), limit_ms=499)
    with pytest.raises(AudioTooShort):
        plain(wav(tone(0.099)))


def test_probe_tells_the_header():
    probed = probe(SPEECH)
    assert (probed.codec, probed.container, probed.channels, probed.sample_rate) == ("pcm_s16le", "wav", 1, RATE)
    assert probed.duration_ms is not None
    assert abs(probed.duration_ms - len(load(SPEECH)) / 16) <= 1


def test_pieces_and_spool_are_the_whole(tmp_path: Path):
    whole = load(SPEECH)
    assert np.array_equal(np.concatenate(list(decode(SPEECH))), whole)
    spooled = spool(SPEECH, tmp_path / "raw")
    assert np.array_equal(spooled, whole)
    assert not spooled.flags.writeable


def test_stereo_is_mixed(file):
    both = np.stack([tone(0.5), np.zeros(RATE // 2, np.int16)], axis=1)
    mixed = load(file(wav(both, channels=2)))
    assert len(mixed) == RATE // 2
    assert abs(pitch(mixed) - TONE_HZ) < 3


@pytest.mark.parametrize("name", ["awful.wav", "bad.wav", "evil.wav", "null.wav"])
def test_malformed_files_are_refused(name: str):
    with pytest.raises((NotAudio, UnsupportedAudio)):
        load(MALFORMED / name)


def test_empty_file(file):
    for act in (load, probe):
        with pytest.raises(EmptyAudio):
            act(file(b""))


def other_kinds() -> dict[str, bytes]:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.wav", wav(tone(1)))
    here = SPEECH.resolve()
    return {
        "picture.png": bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
            "1f15c4890000000a49444154789c6300010000050001"
            "0d0a2db40000000049454e44ae426082"
        ),
        "archive.zip": packed.getvalue(),
        "text.txt": b"not audio at all, but a sentence. " * 50,
        "text.mp3": b"not audio at all, but a sentence. " * 50,
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{here.as_uri()}\n#EXT-X-ENDLIST\n".encode(),
        "list.ffconcat": f"ffconcat version 1.0\nfile '{here}'\n".encode(),
        "session.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "manifest.mpd": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{here}</BaseURL>'
        "</MPD>".encode(),
        "zeros.bin": bytes(4096),
    }


@pytest.mark.parametrize("name", other_kinds())
def test_what_is_not_audio_is_refused(file, name: str):
    path = file(other_kinds()[name], name)
    with pytest.raises(NotAudio) as raised:
        load(path)
    assert str(path.parent) not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    "reference",
    [
        "ffconcat version 1.0\nfile neighbour.aac\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nneighbour.aac\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nhttp://127.0.0.1:9/neighbour.aac\n#EXT-X-ENDLIST\n",
    ],
)
def test_no_file_brings_in_its_neighbours(file, tmp_path: Path, reference: str):
    encoded(tmp_path / "neighbour.aac", "adts", "aac", 44_100)
    for act in (load, probe):
        with pytest.raises(NotAudio):
            act(file(reference.encode(), "list.m3u8"))


def test_a_video_without_sound_is_not_audio(tmp_path: Path):
    import av

    path = tmp_path / "upload"
    with av.open(str(path), "w", format="avi") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame(32, 32, "yuvj420p")))
        out.mux(stream.encode(None))
    with pytest.raises(NotAudio):
        load(path)


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 9), (RATE, 0), (1, 1), (4_000, 1), (400_000, 1), (0, 1)])
def test_absurd_shapes_are_refused(file, rate: int, channels: int):
    with pytest.raises((UnsupportedAudio, NotAudio)):
        load(file(wav(tone(1), rate, channels)))


def test_nine_channels_are_named_unsupported(file):
    with pytest.raises(UnsupportedAudio):
        load(file(wav(tone(1), channels=9)))


def test_truncated_files_give_what_they_hold(file, tmp_path: Path):
    cut = load(file(wav(tone(1))[:16_045]))
    assert 7_990 <= len(cut) <= 8_001
    mp3 = encoded(tmp_path / "whole", "mp3", "libmp3lame", 44_100).read_bytes()
    half = load(file(mp3[: len(mp3) // 2], "half"))
    assert RATE // 2 < len(half) < 3 * RATE // 2


def test_damage_in_the_middle_costs_only_itself(file, tmp_path: Path):
    mp3 = bytearray(encoded(tmp_path / "whole", "mp3", "libmp3lame", 44_100, seconds=4).read_bytes())
    mp3[len(mp3) // 2 : len(mp3) // 2 + 600] = bytes(600)
    assert len(load(file(bytes(mp3)))) > 3 * RATE


def test_a_claimed_length_is_not_believed(file):
    path = file(wav(tone(1), claim=0xFFFFFFF0))
    assert len(load(path)) == RATE


def test_rate_changing_midway(file, tmp_path: Path):
    one = encoded(tmp_path / "one", "adts", "aac", 44_100).read_bytes()
    two = encoded(tmp_path / "two", "adts", "aac", 22_050).read_bytes()
    samples = load(file(one + two))
    assert abs(len(samples) - 4 * RATE) < RATE // 5
    assert abs(pitch(samples[-RATE:]) - TONE_HZ) < 2


def test_limits(file, tmp_path: Path):
    path = file(wav(tone(2)))
    assert len(load(path, limit_ms=2_000)) == 2 * RATE
    with pytest.raises(AudioTooLong):
        load(path, limit_ms=1_999)
    with pytest.raises(AudioTooLong):
        spool(path, tmp_path / "raw", limit_ms=1_999)
    assert not (tmp_path / "raw").exists()
    assert len(load(file(wav(tone(0.1))))) == RATE // 10
    with pytest.raises(AudioTooShort):
        load(file(wav(tone(0.099))))
    with pytest.raises(NotAudio):
        load(file(wav(tone(0))))


@pytest.mark.parametrize("seed", range(40))
def test_noise_after_a_header_never_escapes_the_tree(file, seed: int, tmp_path: Path):
    chance = np.random.default_rng(seed)
    container, codec = [("mp3", "libmp3lame"), ("ogg", "libopus"), ("flac", "flac"), ("mp4", "aac")][seed % 4]
    data = bytearray(encoded(tmp_path / "whole", container, codec, 48_000, seconds=0.5).read_bytes())
    for at in chance.integers(0, len(data), 30):
        data[at] = chance.integers(256)
    with suppress(AudioError):
        assert load(file(bytes(data)), limit_ms=60_000).dtype == np.int16
