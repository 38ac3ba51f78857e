"""Parting a dataset: stratified, without overlap, and the same for ever."""

import dataclasses

import numpy as np
import pytest

from aim_flax.data.records import Subset, hold_out


@dataclasses.dataclass
class Letters:
    """Records whose bytes are their name."""

    letters: str

    def __len__(self) -> int:
        return len(self.letters)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.letters[index].encode(), index

    def label(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return self.letters[index]


def test_subset_is_those_records_in_that_order():
    subset = Subset(Letters("abcde"), np.array([3, 0, 4]))
    assert len(subset) == 3
    assert [subset.read(i) for i in range(3)] == [(b"d", 3), (b"a", 0), (b"e", 4)]
    assert [subset.name(i) for i in range(3)] == ["d", "a", "e"]
    assert [subset.label(i) for i in range(3)] == [3, 0, 4]
    again = Subset(subset, np.array([2, 1]))
    assert [again.name(i) for i in range(2)] == ["e", "a"]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_every_class_is_parted_in_proportion(fraction):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 7], [1, 40, 203]))
    kept, held = hold_out(labels, fraction, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(244))
    for indices in (kept, held):
        np.testing.assert_array_equal(indices, np.sort(indices))
    counts = [int((labels[held] == label).sum()) for label in (0, 1, 7)]
    # A class of one example keeps it.
    assert counts == [0, round(40 * fraction), round(203 * fraction)]


def test_a_class_keeps_at_least_one_example():
    kept, held = hold_out(np.array([0, 0, 0, 1]), 0.99, seed=0)
    assert (len(kept), len(held)) == (2, 2)
    assert 3 in kept


def test_the_seed_alone_decides():
    labels = np.repeat(np.arange(4), 25)
    held = [hold_out(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1)]
    assert held[0] == held[1]
    assert held[0] != held[2]


def test_held_out_examples_stay_those_of_earlier_versions():
    """Results of other versions would no longer compare if these changed."""
    _, held = hold_out(np.repeat([0, 1], 10), 0.3, seed=0)
    assert held.tolist() == [2, 4, 6, 12, 13, 19]


def test_nothing_to_part():
    kept, held = hold_out(np.array([], np.int64), 0.5, seed=0)
    assert (len(kept), len(held)) == (0, 0)
