"""The specification against PyTorch's linear layer and autograd, the dropout mask against published Philox words."""

import pytest
import torch

from lora_kernels import reference

M, N, K, R, S = 7, 5, 11, 3, 0.75


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, K), (N, K), (R, K), (N, R), (N,), (M, N))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_merged_layer(with_bias):
    x, weight, lora_a, lora_b, bias, _ = operands()
    bias = bias if with_bias else None
    merged = torch.nn.functional.linear(x, weight + S * lora_b @ lora_a, bias)
    torch.testing.assert_close(reference.lora_linear(x, weight, lora_a, lora_b, S, bias), merged)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_equal_autograds(dropout_p):
    x, weight, lora_a, lora_b, bias, dy = operands()
    keep = reference.dropout_keep(3, M, K, dropout_p) if dropout_p else None
    inputs = [t.requires_grad_() for t in (x, lora_a, lora_b, bias)]
    expected = torch.autograd.grad(
        reference.lora_linear(x, weight, lora_a, lora_b, S, bias, keep, dropout_p), inputs, dy
    )
    actual = reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, S, keep, dropout_p)
    for gradient, autograds in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, autograds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_keeps_the_dtype(dtype):
    x, weight, lora_a, lora_b, bias, dy = operands(dtype)
    keep = reference.dropout_keep(3, M, K, 0.5)
    assert reference.lora_linear(x, weight, lora_a, lora_b, S, bias, keep, 0.5).dtype == dtype
    for gradient in reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, S, keep, 0.5):
        assert gradient.dtype == dtype


def test_dropout_hides_elements_from_the_adapter_only():
    x, weight, lora_a, lora_b, *_ = operands()
    nothing = torch.zeros(M, K, dtype=torch.bool)
    torch.testing.assert_close(reference.lora_linear(x, weight, lora_a, lora_b, S, None, nothing, 0.5), x @ weight.T)


def test_dropout_words_are_philox_4x32_7():
    """Random123's known answer for counter 0 and key 0, read off the mask by moving the threshold past each lane."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for column, lane in enumerate(lanes):
        kept_below, kept_above = 1 - lane / 65536, 1 - (lane + 1) / 65536
        assert not reference.dropout_keep(0, 1, 8, kept_below)[0, column]
        assert reference.dropout_keep(0, 1, 8, kept_above)[0, column]


def test_dropout_mask_depends_on_nothing_but_seed_row_and_column():
    whole = reference.dropout_keep(42, 40, 100, 0.3)
    assert torch.equal(reference.dropout_keep(42, 17, 33, 0.3), whole[:17, :33])
    assert torch.equal(reference.dropout_keep(torch.tensor(42), 40, 100, 0.3), whole)
    assert reference.dropout_keep(42, 0, 100, 0.3).shape == (0, 100)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should(dropout_p):
    keep = reference.dropout_keep(-5, 1000, 1000, dropout_p).double()
    sigma = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(keep.mean() - (1 - dropout_p)) < 5 * sigma / 1000
    for lines in (keep.mean(0), keep.mean(1)):  # every row and column by itself
        assert (lines - (1 - dropout_p)).abs().max() < 6 * sigma / 1000**0.5
    centred = keep - keep.mean()
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):  # neighbours do not know each other
        assert (centred * shifted).mean().abs() < 5 * sigma**2 / 1000


def test_dropout_seeds_give_different_masks():
    seeds = (0, 1, -1, 2**32, 2**62, -(2**63))
    masks = [reference.dropout_keep(seed, 20, 64, 0.5) for seed in seeds]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (mask == other).double().mean() < 0.6
