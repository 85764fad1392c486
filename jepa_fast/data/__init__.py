"""Batches: data sets of images, their random views, and the loader."""

from .images import ImageFolder, ImageFolderData
from .loader import BadFile, BadFiles, load_batches, load_in_order, steps_per_epoch
from .mnist import Mnist, MnistData
from .synthetic import SyntheticData, SyntheticImages
from .tensor_augment import TensorAugment
from .transforms import AsIs, EvalTransform, IjepaTransform, MultiCrop, lejepa_minimal_views
from .two_rooms import DiscRooms, DotRooms, TwoRooms
from .two_rooms_data import TwoRoomsData

__all__ = ["AsIs", "BadFile", "BadFiles", "DiscRooms", "DotRooms", "EvalTransform", "IjepaTransform", "ImageFolder",
           "ImageFolderData", "Mnist", "MnistData", "MultiCrop", "SyntheticData", "SyntheticImages", "TensorAugment",
           "TwoRooms", "TwoRoomsData", "lejepa_minimal_views", "load_batches", "load_in_order", "steps_per_epoch"]
