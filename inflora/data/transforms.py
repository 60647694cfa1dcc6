"""Batched augmentation on the device of the images, equal to torchvision's transforms of PIL images.

Resizing, cropping and flipping are, along one axis of one sample, a few weighted source pixels per output pixel. So a whole batch, with
another box for every sample, is one axis after the other a handful of gathered and weighted rows. The arithmetic is Pillow's: integer
weights in units of 2**-22, pixels rounded to 0..255 between the axes, horizontal axis first, nothing from outside the crop box. Hence the
result is Pillow's, pixel by pixel, and depends neither on the batch a sample is in nor on the order in which a device adds up. (From
version 13 on, Pillow begins with the vertical axis when an image shrinks more in height; the published numbers are older.)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_ATTEMPTS = 10  # tries of RandomResizedCrop before it falls back to a centre crop
_BOX_DRAWS = 2 * _ATTEMPTS + 2
_MAX_RATIO = 4 / 3  # of a crop's width to its height, and of its height to its width
_WEIGHT_BITS = 22  # Pillow's: 255 times the absolute weights still fits into 31 bits
_REACH = {"bilinear": 1, "bicubic": 2}  # half the width of a filter, in output or source pixels, whichever are larger
_CPU_CHUNK_BYTES = 2**23  # working memory: on a CPU, few enough images at a time to stay in its cache
_CHUNK_BYTES = 2**30


class Axis(NamedTuple):
    """How one axis of every image is resampled; fields are (b,), with b = 1 if all images are treated alike.

    Pixels [start, start + length) are resized to `resized` pixels, of which [offset, offset + S) are kept, in reverse order where
    `reverse`.
    """

    start: Tensor
    length: Tensor
    resized: Tensor
    offset: Tensor
    reverse: Tensor


def _filter(distance: Tensor, interpolation: str) -> Tensor:
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1  # Keys' cubic with a = -1/2
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _taps(num_pixels: int, axis: Axis, size: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Which source pixels make up each output pixel, and with which weights.

    Returns:
        indices: (b, size, K) int64, in 0..num_pixels - 1.
        weights: (b, size, K) int32, in units of 2**-22, rounded as Pillow rounds them.
    """
    device = axis.start.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # in float32 a pixel can be off by one level
    start, length, resized, offset = (field.to(dtype).view(-1, 1, 1) for field in axis[:4])
    output = torch.arange(size, device=device).view(1, -1, 1)
    output = torch.where(axis.reverse.view(-1, 1, 1), size - 1 - output, output)
    scale = length / resized
    stretch = scale.clamp(min=1)  # antialiasing: a filter widens when an image shrinks
    centre = (output + offset + 0.5) * scale  # in pixels from the start of the box
    reach = _REACH[interpolation]
    count = math.ceil(2 * reach * max(1.0, num_pixels / size))  # enough for every sample, without asking the device
    position = (centre - reach * stretch + 0.5).floor() + torch.arange(count, device=device)
    weights = _filter((position + 0.5 - centre) / stretch, interpolation) * ((position >= 0) & (position < length))
    weights *= 2**_WEIGHT_BITS / weights.sum(-1, keepdim=True)
    indices = start + torch.minimum(position.clamp(min=0), length - 1)
    return indices.long(), torch.trunc(weights + 0.5 * weights.sign()).int()


