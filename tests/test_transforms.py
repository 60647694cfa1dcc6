"""The transforms must be torchvision's on PIL images, pixel by pixel, on the same random boxes, and depend on nothing but the sample."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

from inflora.data import transforms
from inflora.data.transforms import RandomResizedCrop, Resize, Transform, build_transforms, crop_boxes
from inflora.seeding import uniform

BILINEAR, BICUBIC = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC
PILLOW_FILTER = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PUBLISHED = ["inflora", "inflora_cifar", "pilot", "ranpac_cifar", "lae", "slca", "slca_cifar", "jax", "mammoth", "mammoth_cifar"]
NAMES = [*PUBLISHED, "shift", "shift_flip"]

PUBLISHED_TESTS: dict[str, Callable[[int, int], list]] = {  # from the size and 8/7 of it
    "inflora": lambda size, margin: [T.Resize(margin, BILINEAR), T.CenterCrop(size)],
    "inflora_cifar": lambda size, margin: [T.Resize((size, size), BILINEAR)],
    "pilot": lambda size, margin: [T.Resize(margin, BICUBIC), T.CenterCrop(size)],
    "ranpac_cifar": lambda size, margin: [T.Resize(size, BICUBIC), T.CenterCrop(size)],
    "lae": lambda size, margin: [T.Resize(margin, BILINEAR), T.CenterCrop(size)],
    "slca": lambda size, margin: [T.Resize(margin, BICUBIC), T.CenterCrop(size)],
    "slca_cifar": lambda size, margin: [T.Resize(margin, BICUBIC), T.CenterCrop(size)],
    "jax": lambda size, margin: [T.Resize((margin, margin), BILINEAR), T.CenterCrop(size)],
    "mammoth": lambda size, margin: [T.Resize((margin, margin), BICUBIC), T.CenterCrop(size)],
    "mammoth_cifar": lambda size, margin: [T.Resize((size, size), BICUBIC)],
    "shift": lambda size, margin: [T.Resize((size, size), BILINEAR)],
    "shift_flip": lambda size, margin: [T.Resize((size, size), BILINEAR)],
}


def noise(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """White noise: the hardest image to resize exactly. (B, 3, H, W) uint8."""
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(images: Tensor) -> Tensor:
    """Values in [0, 1] as the integers 0..255 that they must be."""
    scaled = images * 255
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().byte()


def pillow_resize(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Resize to a square, horizontal axis first: what every Pillow before 13 does, and later ones do for most images."""
    for shape in ((size, image.height), (size, size)):
        image = image.resize(shape, PILLOW_FILTER[interpolation])
    return image


def draws(transform: Transform, ids: list[int] | int, key: int = 11) -> Tensor | None:
    ids = list(range(ids)) if isinstance(ids, int) else ids
    return uniform(key, torch.tensor(ids), transform.num_draws) if transform.num_draws else None


