"""Networks: everything timm has, and a few that it lacks, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from lq.models.cifar_resnet import CifarResNet
from lq.models.mobilenet_v1 import MobileNetV1

__all__ = ["CifarResNet", "MobileNetV1", "create_model", "load_weights"]


def create_model(
    name: str,
    num_classes: int = 10,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint: str | None = None,
    options: Mapping[str, Any] | None = None,
    channels_last: bool = False,
) -> nn.Module:
    """Build a timm model, optionally from a file of float weights.

    Args:
        name: of any timm model, or of ours: cifar_resnet8, cifar_resnet20, cifar_resnet32, cifar_resnet56,
            mobilenetv1_075_same.
        num_classes: outputs.
        in_chans: channels of the image.
        pretrained: whether timm downloads its weights.
        checkpoint: file of float weights, .safetensors or a torch file that loads with weights_only.
        options: further arguments of the model, such as img_size.
        channels_last: keep images with their channels side by side, in which most convolutions are faster.

    Returns:
        The model.

    Raises:
        ValueError: for a name timm does not know, with those that come near.

    >>> type(create_model("cifar_resnet8")).__name__
    'CifarResNet'
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:8]
        raise ValueError(f"model.name must be a timm model, got {name!r}: did you mean one of {near}?")
    model = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **dict(options or {})
    )
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load float weights strictly, never unpickling code.

    Args:
        model: the model.
        path: .safetensors, or a torch file holding a state dict, alone or under "state_dict" or "model".

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where its keys or shapes do not fit, saying which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model.checkpoint must be a file of weights, got {str(path)!r} which does not exist")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state.get("model", state))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"model.checkpoint {path.name!r} does not fit {type(model).__name__}: {error}") from error
