"""Random flip, crop and rotation of training images, together as one gather of pixels.

    transformations = draw_transformations(len(order), generator).to(device)     # for a whole epoch
    images, labels = augmented(training_set, order[:90], transformations[:90])   # for one step

Equal, pixel for pixel, to torchvision's RandomHorizontalFlip(0.5), RandomCrop(32, padding=4, padding_mode="reflect") and
RandomRotation((0, 15)) one after the other with the same draws. Letters in the shapes: n images; 1024 positions, row by row.
Source: paper, Methods; released incremental_cifar_experiment.py, get_data.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from incremental_cifar.cifar100 import IMAGE_SIZE, PIXELS, ImageSet, normalise

PADDING = 4  # pixels on each side, before the crop
LARGEST_ANGLE = 15.0  # degrees
LAST = IMAGE_SIZE - 1
HALF = IMAGE_SIZE / 2


class Transformations(NamedTuple):
    """One transformation per image; every field has shape (n,)."""

    flip: Tensor  # bool: mirror left and right
    top: Tensor  # int64, 0 to 8: first row of the crop in the padded image
    left: Tensor  # int64, 0 to 8: first column
    cosine: Tensor  # float32, of the angle of rotation
    sine: Tensor  # float32

    def to(self, device: torch.device) -> "Transformations":
        return Transformations(*(field.to(device) for field in self))

    def slice(self, start: int, stop: int) -> "Transformations":
        """The transformations of images `start` to `stop - 1`."""
        return Transformations(*(field[start:stop] for field in self))


def draw_transformations(n: int, generator: torch.Generator) -> Transformations:
    """Draw the transformations of n images, on the CPU; angles are uniform in [0, 15) degrees."""
    flip = torch.rand(n, generator=generator) < 0.5
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n), generator=generator)
    return make_transformations(flip, top, left, torch.rand(n, generator=generator) * LARGEST_ANGLE)


def make_transformations(flip: Tensor, top: Tensor, left: Tensor, degrees: Tensor) -> Transformations:
    """Transformations from flips, crop offsets and angles in degrees (positive: counter-clockwise), each (n,)."""
    radians = degrees.double() * (math.pi / 180)
    return Transformations(flip, top, left, radians.cos().float(), radians.sin().float())


def source_positions(transformations: Transformations) -> tuple[Tensor, Tensor]:
    """Where each pixel of the transformed images comes from.

    Returns (n, 1024) int64 positions in the original image, and (n, 1024) bool: False where rotation shows what lies outside the image.

    Backwards through the three transformations. The rotated coordinates repeat torchvision's operations in float32, one by one (F.rotate:
    an affine grid, then grid_sample with the nearest neighbour), because a difference in the last bit can choose another pixel: two
    products, each rounded, and their rounded sum. A fused multiply-add would not do.
    """
    flip, top, left, cosine, sine = (field[:, None] for field in transformations)
    position = torch.arange(PIXELS, device=flip.device)
    y = (position // IMAGE_SIZE) - (HALF - 0.5)  # (1024,) rows and columns, counted from the centre
    x = (position % IMAGE_SIZE) - (HALF - 0.5)
    scaled_cosine, scaled_sine = cosine / HALF, sine / HALF

    row = _rotated(x, scaled_sine, y, scaled_cosine)  # (n, 1024)
    column = _rotated(x, scaled_cosine, y, -scaled_sine)
    inside = (row >= 0) & (row <= LAST) & (column >= 0) & (column <= LAST)

    row = _reflected(row + (top - PADDING))
    column = _reflected(column + (left - PADDING))
    column = torch.where(flip, LAST - column, column)
    return torch.where(inside, row * IMAGE_SIZE + column, 0), inside


def _rotated(x: Tensor, x_factor: Tensor, y: Tensor, y_factor: Tensor) -> Tensor:
    """Row or column, as an int64 number that may lie outside the image, from which a rotated pixel is taken."""
    coordinate = x * x_factor + y * y_factor  # in [-1, 1] where it is inside
    return ((coordinate + 1) * HALF - 0.5).round().long()  # halves go to the even neighbour, as in grid_sample


def _reflected(position: Tensor) -> Tensor:
    """Undo reflect padding: -1 is 1, and 32 is 30."""
    return LAST - (LAST - position.abs()).abs()


def augmented(image_set: ImageSet, indices: Tensor, transformations: Transformations) -> tuple[Tensor, Tensor]:
    """Transformed, normalised images (n, 3, 32, 32) float32, channels-last in memory, and their labels (n,).

    indices: (n,) into `image_set`, on its device, as the transformations are. What rotation shows from outside an image is 0, the mean
    colour.
    """
    position, inside = source_positions(transformations)
    pixels = image_set.pixels[indices[:, None] * PIXELS + position]  # (n, 1024, 3)
    images = normalise(pixels.view(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
    images = torch.where(inside.view(-1, 1, IMAGE_SIZE, IMAGE_SIZE), images, 0.0)
    return images, image_set.labels(indices)
