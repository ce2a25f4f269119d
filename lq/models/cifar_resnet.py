"""The CIFAR ResNets of 6n+2 layers, which timm lacks, registered with timm under its conventions."""

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

__all__ = ["CifarResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A: stride and zero channels).

    Args:
        in_channels: channels in.
        channels: channels out.
        stride: of the first convolution and the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Allocate the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.pad = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Features, shape ``(N, C, H, W)`` to ``(N, channels, H/stride, W/stride)``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return self.relu2(x + y)


class CifarResNet(nn.Module):
    """ResNet for small images: three stages of n basic blocks with 16, 32 and 64 channels, 6n+2 layers.

    Args:
        blocks: n.
        num_classes: outputs.
        in_chans: channels of the image.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    >>> import torch
    >>> CifarResNet(1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        """Allocate the layers, He-initialised."""
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(N, in_chans, H, W)`` to ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _build(blocks: int, pretrained: bool, num_classes: int = 10, in_chans: int = 3, **unused: Any) -> CifarResNet:
    if pretrained:
        raise ValueError("pretrained must be False: no weights are published here, pass checkpoint=PATH instead")
    unknown = [name for name in unused if not name.startswith("pretrained_cfg") and name != "cache_dir"]
    if unknown:
        raise TypeError(f"CIFAR ResNets take num_classes and in_chans, got {unknown}: remove them")
    return CifarResNet(blocks, num_classes, in_chans)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8, for very small images."""
    return _build(1, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20."""
    return _build(3, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32."""
    return _build(5, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56."""
    return _build(9, pretrained, **kwargs)
