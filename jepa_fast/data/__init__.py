"""Batches: data sets of images, their random views, and the loader."""

from .images import ImageFolder, ImageFolderData
from .impossible import ImpossiblePairs
from .loader import BadFile, BadFiles, load_batches, load_in_order, steps_per_epoch
from .mnist import Mnist, MnistData
from .moving_digits import MovingDigits, MovingDigitsData
from .synthetic import SyntheticData, SyntheticImages
from .tensor_augment import TensorAugment
from .transforms import AsIs, EvalTransform, IjepaTransform, MultiCrop, lejepa_minimal_views

__all__ = ["AsIs", "BadFile", "BadFiles", "EvalTransform", "IjepaTransform", "ImageFolder", "ImageFolderData",
           "ImpossiblePairs", "Mnist", "MnistData", "MovingDigits", "MovingDigitsData", "MultiCrop", "SyntheticData",
           "SyntheticImages", "TensorAugment", "lejepa_minimal_views", "load_batches", "load_in_order",
           "steps_per_epoch"]
