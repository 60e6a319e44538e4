"""The judge itself: its guards, its problems, its budget, and the interpreter it mends."""

import random
import re

import pytest
import torch
from conftest import DEVICE, INTERPRETED

from lora_kernels import testing
from lora_kernels.testing import Case


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (16, 32), (2, 3, 5, 7), (9,), (0, 7), (2, 0, 7)], ids=str)
def test_guarded_tensors_hold_their_values_between_nans(shape, layout):
    if layout == "expanded" and len(shape) == 1:
        pytest.skip("a vector has no rows to expand")
    values = torch.randn(shape)
    t = testing.guarded(values, layout, DEVICE)
    expected = values if layout != "expanded" else values[..., :1, :].expand_as(values)
    assert t.shape == values.shape and torch.equal(t.cpu(), expected)
    buffer = testing._buffer(t)
    inside = torch.zeros_like(buffer).as_strided(t.shape, t.stride(), t.storage_offset())
    covered = inside.fill_(1.0).untyped_storage()
    mask = torch.empty(0, device=DEVICE).set_(covered, 0, buffer.shape) == 1.0
    assert buffer[~mask].isnan().all() and not buffer[mask].isnan().any()
    assert not mask[: testing.GUARD].any() and not mask[-testing.GUARD :].any()


def test_layouts_are_what_their_names_say():
    values = torch.randn(5, 8)
    layouts = {layout: testing.guarded(values, layout, DEVICE) for layout in testing.LAYOUTS}
    assert layouts["contiguous"].is_contiguous() and layouts["contiguous"].data_ptr() % 16 == 0
    assert layouts["padded"].stride() == (16, 1) and layouts["padded"].data_ptr() % 16 == 0
    assert layouts["misaligned"].stride() == (11, 1) and layouts["misaligned"].data_ptr() % 16 == 4
    assert layouts["transposed"].stride()[0] == 1
    assert layouts["strided"].stride() == (17, 2)
    assert layouts["expanded"].stride() == (0, 1)


def test_poisoned_allocations_are_nan_aligned_and_no_views():
    real = torch.empty
    with testing.poisoned_empty():
        x = torch.zeros(3, 4, dtype=torch.bfloat16, device=DEVICE)
        allocated = [
            torch.empty(3, 5, device=DEVICE),
            torch.empty_like(x),
            torch.empty_strided((3, 4), (1, 3), device=DEVICE),
            x.new_empty(2, 2),
            x.new_empty((7,), dtype=torch.float64),
        ]
        counters = torch.empty(4, dtype=torch.int32, device=DEVICE)
        assert torch.empty(0, 3).shape == (0, 3)
    for t in allocated:
        assert t.isnan().all() and t._base is None and t.data_ptr() % 16 == 0
    assert allocated[2].stride() == (1, 3) and allocated[1].dtype == torch.bfloat16
    assert (counters == -1).all()
    assert torch.empty is real and "new_empty" not in vars(torch.Tensor)


@pytest.mark.parametrize("offset", [-1, 12, -1000, 1000])
def test_a_wild_store_is_noticed(offset):
    with pytest.raises(AssertionError, match="outside its buffer, " + ("before" if offset < 0 else "behind")):
        with testing.poisoned_empty():
            t = torch.empty(3, 4, device=DEVICE)
            t.as_strided((1,), (1,), t.storage_offset() + offset).fill_(0.0)


def test_an_error_inside_is_not_hidden_by_the_guards():
    with pytest.raises(ValueError, match="mine"), testing.poisoned_empty():
        raise ValueError("mine")


def test_random_cases_reach_every_corner_and_are_reproducible():
    rng = random.Random(0)
    cases = [testing.random_case(rng) for _ in range(3000)]
    again = random.Random(0)
    assert cases == [testing.random_case(again) for _ in range(3000)]
    assert all(eval(repr(case), {"Case": Case, "torch": torch}) == case for case in cases)
    assert {0, 1} <= {case.rows for case in cases}
    assert {1, 512} <= {case.r for case in cases} and {1} <= {case.n for case in cases} & {case.k for case in cases}
    assert {case.dtype for case in cases} == {*testing.HALF, torch.float32}
    assert {case.lora_dtype for case in cases} == {None, torch.float32}
    assert {layout for case in cases for layout in case.layouts.values()} == set(testing.LAYOUTS)
    assert {name for case in cases for name in case.layouts} == set(testing.INPUTS)
    assert {len(case.needs) for case in cases} == {0, 1, 2, 3, 4}
    assert {case.bias for case in cases} == {case.dropout_p > 0 for case in cases} == {False, True}
    assert {len(case.leading) for case in cases} == {0, 1, 2}


