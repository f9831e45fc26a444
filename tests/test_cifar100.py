import fcntl
import functools
import hashlib
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
import time
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import processes

from incremental_cifar.cifar100 import ImageSet, draw_synthetic_images, load_images
from incremental_cifar.config import UserError
from incremental_cifar.safe_files import lock


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


@pytest.fixture
def small_archive(small_cifar100):
    """A folder that holds the archive of the small CIFAR-100 and nothing else; what a process does to know its md5s; its files."""
    folder, files = small_cifar100
    cifar100 = torchvision.datasets.CIFAR100
    archive = folder / cifar100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / cifar100.base_folder, cifar100.base_folder)
    shutil.rmtree(folder / cifar100.base_folder)
    tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    known = {"train_list": cifar100.train_list, "test_list": cifar100.test_list, "meta": cifar100.meta, "tgz_md5": tgz_md5}
    return folder, functools.partial(know, known), files


def know(attributes):
    for name, value in attributes.items():
        setattr(torchvision.datasets.CIFAR100, name, value)


def load(folder, prepare, barrier, downloads, output, pause):
    """A process that needs CIFAR-100. downloads: how often the archive was downloaded. pause: seconds that half a file takes to unpack."""
    prepare()
    torchvision.datasets.utils._urlretrieve = functools.partial(copy_slowly, downloads)
    tarfile.copyfileobj = functools.partial(unpack_slowly, pause, tarfile.copyfileobj)
    torchvision.datasets.utils._get_redirect_url = lambda url, max_hops: url
    sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 (closed with the process)
    barrier.wait()
    try:
        load_images("cifar100", str(folder))
    except UserError as error:
        sys.exit(str(error))


