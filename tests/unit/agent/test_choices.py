"""Choices: the greedy and the random ones, in one dimension and in several of different sizes, under masks."""

import numpy as np
import pytest

from hvd_dqn.agent.choices import Choices

T, F = True, False


#     sizes       values                  mask                      greedy
GREEDY = [
    ((3,),       [1.0, 3.0, 2.0],         None,                     1),
    ((3,),       [1.0, 3.0, 2.0],         [T, F, T],                2),
    ((3,),       [-1.0, -3.0, 9.0],       [F, T, F],                1),
    ((2, 2),     [1.0, 3.0, 5.0, 4.0],    None,                     [1, 0]),
    ((2, 3),     [1.0, 3.0, 5.0, 4.0, 6.0], None,                   [1, 2]),
    ((3, 1, 2),  [-5.0, -4.0, -6.0, -1.0, -3.0, -2.0], None,        [1, 0, 1]),  # padding is never the largest
    ((3, 1, 2),  [-5.0, -4.0, -6.0, -1.0, -3.0, -2.0], [T, F, T, T, T, F], [0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "values", "mask", "expected"), GREEDY)
def test_the_greedy_choice_is_the_highest_allowed_value_in_each_dimension(sizes, values, mask, expected):
    masks = None if mask is None else np.array([mask] * 2)
    assert Choices(sizes).greedy(np.array([values] * 2), masks).tolist() == [expected] * 2


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (2, 1, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_random_choices_are_uniform_over_what_is_allowed(sizes, masked):
    choices, rng, count = Choices(sizes), np.random.default_rng(0), 6_000
    mask = np.ones((count, choices.total), bool)
    if masked:
        mask[:, 0] = False
    drawn = choices.random(rng, count, mask if masked else None).reshape(count, -1)
    for d, n in enumerate(sizes):
        allowed = np.arange(1 if masked and d == 0 else 0, n)
        counts = np.bincount(drawn[:, d], minlength=n)
        assert np.flatnonzero(counts).tolist() == allowed.tolist()
        assert np.all(np.abs(counts[allowed] - count / len(allowed)) < 5 * np.sqrt(count / len(allowed)))
    assert choices.random(rng, 4).shape == (4, *choices.shape)


def test_an_action_is_allowed_if_each_of_its_numbers_is():
    choices, mask = Choices((2, 3)), np.array([[T, F, F, T, T]] * 4)
    assert choices.allows(mask, np.array([[0, 1], [1, 1], [0, 0], [0, 2]])).tolist() == [T, F, F, T]
    assert Choices((5,)).allows(mask, np.array([0, 1, 3, 2])).tolist() == [T, F, T, F]


def test_an_action_needs_a_number_in_every_dimension():
    masks = np.array([[T, T, F, F, F], [F, F, T, T, T], [F, T, F, F, T], [F] * 5])
    assert Choices((2, 3)).leaves_any(masks).tolist() == [F, F, T, F]
    assert Choices((5,)).leaves_any(masks).tolist() == [T, T, T, F]
