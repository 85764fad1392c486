"""Images and clips in every batch, each from a source of its own: V-JEPA 2.1, arXiv:2603.14482.

    {"clips": [B, C, T, H, W],  "images": [B_i, C, H, W], or [B_i, C, 1, H, W] from a source of one-frame clips,
     "index", "labels": of the clips,  "image_index", "image_labels",  "bad_files", "num_bad_files": of both}

A batch of B clips has B * images_per_clip images. Both streams have their own epochs, each a function of (seed, step).
"""

from dataclasses import dataclass

from .images import ImageFolderData
from .loader import Batch
from .prefetch import Prefetcher
from .synthetic import SyntheticData, SyntheticVideoData
from .video import VideoData


class Mixed:
    """Videos beside images. To all but the training batches it is its videos."""

    def __init__(self, videos, images):
        if videos.in_chans != images.in_chans:
            raise ValueError(f"videos and images must have as many channels, got {videos.in_chans} and {images.in_chans}")
        self.videos, self.images = videos, images
        self.in_chans, self.labels, self.class_names = videos.in_chans, videos.labels, videos.class_names

    def __len__(self) -> int:
        return len(self.videos)

    def clip(self, index: int, *args, **kwargs):
        return self.videos.clip(index, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class MixedData:
    """A source of clips and one of images; a batch size counts the clips."""

    videos: VideoData | SyntheticVideoData = VideoData()
    images: VideoData | ImageFolderData | SyntheticData = VideoData(num_frames=1)  # VideoData of one frame reads images too
    images_per_clip: float = 1.0

    def __post_init__(self):
        if not self.images_per_clip > 0:
            raise ValueError(f"images_per_clip must be above 0, got {self.images_per_clip}")
        if getattr(self.images, "num_frames", 1) != 1:
            raise ValueError(f"images.num_frames must be 1, got {self.images.num_frames}")

    @property
    def transform(self):
        return self.videos.transform

    @property
    def eval_transform(self):
        return self.videos.eval_transform

    @property
    def num_workers(self) -> int:
        return self.videos.num_workers

    def build(self) -> Mixed:
        return Mixed(build("videos", self.videos), build("images", self.images))

    def batches(self, dataset: Mixed, *, global_batch_size: int, **run) -> Prefetcher:
        """Training batches; `run` as `load_batches` takes it. Raises ValueError for a broken number of images."""
        num_images = global_batch_size * self.images_per_clip
        if num_images != int(num_images):
            raise ValueError(f"images_per_clip must make a whole number of images, got {self.images_per_clip} for "
                             f"{global_batch_size} clips")
        clips = self.videos.batches(dataset.videos, global_batch_size=global_batch_size, **run)
        images = self.images.batches(dataset.images, global_batch_size=int(num_images), **run)
        pairs = ({"videos": clip, "images": image, "index": clip["index"]}
                 for clip, image in zip(clips.batches, images.batches, strict=True))
        return Prefetcher(pairs, clips.device, start_step=clips.start_step, finish=lambda pair, step: join(
            clips.finish(pair["videos"], step), images.finish(pair["images"], step)))


def build(name: str, source):
    try:
        return source.build()
    except (ValueError, OSError) as error:
        # the sources speak of `data`, of which there are two here
        raise type(error)(f"data.{name}: {error}") from None


def join(clips: Batch, images: Batch) -> Batch:
    pixels = images["images"] if "images" in images else images["clips"]
    if isinstance(pixels, list):
        raise ValueError(f"images must have one view each, got {len(pixels)}")
    return {"clips": clips["clips"], "images": pixels, "index": clips["index"], "labels": clips["labels"],
            "image_index": images["index"], "image_labels": images["labels"],
            "bad_files": clips["bad_files"] + images["bad_files"],
            "num_bad_files": clips["num_bad_files"] + images["num_bad_files"]}