def copy_slowly(downloads, url, path):
    """Download the archive in pieces, as a slow network does."""
    with downloads.get_lock():
        downloads.value += 1
    content = (Path(path).parent.parent / "archive").read_bytes()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), len(content) // 10):
            file.write(content[start : start + len(content) // 10])
            time.sleep(0.02)


def unpack_slowly(pause, copy, source, target, length, *options):
    for part in (length // 2, length - length // 2):
        time.sleep(pause)
        copy(source, target, part, *options)
        target.flush()


@pytest.mark.parametrize("what", ["nothing", "the archive", "half the archive", "half a file"])
def test_of_runs_that_start_at_once_one_fetches_the_images(small_archive, tmp_path, what):
    folder, prepare, _ = small_archive
    archive = folder / torchvision.datasets.CIFAR100.filename
    content = archive.read_bytes()
    (tmp_path / "archive").write_bytes(content)
    data = tmp_path / "data"
    if what == "nothing":
        archive.unlink()
    else:
        data.mkdir()
        archive.rename(data / archive.name)
        if what == "half the archive":
            (data / archive.name).write_bytes(content[: len(content) // 2])
        if what == "half a file":
            (data / "cifar-100-python").mkdir()
            (data / "cifar-100-python" / "train").write_bytes(b"half")
    barrier, downloads = processes.Barrier(4), processes.Value("i", 0)
    outputs = [tmp_path / f"output-{number}" for number in range(4)]
    paces = zip(outputs, (0.05, 0.1, 0.15, 0.2), strict=True)
    started = [processes.Process(target=load, args=(data, prepare, barrier, downloads, *pace)) for pace in paces]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    said = [output.read_text() for output in outputs]
    assert [process.exitcode for process in started] == [0] * 4, said
    assert downloads.value == (what in ("nothing", "half the archive"))
    waited = [line for text in said for line in text.splitlines() if "waiting" in line]
    assert all(f"warning: {data}: CIFAR-100 is being fetched into this folder by host" in line for line in waited)
    assert sorted(path.name for path in data.iterdir()) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_whoever_waits_for_the_images_says_so_once(small_archive, monkeypatch, capsys):
    """Another process fetches them; they are there when it is done."""
    folder = small_archive[0]
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    flock, unpack = fcntl.flock, threading.Event()

    def noted(descriptor, operation):
        if operation == fcntl.LOCK_EX:
            unpack.set()
        flock(descriptor, operation)

    def fetch():
        with lock(folder / ".cifar-100-python.lock"):
            is_locked.set()
            assert unpack.wait(20)
            with tarfile.open(folder / "cifar-100-python.tar.gz") as tar:
                tar.extractall(folder)

    is_locked = threading.Event()
    monkeypatch.setattr(fcntl, "flock", noted)
    fetching = threading.Thread(target=fetch)
    fetching.start()
    assert is_locked.wait(20)
    train, _ = load_images("cifar100", str(folder))
    fetching.join()
    assert train.shape[1] == 6
    said = capsys.readouterr().err
    assert said.count("waiting for it") == 1 and f"fetched into this folder by host {os.uname().nodename}, process {os.getpid()}," in said


def test_the_folder_of_the_files_themselves_will_do(small_cifar100, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    folder, files = small_cifar100
    train, _ = load_images("cifar100", str(folder / "cifar-100-python"))
    data, labels = files["train"]
    assert np.array_equal(train[17], data[labels == 17])
    assert sorted(path.name for path in (folder / "cifar-100-python").iterdir()) == ["meta", "test", "train"]


@pytest.mark.parametrize(
    "error",
    [
        UnicodeError("label too long"),
        ValueError("unknown url type"),
        zlib.error("Error -3 while decompressing data"),
        pickle.UnpicklingError("invalid load key"),
        AttributeError("'NoneType' object has no attribute"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_download_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", fail)
    with pytest.raises(UserError, match="could not be downloaded.*" + re.escape(f"({str(error) or 'MemoryError'})")):
        load_images("cifar100", str(tmp_path / "new" / "data"))
    assert not (tmp_path / "new").exists()


def test_a_proxy_with_an_impossible_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://{'a' * 64}.example:3128")
    with pytest.raises(UserError, match=r"could not be downloaded through the proxy set in the environment \(.*label"):
        load_images("cifar100", str(tmp_path))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("gone", "{data} is a link to gone, which is not there; make that folder, or remove the link"),
        ("data", "{data} is a link that leads back to itself; remove it"),
        (None, "data is not a folder"),
    ],
)
def test_a_data_path_that_cannot_be_a_folder_is_named(target, reason, tmp_path):
    data = tmp_path / "data"
    data.write_bytes(b"") if target is None else data.symlink_to(target)
    with pytest.raises(UserError, match=re.escape(f"({reason.format(data=data)})") + "$") as error:
        load_images("cifar100", str(data))
    assert str(error.value).startswith(f"{data}: CIFAR-100 is not there, and cannot be put there: ")


@pytest.mark.parametrize("closed", ["cifar-100-python", "cifar-100-python/meta"])
def test_images_that_must_not_be_read_are_not_called_missing(closed, small_cifar100, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    folder, _ = small_cifar100
    (folder / closed).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(54321)
        with pytest.raises(UserError, match=rf"^{folder}/cifar-100-python/\w+: no permission for this file of CIFAR-100"):
            load_images("cifar100", str(folder))
    finally:
        os.seteuid(user)
        (folder / closed).chmod(0o700)


def test_unpacked_images_are_the_groups_too_whatever_the_umask(small_archive, monkeypatch):
    folder = small_archive[0]
    folder.chmod(0o2775)
    md5 = hashlib.md5((folder / "cifar-100-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", md5)
    umask = os.umask(0o077)
    try:
        load_images("cifar100", str(folder))
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o070 for path in (folder / "cifar-100-python", *folder.glob("cifar-100-python/*"))}
    assert modes == {"cifar-100-python": 0o070, "train": 0o060, "test": 0o060, "meta": 0o060}


def test_a_damaged_archive_is_named(small_archive, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    archive = small_archive[0] / "cifar-100-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError, match=re.escape(f"{archive} is damaged, and could not be downloaded (")):
        load_images("cifar100", str(archive.parent))


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