def _weighted_rows(images: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """(b, C, N, M) int32 -> (b, C, S, M) int32: weighted sums of rows, rounded and clipped to 0..255; indices and weights from `_taps`."""
    batch, channels, num_rows, row_length = images.shape
    first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * num_rows
    rows = images.reshape(-1, row_length)
    total = images.new_full((batch, channels, indices.shape[1], row_length), 2 ** (_WEIGHT_BITS - 1))  # one half, to round
    picked = torch.empty_like(total).view(-1, row_length)
    for index, weight in zip(indices.unbind(-1), weights.unbind(-1), strict=True):
        torch.index_select(rows, 0, (first + index.unsqueeze(1)).flatten(), out=picked)
        total.addcmul_(picked.view_as(total), weight[:, None, :, None])
    return total.bitwise_right_shift_(_WEIGHT_BITS).clamp_(0, 255)


def resample(images: Tensor, rows: Axis, columns: Axis, size: int, interpolation: str) -> Tensor:
    """Crop, resize and flip each image of a batch.

    Args:
        images: (B, C, H, W) uint8.
        rows: the vertical axis.
        columns: the horizontal axis.
        size: S, the height and width of the result; no `resized` may be smaller.
        interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
        (B, C, S, S) uint8.
    """
    batch, channels, height, width = images.shape
    across, down = _taps(width, columns, size, interpolation), _taps(height, rows, size, interpolation)
    result = images.new_empty(batch, channels, size, size)
    image_bytes = 4 * channels * (2 * height * width + 3 * height * size + 2 * size**2)  # the int32 arrays below
    step = max(1, (_CPU_CHUNK_BYTES if images.device.type == "cpu" else _CHUNK_BYTES) // image_bytes)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        narrow = _weighted_rows(images[part].int().mT, *(tap.expand(batch, -1, -1)[part] for tap in across)).mT
        result[part] = _weighted_rows(narrow, *(tap.expand(batch, -1, -1)[part] for tap in down))
    return result


def crop_boxes(uniforms: Tensor, heights: Tensor, widths: Tensor, min_scale: float) -> Tensor:
    """The random boxes of RandomResizedCrop: area uniform in (min_scale, 1) of the image's, log-uniform ratio in (3/4, 4/3).

    Args:
        uniforms: (B, 22) in [0, 1): ten areas, ten ratios, top, left.
        heights: (B,) or (1,) image heights in pixels.
        widths: the same for widths.
        min_scale: smallest area, as a fraction of the image's.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    height, width = heights.view(-1, 1), widths.view(-1, 1)
    areas, log_ratios, corner = uniforms.split([_ATTEMPTS, _ATTEMPTS, 2], dim=1)
    areas = height * width * (min_scale + (1 - min_scale) * areas)
    ratios = ((2 * log_ratios - 1) * math.log(_MAX_RATIO)).exp()
    crop_width, crop_height = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first = fits.int().argmax(1, keepdim=True)
    # No attempt fits: the largest centred box whose ratio is allowed.
    fallback_height = torch.minimum(height, (width * _MAX_RATIO).round().long())
    fallback_width = torch.minimum(width, (height * _MAX_RATIO).round().long())
    found = fits.any(1, keepdim=True)
    crop_height = torch.where(found, crop_height.gather(1, first), fallback_height)
    crop_width = torch.where(found, crop_width.gather(1, first), fallback_width)
    top = torch.where(found, (corner[:, :1] * (height - crop_height + 1)).long(), (height - crop_height) // 2)
    left = torch.where(found, (corner[:, 1:] * (width - crop_width + 1)).long(), (width - crop_width) // 2)
    return torch.cat([top, left, crop_height, crop_width], dim=1)


@dataclass(kw_only=True)
class Transform(ABC):
    """Turns uint8 images into the network's input, (B, 3, size, size) float32.

    Args:
        size: S, height and width of the result in pixels.
        mean: per channel, subtracted from values in [0, 1]; None leaves them in [0, 1].
        std: per channel, divides the difference; given exactly when `mean` is.
    """

    size: int
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @property
    def num_draws(self) -> int:
        """Uniform numbers needed per sample; 0 if nothing is random."""
        return 0

    @abstractmethod
    def pixels(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor) -> Tensor:
        """(B, 3, S, S) uint8; arguments as `__call__`'s, but `uniforms` is never None."""

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor | None) -> Tensor:
        """Transform a batch.

        Args:
            images: (B, 3, H, W) uint8; smaller images are padded at the bottom and right.
            sizes: (B, 2) true heights and widths; None if nothing is padded.
            uniforms: (B, num_draws) in [0, 1), each row depending on its sample alone; None if `num_draws` is 0.

        Returns:
            (B, 3, S, S) float32 on the device of `images`, in [0, 1] unless normalised.
        """
        draws = images.new_empty(len(images), 0) if uniforms is None else uniforms
        assert draws.shape == (len(images), self.num_draws), f"draws of shape {tuple(draws.shape)} for {len(images)} x {self.num_draws}"
        result = self.pixels(images, sizes, draws).float().div_(255)
        if self.mean is not None and self.std is not None:
            for channel, mean, std in zip(result.unbind(1), self.mean, self.std, strict=True):
                channel.sub_(mean).div_(std)
        return result


@dataclass(kw_only=True)
class Resize(Transform):
    """Resize to `resized` x `resized`, or, with `keep_ratio`, the shorter side to `resized`; then crop the centre. All tests use it."""

    interpolation: str
    resized: int
    keep_ratio: bool

    def pixels(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor) -> Tensor:
        if sizes is None and images.shape[2:] == (self.size, self.size) and self.resized == self.size:
            return images
        lengths = _lengths(images, sizes)
        shorter = torch.minimum(*lengths)
        rows, columns = (self._axis(length, shorter) for length in lengths)
        return resample(images, rows, columns, self.size, self.interpolation)

    def _axis(self, length: Tensor, shorter: Tensor) -> Axis:
        resized = self.resized * length // shorter if self.keep_ratio else torch.full_like(length, self.resized)
        offset = ((resized - self.size) / 2).round()  # halves to even, like torchvision
        return Axis(torch.zeros_like(length), length, resized, offset, torch.zeros_like(length, dtype=torch.bool))


@dataclass(kw_only=True)
class RandomResizedCrop(Transform):
    """A random box (`crop_boxes`) resized to S x S and flipped with probability 1/2.

    Args:
        interpolation: "bilinear" or "bicubic".
        min_scale: smallest box, as a fraction of the image's area.
        brightness: pixels are multiplied by a random factor in 1 -+ this.
        first: applied before the crop.
    """

    interpolation: str
    min_scale: float
    brightness: float = 0.0
    first: Resize | None = None

    @property
    def num_draws(self) -> int:
        return _BOX_DRAWS + 1 + (self.brightness > 0)

    def pixels(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor) -> Tensor:
        if self.first is not None:
            images, sizes = self.first.pixels(images, sizes, uniforms), None
        top, left, height, width = crop_boxes(uniforms[:, :_BOX_DRAWS], *_lengths(images, sizes), self.min_scale).unbind(1)
        flip = uniforms[:, _BOX_DRAWS] < 0.5
        resized, offset = torch.full_like(top, self.size), torch.zeros_like(top)
        rows = Axis(top, height, resized, offset, torch.zeros_like(flip))
        columns = Axis(left, width, resized, offset, flip)
        result = resample(images, rows, columns, self.size, self.interpolation)
        if self.brightness:
            factor = 1 + self.brightness * (2 * uniforms[:, -1] - 1)
            result = result.float().mul_(factor.view(-1, 1, 1, 1)).clamp_(max=255).byte()  # Pillow truncates here
        return result


@dataclass(kw_only=True)
class Shift(Transform):
    """Bilinear resize to S x S, a random shift of up to S/8 pixels each way, reflected at the border, and a `flip` of every other image."""

    flip: bool

    @property
    def num_draws(self) -> int:
        return 2 + self.flip

    def pixels(self, images: Tensor, sizes: Tensor | None, uniforms: Tensor) -> Tensor:
        images = _plain_resize(self.size).pixels(images, sizes, uniforms)
        reach = self.size // 8
        shift = (uniforms[:, :2] * (2 * reach + 1)).long() - reach
        index = torch.arange(self.size, device=images.device).expand(len(images), -1)
        column = torch.where(uniforms[:, 2:] < 0.5, self.size - 1 - index, index) if self.flip else index
        rows, columns = self._reflect(index + shift[:, :1]), self._reflect(column + shift[:, 1:])
        source = (rows.unsqueeze(2) * self.size + columns.unsqueeze(1)).flatten(1)  # (B, S S): one gather moves all pixels
        return images.flatten(2).gather(2, source.unsqueeze(1).expand(-1, 3, -1)).view(images.shape)

    def _reflect(self, index: Tensor) -> Tensor:
        return self.size - 1 - (self.size - 1 - index.abs()).abs()


def _plain_resize(size: int, interpolation: str = "bilinear") -> Resize:
    return Resize(size=size, interpolation=interpolation, resized=size, keep_ratio=False)


def _lengths(images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Heights and widths, (B,) each, or (1,) each if all images are of one size."""
    if sizes is None:
        height, width = (torch.full((1,), pixels, device=images.device) for pixels in images.shape[2:])
        return height, width
    return sizes[:, 0], sizes[:, 1]


@dataclass(frozen=True)
class _Recipe:
    """What differs between the published transforms."""

    train_interpolation: str = "bilinear"
    test_interpolation: str = "bilinear"
    min_scale: float = 0.08
    brightness: float = 0.0
    square_first: bool = False  # training: resize to a square of 8/7 of the size before the random crop
    test_margin: bool = True  # test: resize to 8/7 of the size (256 for 224) and crop the centre; else straight to the size
    keep_ratio: bool = True  # test: resize the shorter side; else to a square


_RECIPES = {
    "inflora": _Recipe(),
    "inflora_cifar": _Recipe(test_margin=False, keep_ratio=False),
    "pilot": _Recipe(test_interpolation="bicubic", min_scale=0.05),
    "ranpac_cifar": _Recipe(test_interpolation="bicubic", min_scale=0.05, test_margin=False),
    "lae": _Recipe(),
    "slca": _Recipe("bicubic", "bicubic"),
    "slca_cifar": _Recipe("bicubic", "bicubic", brightness=63 / 255),
    # As the JAX originals of L2P and DualPrompt, but for their sampler of boxes, no antialiasing in shrinking, and a second JPEG encoding.
    "jax": _Recipe(min_scale=0.05, square_first=True, keep_ratio=False),
    "mammoth": _Recipe("bicubic", "bicubic", keep_ratio=False),
    "mammoth_cifar": _Recipe("bicubic", "bicubic", test_margin=False, keep_ratio=False),
}
_SHIFTS = {"shift": False, "shift_flip": True}  # name -> flips


def build_transforms(
    name: str, image_size: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[Transform, Transform]:
    """The training and the test transform called `name`.

    Args:
        name: a published one, or `shift` / `shift_flip` for small images at their own size.
        image_size: S, the network's input size in pixels.
        mean: see `Transform`.
        std: see `Transform`.

    Raises:
        ValueError: if no transform has this name.
    """
    train: Transform
    if name in _SHIFTS:
        train, test = Shift(size=image_size, flip=_SHIFTS[name]), _plain_resize(image_size)
    elif name in _RECIPES:
        recipe, margin = _RECIPES[name], round(image_size * 256 / 224)
        train = RandomResizedCrop(
            size=image_size,
            interpolation=recipe.train_interpolation,
            min_scale=recipe.min_scale,
            brightness=recipe.brightness,
            first=_plain_resize(margin, recipe.train_interpolation) if recipe.square_first else None,
        )
        resized = margin if recipe.test_margin else image_size
        test = Resize(size=image_size, interpolation=recipe.test_interpolation, resized=resized, keep_ratio=recipe.keep_ratio)
    else:
        raise ValueError(f"dataset.transform={name} is unknown; choose one of {', '.join([*_RECIPES, *_SHIFTS])}.")
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)
