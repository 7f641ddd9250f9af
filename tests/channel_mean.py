"""A backbone of one's own, small enough to check by hand: the feature is the mean of each colour channel."""

from torch import Tensor, nn

from featcache.backbones import Backbone, make_backbone
from featcache.spec import Preprocessing


class ChannelMean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))  # (B, 3, S, S) -> (B, 3)


def channel_mean() -> Backbone:
    return make_backbone(
        ChannelMean(),
        preprocessing=Preprocessing(resize_size=8, crop_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        label="no weights",
    )
