"""A backbone and a transform of one's own: images are squashed to a square, in negative."""

import numpy as np
from channel_mean import ChannelMean
from numpy.typing import NDArray
from PIL import Image

from featcache.backbones import Backbone, make_backbone
from featcache.spec import Preprocessing


def negative(image: Image.Image) -> NDArray[np.uint8]:
    if image.size == (13, 13):
        raise RuntimeError("thirteen")
    return 255 - np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))


def negative_mean() -> Backbone:
    return make_backbone(
        ChannelMean(),
        preprocessing=Preprocessing(resize_size=8, crop_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        transform=negative,
        label="no weights",
    )
