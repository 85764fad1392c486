"""Frames of a video by their numbers, through PyAV or torchcodec.

A decoder is opened on a path or on the bytes of a file, has `num_frames` and `average_fps` (None: unknown), and
`read(numbers)` gives uint8 [len(numbers), H, W, 3] RGB, upright, numbers counted in display order, in any order and
repeated as wanted. It raises whatever its library raises, or ValueError in one line; `close()` ends it.
One thread each: the loader's processes are the parallelism.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import numpy as np

DecoderName = Literal["auto", "pyav", "torchcodec"]
# a seek throws away what the decoder holds: skip fewer frames than this by decoding them
_WORTH_A_SEEK = 16


class PyAV:
    """Seeks to the last keyframe before the first frame wanted and decodes up to the last one.

    Where the container says where all frames lie (mp4, mov, avi) nothing else of the file is read; others are read
    once from end to end, without decoding, to number their frames.
    """

    def __init__(self, source: str | bytes):
        self._source = source
        self._open()
        self.average_fps = float(self._stream.average_rate) if self._stream.average_rate else None
        entries = self._stream.index_entries
        if self._stream.frames == len(entries) > 0:
            self._id, packets = "dts", [(entry.timestamp, entry.is_keyframe, not entry.is_discard) for entry in entries]
        else:
            self._id, packets = "pts", [(packet.pts, packet.is_keyframe, _is_shown(packet))
                                        for packet in self._container.demux(self._stream) if packet.size]
            self._is_at_start = False
        # per keyframe, known by its time stamp: frames shown among the packets before it
        self._times, self._keyframes, self.num_frames = [], [], 0
        for time, is_keyframe, is_shown in packets:
            if is_keyframe:
                self._times.append(time)
                self._keyframes.append(self.num_frames)
            self.num_frames += is_shown
        self._shown_before = dict(zip(self._times, self._keyframes, strict=True))
        if not self._keyframes or not self.num_frames:
            raise ValueError("no keyframe" if packets else "no frames")

    def _open(self) -> None:
        import av

        self._container = av.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source)
        streams = [stream for stream in self._container.streams.video
                   if not stream.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError("no video in it")
        self._stream, self._is_at_start = streams[0], True
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = av.stream.Discard.all
        self._stream.codec_context.thread_count = 1
        self._to_rgb = av.video.reformatter.VideoReformatter()

    def close(self) -> None:
        self._container.close()

    def read(self, numbers: np.ndarray) -> np.ndarray:
        out, playing, at = None, None, -1
        for number in np.unique(numbers).tolist():
            keyframe = self._keyframes[max(0, bisect_right(self._keyframes, number) - 1)]
            if playing is None or keyframe - at >= _WORTH_A_SEEK:
                playing = self._play(number)
            at, frame = next((pair for pair in playing if pair[0] >= number), (None, None))
            if at != number:
                raise ValueError(f"frame {number} of {self.num_frames} cannot be decoded")
            pixels = self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
            pixels = np.rot90(pixels, round(frame.rotation / 90))
            if out is None:
                out = np.empty((len(numbers), *pixels.shape), np.uint8)
            out[numbers == number] = pixels
        return out

    def _play(self, number: int) -> Iterator:
        """(number, frame) in display order, from a keyframe that is shown no later than frame `number`."""
        last = bisect_right(self._keyframes, number) - 1
        # a keyframe is shown after the frames that refer back across it: then the one before it is needed
        for place in range(last, max(0, last - 2), -1):
            self._container.seek(self._times[place], stream=self._stream)
            self._is_at_start = False
            playing = self._decode()
            first = next(playing, None)
            if first and first[0] <= number:
                return chain([first], playing)
        if not self._is_at_start:
            self.close()
            self._open()
        self._is_at_start = False
        return self._decode()

    def _decode(self) -> Iterator:
        """(number, frame) from the next keyframe on, frames that refer back across it left out."""
        start = number = shown_before = None
        times = []      # of the packets read before the first frame comes
        for packet in self._container.demux(self._stream):
            if shown_before is None:
                shown_before = self._shown_before.get(getattr(packet, self._id)) if packet.is_keyframe else None
                if shown_before is None:
                    continue
                start = packet.pts
            if number is None and _is_shown(packet) and packet.pts is not None:
                times.append(packet.pts)
            for frame in packet.decode():
                if number is not None:
                    number += 1
                elif frame.pts is None or start is None:
                    number = shown_before
                elif frame.pts >= start:
                    number = shown_before + sum(time < frame.pts for time in times)
                else:
                    continue
                yield number, frame


def _is_shown(packet) -> bool:
    """False for the empty packet at the end and for what an edit list cuts away."""
    return packet.size > 0 and not packet.is_discard


class TorchCodec:
    """torchcodec's decoder on the CPU: the same values as PyAV where both number the frames alike.

    It reads the whole file once, without decoding, and numbers frames by their time stamps, which avi and MPEG streams
    get wrong (seen with torchcodec 0.17): "auto" therefore prefers PyAV.
    """

    def __init__(self, source: str | bytes):
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        self.num_frames = self._decoder.metadata.num_frames
        self.average_fps = self._decoder.metadata.average_fps

    def close(self) -> None:
        self._decoder = None

    def read(self, numbers: np.ndarray) -> np.ndarray:
        wanted, order = np.unique(numbers, return_inverse=True)
        return self._decoder.get_frames_at(indices=wanted.tolist()).data.numpy()[order]


def _import_pyav() -> None:
    import av

    if tuple(map(int, av.__version__.split(".")[:2])) < (17, 1):
        raise ImportError(f"version 17.1 or newer is needed, got {av.__version__}")


def _import_torchcodec() -> None:
    import torchcodec.decoders  # noqa: F401


_DECODERS = {"pyav": (PyAV, _import_pyav, 'pip install "jepa_fast[video]"'),
             "torchcodec": (TorchCodec, _import_torchcodec, 'pip install "jepa_fast[torchcodec]"')}


def choose_decoder(name: DecoderName) -> type[PyAV] | type[TorchCodec]:
    """The decoder of that name; "auto": PyAV, else torchcodec. ImportError, with the pip command, where it is missing."""
    if name not in ("auto", *_DECODERS):
        raise ValueError(f"decoder must be auto, pyav or torchcodec, got {name!r}")
    errors = []
    for candidate in _DECODERS if name == "auto" else (name,):
        decoder, probe, command = _DECODERS[candidate]
        try:
            probe()
            return decoder
        # torchcodec raises RuntimeError where it finds no FFmpeg
        except (ImportError, OSError, RuntimeError) as error:
            errors.append(f"{candidate}: {command} ({' '.join(str(error).split())[:200]})")
    raise ImportError("videos need a decoder; " + "; ".join(errors))
