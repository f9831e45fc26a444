import numpy as np
import pytest
import torch
from conftest import GPU
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from incremental_cifar.augmentation import augmented, draw_transformations, make_transformations, source_positions
from incremental_cifar.cifar100 import ImageSet, normalise


@pytest.fixture(scope="module")
def image_set():
    images = np.random.default_rng(0).integers(0, 256, (100, 10, 32, 32, 3), dtype=np.uint8)
    return ImageSet(images, torch.device("cpu"))


def one_image_at_a_time(image_set, indices, flip, top, left, degrees):
    """torchvision's transforms, on one normalised image after the other."""
    plain, _ = image_set.get(indices)
    results = []
    for i, image in enumerate(plain):
        image = image.contiguous()
        if flip[i]:
            image = F.hflip(image)
        image = F.crop(F.pad(image, [4, 4, 4, 4], padding_mode="reflect"), int(top[i]), int(left[i]), 32, 32)
        results.append(F.rotate(image, float(degrees[i]), InterpolationMode.NEAREST, fill=0))
    return torch.stack(results)


def draws(n, seed):
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    return torch.rand(n, generator=generator) < 0.5, top, left, torch.rand(n, generator=generator) * 15


@pytest.mark.parametrize("angles", ["random", "corner cases"])
def test_equals_torchvision_pixel_by_pixel(image_set, angles):
    n = 1000
    flip, top, left, degrees = draws(n, seed=1)
    if angles == "corner cases":
        # No rotation, hardly any, nearly 15 degrees, and tangents that put many pixels half-way between two neighbours.
        special = [0.0, 1e-6, 1e-3, 15 - 1e-6, *np.degrees(np.arctan([1 / 31, 1 / 16, 1 / 15, 1 / 8, 1 / 5, 1 / 4])), 5.0, 7.5, 10.0]
        degrees = torch.tensor(special, dtype=torch.float32).repeat(n)[:n]
        top, left = torch.arange(n) % 9, torch.arange(n) // 9 % 9
        flip = torch.arange(n) // 81 % 2 == 0
    indices = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    images, labels = augmented(image_set, indices, make_transformations(flip, top, left, degrees))
    assert torch.equal(images, one_image_at_a_time(image_set, indices, flip, top, left, degrees))
    assert torch.equal(labels, indices // 10)
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


# Angles, found by search (one image in 6,000), at which the last bit of a coordinate decides which pixel is nearest.
KNIFE_EDGE_ANGLES = [9.25539779663086, 6.1068902015686035, 3.5469210147857666, 9.064263343811035, 13.555144309997559, 13.969511985778809]


def test_rounding_in_torchvisions_order_matters(image_set):
    """At these angles a fused multiply-add takes a pixel from elsewhere; torchvision, and we, round each product first."""
    degrees = torch.tensor(KNIFE_EDGE_ANGLES)
    n = len(degrees)
    centre = torch.full((n,), 4)
    not_flipped = torch.zeros(n, dtype=torch.bool)
    transformations = make_transformations(not_flipped, centre, centre, degrees)
    images, _ = augmented(image_set, torch.arange(n), transformations)
    assert torch.equal(images, one_image_at_a_time(image_set, torch.arange(n), not_flipped, centre, centre, degrees))

    position, inside = source_positions(transformations)
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij"))
    cosine, sine = transformations.cosine[:, None] / 16, transformations.sine[:, None] / 16

    def fused(a, b, rounded):
        return (a.double() * b.double() + rounded.double()).float()

    row = ((fused(y, cosine, x * sine) + 1) * 16 - 0.5).round().long()
    column = ((fused(y, -sine, x * cosine) + 1) * 16 - 0.5).round().long()
    fused_inside = (row >= 0) & (row < 32) & (column >= 0) & (column < 32)
    differing = (fused_inside != inside) | (inside & (row * 32 + column != position))
    assert (differing.sum(1) >= 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("angles", ["random", "rounding"])
def test_on_a_gpu_every_pixel_is_the_cpus(image_set, angles):
    """The same pixels, and the same colours to the bit."""
    flip, top, left, degrees = draws(1000, seed=3)
    if angles == "rounding":
        degrees = torch.tensor(KNIFE_EDGE_ANGLES).repeat(1000)[:1000]
    transformations = make_transformations(flip, top, left, degrees)
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(4))
    there = ImageSet(image_set.pixels.view(100, 10, 32, 32, 3).numpy(), GPU)
    for own, other in zip(source_positions(transformations.to(GPU)), source_positions(transformations), strict=True):
        assert torch.equal(own.cpu(), other)
    images, labels = augmented(there, indices.to(GPU), transformations.to(GPU))
    expected, expected_labels = augmented(image_set, indices, transformations)
    assert images.is_contiguous(memory_format=torch.channels_last) and torch.equal(labels.cpu(), expected_labels)
    assert torch.equal(images.cpu(), expected)


def test_draws_have_the_distributions_of_torchvisions_transforms():
    transformations = draw_transformations(90_000, torch.Generator().manual_seed(0))
    assert transformations.flip.float().mean().item() == pytest.approx(0.5, abs=0.01)
    for offset in (transformations.top, transformations.left):
        assert torch.bincount(offset, minlength=9).tolist() == pytest.approx([10_000] * 9, rel=0.05)
    angles = torch.rad2deg(torch.atan2(transformations.sine, transformations.cosine))
    assert angles.min() >= 0 and angles.max() < 15.00001 and angles.mean().item() == pytest.approx(7.5, abs=0.05)
    correlation = torch.corrcoef(torch.stack([transformations.top.float(), transformations.left.float(), angles]))
    assert (correlation - torch.eye(3)).abs().max() < 0.02


def test_the_same_generator_gives_the_same_draws():
    first, second = (draw_transformations(10, torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_normalised_as_torchvision_normalises(image_set):
    from torchvision.transforms import Normalize, ToTensor

    pixels = image_set.pixels.view(-1, 32, 32, 3)[:20]
    normalise_theirs = Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    theirs = torch.stack([normalise_theirs(ToTensor()(image.numpy())) for image in pixels])
    assert torch.equal(normalise(pixels), theirs)
