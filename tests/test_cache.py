"""Prepared test images: exactly the transform's numbers, in every order of events, whatever happens to the files."""

import errno
import io
import os
import pickle
import random
import shutil
from multiprocessing import get_context

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import MaybeConvertMode, MaybeToTensor, ResizeKeepRatio
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomCrop, Resize, ToTensor

from mulki_plugins.errors import MulkiError, UnreadableImage
from mulki_plugins.streams import cache_folder, pixel_file
from mulki_plugins.streams.benchmark import UNREADABLE_LABEL, as_benchmark
from mulki_plugins.streams.cache import PixelCache
from mulki_plugins.streams.images import FileImages, open_picture
from mulki_plugins.streams.mtil.contents import PixelImages
from mulki_plugins.streams.pixel_file import Layout, MemoryPixels, PixelFile
from mulki_plugins.streams.pixels import READERS, split_transform
from mulki_plugins.streams.task import ArrayImages, Task, TaskStream

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
NORMALISE = Normalize(MEAN, STD)
COUNT = 6


def transform(size=20, **options):
    return open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, **options)


def picture(seed=0, size=(37, 26)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT):
        picture(i, (30 + i, 25)).save(folder / f"{i}.jpg")
    return folder


class Photos:
    """The experience of a task whose test images are files, with a cache; opened anew by every `batches`."""

    def __init__(self, folder, cache=None, unreadable="stop", images=None):
        files = sorted(path.name for path in folder.glob("*.jpg"))
        test = images or FileImages.of(folder, files, [i % 2 for i in range(len(files))], open_picture)
        train = ArrayImages(np.zeros((4, 30, 30, 3), np.uint8), np.array([0, 1, 0, 1]))
        task = Task(name="photos", class_names=("cat", "dog"), templates=("a {}.",), train=train, test=test)
        whole = TaskStream(name="photos", tasks=(task,))
        self.cache = cache
        benchmark = as_benchmark(whole, transform(), transform(), unreadable=unreadable, cache=cache)
        self.experience = benchmark.test_stream[0]
        self.images = self.experience.images

    def batches(self, workers=0, group="pixels"):
        """The numbers and labels of an evaluation, as the strategy sees them."""
        cached = self.images.cached
        if cached is not None:
            cached.prepare()
        dataset = self.experience.dataset
        loader = DataLoader(
            dataset.with_transforms(group) if cached else dataset, 4, num_workers=workers, collate_fn=dataset.collate_fn
        )
        numbers, labels = zip(*((x, y) for x, y, _ in loader), strict=True)
        x = torch.cat(numbers)
        assert (x.dtype == torch.uint8) == (cached is not None and group == "pixels")
        return cached.split.to_numbers(x) if x.dtype == torch.uint8 else x, torch.cat(labels)


def plain(folder, **options):
    return Photos(folder, **options).batches()


def cached(folder, tmp_path, **options):
    return Photos(folder, cache=PixelCache(tmp_path / "cache"), **options)


@pytest.fixture
def decoded(monkeypatch):
    """The paths that Pillow opens."""
    paths, whole = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *rest: (paths.append(os.path.basename(path)), whole(path, *rest))[1]
    )
    return paths


def same(a, b):
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


# the two halves of a transform


@pytest.mark.parametrize(
    "options", [{}, {"resize_mode": "longest"}, {"resize_mode": "squash"}, {"interpolation": "bilinear"}]
)
@pytest.mark.parametrize("size", [20, (20, 28)])
def test_both_halves_give_the_numbers_of_the_whole(options, size):
    whole = transform(size, **options)
    split = split_transform(whole)
    images = [
        picture(1),
        picture(2, (20, 20)),
        picture(3, (9, 80)),
        picture(4).convert("L"),
        picture(5).convert("RGBA"),
    ]
    pixels = torch.stack([split.to_pixels(image) for image in images])
    assert pixels.shape[1:] == split.shape
    expected = torch.stack([whole(image) for image in images])
    assert torch.equal(split.to_numbers(pixels), expected)
    assert split.to_numbers(pixels).is_contiguous()
    looked_up = split.table()[torch.arange(3)[:, None, None], pixels.int()]  # as on a GPU
    assert torch.equal(looked_up, expected)


