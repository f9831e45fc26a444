import hashlib
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from incremental_cifar.cifar100 import ImageSet, draw_synthetic_images, load_images
from incremental_cifar.config import UserError


def write_cifar100(folder, rng, per_class_train=6, per_class_test=3):
    """A small CIFAR-100 in the real on-disk format: shuffled labels, 3,072 bytes per image as red, green, blue planes."""
    files = {}
    base = folder / "cifar-100-python"
    base.mkdir()
    for name, per_class in (("train", per_class_train), ("test", per_class_test)):
        labels = rng.permutation(np.repeat(np.arange(100), per_class))
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels.tolist()}))
        files[name] = (data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {label}" for label in range(100)]}))
    return files


@pytest.fixture
def small_cifar100(tmp_path, rng, monkeypatch):
    files = write_cifar100(tmp_path, rng)
    base = tmp_path / "cifar-100-python"

    def md5(name):
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    cifar100 = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar100, "train_list", [["train", md5("train")]])
    monkeypatch.setattr(cifar100, "test_list", [["test", md5("test")]])
    monkeypatch.setattr(cifar100, "meta", {**cifar100.meta, "md5": md5("meta")})
    return tmp_path, files


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no network in this test")


def test_images_are_grouped_by_class_in_file_order(small_cifar100):
    folder, files = small_cifar100
    train, test = load_images("cifar100", str(folder), 6, 3)
    for images, (data, labels) in ((train, files["train"]), (test, files["test"])):
        assert images.dtype == np.uint8
        for label in (0, 17, 99):
            assert np.array_equal(images[label], data[labels == label])


def test_validation_and_training_images_are_disjoint_and_complete(small_cifar100):
    folder, files = small_cifar100
    train, _ = load_images("cifar100", str(folder))
    validation_set, train_set = ImageSet(train[:, :2], torch.device("cpu")), ImageSet(train[:, 2:], torch.device("cpu"))
    validation, training = ({bytes(image) for image in part.pixels.view(-1, 3072).numpy()} for part in (validation_set, train_set))
    assert len(validation) == 200 and len(training) == 400 and not validation & training
    data, labels = files["train"]
    first_two_of_class_8 = {data[i].tobytes() for i in np.flatnonzero(labels == 8)[:2]}
    assert first_two_of_class_8 <= validation


def test_labels_follow_the_images(small_cifar100):
    folder, files = small_cifar100
    _, test = load_images("cifar100", str(folder))
    image_set = ImageSet(test, torch.device("cpu"))
    indices = image_set.indices_of(np.array([40, 7]))
    images, labels = image_set.get(indices)
    assert labels.tolist() == [40] * 3 + [7] * 3
    data, all_labels = files["test"]
    pixel = data[np.flatnonzero(all_labels == 7)[2], 5, 9]
    expected = (torch.tensor(pixel) / 255 - torch.tensor([0.5071, 0.4865, 0.4409])) / torch.tensor([0.2673, 0.2564, 0.2762])
    assert torch.equal(images[5, :, 5, 9], expected)


def test_without_files_and_network_one_line_says_what_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    with pytest.raises(UserError, match=r"cifar-100-python: .*train, test and meta .*this folder"):
        load_images("cifar100", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


class Dangerous:
    """Unpickling this writes a file."""

    def __init__(self, evidence):
        self.evidence = evidence

    def __reduce__(self):
        return open, (str(self.evidence), "w")


def test_a_data_file_with_another_md5_is_not_unpickled(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    write_cifar100(tmp_path, rng)
    evidence = tmp_path / "executed"
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(Dangerous(evidence)))
    with pytest.raises(UserError, match="could not be downloaded"):
        load_images("cifar100", str(tmp_path))
    assert not evidence.exists()
    pickle.loads(pickle.dumps(Dangerous(evidence))).close()
    assert evidence.exists()  # the pickle would have done something


def test_synthetic_images_are_the_same_ones_however_many():
    train, test = draw_synthetic_images(5, 2)
    more_train, more_test = draw_synthetic_images(8, 4)
    assert train.shape == (100, 5, 32, 32, 3) and test.shape == (100, 2, 32, 32, 3) and train.dtype == np.uint8
    assert np.array_equal(train, more_train[:, :5]) and np.array_equal(test, more_test[:, :2])
    digest = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()
    assert digest == "326f13603c40d9b65571a576357148243bbe1ef43773d28590fac3b139fdb41a"


def test_synthetic_images_use_the_range_of_bytes_and_differ():
    train, test = draw_synthetic_images(5, 2)
    assert 110 < train.mean() < 145 and 35 < train.std() < 65
    assert len({image.tobytes() for image in np.concatenate([train.reshape(-1, 3072), test.reshape(-1, 3072)])}) == 700
    # Of the same class, two images are nearer to each other than of different classes, on average.
    flat = train.reshape(100, 5, -1).astype(np.float64) - 128
    centres = flat[:, :4].mean(1)
    same = (flat[:, 4] * centres).sum(1)
    other = (flat[:, 4] * np.roll(centres, 1, axis=0)).sum(1)
    assert same.mean() > other.mean() + 3 * other.std() / 10
