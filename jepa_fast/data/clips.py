"""Which frames of a video make a clip: V-JEPA's rules (arXiv:2404.08471, also V-JEPA 2's, arXiv:2506.09985).

Checked against facebookresearch/vjepa2 c2963a4, src/datasets/video_dataset.py, `loadvideo_decord`; where that ends in
a wrong index or an assertion (no frame, one frame with overlap, fewer frames per second than wanted), here is a
ValueError or the one frame there is.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


def frame_step_of(average_fps: float, num_frames: int, *, fps: int | None = None,
                  duration: float | None = None) -> int:
    """Frames from one sample to the next for `fps` samples per second, or for clips of `duration` seconds.

    The video's own rate is rounded up first, the step down: 29.97 at fps = 4 has step 7, so 4.28 samples per second.
    """
    rate = math.ceil(average_fps)
    step = rate // fps if fps is not None else int(duration * rate / num_frames)
    if step < 1:
        wanted = f"fps = {fps}" if fps is not None else f"duration = {duration} with num_frames = {num_frames}"
        raise ValueError(f"{average_fps:.4g} frames per second are too few for {wanted}")
    return step


def clip_indices(num_video_frames: int, num_frames: int, frame_step: int, *, num_clips: int = 1,
                 generator: torch.Generator | None = None, allow_overlap: bool = False) -> np.ndarray:
    """Frame numbers int64 [num_clips, num_frames]; the clips lie in equal parts of the video, one in each.

    A clip spans clip_len = num_frames * frame_step frames, its samples evenly spread over both ends: 64 / 15 frames
    apart for 16 x 4. Its end is drawn from [clip_len, length of the part); without a generator it is clip_len.
    In a part no longer than that, the samples are spread over the part and its last frame fills up the rest; with
    allow_overlap the clips share frames before they do that.
    """
    if num_video_frames < (1 if allow_overlap else num_clips):
        raise ValueError(f"{num_video_frames} frames are too few for {num_clips} clips")
    clip_len, part_len = num_frames * frame_step, num_video_frames // num_clips
    if part_len > clip_len:
        return np.stack([_window(clip_len, part_len, num_frames, generator) + i * part_len for i in range(num_clips)])
    if not allow_overlap:
        return _filled_up(part_len, part_len // frame_step, num_frames) + np.arange(num_clips)[:, None] * part_len
    last = min(clip_len, num_video_frames) - 1
    shift = max(0, num_video_frames - clip_len) // max(1, num_clips - 1)
    return _filled_up(last, last // frame_step, num_frames) + np.arange(num_clips)[:, None] * shift


def _window(clip_len: int, part_len: int, num_frames: int, generator: torch.Generator | None) -> np.ndarray:
    end = clip_len if generator is None else torch.randint(clip_len, part_len, (1,), generator=generator).item()
    return np.linspace(end - clip_len, end, num_frames).clip(max=end - 1).astype(np.int64)


def _filled_up(end: int, num_spread: int, num_frames: int) -> np.ndarray:
    """`num_spread` numbers spread over [0, end], then the last one below `end`."""
    indices = np.full(num_frames, float(end))
    indices[:num_spread] = np.linspace(0, end, num_spread)
    return indices.clip(0, max(0, end - 1)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """How clips are taken from videos of any length and rate."""

    num_frames: int = 16                # per clip
    frame_step: int = 4                 # frames of the video per sample, where neither fps nor duration is given
    fps: int | None = None              # samples per second, at least: see frame_step_of
    duration: float | None = None       # seconds per clip
    skip_short: bool = False            # leave out videos shorter than a clip; else their last frame is repeated

    def __post_init__(self):
        for name in ("num_frames", "frame_step", "fps", "duration"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or name != "duration" and value != int(value)):
                kind = "a number of seconds above 0" if name == "duration" else "an integer of at least 1"
                raise ValueError(f"{name} must be {kind}, got {value}")
        if self.fps is not None and self.duration is not None:
            raise ValueError(f"fps and duration exclude each other, got {self.fps} and {self.duration}")

    def indices(self, num_video_frames: int, average_fps: float | None, generator: torch.Generator | None = None, *,
                num_clips: int = 1, allow_overlap: bool = False) -> np.ndarray:
        """`clip_indices` of a video; ValueError where it is too short or too slow."""
        step = self.frame_step
        if self.fps is not None or self.duration is not None:
            if not average_fps:
                raise ValueError("the frames per second are not known, which fps and duration need")
            step = frame_step_of(average_fps, self.num_frames, fps=self.fps, duration=self.duration)
        if self.skip_short and num_video_frames < self.num_frames * step:
            raise ValueError(f"too short: {num_video_frames} frames, a clip of {self.num_frames} x {step} needs "
                             f"{self.num_frames * step}")
        return clip_indices(num_video_frames, self.num_frames, step, num_clips=num_clips, generator=generator,
                            allow_overlap=allow_overlap)


EVERY_FOURTH = ClipSampling()           # V-JEPA 1's 16 frames, 4 apart