@pytest.mark.parametrize(
    "steps",
    [
        [Resize(20), MaybeConvertMode(), MaybeToTensor(), NORMALISE],  # the size depends on the image
        [RandomCrop(20), MaybeConvertMode(), MaybeToTensor(), NORMALISE],
        [ResizeKeepRatio(20, random_scale_prob=0.5), CenterCrop(20), MaybeConvertMode(), ToTensor()],
        [Resize((20, 20)), ToTensor(), NORMALISE],  # grey images stay grey
        [Resize((20, 20)), MaybeConvertMode(), ToTensor(), NORMALISE, CenterCrop(10)],
        [MaybeConvertMode(), MaybeToTensor(), Resize((20, 20)), NORMALISE],  # resized as numbers
        [lambda image: image, MaybeConvertMode(), MaybeToTensor()],
    ],
)
def test_a_transform_that_cannot_be_split_is_left_alone(steps):
    assert split_transform(Compose(steps)) is None
    assert split_transform(lambda image: image) is None


def test_a_run_is_told_of_a_transform_that_cannot_be_split(photos, tmp_path):
    cache = PixelCache(tmp_path / "cache")
    stream = TaskStream(name="photos", tasks=(Task(
        name="photos", class_names=("cat",), templates=("a {}.",),
        train=ArrayImages(np.zeros((1, 2, 2, 3), np.uint8), np.array([0])), test=FileImages.of(photos, ["0.jpg"], [0]),
    ),))  # fmt: skip
    benchmark = as_benchmark(stream, transform(), lambda image: image.size, cache=cache)
    assert benchmark.test_stream[0].dataset[0][0] == (30, 25)
    assert "cannot be split" in cache.problems()[0]
    assert cache.problems() == []


# an evaluation from the cache


@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_evaluation_opens_no_image(photos, tmp_path, monkeypatch, workers):
    expected = plain(photos)
    same(cached(photos, tmp_path).batches(workers), expected)
    monkeypatch.setattr(Image, "open", None)
    again = cached(photos, tmp_path)
    same(again.batches(workers), expected)
    same(again.batches(group="eval"), expected)  # as plugins see the data set
    assert again.cache.problems() == []
    [file] = cache_folder.list_cache(tmp_path / "cache")
    assert (file.what, file.images, file.stored) == ("photos: 6 test images", COUNT, COUNT)


def test_the_other_groups_of_the_data_set_get_the_image_itself(photos, tmp_path):
    dataset = cached(photos, tmp_path).experience.dataset
    expected = transform()(open_picture(str(photos / "3.jpg")))
    assert torch.equal(dataset.train()[3][0], expected)
    assert torch.equal(dataset.eval()[3][0], expected)
    assert torch.equal(dataset.train()[3][0], expected)  # its pixels are in the cache by now


