"""Batches: data sets of images and videos, their random views, and the loader."""

from .clip_transform import ClipTransform, EvalClipTransform
from .clips import ClipSampling
from .device_crops import DeviceMultiCrop, dino_views, ijepa_views
from .feature_cache import FeatureCache
from .hf_images import HfImages, HfImagesData
from .images import ImageData, ImageFolder, ImageFolderData
from .impossible import ImpossiblePairs
from .loader import BadFile, BadFiles, load_batches, load_in_order, steps_per_epoch
from .mixed import Mixed, MixedData
from .mnist import Mnist, MnistData
from .moving_digits import MovingDigits, MovingDigitsData
from .prefetch import Prefetcher
from .shards import ImageShards, ImageShardsData, VideoShards
from .synthetic import SyntheticData, SyntheticImages, SyntheticVideoData, SyntheticVideos
from .tensor_augment import TensorAugment
from .trajectories import Trajectories
from .trajectory_batches import SyntheticTrajectoryData, TrajectoryData
from .transforms import AsIs, EvalTransform, IjepaTransform, MultiCrop, lejepa_minimal_views
from .two_rooms import DiscRooms, DotRooms, TwoRooms
from .two_rooms_data import TwoRoomsData
from .video import VideoData, VideoFolder, VideoList

__all__ = ["AsIs", "BadFile", "BadFiles", "ClipSampling", "ClipTransform", "DeviceMultiCrop", "DiscRooms", "DotRooms",
           "EvalClipTransform", "EvalTransform", "FeatureCache", "HfImages", "HfImagesData", "IjepaTransform",
           "ImageData", "ImageFolder", "ImageFolderData", "ImageShards", "ImageShardsData", "ImpossiblePairs", "Mixed",
           "MixedData", "Mnist", "MnistData", "MovingDigits", "MovingDigitsData", "MultiCrop", "Prefetcher",
           "SyntheticData", "SyntheticImages", "SyntheticTrajectoryData", "SyntheticVideoData",
           "SyntheticVideos", "TensorAugment", "Trajectories", "TrajectoryData", "TwoRooms", "TwoRoomsData",
           "VideoData", "VideoFolder", "VideoList", "VideoShards", "dino_views", "ijepa_views",
           "lejepa_minimal_views", "load_batches", "load_in_order", "steps_per_epoch"]