@pytest.mark.parametrize("shape", [(32, 32), (75, 100), (90, 301)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_test_transform_is_torchvisions(name: str, shape: tuple[int, int]):
    for size in (56, 64):
        images = noise(3, *shape)
        reference = T.Compose(PUBLISHED_TESTS[name](size, round(size * 256 / 224)))
        expected = torch.stack([to_tensor(reference(to_pil(image))) for image in images])
        test = build_transforms(name, size)[1]
        assert test.num_draws == 0
        assert torch.equal(levels(test(images, None, None)), expected)


def test_published_size():
    image = noise(1, 300, 400)
    reference = T.Compose([T.Resize(256, BICUBIC), T.CenterCrop(224), T.PILToTensor()])
    expected = torch.as_tensor(reference(to_pil(image[0])))
    assert torch.equal(levels(build_transforms("pilot", 224)[1](image, None, None)[0]), expected)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (90, 120), (120, 90), (500, 40)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_train_transform_is_pillows_on_the_same_boxes(name: str, height: int, width: int):
    batch, size = 6, 48
    train = build_transforms(name, size)[0]
    assert isinstance(train, RandomResizedCrop)
    images, uniforms = noise(batch, height, width), draws(train, batch)
    assert uniforms is not None
    margin = round(size * 256 / 224)
    source_height, source_width = torch.tensor([[margin], [margin]] if name == "jax" else [[height], [width]])
    boxes = crop_boxes(uniforms[:, :22], source_height, source_width, train.min_scale)
    expected = []
    for image, (top, left, box_height, box_width), row in zip(images, boxes.tolist(), uniforms.tolist(), strict=True):
        pil = to_pil(image)
        if name == "jax":
            pil = pillow_resize(pil, margin, "bilinear")
        pil = pillow_resize(pil.crop((left, top, left + box_width, top + box_height)), size, train.interpolation)
        if row[22] < 0.5:
            pil = pil.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if name == "slca_cifar":
            pil = ImageEnhance.Brightness(pil).enhance(1 + 63 / 255 * (2 * row[23] - 1))  # what torchvision calls
        expected.append(to_tensor(pil))
    assert torch.equal(levels(train(images, None, uniforms)), torch.stack(expected))


@pytest.mark.parametrize("name", ["inflora_cifar", "slca"])
def test_crops_of_cifar_images_are_torchvisions(name: str):
    train = build_transforms(name, 224)[0]
    assert isinstance(train, RandomResizedCrop)
    images, uniforms = noise(4, 32, 32), draws(train, 4)
    assert uniforms is not None
    result = train(images, None, uniforms)
    boxes = crop_boxes(uniforms[:, :22], torch.tensor([32]), torch.tensor([32]), train.min_scale).tolist()
    for image, crop, box, flipped in zip(images, result, boxes, (uniforms[:, 22] < 0.5).tolist(), strict=True):
        top, left, height, width = box
        cropped = F.crop(to_pil(image), top, left, height, width)  # type: ignore[arg-type]
        expected = to_tensor(F.resize(cropped, [224, 224], T.InterpolationMode(train.interpolation)))  # type: ignore[arg-type]
        assert torch.equal(levels(crop), expected.flip(-1) if flipped else expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("source", [32, 20])
def test_shift_moves_the_reflected_image(flip: bool, source: int):
    train, _ = build_transforms("shift_flip" if flip else "shift", 32)
    images, uniforms = noise(200, source, source), draws(train, 200)
    assert uniforms is not None
    result = levels(train(images, None, uniforms)).numpy()
    shifts = (uniforms[:, :2] * 9).long().tolist()  # 0 .. 8 pixels into an image padded by 32 / 8 = 4
    assert {down for down, _ in shifts} == {across for _, across in shifts} == set(range(9))
    for index, (down, across) in enumerate(shifts):
        image = to_tensor(pillow_resize(to_pil(images[index]), 32, "bilinear")).numpy()
        expected = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")[:, down : down + 32, across : across + 32]
        if flip and uniforms[index, 2] < 0.5:
            expected = expected[:, :, ::-1]
        assert np.array_equal(result[index], expected)


def test_fixed_image_gives_fixed_numbers():
    row = torch.arange(0, 250, 25, dtype=torch.uint8)
    image = torch.stack([row.expand(10, 10), row.view(-1, 1).expand(10, 10), torch.full((10, 10), 7, dtype=torch.uint8)]).unsqueeze(0)
    result = (build_transforms("inflora", 4)[1](image, None, None) * 255).round()[0]
    assert result[0].tolist() == [[18, 63, 113, 163]] * 4
    assert result[1].tolist() == [[value] * 4 for value in [18, 63, 113, 163]]
    assert result[2].tolist() == [[7] * 4] * 4
    assert (build_transforms("pilot", 4)[1](image, None, None) * 255).round()[0, 0, 0].tolist() == [14, 61, 113, 164]


def mixed_sizes() -> tuple[Tensor, Tensor]:
    """Images of several sizes, padded with bright garbage that must not be seen."""
    sizes = torch.tensor([[40, 50], [33, 21], [12, 50], [40, 17], [9, 9]])
    images = torch.full((5, 3, 40, 50), 255, dtype=torch.uint8)
    for index, (height, width) in enumerate(sizes.tolist()):
        images[index, :, :height, :width] = noise(1, height, width, seed=index)[0] // 2
    return images, sizes


@pytest.mark.parametrize("name", NAMES)
def test_sample_does_not_depend_on_its_batch_or_padding(name: str, monkeypatch: pytest.MonkeyPatch):
    images, sizes = mixed_sizes()
    for transform in build_transforms(name, 24):
        together = transform(images, sizes, draws(transform, 5))
        order = [3, 0, 4]
        assert torch.equal(transform(images[order], sizes[order], draws(transform, order)), together[order])
        for index, (height, width) in enumerate(sizes.tolist()):
            alone = transform(images[index : index + 1, :, :height, :width], None, draws(transform, [index]))
            assert torch.equal(alone[0], together[index])
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "_CPU_CHUNK_BYTES", 1)  # one image at a time
            assert torch.equal(transform(images, sizes, draws(transform, 5)), together)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_in_0_1_unless_normalised(name: str):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
    images = noise(4, 40, 30)
    images[0], images[1] = 0, 255
    for plain, normalised in zip(build_transforms(name, 24), build_transforms(name, 24, mean, std), strict=True):
        result = plain(images, None, draws(plain, 4))
        assert result.dtype == torch.float32
        assert result.shape == (4, 3, 24, 24)
        assert result.min() == 0
        assert result.max() <= 1
        expected = torch.stack([F.normalize(image, list(mean), list(std)) for image in result])
        assert torch.equal(normalised(images, None, draws(plain, 4)), expected)


@pytest.mark.parametrize("name", ["inflora", "slca_cifar", "shift_flip"])
def test_autocast_changes_nothing(name: str):
    for transform in build_transforms(name, 24, (0.5,) * 3, (0.5,) * 3):
        expected = transform(noise(2, 40, 30), None, draws(transform, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(transform(noise(2, 40, 30), None, draws(transform, 2)), expected)


def test_empty_batch():
    # One of several processes may have no part in the last batch.
    for name in NAMES:
        for transform in build_transforms(name, 24):
            empty = torch.empty(0, 3, 40, 30, dtype=torch.uint8)
            assert transform(empty, None, draws(transform, [])).shape == (0, 3, 24, 24)


def test_recipes_differ_where_the_published_ones_do():
    trains = {name: build_transforms(name, 224)[0] for name in PUBLISHED}
    assert all(isinstance(train, RandomResizedCrop) for train in trains.values())
    described = {
        name: tuple(dataclasses.asdict(train)[key] for key in ("min_scale", "interpolation", "brightness"))
        for name, train in trains.items()
    }
    assert described == {
        "inflora": (0.08, "bilinear", 0),
        "inflora_cifar": (0.08, "bilinear", 0),
        "pilot": (0.05, "bilinear", 0),
        "ranpac_cifar": (0.05, "bilinear", 0),
        "lae": (0.08, "bilinear", 0),
        "slca": (0.08, "bicubic", 0),
        "slca_cifar": (0.08, "bicubic", 63 / 255),
        "jax": (0.05, "bilinear", 0),
        "mammoth": (0.08, "bicubic", 0),
        "mammoth_cifar": (0.08, "bicubic", 0),
    }
    assert [name for name, train in trains.items() if isinstance(train, RandomResizedCrop) and train.first] == ["jax"]
    assert isinstance(tests := build_transforms("pilot", 224)[1], Resize)
    assert tests.resized == 256


def test_crop_boxes_have_torchvisions_distribution():
    torch.manual_seed(0)
    count, shape = 4000, (90, 120)
    reference = torch.tensor([T.RandomResizedCrop.get_params(torch.empty(3, *shape), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    boxes = crop_boxes(uniform(5, torch.arange(count), 22), torch.tensor([90]), torch.tensor([120]), 0.08)
    assert boxes.dtype == torch.int64
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == 90
    assert (left + width).max() == 120
    for ours, theirs in zip(
        (*boxes.T, height * width, height / width),
        (*reference.T, reference[:, 2] * reference[:, 3], reference[:, 2] / reference[:, 3]),
        strict=True,
    ):
        # Two-sample Kolmogorov-Smirnov; 2.2 corresponds to a probability of about 1e-4.
        grid = torch.cat([ours, theirs]).double().unique()
        gap = (
            (
                torch.searchsorted(ours.double().sort().values, grid, right=True)
                - torch.searchsorted(theirs.double().sort().values, grid, right=True)
            )
            .abs()
            .max()
        )
        assert gap / count * (count / 2) ** 0.5 < 2.2


def test_crop_areas_and_ratios_are_uniform_where_nothing_is_rejected():
    # In an image of 1000 x 1000, boxes of up to half the area always fit.
    boxes = crop_boxes(uniform(5, torch.arange(20_000), 22), torch.tensor([1000]), torch.tensor([1000]), 0.08)
    area = boxes[:, 2] * boxes[:, 3] / 1e6
    small = area[area < 0.5]
    assert small.min() < 0.081
    assert abs((small.mean() - 0.29) / (0.42 / 12**0.5)) * len(small) ** 0.5 < 4
    log_ratio = (boxes[:, 3] / boxes[:, 2]).log()[area < 0.5]
    limit = np.log(4 / 3)
    assert log_ratio.abs().max() < limit + 0.01
    assert abs(log_ratio.mean() / (2 * limit / 12**0.5)) * len(small) ** 0.5 < 4
    assert log_ratio.std() == pytest.approx(2 * limit / 12**0.5, rel=0.03)


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (1, 1), (3, 1), (1, 9)])
def test_box_when_no_attempt_fits(height: int, width: int):
    # With min_scale 1 only the whole area would do: torchvision then takes the largest centred box of an allowed ratio.
    uniforms = uniform(5, torch.arange(50), 22)
    boxes = crop_boxes(uniforms, torch.tensor([height]), torch.tensor([width]), 1.0)
    expected = T.RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert boxes.unique(dim=0).tolist() == [list(expected)]


def test_half_of_the_images_are_flipped():
    train = build_transforms("shift_flip", 8)[0]
    assert isinstance(train, transforms.Shift)
    ramp = torch.arange(0, 80, 10, dtype=torch.uint8).expand(2000, 3, 8, 8)
    result = train(ramp, None, draws(train, 2000))
    flipped = result[:, 0, 0, 2] > result[:, 0, 0, 5]
    assert abs(flipped.float().mean() - 0.5) < 0.05
    crop = build_transforms("inflora", 8)[0]
    flipped = (result := crop(ramp, None, draws(crop, 2000)))[:, 0, 0, 0] > result[:, 0, 0, 7]
    assert abs(flipped.float().mean() - 0.5) < 0.05


def test_brightness_factor_is_uniform():
    train = build_transforms("slca_cifar", 4)[0]
    grey = torch.full((2000, 3, 8, 8), 100, dtype=torch.uint8)
    values = levels(train(grey, None, draws(train, 2000)))[:, 0, 0, 0].float()
    low, high = 100 * (1 - 63 / 255), 100 * (1 + 63 / 255)
    assert low - 1 <= values.min() < low + 1
    assert high - 1.5 < values.max() <= high
    assert values.mean() == pytest.approx(99.5, abs=1.5)  # Pillow rounds down


def test_names():
    with pytest.raises(ValueError) as error:
        build_transforms("infora", 224)
    assert str(error.value) == f"dataset.transform=infora is unknown; choose one of {', '.join(NAMES)}."


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_gives_the_same_pixels(name: str):
    images, sizes = mixed_sizes()
    for transform in build_transforms(name, 24):
        uniforms = draws(transform, 5)
        result = transform(images.cuda(), sizes.cuda(), None if uniforms is None else uniforms.cuda())
        assert torch.equal(levels(result.cpu()), levels(transform(images, sizes, uniforms)))