def test_images_of_one_array_are_kept_in_memory_or_in_a_file(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    images = PixelImages(pixels, np.arange(6) % 2, np.array([8, 1, 2, 3, 5, 4]))
    expected = plain(tmp_path, images=images)
    for budget, files in ((2**20, 0), (2**10, 1)):
        monkeypatch.setattr("mulki_plugins.streams.cache.IN_MEMORY", budget)
        first = cached(tmp_path, tmp_path, images=images)
        same(first.batches(), expected)
        assert len(cache_folder.list_cache(tmp_path / "cache")) == files
        with monkeypatch.context() as patch:
            patch.setattr(Image, "fromarray", None)
            same(first.batches(), expected)
    pixels[8] += 1  # other pixels, another file
    same(cached(tmp_path, tmp_path, images=images).batches(), plain(tmp_path, images=images))


def test_an_evaluation_starts_only_the_workers_that_help(photos, tmp_path):
    files = cached(photos, tmp_path).images.cached
    files.prepare()
    assert files.useful_workers(15) == 15
    for i in range(COUNT):
        files[i][0].prepared()
    assert (files.useful_workers(15), files.useful_workers(2), files.useful_workers(0)) == (READERS, 2, 0)
    memory = cached(tmp_path, tmp_path, images=ArrayImages(np.zeros((2, 9, 9, 3), np.uint8), np.array([0, 1]))).images
    assert memory.cached.useful_workers(15) == 15
    for i in range(2):
        memory.cached[i][0].prepared()
    assert memory.cached.useful_workers(15) == 0


def test_images_with_an_unknown_decoder_are_not_cached(photos, tmp_path):
    images = FileImages.of(photos, ["0.jpg"], [0], lambda path: Image.open(path).convert("RGB"))
    assert cached(photos, tmp_path, images=images).images.cached is None


class Foreign:
    """A third party's images."""

    targets = (0, 1)

    def __init__(self, known=None):
        if known is not None:
            self.fingerprint = lambda: known

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return picture(index).convert("L"), index


def test_images_of_others_are_cached_if_they_have_a_fingerprint(tmp_path, monkeypatch):
    expected = plain(tmp_path, images=Foreign())
    for known in (None, 7):
        assert cached(tmp_path, tmp_path, images=Foreign(known)).images.cached is None
    own = cached(tmp_path, tmp_path, images=Foreign("stripes 1"))
    same(own.batches(), expected)
    monkeypatch.setattr(Foreign, "__getitem__", None)
    same(own.batches(), expected)


def test_it_can_be_sent_to_a_worker_that_is_not_forked(photos, tmp_path):
    first = cached(photos, tmp_path)
    first.images.cached.prepare()
    sent = pickle.loads(pickle.dumps(first.experience.dataset.with_transforms("pixels")))
    assert torch.equal(sent[2][0], first.experience.dataset.with_transforms("pixels")[2][0])
    assert cache_folder.list_cache(tmp_path / "cache")[0].stored == 1
    rows = MemoryPixels(Layout(key="", what="", count=2, shape=(1, 1, 1)))
    rows.write(1, 0, b"x")
    assert pickle.loads(pickle.dumps(rows)).read(1, 0) == "empty"


# other files


def _replaced(folder):
    """Other bytes of the same size, with the same modification time."""
    path = folder / "2.jpg"
    status = path.stat()
    buffer = io.BytesIO()
    picture(77, (32, 25)).save(buffer, "JPEG", quality=20)
    path.write_bytes(buffer.getvalue().ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        _replaced,
        lambda folder: picture(77).save(folder / "2.jpg"),
        lambda folder: os.replace(folder / "2.jpg", folder / "a.jpg"),
        lambda folder: (folder / "2.jpg").unlink(),
        lambda folder: picture(77).save(folder / "21.jpg"),
        lambda folder: shutil.copy(folder / "1.jpg", folder / "2.jpg"),
    ],
)
def test_a_changed_file_is_noticed(photos, tmp_path, change):
    before = cached(photos, tmp_path).batches()
    change(photos)
    expected = plain(photos)
    assert expected[0].shape != before[0].shape or not torch.equal(expected[0], before[0])
    same(cached(photos, tmp_path).batches(), expected)
    same(cached(photos, tmp_path).batches(), expected)


def test_only_the_changed_file_is_decoded_again(photos, tmp_path, decoded):
    first = cached(photos, tmp_path)
    first.batches()
    picture(77).save(photos / "2.jpg")
    decoded.clear()
    first.batches()
    assert decoded == ["2.jpg"]