def test_tensors_depend_on_the_case_alone():
    case = Case(5, 6, 7, 3, bias=True, dropout_p=0.5, layouts={"x": "misaligned"})
    first, second = testing.make_tensors(case, DEVICE), testing.make_tensors(case, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_magnitude_is_the_size_of_a_result_in_which_nothing_cancels():
    case = Case(200, 150, 100, 40, dtype=torch.float64, bias=True, dropout_p=0.3, needs=testing.TRAINABLE)
    truth, _, magnitude = testing.expected(case, testing.make_tensors(case, DEVICE))
    for name in truth:
        ratio = (testing._rms(magnitude[name]) / testing._rms(truth[name])).item()
        assert 0.8 < ratio < 1.25, name


def test_errors_are_relative_and_nan_is_infinitely_wrong():
    truth = torch.tensor([3.0, -4.0], dtype=torch.float64)
    measured = testing.errors(torch.tensor([3.0, -4.5]), truth, torch.zeros(2))
    assert measured["rms"][0] == pytest.approx(0.1) and measured["max"][0] == pytest.approx(0.125)
    assert measured["max"][1] == 1
    assert testing.errors(torch.tensor([3.0, torch.nan]), truth, torch.zeros(2))["max"][0] == float("inf")
    zero = torch.zeros(2, dtype=torch.float64)
    assert testing.errors(zero, zero, zero)["rms"][0] == 0.0
    assert testing.errors(torch.tensor([0.0, 1e-30]), zero, zero)["max"][0] == float("inf")


def test_floor_shrinks_as_luck_averages_out():
    def floor(m, metric):
        case = Case(m, 64, 64, 16, dtype=torch.bfloat16)
        truth, eager, magnitude = testing.expected(case, testing.make_tensors(case, DEVICE))
        return testing.budgets(case, "y", truth["y"], eager["y"], magnitude["y"])[metric].floor

    assert floor(256, "rms") < floor(1, "rms") / 10 and floor(1, "max") == floor(256, "max")


@pytest.mark.parametrize("got", [lambda t: t[:-1], torch.Tensor.double], ids=["shape", "dtype"])
def test_shape_and_dtype_are_compared_first(got):
    case = Case(5, 6, 7, 3)
    truth, eager, magnitude = testing.expected(case, testing.make_tensors(case, DEVICE))
    with pytest.raises(AssertionError, match=r"^y: got \(\[.*expected \(\[5, 6\], torch.float32"):
        testing.compare(case, "y", got(eager["y"]), truth["y"], eager["y"], magnitude["y"])


def test_the_message_says_what_where_and_how_to_repeat_it():
    case = Case(5, 6, 7, 3)
    truth, eager, magnitude = testing.expected(case, testing.make_tensors(case, DEVICE))
    wrong = eager["y"].clone()
    wrong[2, 4] += 1.0
    with pytest.raises(AssertionError) as caught:
        testing.compare(case, "y", wrong, truth["y"], eager["y"], magnitude["y"])
    message = str(caught.value)
    assert re.match(r"y: rms error \S+, budget \S+ = 1.25 × \S+ \(eager\) \+ \S+; worst at \(2, 4\): got ", message)
    assert message.endswith(repr(case))


def test_a_case_that_a_strategy_cannot_run_is_no_failure():
    with pytest.raises(NotImplementedError):
        testing.check(Case(5, 6, 7, 3), "eager", "one_launch", DEVICE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about casts that overflow
@pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter")
class TestMendedInterpreter:
    def cast(self, source, dtype):
        import interpreter

        out = torch.empty(source.shape, dtype=dtype)
        interpreter.cast_kernel[(1,)](source, out, source.numel(), BLOCK=1 << (source.numel() - 1).bit_length())
        return out

    def every_bf16(self):
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    def test_from_bf16_is_exact(self, dtype):
        source = self.every_bf16()
        torch.testing.assert_close(self.cast(source, dtype), source.to(dtype), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    def test_to_bf16_rounds_to_nearest_even(self, dtype):
        generator = torch.Generator().manual_seed(0)
        random_bits = torch.randint(-(2**31), 2**31, (2**15,), generator=generator).to(torch.int32).view(torch.float32)
        bf16 = self.every_bf16()[::4].float()
        between = (bf16.view(torch.int32) + 0x8000).view(torch.float32)  # exactly half way to the next one
        source = torch.cat((random_bits, bf16, between)).to(dtype)
        torch.testing.assert_close(self.cast(source, torch.bfloat16), source.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_integers_to_and_from_bf16(self):
        integers = torch.arange(-3000, 3000, dtype=torch.int32)
        assert torch.equal(self.cast(integers, torch.bfloat16), integers.bfloat16())
        halves = (integers / 8).bfloat16()
        assert torch.equal(self.cast(halves, torch.int32), halves.to(torch.int32))

    def test_mending_twice_changes_nothing(self):
        from triton.runtime.interpreter import InterpreterBuilder

        before = dict(vars(InterpreterBuilder))
        testing.mend_interpreter()
        assert dict(vars(InterpreterBuilder)) == before
