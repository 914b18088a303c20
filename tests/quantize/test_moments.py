"""What solvers are told of their inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claq_exp.quantize.moments import Moments


def hessians(groups: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, 2 * columns, columns, generator=generator, dtype=torch.float64)
    return inputs.transpose(1, 2) @ inputs


@given(groups=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_single_hessian_is_the_mean_of_all_groups(groups, columns, seed):
    given_ones = hessians(groups, columns, seed)
    moments = Moments(given_ones)
    assert moments.groups == groups
    expected = sum(given_ones[group] / groups for group in range(groups))
    assert torch.allclose(moments.single(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(moments.hessian, given_ones)


def test_the_loss_of_equal_groups_is_that_of_their_single_hessian():
    one = hessians(1, 6)[0]
    difference = torch.randn(8, 6, dtype=torch.float64, generator=torch.manual_seed(1))
    by_group = [torch.trace(part @ one @ part.t()) for part in difference.split(4)]
    single = Moments(torch.stack([one, one])).single()
    assert sum(by_group).item() == pytest.approx(
        torch.trace(difference @ single @ difference.t()).item()
    )


def test_one_group_is_its_own_memory_and_may_be_given_flat():
    hessian = hessians(1, 4)[0]
    moments = Moments(hessian, hessian + 1)
    assert moments.hessian.shape == moments.cross.shape == (1, 4, 4)
    assert moments.single().data_ptr() == hessian.data_ptr()


def test_what_is_used_up_is_gone():
    moments = Moments(hessians(2, 3), hessians(2, 3), tokens=5, disposable=True)
    assert not moments.used_up
    moments.use_up()
    assert moments.used_up
    assert moments.cross is None
    assert moments.tokens == 5


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (0, 3, 3), (3,), (1, 1, 2, 2)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        Moments(torch.zeros(shape, dtype=torch.float64))


def test_a_cross_moment_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="cross is"):
        Moments(hessians(2, 3), hessians(1, 3))


def test_a_copy_on_a_device_is_disposable_and_the_original_is_not(pretend):
    moments = Moments(hessians(2, 3), hessians(2, 3, seed=1), tokens=7)
    there = moments.to(torch.device(pretend))
    assert there.hessian.device.type == there.cross.device.type == pretend
    assert there.disposable
    assert there.tokens == 7
    assert not moments.disposable
    assert moments.to(torch.device("cpu")) is moments
