"""Batches: data sets of images and videos, their random views, and the loader."""

from .clip_transform import ClipTransform, EvalClipTransform
from .clips import ClipSampling
from .feature_cache import FeatureCache
from .images import ImageFolder, ImageFolderData
from .impossible import ImpossiblePairs
from .loader import BadFile, BadFiles, load_batches, load_in_order, steps_per_epoch
from .mixed import Mixed, MixedData
from .mnist import Mnist, MnistData
from .moving_digits import MovingDigits, MovingDigitsData
from .shards import VideoShards
from .synthetic import SyntheticData, SyntheticImages, SyntheticVideoData, SyntheticVideos
from .tensor_augment import TensorAugment
from .trajectories import Trajectories
from .trajectory_batches import SyntheticTrajectoryData, TrajectoryData
from .transforms import AsIs, EvalTransform, IjepaTransform, MultiCrop, lejepa_minimal_views
from .two_rooms import DiscRooms, DotRooms, TwoRooms
from .two_rooms_data import TwoRoomsData
from .video import VideoData, VideoFolder, VideoList

__all__ = ["AsIs", "BadFile", "BadFiles", "ClipSampling", "ClipTransform", "DiscRooms", "DotRooms", "EvalClipTransform",
           "EvalTransform", "FeatureCache", "IjepaTransform", "ImageFolder", "ImageFolderData", "ImpossiblePairs", "Mixed",
           "MixedData", "Mnist", "MnistData", "MovingDigits", "MovingDigitsData", "MultiCrop", "SyntheticData",
           "SyntheticImages", "SyntheticTrajectoryData", "SyntheticVideoData", "SyntheticVideos", "TensorAugment",
           "Trajectories", "TrajectoryData", "TwoRooms", "TwoRoomsData", "VideoData", "VideoFolder", "VideoList",
           "VideoShards", "lejepa_minimal_views", "load_batches", "load_in_order", "steps_per_epoch"]
