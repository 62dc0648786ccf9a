"""Networks that a user would pick instead: a 3D ResNet-50, a 2D ResNet-50 in its ACS form, and ViViT, random weights.

They compute something else than PlaneCycle, so that there is nothing to compare their outputs with; each takes
volumes (B, 3, D, height, width) and returns one vector per volume.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cells import PEERS, Volume
from .contenders import Contender, NotHereError

WIDTH = {"3D ResNet-50": 2048, "ACS ResNet-50": 2048, "ViViT-B": 768}


def peer(name: str, volume: Volume, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """One of `cells.PEERS` in eval mode, for this size of volumes.

    Raises NotHereError where its library is not installed, or where it does not take such volumes.
    """
    if name not in PEERS:
        raise ValueError(f"name must be one of {', '.join(PEERS)}, got {name!r}")
    with torch.device(device):
        torch.manual_seed(0)
        made = {"3D ResNet-50": _resnet3d, "ACS ResNet-50": _resnet_acs, "ViViT-B": _vivit}[name](volume)
    twice = Contender(made, lambda vectors, _: (vectors, vectors))  # as patches too: peers run like everything else
    return twice.to(device, dtype).eval()


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision without its operators raises RuntimeError
        raise NotHereError(f"needs {name.split('.')[0]}: {error}") from error


def _resnet3d(volume: Volume) -> nn.Module:
    """MONAI's where it is installed, else torchvision's video ResNet with bottlenecks and full 3D convolutions."""
    with suppress(NotHereError):
        monai = _imported("monai.networks.nets")
        return monai.resnet50(spatial_dims=3, n_input_channels=3, feed_forward=False, pretrained=False)
    video = _imported("torchvision.models.video.resnet")
    made = video.VideoResNet(video.Bottleneck, [video.Conv3DSimple] * 4, [3, 4, 6, 3], video.BasicStem)
    made.fc = nn.Identity()
    return made


def _resnet_acs(volume: Volume) -> nn.Module:
    """torchvision's ResNet-50 with its 2D kernels on three planes (Yang et al., Reinventing 2D Convolutions for 3D)."""
    made = _imported("torchvision.models").resnet50()
    made.fc = nn.Identity()
    return to_acs(made)


class ACSConv(nn.Module):
    """A 2D convolution on volumes: a third of its kernels looks along each plane, axial, coronal and sagittal."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[0], conv.padding[0]
        third = -(-conv.out_channels // 3)
        self.parts = [third, third, conv.out_channels - 2 * third]

    def forward(
        self,
        x: Tensor,  # (B, C, D, height, width)
    ) -> Tensor:  # (B, out, D', height', width')
        if self.weight.shape[-1] == 1:  # the same along every plane
            return F.conv3d(x, self.weight.unsqueeze(2), self.bias, self.stride)
        kernels, outputs = self.weight.split(self.parts), []
        biases = (None, None, None) if self.bias is None else self.bias.split(self.parts)
        for axis, (kernel, bias) in enumerate(zip(kernels, biases)):
            padding = [0 if i == axis else self.padding for i in range(3)]
            outputs.append(F.conv3d(x, kernel.unsqueeze(2 + axis), bias, self.stride, padding))
        return torch.cat(outputs, 1)


def to_acs(module: nn.Module) -> nn.Module:
    """A 2D CNN for volumes, in place: convolutions become ACS convolutions, norms and pools those of three axes."""
    for name, child in module.named_children():
        setattr(module, name, _acs_of(child))
    return module


def _acs_of(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return ACSConv(layer)
    if isinstance(layer, nn.BatchNorm2d):
        norm = nn.BatchNorm3d(layer.num_features, layer.eps, layer.momentum)
        norm.load_state_dict(layer.state_dict())
        return norm
    if isinstance(layer, nn.MaxPool2d):
        return nn.MaxPool3d(layer.kernel_size, layer.stride, layer.padding)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return nn.AdaptiveAvgPool3d(1)  # what a classifier's is; its output size is (1, 1)
    return to_acs(layer)


class _Vivit(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, volume: Tensor) -> Tensor:  # (B, 3, D, height, width) -> (B, C)
        return self.model(volume.transpose(1, 2)).last_hidden_state[:, 0]


def _vivit(volume: Volume) -> nn.Module:
    """transformers' ViViT-B: all tubelets of 2 slices and 16 x 16 pixels in one sequence."""
    if volume.height != volume.width or volume.depth % 2:
        raise NotHereError("ViViT takes square pictures and an even number of slices")
    transformers = _imported("transformers")
    config = transformers.VivitConfig(image_size=volume.height, num_frames=volume.depth, tubelet_size=[2, 16, 16])
    return _Vivit(transformers.VivitModel(config, add_pooling_layer=False))
