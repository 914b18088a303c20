"""The moments of a layer's inputs against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.errors import CalibrationError


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.01, 30, columns)  # features of real models differ as much in size
    return torch.randn(tokens, columns, generator=generator) * scale + 0.5


def accumulated(*batches: torch.Tensor) -> torch.Tensor:
    accumulator = MomentsAccumulator(batches[0].shape[-1])
    for batch in batches:
        accumulator.add(batch, where="here")
    return accumulator.moments().single()


def exact(tokens: torch.Tensor) -> np.ndarray:
    flat = tokens.double().reshape(-1, tokens.shape[-1]).numpy()
    return 2 / len(flat) * sum(np.outer(token, token) for token in flat)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 3), (5, 8), (300, 17)])
def test_it_is_twice_the_mean_outer_product(tokens, columns):
    batch = inputs(tokens, columns)
    found = accumulated(batch)
    expected = exact(batch)
    assert found.dtype == torch.float64
    largest = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(found.numpy() - expected) <= 1e-5 * largest).all()


def test_one_token_by_hand():
    assert accumulated(torch.tensor([[1.0, 3.0]])).tolist() == [[2.0, 6.0], [6.0, 18.0]]


@pytest.mark.case(39)
@pytest.mark.parametrize("sizes", [[90], [1] * 90, [1, 89], [30, 30, 30], [64, 25, 1]])
def test_how_tokens_are_split_into_batches_changes_nothing(sizes):
    tokens = inputs(90, 6)
    whole = accumulated(tokens)
    assert torch.allclose(accumulated(*tokens.split(sizes)), whole, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_tokens():
    tokens = inputs(24, 5)
    assert torch.equal(accumulated(tokens.reshape(2, 3, 4, 5)), accumulated(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_float_dtype_are_summed_in_float32_or_better(dtype):
    tokens = inputs(200, 5).to(dtype)
    expected = exact(tokens)
    assert accumulated(tokens).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.case(23)
def test_many_batches_lose_no_digits():
    # in float32 the sum would stop growing at 2**24
    accumulator = MomentsAccumulator(1)
    accumulator.add(torch.full((1, 1), 2.0**13), where="here")
    for _ in range(1000):
        accumulator.add(torch.ones(1, 1), where="here")
    assert accumulator.moments().single().item() == 2 / 1001 * (2.0**26 + 1000)


@pytest.mark.case(26)
def test_large_float16_inputs_do_not_overflow():
    tokens = torch.full((64, 2), 60000.0, dtype=torch.float16)
    assert accumulated(tokens)[0, 1].item() == pytest.approx(2 * tokens[0, 0].item() ** 2, rel=1e-5)


def test_it_is_symmetric_and_has_no_negative_eigenvalue_beyond_rounding():
    found = accumulated(*inputs(40, 12).split(7))
    assert torch.equal(found, found.t())
    eigenvalues = torch.linalg.eigvalsh(found)
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]


@pytest.mark.case(21)
def test_a_dead_input_has_an_exactly_zero_row_and_column():
    tokens = inputs(30, 4)
    tokens[:, 2] = 0
    found = accumulated(tokens)
    assert not found[2].any()
    assert not found[:, 2].any()
    assert found.diagonal().count_nonzero() == 3


@pytest.mark.case(24)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_input_that_is_no_number_is_refused_by_its_place(bad, dtype):
    tokens = inputs(20, 4).to(dtype)
    accumulator = MomentsAccumulator(4)
    accumulator.add(tokens, where="block 3, q_proj")
    expected = accumulated(tokens)
    tokens[7, 1] = bad
    with pytest.raises(CalibrationError, match=r"block 3, q_proj"):
        accumulator.add(tokens, where="block 3, q_proj")
    assert accumulator.tokens == 20
    assert torch.equal(accumulator.moments().single(), expected)


def test_without_tokens_it_is_zero():
    assert not MomentsAccumulator(3).moments().single().any()


def test_sums_of_several_processes_combine_to_the_one_of_all_tokens():
    parts = [torch.randn(tokens, 9) for tokens in (40, 7, 0)]
    accumulators = [MomentsAccumulator(9) for _ in parts]
    whole = MomentsAccumulator(9)
    for accumulator, part in zip(accumulators, parts, strict=True):
        for sums in (accumulator, whole):
            sums.add(part, where="a layer")
    seen = map(torch.tensor, ([7, 0], [0, 0]))
    others = iter([*(other._sums for other in accumulators[1:]), *seen])

    def sum_(tensor: torch.Tensor) -> None:
        tensor += next(others)
        tensor += next(others)

    accumulators[0].combine(sum_)
    assert accumulators[0].tokens == 47
    assert not accumulators[0].moments().wide
    expected = whole.moments().single()
    assert (
        accumulators[0].moments().single() - expected
    ).abs().max() < 1e-12 * expected.abs().max()


def teacher_of(student: torch.Tensor, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(student.shape, generator=generator)
    return student + (0.1 * noise * student.abs().mean(dim=0)).to(student.dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """scale: [..., in], the size of each input: products are as near as float32 has digits."""
    limit = 1e-5 * scale[..., :, None] * scale[..., None, :]
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= limit).all()


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 100, 100], [64, 200, 36]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [1, 5, 70])
def test_the_cross_moment_is_what_the_teacher_adds_times_the_student(sizes, dtype, columns):
    student = inputs(300, columns).to(dtype)
    teacher = teacher_of(student)
    accumulator = MomentsAccumulator(columns, {"cross"})
    for own, original in zip(student.split(sizes), teacher.split(sizes), strict=True):
        accumulator.add(own.unsqueeze(0), original.unsqueeze(0), where="here")
    found = accumulator.moments()
    exact_student, exact_teacher = student.double(), teacher.double()
    expected = 2 / 300 * (exact_teacher - exact_student).t() @ exact_student
    scale = exact_student.square().mean(dim=0).sqrt()
    assert found.tokens == 300
    assert_near(found.cross[0], expected, scale)
    assert torch.equal(found.single(), accumulated(*student.split(sizes)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("crossed", [False, True])
def test_each_group_of_rows_has_the_moments_of_tokens_by_their_weights(groups, crossed):
    student = inputs(200, 7)
    teacher = teacher_of(student) if crossed else None
    weights = torch.rand(200, groups, generator=torch.Generator().manual_seed(3)) ** 4
    wants = {"output_gradients", "cross"} if crossed else {"output_gradients"}
    accumulator = MomentsAccumulator(7, wants, groups)
    for start in range(0, 200, 50):
        some = slice(start, start + 50)
        original = teacher[some] if crossed else None
        accumulator.add(student[some], original, where="here", weights=weights[some])
    found = accumulator.moments()
    assert found.groups == groups
    exact = student.double()
    scale = exact.square().mean(dim=0).sqrt()
    for group in range(groups):
        weighed = exact * weights[:, group, None].double()
        assert_near(found.hessian[group], 2 / 200 * weighed.t() @ exact, scale)
        assert torch.equal(found.hessian[group], found.hessian[group].t())
        if crossed:
            expected = 2 / 200 * (teacher.double() - exact).t() @ weighed
            assert_near(found.cross[group], expected, scale)
    assert (found.cross is not None) == crossed


def test_weights_of_one_change_no_bit():
    student = inputs(90, 12)
    accumulator = MomentsAccumulator(12, {"output_gradients"}, groups=2)
    accumulator.add(student, where="here", weights=torch.ones(90, 2))
    found = accumulator.moments().hessian
    assert torch.equal(found[0], accumulated(student))
    assert torch.equal(found[1], found[0])


def test_a_teacher_who_sees_the_same_has_no_cross_moment():
    student = inputs(30, 4)
    accumulator = MomentsAccumulator(4, {"cross"})
    accumulator.add(student, student.clone(), where="here")
    assert not accumulator.moments().cross.any()


@pytest.mark.parametrize(
    ("wants", "given", "message"),
    [
        ((), {"teacher": torch.ones(3, 2)}, "teacher's inputs belong"),
        (("cross",), {}, "teacher's inputs belong"),
        ((), {"weights": torch.ones(3, 1)}, "weights belong"),
        (("output_gradients",), {}, "weights belong"),
        (("cross",), {"teacher": torch.ones(2, 2)}, "teacher's inputs are"),
    ],
)
def test_what_is_wanted_and_what_is_given_must_agree(wants, given, message):
    accumulator = MomentsAccumulator(2, wants)
    with pytest.raises(ValueError, match=message):
        accumulator.add(torch.ones(3, 2), where="here", **given)
    assert accumulator.tokens == 0


def test_groups_need_weights_and_finished_moments_take_no_tokens():
    with pytest.raises(ValueError, match="2 groups of rows"):
        MomentsAccumulator(3, (), groups=2)
    accumulator = MomentsAccumulator(2)
    accumulator.add(torch.ones(3, 2), where="here")
    assert accumulator.moments() is accumulator.moments()
    with pytest.raises(ValueError, match="finished"):
        accumulator.add(torch.ones(3, 2), where="here")


@pytest.mark.parametrize("part", ["teacher", "weights"])
def test_a_teacher_or_a_weight_that_is_no_number_is_refused_and_nothing_is_added(part):
    accumulator = MomentsAccumulator(2, {"cross", "output_gradients"})
    given = {"teacher": torch.ones(3, 2), "weights": torch.ones(3, 1)}
    accumulator.add(torch.ones(3, 2), where="a layer", **given)
    given[part][1, 0] = math.nan
    with pytest.raises(CalibrationError, match="the input of a layer"):
        accumulator.add(torch.ones(3, 2), where="a layer", **given)
    assert accumulator.tokens == 3
    assert accumulator.moments().hessian.tolist() == [[[2.0, 2.0], [2.0, 2.0]]]


def test_cross_moments_of_several_processes_combine_too():
    parts = [torch.randn(tokens, 5, generator=torch.manual_seed(tokens)) for tokens in (40, 7)]
    accumulators = [MomentsAccumulator(5, {"cross"}) for _ in parts]
    whole = MomentsAccumulator(5, {"cross"})
    for accumulator, part in zip(accumulators, parts, strict=True):
        for sums in (accumulator, whole):
            sums.add(part, teacher_of(part), where="a layer")
    others = iter([accumulators[1]._sums, accumulators[1]._cross, torch.tensor([7, 0])])

    def sum_(tensor: torch.Tensor) -> None:
        tensor += next(others)

    accumulators[0].combine(sum_)
    expected, found = whole.moments(), accumulators[0].moments()
    assert found.tokens == 47
    assert torch.allclose(found.cross, expected.cross, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[200], [1, 199], [64, 64, 72]])
def test_products_of_inputs_in_float64_are_in_float64(sizes):
    tokens = inputs(200, 17).double() + 1e-9
    accumulator = MomentsAccumulator(17, {"cross"})
    for batch in tokens.split(sizes):
        accumulator.add(batch, 2 * batch, where="here")
    found, expected = accumulator.moments(), exact(tokens)
    limit = 1e-14 * np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert found.wide
    assert (np.abs(found.single().numpy() - expected) <= limit).all()
    assert (np.abs(found.single_cross().numpy() - expected) <= limit).all()


def test_a_process_without_tokens_learns_that_inputs_are_in_float64():
    accumulator, other = MomentsAccumulator(3), MomentsAccumulator(3)
    other.add(torch.ones(5, 3, dtype=torch.float64), where="here")
    others = iter([other._sums, torch.tensor([5, 1])])
    accumulator.combine(lambda tensor: tensor.add_(next(others)))
    assert accumulator.moments().wide
    assert accumulator.moments().tokens == 5
