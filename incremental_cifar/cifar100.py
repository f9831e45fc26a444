"""The images: reading CIFAR-100 or drawing the synthetic set, the split of each class, and the bytes on the device.

    train, test = load_images("cifar100", data_path)                 # (100, 500, 32, 32, 3) and (100, 100, 32, 32, 3) bytes
    validation_set = ImageSet(train[:, :50], device)                 # of each class, in file order, the first 50
    indices = validation_set.indices_of(class_order[:5])             # which of its images belong to the first five classes
    images, labels = validation_set.get(indices)                     # normalised, in channels-last order

Letters in the shapes: n images, k images per class, h and w positions.
"""

import contextlib
import os
import pickle
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from incremental_cifar.command_line import warn
from incremental_cifar.config import NUM_CLASSES, TEST_IMAGES_PER_CLASS, TRAIN_IMAGES_PER_CLASS, Config, UserError
from incremental_cifar.safe_files import lock, share

IMAGE_SIZE = 32  # height and width
PIXELS = IMAGE_SIZE * IMAGE_SIZE
CHANNEL_MEANS = (0.5071, 0.4865, 0.4409)  # of pixels in [0, 1]; red, green, blue
CHANNEL_DEVIATIONS = (0.2673, 0.2564, 0.2762)


def load_images(
    dataset: str,
    data_path: str,
    train_images_per_class: int = TRAIN_IMAGES_PER_CLASS,
    test_images_per_class: int = TEST_IMAGES_PER_CLASS,
) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images, the first so many of each class in file order: two arrays (100, k, 32, 32, 3) of uint8.

    dataset: "cifar100", which is downloaded into `data_path` unless it is there, or "synthetic". Raises UserError if CIFAR-100 is
    neither there nor to be had.
    """
    if dataset == "synthetic":
        return draw_synthetic_images(train_images_per_class, test_images_per_class)
    folder = fetch_cifar100(Path(data_path))
    train, test = (_images_by_class(folder / name) for name in ("train", "test"))
    return train[:, :train_images_per_class], test[:, :test_images_per_class]


def fetch_cifar100(data_path: Path) -> Path:
    """The folder that holds the files of CIFAR-100, each with the right md5: cifar-100-python/ in `data_path`, or `data_path` itself.

    If they are in neither, one process at a time downloads and unpacks the archive; the others say that they wait. Raises UserError if
    that fails.
    """
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    files = [*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])]
    folder, archive = data_path / CIFAR100.base_folder, data_path / CIFAR100.filename

    def is_whole(path: Path, md5: str) -> bool:
        try:
            os.stat(path)
        except PermissionError:  # check_integrity takes that for a file that is not there
            raise
        except OSError:
            return False
        return check_integrity(path, md5)

    def whole_folder() -> Path | None:
        return next((place for place in (folder, data_path) if all(is_whole(place / name, md5) for name, md5 in files)), None)

    def fetch(wait: bool) -> str | None:
        """Download and unpack what is not there, or else return who is doing so."""
        with lock(lock_file, wait) as holder:
            if holder is None:
                try:
                    if not whole_folder():
                        download_and_extract_archive(CIFAR100.url, str(data_path), filename=archive.name, md5=CIFAR100.tgz_md5)
                        for path in (archive, folder, *folder.iterdir()):
                            share(path, path.parent)
                finally:
                    lock_file.unlink(missing_ok=True)
        return holder

    new_folders = [path for path in (data_path, *data_path.parents) if not os.path.exists(path)]
    lock_file = data_path / f".{CIFAR100.base_folder}.lock"
    try:
        if place := whole_folder():
            return place
        if holder := fetch(wait=False):
            warn(f"{data_path}: CIFAR-100 is being fetched into this folder by {holder}; waiting for it")
            fetch(wait=True)
        if place := whole_folder():
            return place
        raise RuntimeError("what was unpacked is not what it should be")
    except Exception as error:  # network, proxy, archive and file system raise many kinds
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()  # made for the download; it stays if something was put there
        if isinstance(error, PermissionError) and error.filename:
            raise UserError(
                f"{error.filename}: no permission for this file of CIFAR-100, or for a folder above it; its owner can give it, or set "
                "data_path to another folder"
            ) from None
        if isinstance(error, UserError):  # there can be no lock, and so no other file
            raise UserError(f"{data_path}: CIFAR-100 is not there, and cannot be put there: {error}") from None
        through = " through the proxy set in the environment" if "https" in urllib.request.getproxies() else ""
        is_damaged = archive.is_file() and not check_integrity(archive, CIFAR100.tgz_md5)
        what = f"{archive} is damaged," if is_damaged else "CIFAR-100 is not there, or not whole,"
        raise UserError(
            f"{folder}: {what} and could not be downloaded{through} ({str(error) or type(error).__name__}); put the files train, test and "
            f"meta of {archive.name} into this folder, or set data_path to where they are"
        ) from None


def _images_by_class(file: Path) -> np.ndarray:
    """The images of a file of CIFAR-100 whose md5 is right, by class and in file order within a class."""
    with open(file, "rb") as opened:
        content = pickle.load(opened, encoding="latin1")
    images = content["data"].reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 3, 1)
    by_class = np.argsort(content["fine_labels"], kind="stable")
    return images[by_class].reshape(NUM_CLASSES, -1, IMAGE_SIZE, IMAGE_SIZE, 3)


class ImageSet:
    """Some images of every class, as bytes on the device.

    images: (100, k, 32, 32, 3) uint8, by CIFAR's label. Image i of the set has label i // k.
    """

    def __init__(self, images: np.ndarray, device: torch.device):
        self.images_per_class = images.shape[1]
        # (100 k 1024, 3): a row per pixel, so that any choice of images and positions is one gather of rows.
        self.pixels = torch.from_numpy(np.ascontiguousarray(images)).view(-1, 3).to(device)
        self.device = device

    def indices_of(self, classes: Sequence[int] | np.ndarray) -> Tensor:
        """Indices of all images of these classes, class after class: (len(classes) k,) int64, on the CPU."""
        firsts = torch.as_tensor(np.asarray(classes), dtype=torch.int64) * self.images_per_class
        return (firsts[:, None] + torch.arange(self.images_per_class)).flatten()

    def labels(self, indices: Tensor) -> Tensor:
        """CIFAR's labels, 0 to 99, of these images: (n,) int64."""
        return indices // self.images_per_class

    def get(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (n, 3, 32, 32) float32, channels-last in memory, and labels (n,); indices are on the set's device."""
        pixels = self.pixels.view(-1, IMAGE_SIZE, IMAGE_SIZE, 3)[indices]
        return normalise(pixels), self.labels(indices)


def normalise(pixels: Tensor) -> Tensor:
    """Bytes (n, 32, 32, 3) to images (n, 3, 32, 32) of mean 0 and deviation 1 per channel; channels-last in memory."""
    largest, means, deviations = channel_statistics(pixels.device)
    return ((pixels / largest - means) / deviations).permute(0, 3, 1, 2)


_channel_statistics: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}


