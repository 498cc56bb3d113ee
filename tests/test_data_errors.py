"""What a user reads when data is missing, broken, of the wrong layout, or asked for wrongly."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pynas.training.data import open_data
from pynas.training.sources import STORED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A good folder, for tests to break: train/ with 10 pictures and val/ with 3 of each of two classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for kind in ("cat", "dog"):
            (tmp_path / "pets" / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / kind / f"{i}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 7}, "size=7 is too small: images need 8 pixels or more"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"arch_share": 0.0}, "arch_share=0.0 is not a share between 0 and 1"),
        ({"arch_share": 1.0}, "arch_share=1.0 is not a share"),
        ({"test_share": 1.5}, "test_share=1.5 is not a share"),
        ({"test_share": float("nan")}, "test_share=nan is not a share"),
        ({"limit": 0}, "limit=0 leaves no training images"),
        ({"limit": 3}, "limit=3 is too few for 2 classes.*Give limit=4 or more"),
        ({"workers": -1}, "workers=-1 is negative"),
        ({"on_corrupt": "ignore"}, "Unknown on_corrupt 'ignore'.*Allowed: skip, stop"),
        ({"augment": "crop_flp"}, "Unknown augment 'crop_flp'. Did you mean 'crop_flip'?"),
    ],
)
def test_arguments(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(root, **({"size": 8} | arguments))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="Unknown data set 'cifar-10'. Did you mean 'cifar10'.*path of a folder"):
        open_data("cifar-10", size=32)


@pytest.mark.parametrize("name", STORED)
def test_absent_data_set_says_where_it_looked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = re.escape(f"{name!r} is not under {tmp_path / 'x'}")
    with pytest.raises(FileNotFoundError, match=rf"{looked} \(given as root\), and nothing is downloaded"):
        open_data(name, size=32, root=tmp_path / "x")
    monkeypatch.setenv("PYNAS_DATA", str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=rf"{looked} \(from PYNAS_DATA\)"):
        open_data(name, size=32)
    monkeypatch.delenv("PYNAS_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"under {tmp_path / 'data'} (the default")):
        open_data(name, size=32)
    assert not any(tmp_path.rglob("*.gz"))


# Layout: each entry breaks the good folder


def empty_class(root: Path) -> None:
    (root / "train" / "eel").mkdir()


def text_class(root: Path) -> None:
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "notes.txt").write_text("x")


def class_only_in_val(root: Path) -> None:
    shutil.copytree(root / "val" / "cat", root / "val" / "eel")


def class_only_in_train(root: Path) -> None:
    shutil.copytree(root / "train" / "cat", root / "train" / "eel")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "dog")


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def empty_train(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def loose_images(root: Path) -> None:
    for kind in ("cat", "dog"):
        for file in (root / "train" / kind).iterdir():
            file.rename(root / "train" / f"{kind}{file.name}")
        (root / "train" / kind).rmdir()


def nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def missing(root: Path) -> None:
    shutil.rmtree(root)


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("x")


def few_images(root: Path) -> None:
    for i in range(1, 10):
        (root / "train" / "dog" / f"{i}.png").unlink()


def few_in_three_ways(root: Path) -> None:
    shutil.rmtree(root / "val")
    few_images(root)


LAYOUTS: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (empty_class, ValueError, "The class folder .*train/eel holds no images. Add some, or remove the folder"),
    (text_class, ValueError, "The class folder .*train/eel holds no images.*Suffixes of images: .bmp"),
    (class_only_in_val, ValueError, "has classes in val/ that train/ lacks .1.: 'eel'"),
    (class_only_in_train, ValueError, "has classes in train/ that val/ lacks .1.: 'eel'"),
    (one_class, ValueError, "train has one class only, 'cat'; a classifier needs two"),
    (no_train, ValueError, "has val/ but no train/"),
    (empty_train, ValueError, "train holds no images and no class folders"),
    (loose_images, ValueError, "train holds images but no class folders. Put each image into a folder"),
    (nothing, ValueError, "pets holds no images and no class folders"),
    (missing, FileNotFoundError, "There is no folder .*pets. Expected PATH/<class>"),
    (a_file, NotADirectoryError, "pets is a file, not a folder of images"),
    (few_images, ValueError, "Class 'dog' of .* has 1 training image, and needs 2 or more: one each for training and"),
    (few_in_three_ways, ValueError, "'dog' .* has 1 training image, and needs 3 or more: .* architecture and test"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), LAYOUTS, ids=lambda x: getattr(x, "__name__", ""))
def test_layout(root: Path, damage: Callable[[Path], None], kind: type[Exception], message: str) -> None:
    damage(root)
    with pytest.raises(kind, match=message):
        open_data(root, size=8)


# Broken images


def encoded(kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def floating() -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32)).save(buffer, "tiff")
    return buffer.getvalue()


def wide_integers() -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((9, 9), 70000, dtype=np.int32)).save(buffer, "tiff")
    return buffer.getvalue()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is no known kind of image"),
    "text": (b"<html>404</html>", "the file is no known kind of image"),
    "truncated jpeg": (encoded("jpeg")[:-300], "image file is truncated"),
    "truncated png": (encoded("png")[:-300], "image file is truncated"),
    "header only": (encoded("jpeg")[:200], ""),
    "floats": (floating(), "floating-point pixels have no agreed range"),
    "wide integers": (wide_integers(), "32-bit pixels outside 0 .. 65535"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_image_stops_or_is_skipped(root: Path, kind: str) -> None:
    content, reason = BROKEN[kind]
    (root / "train" / "cat" / "4.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"Cannot decode image train/cat/4.png of .*: .*{reason}") as caught:
        open_data(root, size=8)
    assert "leave such files out with on_corrupt='skip'" in str(caught.value)
    data = open_data(root, size=8, on_corrupt="skip")
    assert "train/cat/4.png" not in data.train.names
    assert len(data.train) == len(data.train.labels) == 19
    (note,) = data.notes
    assert note.startswith("1 images could not be decoded and were left out, for example train/cat/4.png (")
    assert reason in note


def test_skipping_leaves_the_split_of_the_others_alone(root: Path) -> None:
    before = open_data(root, size=8)
    broken = before.arch.names[0]
    (root / broken).write_bytes(b"")
    after = open_data(root, size=8, on_corrupt="skip")
    assert after.arch.names == before.arch.names[1:]
    assert (after.weights.names, after.test.names) == (before.weights.names, before.test.names)


def test_skipping_must_leave_every_class_in_every_part(root: Path) -> None:
    for i in range(3):
        (root / "val" / "dog" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="Class 'dog' of .* has no readable image left for the test part: 3 images"):
        open_data(root, size=8, on_corrupt="skip")


def test_dangling_link_is_a_broken_image(root: Path) -> None:
    (root / "train" / "cat" / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match="Cannot decode image train/cat/link.png of .*No such file"):
        open_data(root, size=8)


def test_decompression_bomb_is_a_broken_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(root / "train" / "cat" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # Pillow warns above it, and refuses above twice as much
    assert len(open_data(root, size=8).train) == 21
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match="Cannot decode image train/cat/bomb.png .*exceeds limit"):
        open_data(root, size=8)


SAMPLES = [encoded("jpeg"), encoded("png"), encoded("gif"), encoded("bmp"), encoded("webp"), encoded("tiff")]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_bytes_are_decoded_or_named(root: Path, content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(min(len(damaged), 8)):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (root / "train" / "cat" / "4.png").write_bytes(damaged)
    opened = open_data(root, size=8, on_corrupt="skip", workers=1)
    if "train/cat/4.png" in opened.train.names:
        assert opened.train.pixels([opened.train.names.index("train/cat/4.png")]).shape == (1, 3, 8, 8)
    else:
        assert any("could not be decoded and were left out, for example train/cat/4.png" in n for n in opened.notes)


# Permissions


def test_unreadable_file_is_never_skipped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def deny(path: Path) -> bytes:
        if path.name == "4.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(PermissionError, match=r"Cannot read .*/4.png: permission denied. Try: chmod u\+r .*/4.png"):
        open_data(root, size=8, on_corrupt="skip")


def test_unreadable_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def deny(path: str) -> Any:
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match=r"Cannot read .*train/dog: permission denied. Try: chmod -R u\+rX "):
        open_data(root, size=8)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("place", ["", "train", "train/dog", "train/dog/1.png"])
def test_real_permissions(root: Path, place: str) -> None:
    (root / place).chmod(0)
    try:
        with pytest.raises(PermissionError, match="Cannot read .*: permission denied. Try: chmod"):
            open_data(root, size=8)
    finally:
        (root / place).chmod(0o700)
