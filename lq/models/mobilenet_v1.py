"""MobileNetV1 of any width with TensorFlow's padding, registered with timm under its conventions."""

from typing import Any

from timm.layers import create_conv2d  # pyright: ignore[reportPrivateImportUsage]
from timm.models import register_model
from torch import Tensor, nn

__all__ = ["MobileNetV1"]

_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))  # channels, blocks, stride of the first


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with batch norm and ReLU6.

    Args:
        in_channels: channels in.
        channels: channels out.
        stride: of the depthwise convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Allocate the layers."""
        super().__init__()
        self.conv_dw = create_conv2d(in_channels, in_channels, 3, stride=stride, padding="same", depthwise=True)
        self.bn1 = nn.BatchNorm2d(in_channels, eps=1e-3)
        self.act1 = nn.ReLU6()
        self.conv_pw = create_conv2d(in_channels, channels, 1, padding="same")
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.act2 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """Features, shape ``(N, in_channels, H, W)`` to ``(N, channels, H/stride, W/stride)``."""
        x = self.act1(self.bn1(self.conv_dw(x)))
        return self.act2(self.bn2(self.conv_pw(x)))


class MobileNetV1(nn.Module):
    """MobileNetV1: a stem and thirteen depthwise separable blocks.

    Args:
        width: factor on all channels.
        num_classes: outputs.
        in_chans: channels of the image.

    Source: Howard et al., MobileNets, 2017, table 1; keys are those of timm's MobileNetV1.

    >>> import torch
    >>> MobileNetV1(0.25)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """

    def __init__(self, width: float = 1.0, num_classes: int = 1000, in_chans: int = 3) -> None:
        """Allocate the layers."""
        super().__init__()
        self.num_classes = num_classes
        channels = int(32 * width)
        self.conv_stem = create_conv2d(in_chans, channels, 3, stride=2, padding="same")
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.act1 = nn.ReLU6()
        stages = []
        for out, blocks, stride in _STAGES:
            stage = []
            for i in range(blocks):
                stage.append(DepthwiseSeparable(channels, int(out * width), stride if i == 0 else 1))
                channels = int(out * width)
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(N, in_chans, H, W)`` to ``(N, num_classes)``."""
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))


@register_model
def mobilenetv1_075_same(pretrained: bool = False, **kwargs: Any) -> MobileNetV1:
    """MobileNetV1 of width 0.75, padded as in TensorFlow."""
    if pretrained:
        raise ValueError("pretrained must be False: no weights are published here, pass checkpoint=PATH instead")
    known = {name: kwargs[name] for name in ("num_classes", "in_chans") if name in kwargs}
    unknown = [n for n in kwargs if n not in known and not n.startswith("pretrained_cfg") and n != "cache_dir"]
    if unknown:
        raise TypeError(f"MobileNetV1 takes num_classes and in_chans, got {unknown}: remove them")
    return MobileNetV1(0.75, **known)
