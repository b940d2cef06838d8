"""What needs no second rank: the range of 16-bit gradients."""

import pytest

from hvd_dqn.ranks.world import LARGEST_FP16, largest_gradient, predivision


@pytest.mark.parametrize(
    ("size", "elastic", "divisor", "largest"),
    [(1, False, 1, 65_504), (2, False, 2, 65_504), (3, False, 2, 43_669), (4, False, 2, 32_752), (8, False, 4, 32_752),
     (64, False, 8, 8_188), (512, False, 32, 4_094), (512, True, 1, 128), (2, True, 1, 32_752)],
)  # fmt: skip
def test_16_bit_gradients_are_divided_before_they_are_summed_by_about_the_root_of_the_size(
    size, elastic, divisor, largest
):
    assert predivision(size, elastic) == divisor
    assert round(largest_gradient(size, elastic)) == largest
    # What each rank may send, summed over all, is within what 16 bits hold.
    assert size * largest_gradient(size, elastic) / divisor <= LARGEST_FP16
