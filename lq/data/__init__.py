"""The recipes' DataModules; users bring their own."""

from lq.data.cifar10 import CIFAR10Data
from lq.data.digits import DigitsData
from lq.data.image_folder import ImageFolderData
from lq.data.image_pack import ImagePackData
from lq.data.images import ImageData, Images
from lq.data.sampling import EpochSampler

__all__ = ["CIFAR10Data", "DigitsData", "EpochSampler", "ImageData", "ImageFolderData", "ImagePackData", "Images"]
