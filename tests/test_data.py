"""Opening data sets: splits without leaks, any kind of picture, any layout of folders."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from pynas.training import images as images_module
from pynas.training.augment import stored_shape
from pynas.training.data import Data, open_data
from pynas.training.decode import decode

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack_cifar10.py"


def picture(seed: int, width: int = 12, height: int = 12) -> Image.Image:
    """A smooth coloured picture, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def fill(root: Path, counts: dict[str, int]) -> Path:
    """Writes so many pictures into each folder of `root`, all different."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(1000 * number + i).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return fill(tmp_path / "flat", {"cat": 20, "dog": 10})


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    return fill(tmp_path / "parted", {"train/cat": 10, "train/dog": 10, "val/cat": 4, "val/dog": 3})


def names(data: Data) -> tuple[set[str], set[str], set[str]]:
    return set(data.weights.names), set(data.arch.names), set(data.test.names)


def test_seed_decides_the_split(flat: Path) -> None:
    one, same, other = (open_data(flat, size=8, seed=seed) for seed in (1, 1, 2))
    assert one.weights.names == same.weights.names
    assert names(one) != names(other)


def test_a_new_file_moves_few_others(flat: Path) -> None:
    before = open_data(flat, size=8)
    picture(77).save(flat / "cat" / "new.png")
    after = open_data(flat, size=8)
    moved = sum(len(old - new) for old, new in zip(names(before), names(after), strict=True))
    assert moved <= 2
    assert set().union(*names(after)) - set().union(*names(before)) == {"cat/new.png"}


def test_parts_begin_with_a_fair_sample_of_the_classes(tmp_path: Path) -> None:
    data = open_data(fill(tmp_path / "many", {f"class{i}": 40 for i in range(4)}), size=8)
    for part in (data.weights, data.arch, data.test):
        assert set(part.labels[: len(part) // 2].tolist()) == {0, 1, 2, 3}


# Digits


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    data, bundle = open_data("digits", size=8, augment="none"), load_digits()
    assert len(set().union(*names(data))) == len(bundle.images) == 1797
    assert data.classes == tuple("0123456789")
    for part in (data.weights, data.arch, data.test):
        rows = [int(name.removeprefix("digits/")) for name in part.names]
        assert part.labels.tolist() == bundle.target[rows].tolist()
        pixels = part.pixels(range(len(part)))
        assert pixels.shape == (len(part), 3, 8, 8)
        assert pixels.dtype == torch.uint8
        expected = torch.from_numpy(np.rint(bundle.images[rows] * 255 / 16)).to(torch.uint8)
        assert all(torch.equal(pixels[:, channel], expected) for channel in range(3))


def test_digits_are_the_same_for_everyone() -> None:
    data = open_data("digits", size=32, limit=200)
    assert (len(data.weights), len(data.arch), len(data.test)) == (160, 40, 359)
    assert data.augment == "crop"
    assert data.test.names[:3] == open_data("digits", size=8, arch_share=0.5).test.names[:3]


# Pictures


def sixteen_bits(value: int) -> Image.Image:
    return Image.fromarray(np.full((10, 10), value, dtype=np.uint16))


def palette() -> Image.Image:
    image = Image.new("P", (10, 10), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


RED = (200, 10, 20)
ZOO: dict[str, tuple[Callable[[], Image.Image], str, dict[str, Any], tuple[int, int, int], str | None]] = {
    "rgb png": (lambda: Image.new("RGB", (10, 10), RED), "png", {}, RED, None),
    "rgb jpeg": (lambda: Image.new("RGB", (10, 10), RED), "jpg", {"quality": 95}, RED, None),
    "rgb bmp": (lambda: Image.new("RGB", (10, 10), RED), "bmp", {}, RED, None),
    "rgb webp": (lambda: Image.new("RGB", (10, 10), RED), "webp", {"lossless": True}, RED, None),
    "rgb ppm": (lambda: Image.new("RGB", (10, 10), RED), "ppm", {}, RED, None),
    "grey": (lambda: Image.new("L", (10, 10), 77), "png", {}, (77, 77, 77), "greyscale"),
    "grey jpeg": (lambda: Image.new("L", (10, 10), 77), "jpg", {}, (77, 77, 77), "greyscale"),
    "one bit": (lambda: Image.new("1", (10, 10), 1), "png", {}, (255, 255, 255), "greyscale"),
    "16 bits": (lambda: sixteen_bits(30000), "png", {}, (117, 117, 117), "16-bit"),
    "16 bits, white": (lambda: sixteen_bits(65535), "tiff", {}, (255, 255, 255), "16-bit"),
    "16 bits, dark": (lambda: sixteen_bits(300), "pgm", {}, (1, 1, 1), "16-bit"),
    "palette": (palette, "png", {}, (10, 200, 30), "palette"),
    "palette gif": (palette, "gif", {}, (10, 200, 30), "palette"),
    "palette, clear": (palette, "png", {"transparency": 1}, (255, 255, 255), "alpha"),
    "palette, half clear": (palette, "png", {"transparency": b"\xff\x80"}, (132, 227, 142), "alpha"),
    "alpha": (lambda: Image.new("RGBA", (10, 10), (*RED, 255)), "png", {}, RED, "alpha"),
    "alpha, clear": (lambda: Image.new("RGBA", (10, 10), (*RED, 0)), "png", {}, (255, 255, 255), "alpha"),
    "grey alpha": (lambda: Image.new("LA", (10, 10), (77, 0)), "png", {}, (255, 255, 255), "alpha"),
    "cmyk": (lambda: Image.new("CMYK", (10, 10), (0, 255, 255, 0)), "jpg", {"quality": 95}, (255, 0, 0), "CMYK"),
    "cmyk tiff": (lambda: Image.new("CMYK", (10, 10), (255, 0, 0, 0)), "tiff", {}, (0, 255, 255), "CMYK"),
    "odd size": (lambda: Image.new("RGB", (37, 5), RED), "png", {}, RED, None),
    "one pixel": (lambda: Image.new("RGB", (1, 1), RED), "png", {}, RED, None),
    "very wide": (lambda: Image.new("RGB", (3000, 2), RED), "png", {}, RED, None),
}


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_any_picture_becomes_rgb(flat: Path, kind: str, augment: str) -> None:
    make, suffix, options, colour, note = ZOO[kind]
    make().save(flat / "cat" / f"odd.{suffix}", **options)
    data = open_data(flat, size=8, augment=augment)  # type: ignore[arg-type]
    part = next(part for part in (data.weights, data.arch, data.test) if f"cat/odd.{suffix}" in part.names)
    pixels = part.pixels([part.names.index(f"cat/odd.{suffix}")])
    assert pixels.shape == (1, 3, 8, 8)
    assert (pixels.to(torch.int16) - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3
    assert data.notes == (() if note is None else tuple(n for n in data.notes if "converted" in n))
    assert note is None or f"1 images converted to 8-bit RGB: {note}" in data.notes


@pytest.mark.parametrize("value", [0, 128, 129, 30000, 65406, 65407, 65535])
def test_16_bits_are_rounded_to_8(value: int) -> None:
    assert (decode(sixteen_bits(value), 10, 1)[0] == round(value / 257)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 16, 3), dtype=np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turn: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn[orientation](upright)))
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    pixels, converted = decode(Image.open(tmp_path / "turned.jpg"), 16, 1)
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - upright).max() < 12
    assert converted == (() if orientation == 1 else ("rotated by EXIF",))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(60, 40, 16), (40, 61, 16), (20, 20, 32), (9, 7, 24), (300, 200, 24)]
)
def test_geometry_is_that_of_torchvision(width: int, height: int, size: int) -> None:
    image = picture(5, width, height)
    ours = decode(image, size, 1)[0].astype(int)
    theirs = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])(image).numpy().astype(int)
    assert ours.shape == theirs.shape
    # The crop comes before the resize, so it is not rounded to whole pixels: half a pixel of difference.
    assert np.abs(ours - theirs).mean() < 255 / min(width, height) / 4


def test_pictures_for_imagenet_crops_keep_their_shape_up_to_a_limit() -> None:
    side, aspect = stored_shape("imagenet", 224)
    assert side == 256
    assert decode(picture(1, 500, 375), side, aspect)[0].shape == (3, 256, 341)
    assert decode(picture(1, 300, 1200), side, aspect)[0].shape == (3, 768, 256)


# Folders


def test_parted_folder_keeps_val_for_the_test(parted: Path) -> None:
    data = open_data(parted, size=8)
    assert data.classes == ("cat", "dog")
    weights, arch, test = names(data)
    assert [len(part) for part in (weights, arch, test)] == [16, 4, 7]
    assert {name.split("/")[0] for name in weights | arch} == {"train"}
    assert {name.split("/")[0] for name in test} == {"val"}
    assert all(data.classes[int(y)] in name for name, y in zip(data.test.names, data.test.labels, strict=True))


def test_flat_folder_is_split_three_ways(flat: Path) -> None:
    data = open_data(str(flat), size=8, arch_share=0.25, test_share=0.4)
    assert [len(part) for part in names(data)] == [13, 5, 12]
    assert not data.notes


@pytest.mark.parametrize(
    ("folders", "test_folder", "note"),
    [
        ({"train": 4, "test": 3}, "test/", "test/ is the test set, as there is no val/"),
        ({"train": 4, "val": 3, "test": 2}, "val/", "val/ is the test set; test/ is not used"),
        ({"train": 9}, "train/", "there is no val/, so the test set is split off train/"),
    ],
)
def test_other_layouts_are_said(tmp_path: Path, folders: dict[str, int], test_folder: str, note: str) -> None:
    root = fill(tmp_path / "x", {f"{part}/{kind}": count for part, count in folders.items() for kind in ("cat", "dog")})
    (root / "train" / "cat" / "notes.txt").write_text("x")
    data = open_data(root, size=8)
    assert all(name.startswith(test_folder) for name in data.test.names)
    assert data.notes[0] == note
    assert data.notes[1].startswith("1 files that are no images by their suffix")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert open_data(fill(tmp_path / "x", {"bus": 4, "train": 4}), size=8).classes == ("bus", "train")


def test_nested_hidden_and_foreign_files(flat: Path) -> None:
    (flat / "cat" / "more").mkdir()
    picture(50).save(flat / "cat" / "more" / "nested.PNG")
    (flat / ".cache").mkdir()
    (flat / "cat" / ".DS_Store").write_bytes(b"x")
    (flat / "cat" / "labels.txt").write_text("x")
    (flat / "readme.md").write_text("x")
    (flat / "cat" / "loop").symlink_to(flat, target_is_directory=True)
    data = open_data(flat, size=8)
    everything = set().union(*names(data))
    assert "cat/more/nested.PNG" in everything
    assert len(everything) == 31
    assert data.notes == ("1 files that are no images by their suffix were passed over, for example cat/labels.txt",)


def test_odd_file_names(flat: Path) -> None:
    for name in ("a b.png", "ümläut.png", os.fsdecode(b"latin\xe9.png"), "x" * 200 + ".png"):
        picture(len(name) + 400).save(flat / "dog" / name)
    assert len(set().union(*names(open_data(flat, size=8)))) == 34


def test_identical_files_are_counted(parted: Path) -> None:
    for i in (1, 2):
        (parted / "val/cat" / f"00{i}.png").write_bytes((parted / "train/cat" / f"00{i}.png").read_bytes())
    notes = open_data(parted, size=8).notes
    example = "val/cat/001.png = train/cat/001.png"
    text = "2 images of the test set are byte for byte among the training images, for example"
    assert notes == (f"{text} {example}",)


def test_identical_files_across_weights_and_architecture(flat: Path) -> None:
    data = open_data(flat, size=8)
    copied, original = data.arch.names[0], data.weights.names[0]
    (flat / copied).write_bytes((flat / original).read_bytes())
    (note,) = open_data(flat, size=8).notes
    assert note.startswith("1 images for the architecture are byte for byte among those for the weights")
    assert f"{copied} = {original}" in note


# Memory and threads


@pytest.mark.parametrize("augment", ["crop_flip", "imagenet"])
@pytest.mark.parametrize("budget", [0, 8700])
def test_images_are_the_same_from_memory_and_from_disk(
    parted: Path, monkeypatch: pytest.MonkeyPatch, augment: str, budget: int
) -> None:
    picture(9, 60, 20).save(parted / "train/cat/wide.png")
    kept = open_data(parted, size=8, augment=augment, workers=1)  # type: ignore[arg-type]
    monkeypatch.setattr(
        images_module, "RAM_BYTES", budget
    )  # 8700: enough for squares, found short on the way for others
    fresh = open_data(parted, size=8, augment=augment, workers=3)  # type: ignore[arg-type]
    assert "kept in memory" in kept.describe()
    assert ("kept in memory" in fresh.describe()) == (augment == "crop_flip" and budget > 0)
    assert (kept.mean, kept.std, kept.weights.names) == (fresh.mean, fresh.std, fresh.weights.names)
    for one, other in ((kept.weights, fresh.weights), (kept.test, fresh.test)):
        assert torch.equal(one.pixels(range(len(one))), other.pixels(range(len(other))))


def test_a_file_that_vanishes_later_is_named(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "RAM_BYTES", 0)
    data = open_data(parted, size=8)
    (parted / data.test.names[1]).unlink()
    with pytest.raises(ValueError, match=f"Cannot decode image {data.test.names[1]} of .*No such file"):
        data.test.pixels([0, 1])


# Statistics and description


def test_mean_and_std_are_those_of_the_weights_part(parted: Path) -> None:
    data = open_data(parted, size=12)
    pixels = data.weights.pixels(range(len(data.weights))).to(torch.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3), unbiased=False), rtol=1e-9)
    assert all(type(value) is float for value in data.mean + data.std)
    normal = data.normalise(data.weights.pixels(range(len(data.weights))))
    assert normal.dtype == torch.float32
    assert normal.mean((0, 2, 3)).abs().max() < 1e-4
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_a_channel_without_contrast_stays_finite(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (10, 50 * i, 255)).save(tmp_path / kind / f"{i}.png")
    data = open_data(tmp_path, size=8)
    assert data.std[0] == data.std[2] == 1.0
    assert torch.isfinite(data.normalise(data.test.pixels([0, 1]))).all()


def test_description_has_what_a_report_needs(parted: Path) -> None:
    Image.new("L", (9, 9), 3).save(parted / "train/cat/grey.png")
    first, second, _, note = open_data(parted, size=8).describe().splitlines()
    assert first == f"{parted}: 2 classes, 8x8 RGB, kept in memory"
    assert second == "17 images for the weights, 4 for the architecture, 7 for the test"
    assert note == "note: 1 images converted to 8-bit RGB: greyscale"


def test_train_is_weights_then_architecture(parted: Path) -> None:
    data = open_data(parted, size=8)
    assert data.train.names == data.weights.names + data.arch.names
    assert data.train.labels.tolist() == data.weights.labels.tolist() + data.arch.labels.tolist()


def test_global_generator_is_left_alone(parted: Path) -> None:
    before = torch.get_rng_state()
    open_data(parted, size=8)
    assert torch.equal(torch.get_rng_state(), before)


# torchvision's data sets


def write_mnist(root: Path, count: int) -> None:
    """MNIST in its own format: idx files of random pixels, labels 0 .. 9 in turn."""
    (raw := root / "MNIST" / "raw").mkdir(parents=True)
    for part, seed in (("train", 0), ("t10k", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())


@pytest.mark.parametrize("how", ["root", "environment", "default"])
def test_mnist_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYNAS_DATA", raising=False)
    where = tmp_path / {"root": "r", "environment": "e", "default": "data"}[how]
    write_mnist(where, 40)
    if how == "environment":
        monkeypatch.setenv("PYNAS_DATA", str(where))
    data = open_data("mnist", size=28, root=where if how == "root" else None)
    assert (len(data.weights), len(data.arch), len(data.test)) == (30, 10, 40)
    assert data.augment == "crop"
    assert data.classes[7] == "7 - seven"
    original = datasets.MNIST(str(where), train=False)
    row = int(data.test.names[5].removeprefix("test/"))
    assert data.test.labels[5] == original.targets[row]
    assert torch.equal(data.test.pixels([5])[0, 1], original.data[row])


def test_cifar_copy_as_a_folder(tmp_path: Path) -> None:
    if not CIFAR.exists():
        pytest.skip(f"the CIFAR-10 copy is not at {CIFAR.parent}")
    subprocess.run([sys.executable, CIFAR, tmp_path, "--per-class", "12"], check=True, capture_output=True)
    data = open_data(tmp_path, size=32, limit=100)
    assert (len(data.classes), len(data.weights), len(data.arch), len(data.test)) == (10, 80, 20, 120)
    assert data.augment == "crop_flip"
    assert np.allclose(data.mean, (0.491, 0.482, 0.447), atol=0.06)
    assert np.allclose(data.std, (0.247, 0.243, 0.262), atol=0.05)