def test_a_file_that_has_gone_is_not_answered_from_the_cache(photos, tmp_path):
    first = cached(photos, tmp_path)
    first.batches()
    (photos / "2.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"2\.jpg: this image cannot be read: No such file"):
        first.batches()


# images that cannot be read


def test_skipped_images_stay_known(photos, tmp_path, decoded):
    (photos / "2.jpg").write_bytes(b"no image")
    expected = plain(photos, unreadable="skip")
    assert expected[1].tolist() == [0, 1, UNREADABLE_LABEL, 1, 0, 1]
    for opened in (True, False):
        decoded.clear()
        now = cached(photos, tmp_path, unreadable="skip")
        same(now.batches(), expected)
        assert now.images.left_out == [str(photos / "2.jpg")]
        assert bool(decoded) == opened
    with pytest.raises(UnreadableImage, match="it is not an image that Pillow can read"):
        cached(photos, tmp_path).batches()  # unreadable: stop
    picture(2).save(photos / "2.jpg")
    same(cached(photos, tmp_path, unreadable="skip").batches(), plain(photos))


def test_an_image_that_is_out_of_reach_for_a_moment_is_tried_again(photos, tmp_path, monkeypatch):
    expected = plain(photos)

    def busy(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", busy)
        with pytest.raises(UnreadableImage, match="consecutive images"):
            cached(photos, tmp_path, unreadable="skip").batches()
    same(cached(photos, tmp_path, unreadable="skip").batches(), expected)


# damaged files of the cache


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: _flip(path, -1), "the pixels of 1 images were damaged"),
        (lambda path: _flip(path, 4096 + 16 * 2 + 9), "the pixels of 1 images were damaged"),  # a checksum
        (lambda path: _flip(path, 4096 + 16 * 2), ""),  # a signature: another image
        (lambda path: os.truncate(path, path.stat().st_size - 1300), "the pixels of 2 images were damaged"),
        (lambda path: os.truncate(path, 4096 + 16 * COUNT), "the pixels of 6 images were damaged"),
        (lambda path: os.truncate(path, 4100), "this file of the cache is damaged"),
        (lambda path: os.truncate(path, 0), "this file of the cache is damaged"),
        (lambda path: _flip(path, 3), "this file of the cache is damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "this file of the cache is damaged"),
    ],
)
def test_a_damaged_file_is_noticed_and_written_anew(photos, tmp_path, damage, problem, monkeypatch):
    first = cached(photos, tmp_path)
    expected = first.batches()
    [path] = (tmp_path / "cache").glob("*.pixels")
    whole = path.read_bytes()
    damage(path)
    same(first.batches(), expected)  # the run that has it open
    assert problem in "".join(first.cache.problems())
    damage(path)
    again = cached(photos, tmp_path)
    same(again.batches(), expected)
    assert path.read_bytes() == whole
    monkeypatch.setattr(Image, "open", None)
    same(again.batches(), expected)


def test_it_shrinks_while_it_is_read(photos, tmp_path):
    first = cached(photos, tmp_path)
    expected = first.batches()
    [path] = (tmp_path / "cache").glob("*.pixels")
    dataset = first.experience.dataset
    assert torch.equal(dataset[0][0], expected[0][0])
    os.truncate(path, 0)
    assert torch.equal(dataset[1][0], expected[0][1])


def test_a_link_to_another_file_is_not_followed(photos, tmp_path):
    cached(photos, tmp_path).batches()
    [path] = (tmp_path / "cache").glob("*.pixels")
    (tmp_path / "other").write_text("precious")
    path.unlink()
    path.symlink_to(tmp_path / "other")
    cached(photos, tmp_path).batches()
    assert (tmp_path / "other").read_text() == "precious"
    assert not path.is_symlink()


def test_several_runs_fill_one_file(tmp_path):
    layout = Layout(key="0" * 64, what="test", count=200, shape=(3, 16, 16))
    fork = get_context("fork")
    writers = [fork.Process(target=_write_all, args=(tmp_path, layout, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    path = PixelCache(tmp_path).file("two", layout).file.path
    reader, seen = PixelFile(path, layout), 0
    while any(writer.is_alive() for writer in writers) or not seen:
        for row in range(layout.count):
            pixels = reader.read(row, row + 1)
            assert pixels in ("empty", "damaged", _row(row))  # damaged: it is just being written
            seen += pixels == _row(row)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert all(reader.read(row, row + 1) == _row(row) for row in range(layout.count))
    assert pixel_file.count_stored(path, layout) == layout.count
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_can_only_be_read_is_read(photos, tmp_path, monkeypatch):
    expected = cached(photos, tmp_path).batches()
    whole = os.open

    def read_only(path, flags, *rest, **options):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return whole(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Image, "open", None)
    same(cached(photos, tmp_path).batches(), expected)


def _row(row):
    return np.random.default_rng(row).integers(0, 256, 768, dtype=np.uint8).tobytes()


def _write_all(folder, layout, seed):
    cache = PixelCache(folder)
    rows = cache.file("two", layout)
    rows.prepare()
    for row in random.Random(seed).sample(range(layout.count), layout.count):
        rows.write(row, row + 1, _row(row))
    assert cache.problems() == []


def test_a_limit_that_is_no_size(monkeypatch):
    monkeypatch.setenv("MULKI_CACHE_LIMIT", "lots")
    with pytest.raises(MulkiError, match="MULKI_CACHE_LIMIT: expected a size, got 'lots'"):
        PixelCache()