def channel_statistics(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The largest byte, and means and deviations of the channels, (3,) each; made once per device, since a copy would wait for it.

    A GPU multiplies with the inverse of a number, and divides by a tensor: only that gives a CPU's bits.
    """
    if device not in _channel_statistics:
        _channel_statistics[device] = (
            torch.tensor(255.0, device=device),
            torch.tensor(CHANNEL_MEANS, device=device),
            torch.tensor(CHANNEL_DEVIATIONS, device=device),
        )
    return _channel_statistics[device]


# --- The synthetic set -----------------------------------------------------------------------------------------------------------

SYNTHETIC_SEED = 100
HIGHEST_FREQUENCY = 3  # cycles per image
CLASS_CONTRAST = 0.40  # how much of an image its class explains; the rest is clutter of the same kind
LARGEST_SHIFT = 3  # pixels by which a class's pattern is moved, in each direction
NOISE_LEVELS = 40  # uniform noise per byte, of this many levels


def draw_synthetic_images(train_images_per_class: int, test_images_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """100 classes of smooth random patterns, as bytes (100, k, 32, 32, 3) for training and for test; always the same ones.

    A class is one random colour pattern of low frequencies. An image shows it moved by up to three pixels, perhaps mirrored, its parts
    stronger or weaker, under a pattern of the same kind that belongs to this image alone, and noise. Fewer images per class are the
    first of more. Takes about 4 s for all 60,000.
    """
    counts = (train_images_per_class, test_images_per_class)
    splits = [np.empty((NUM_CLASSES, count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for count in counts]
    frequencies = np.arange(-HIGHEST_FREQUENCY, HIGHEST_FREQUENCY + 1)
    strength = 1 / (1 + frequencies[:, None] ** 2 + frequencies[None, :] ** 2)  # natural images too are weaker at high frequencies
    strength[HIGHEST_FREQUENCY, HIGHEST_FREQUENCY] = 0.5
    waves = np.exp(2j * np.pi / IMAGE_SIZE * np.outer(np.arange(IMAGE_SIZE), frequencies))  # (position, frequency)

    def random_patterns(rng: np.random.Generator, count: int) -> np.ndarray:
        parts = rng.standard_normal((count, *strength.shape, 3, 2))  # real and imaginary
        return (parts[..., 0] + 1j * parts[..., 1]) * strength[..., None]

    for label in range(NUM_CLASSES):
        pattern = random_patterns(np.random.default_rng((SYNTHETIC_SEED, label)), 1)  # (1, vertical, horizontal frequency, channel)
        for split, images in enumerate(splits):
            # One generator per ingredient: what an image looks like does not depend on how many are asked for.
            rngs = [np.random.default_rng((SYNTHETIC_SEED, label, split, ingredient)) for ingredient in range(5)]
            count = counts[split]
            clutter = random_patterns(rngs[0], count)
            gains = rngs[1].uniform(0.5, 1.5, (count, *strength.shape, 1))
            shifts = rngs[2].uniform(-LARGEST_SHIFT, LARGEST_SHIFT, (count, 2, 1))
            mirrored = rngs[3].random(count) < 0.5

            phases = np.exp(-2j * np.pi / IMAGE_SIZE * shifts * frequencies)  # (n, direction, frequency)
            shown = pattern * gains * phases[:, 0, :, None, None] * phases[:, 1, None, :, None]
            mixture = CLASS_CONTRAST * shown + (1 - CLASS_CONTRAST) * clutter
            # Sum the waves as two products of matrices: over vertical, then over horizontal frequencies.
            field = np.tensordot(mixture, waves, axes=([1], [1]))  # (n, horizontal frequency, channel, h)
            field = np.tensordot(field, waves, axes=([1], [1])).real.transpose(0, 2, 3, 1)  # (n, h, w, channel)
            field[mirrored] = field[mirrored, :, ::-1]
            field = np.rint(45 * field + (128 - NOISE_LEVELS // 2))
            field += rngs[4].integers(0, NOISE_LEVELS, field.shape, dtype=np.uint8)
            images[label] = field.clip(0, 255, out=field)
    return splits[0], splits[1]


class ImageSets(NamedTuple):
    """The images of a run: those that train, those that choose the best network of a task, and those that measure."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def load_image_sets(config: Config, device: torch.device) -> ImageSets:
    """Read the images that a config asks for and put them on the device. Raises UserError, see `load_images`."""
    num_validation, num_train = config.validation_images_per_class, config.train_images_per_class
    train, test = load_images(config.dataset, config.data_path, num_validation + num_train, config.test_images_per_class)
    return ImageSets(ImageSet(train[:, num_validation:], device), ImageSet(train[:, :num_validation], device), ImageSet(test, device))
