"""Batches: each epoch visits each image once, a resumed stream equals an unbroken one, and augmentation is pure."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2_functional

from pynas.training.augment import COLUMNS, Augment, augmented, crop_resize, shift
from pynas.training.data import Data, open_data
from pynas.training.draws import permutation, uniform, words
from pynas.training.feed import Feed, batches
from pynas.training.images import Images

steady = settings(deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def digits() -> Data:
    """120 + 30 small images, all different, without augmentation."""
    return open_data("digits", size=8, limit=150, augment="none")


@pytest.fixture(scope="module", params=["none", "crop", "crop_flip", "imagenet"])
def any_digits(request: pytest.FixtureRequest) -> Data:
    return open_data("digits", size=16, limit=60, augment=request.param)


def which(x: Tensor, images: Images, data: Data) -> list[int]:
    """Positions in `images` of the images of a batch, recognised by their content."""
    known = {pixels.numpy().tobytes(): i for i, pixels in enumerate(data.normalise(images.pixels(range(len(images)))))}
    return [known[image.numpy().tobytes()] for image in x]


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


# Streams


@pytest.mark.parametrize("batch_size", [1, 7, 120])
def test_an_epoch_visits_each_image_once(digits: Data, batch_size: int) -> None:
    feed = Feed(digits, batch_size=batch_size, seed=3)
    assert feed.steps_weights == 120 // batch_size
    orders = []
    for _ in range(3):
        order: list[int] = []
        for _ in range(feed.steps_weights):
            x, y = feed.weights()
            assert x.shape == (batch_size, 3, 8, 8)
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            order += which(x, digits.weights, digits)
            assert y.tolist() == digits.weights.labels[order[-batch_size:]].tolist()
        assert len(order) == len(set(order)) == 120 // batch_size * batch_size
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_a_small_part_is_one_batch(digits: Data) -> None:
    feed = Feed(digits, batch_size=50, seed=0)
    assert (feed.steps_weights, feed.steps_arch) == (2, 1)
    for _ in range(3):
        x, _ = feed.arch()
        assert sorted(which(x, digits.arch, digits)) == list(range(30))


def test_pool_train_has_all_training_images(digits: Data) -> None:
    feed = Feed(digits, batch_size=50, seed=0, pool="train")
    assert feed.steps_weights == 3
    seen = [i for _ in range(3) for i in which(feed.weights()[0], digits.train, digits)]
    assert sorted(seen) == list(range(150))
    assert same(feed.arch(), Feed(digits, batch_size=50, seed=0).arch())


def test_streams_do_not_touch_each_other(any_digits: Data) -> None:
    alone, mixed = (Feed(any_digits, batch_size=5, seed=1) for _ in range(2))
    for _ in range(12):
        mixed.arch()
        assert same(alone.weights(), mixed.weights())


def test_seeds_and_streams_differ(digits: Data) -> None:
    one, other = (Feed(digits, batch_size=26, seed=seed) for seed in (0, 1))
    assert which(one.weights()[0], digits.weights, digits) != which(other.weights()[0], digits.weights, digits)
    halves = open_data("digits", size=8, limit=40, arch_share=0.5, augment="none")
    feed = Feed(halves, batch_size=20, seed=0)
    assert which(feed.weights()[0], halves.weights, halves) != which(feed.arch()[0], halves.arch, halves)


@pytest.fixture(scope="module")
def opened_twice() -> tuple[Data, Data]:
    return open_data("digits", size=8, limit=60), open_data("digits", size=8, limit=60)


@settings(steady, max_examples=50)
@given(st.integers(0, 30), st.integers(0, 9), st.integers(1, 30))
def test_resumed_stream_equals_the_unbroken_one(
    opened_twice: tuple[Data, Data], before_weights: int, before_arch: int, batch_size: int
) -> None:
    unbroken = Feed(opened_twice[0], batch_size=batch_size, seed=5)
    for _ in range(before_weights):
        unbroken.weights()
    for _ in range(before_arch):
        unbroken.arch()
    resumed = Feed(opened_twice[1], batch_size=batch_size, seed=5)
    resumed.load_state_dict(unbroken.state_dict())
    assert resumed.state_dict() == unbroken.state_dict()
    for _ in range(7):
        assert same(unbroken.weights(), resumed.weights())
        assert same(unbroken.arch(), resumed.arch())


def test_state_is_a_few_integers_that_move(digits: Data) -> None:
    feed = Feed(digits, batch_size=50, seed=2)
    states = [feed.state_dict()]
    for _ in range(5):
        feed.weights()
        states.append(feed.state_dict())
    assert [(s["weights_epoch"], s["weights_step"]) for s in states] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(type(value) is int for value in states[-1].values())
    assert all(one != other for one, other in pairwise(states))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_images": 9}, "data does not fit: weights_images was 9 and is 120 now. Resume with"),
        ({"arch_names_crc32": 5}, "data does not fit: arch_names_crc32 was 5 and is"),
        ({"arch_batch_size": 3}, "arch_batch_size was 3 and is 8 now"),
        ({"weights_seed": 1}, "weights_seed was 1 and is 0 now"),
        ({"weights_step": 15}, "damaged: epoch 0, step 15 of 15 for weights"),
        ({"weights_step": 2, "arch_epoch": -1}, "damaged: epoch -1, step 0 of 3 for arch"),
        ({"extra": 1}, "not the state of a feed: it has .*'extra'"),
    ],
)
def test_a_state_that_does_not_fit(digits: Data, change: dict[str, int], message: str) -> None:
    feed = Feed(digits, batch_size=8, seed=0)
    with pytest.raises(ValueError, match=message):
        feed.load_state_dict(feed.state_dict() | change)
    assert feed.state_dict() == Feed(digits, batch_size=8, seed=0).state_dict()


def test_arguments(digits: Data) -> None:
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        Feed(digits, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed=-1 is negative"):
        Feed(digits, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="Unknown pool 'trian'. Did you mean 'train'"):
        Feed(digits, batch_size=1, seed=0, pool="trian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        next(batches(digits.test, 0, digits))


# Augmentation


def test_augmentation_does_not_depend_on_the_batch(any_digits: Data) -> None:
    small, large = Feed(any_digits, batch_size=4, seed=0), Feed(any_digits, batch_size=48, seed=0)
    assert large.steps_weights == 1
    for _ in range(2):
        pieces = [small.weights() for _ in range(small.steps_weights)]
        whole = large.weights()
        for at in (0, 1):
            assert torch.equal(torch.cat([piece[at] for piece in pieces]), whole[at])


@pytest.mark.parametrize("augment", ["crop", "crop_flip", "imagenet"])
def test_augmentation_changes_with_the_epoch(augment: Augment) -> None:
    data = open_data("digits", size=16, limit=60, augment=augment)
    feed = Feed(data, batch_size=48, seed=0)
    first, second = (sorted(image.numpy().tobytes() for image in feed.weights()[0]) for _ in range(2))
    assert len(set(first) & set(second)) < 24


def test_global_generators_are_left_alone(any_digits: Data) -> None:
    feed = Feed(any_digits, batch_size=16, seed=0)
    before = torch.get_rng_state()
    one = feed.weights()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert same(one, Feed(any_digits, batch_size=16, seed=0).weights())


@steady
@given(st.integers(1, 9), st.sampled_from([2, 3]), st.integers(8, 33), st.integers(0, 2**32))
def test_shift_is_crop_and_flip_of_torchvision(count: int, columns: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    numbers, pad = rng.random((count, columns)), size // 8
    expected = []
    for image, row in zip(v2_functional.pad(x, [pad] * 4), numbers, strict=True):
        top, left = (int(u * (2 * pad + 1)) for u in row[:2])
        cropped = v2_functional.crop(image, top, left, size, size)
        expected.append(v2_functional.horizontal_flip(cropped) if columns == 3 and row[2] < 0.5 else cropped)
    assert torch.equal(shift(x, numbers, pad), torch.stack(expected))


def test_shifts_and_flips_are_even() -> None:
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    x[0, 0, 3, 2] = 1
    moved = shift(x.expand(20000, 1, 8, 8), uniform((0,), range(20000), 3), 1)
    places = Counter(zip(*(axis.tolist() for axis in moved[:, 0].nonzero(as_tuple=True)[1:]), strict=True))
    assert sorted(places) == [(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)]
    assert all(abs(count - 20000 / 18) < 160 for count in places.values())  # five standard deviations


def test_imagenet_crops_are_like_those_of_torchvision() -> None:
    """Centre, extent and mirroring of the crops, read off a picture that holds its own coordinates."""
    rows, columns = torch.meshgrid(torch.arange(0, 240, 4), torch.arange(0, 240, 3), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    ours = torch.stack([crop_resize(image, row, 8) for row in uniform((1,), range(3000), COLUMNS["imagenet"])])
    torch.manual_seed(0)
    crop = v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip()])
    theirs = torch.stack([crop(image) for _ in range(3000)])
    for channel in (0, 1):
        one, other = (x[:, channel].to(torch.float32) for x in (ours, theirs))
        assert (one.mean() - other.mean()).abs() < 3
        extents = [(x.amax((1, 2)) - x.amin((1, 2))) for x in (one, other)]
        assert (extents[0].mean() - extents[1].mean()).abs() < 4
        assert (extents[0].std() - extents[1].std()).abs() < 4
    for x in (ours, theirs):
        assert 0.45 < (x[:, 1, 0, 0] > x[:, 1, 0, -1]).to(torch.float32).mean() < 0.55


@settings(steady, max_examples=60)
@given(st.integers(8, 60), st.integers(8, 60), st.integers(0, 2**20))
def test_imagenet_crop_stays_inside(height: int, width: int, seed: int) -> None:
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    for row in uniform((seed,), range(4), COLUMNS["imagenet"]):
        assert torch.equal(crop_resize(image, row, 8), torch.full((3, 8, 8), 200, dtype=torch.uint8))


def test_edges_of_the_random_numbers(any_digits: Data) -> None:
    columns = COLUMNS[any_digits.augment]
    for value in (0.0, 1 - 2**-53):
        out = augmented(any_digits.weights, [0, 1], any_digits.augment, np.full((2, columns), value))
        assert out.shape == (2, 3, 16, 16)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 27, 100, 1000])
def test_batches_give_every_image_once_in_order(any_digits: Data, batch_size: int) -> None:
    got = list(batches(any_digits.test, batch_size, any_digits))
    assert all(len(x) == batch_size for x, _ in got[:-1])
    expected = any_digits.normalise(any_digits.test.pixels(range(len(any_digits.test))))
    assert torch.equal(torch.cat([x for x, _ in got]), expected)
    assert torch.equal(torch.cat([y for _, y in got]), any_digits.test.labels)


# Random numbers


def splitmix64(state: int, count: int) -> list[int]:
    """The reference algorithm, step by step."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_words_are_those_of_splitmix64() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published vector
    start = int(np.random.SeedSequence([4, 2]).generate_state(1, np.uint64)[0])
    assert words((4, 2), np.arange(50, dtype=np.uint64)).tolist() == splitmix64(start, 50)


@steady
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(1, 9))
def test_a_row_of_numbers_belongs_to_its_index(indices: list[int], columns: int) -> None:
    together = uniform((7, 1), indices, columns)
    assert together.shape == (len(indices), columns)
    assert ((together >= 0) & (together < 1)).all()
    for index, row in zip(indices, together, strict=True):
        assert np.array_equal(uniform((7, 1), [index], columns)[0], row)


def test_numbers_are_uniform_and_keys_independent() -> None:
    one, other = (uniform((key, 0), range(20000), 2) for key in (0, 1))
    counts = np.histogram(one, bins=20, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 5 * 2000**0.5
    for pair in ((one[:, 0], one[:, 1]), (one[:, 0], other[:, 0]), (one[:-1, 0], one[1:, 0])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 5 / 20000**0.5


@steady
@given(st.integers(0, 300), st.integers(0, 2**33))
def test_permutation_has_every_number(length: int, seed: int) -> None:
    assert sorted(permutation((seed,), length).tolist()) == list(range(length))
