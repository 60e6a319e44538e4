"""The specification against what it can be derived from: the merged weight, autograd, Philox's published vectors."""

import pytest
import torch

from lora_kernels import reference

P = 0.25


def problem(m=5, n=7, k=11, r=3):
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, k), (n, k), (r, k), (n, r), (n,), (m, n))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_y_is_the_merged_layer():
    x, weight, lora_a, lora_b, bias, _ = problem()
    y = reference.lora_linear(x, weight, lora_a, lora_b, 1.5, bias)
    torch.testing.assert_close(y, x @ (weight + 1.5 * lora_b @ lora_a).mT + bias)


def test_dropout_hides_elements_from_the_adapter_only():
    x, weight, lora_a, lora_b, _, _ = problem()
    keep = reference.dropout_keep(7, *x.shape, P)
    assert 0 < keep.sum() < keep.numel()
    y = reference.lora_linear(x, weight, lora_a, lora_b, 1.5, None, keep, P)
    torch.testing.assert_close(y, x @ weight.mT + 1.5 * (x * keep / (1 - P)) @ lora_a.mT @ lora_b.mT)


@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_gradients_are_autograds(dropout_p):
    x, weight, lora_a, lora_b, bias, dy = problem()
    keep = reference.dropout_keep(7, *x.shape, dropout_p) if dropout_p else None
    inputs = [t.requires_grad_() for t in (x, lora_a, lora_b, bias)]
    y = reference.lora_linear(x, weight, lora_a, lora_b, 1.5, bias, keep, dropout_p)
    expected = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        actual = reference.lora_linear_backward(dy, x, weight, lora_a, lora_b, 1.5, keep, dropout_p)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32 with 7 rounds
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_its_published_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize(("seed", "row", "block"), [(0, 0, 0), (1, 2, 3), (-1, 5, 0), (2**62 + 12345, 1, 70)])
def test_the_mask_is_philoxs(seed, row, block):
    words = philox((row, block, 0, 0), (seed % 2**32, seed // 2**32 % 2**32))
    assert lanes(seed, row, block) == [half for word in words for half in (word % 65536, word // 65536)]


def philox(counter, key, rounds=7):
    """Philox-4x32 as published, one counter at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        (high0, low0), (high1, low1) = divmod(c0 * 0xD2511F53, 2**32), divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def lanes(seed, row, block):
    """The eight 16-bit values behind a mask, found by bisecting the threshold."""
    values = []
    for column in range(8 * block, 8 * block + 8):
        below, above = 0, 65536
        while above - below > 1:
            middle = (below + above) // 2
            keep = reference.dropout_keep(seed, row + 1, 8 * block + 8, 1 - middle / 65536)
            below, above = (below, middle) if keep[row, column] else (middle, above)
        values.append(below)
    return values


def test_the_mask_keeps_the_share_that_was_asked_for():
    keep = reference.dropout_keep(3, 512, 1024, P)
    assert abs(keep.double().mean() - (1 - P)) < 5 * (P * (1 - P) / keep.numel()) ** 0.5
    assert not torch.equal(keep, reference.dropout_keep(4, 512, 1024, P))


@pytest.mark.parametrize(("rows", "cols"), [(3, 1), (1, 7), (4, 8), (5, 13)])
def test_the_mask_does_not_depend_on_the_size(rows, cols):
    whole = reference.dropout_keep(-5, 8, 16, P)
    assert torch.equal(reference.dropout_keep(torch.tensor(-5), rows, cols, P), whole[:rows, :cols])


@pytest.mark.parametrize("dropout_p", [0.0, 1 / 65536, 0.1, 0.5, 65535 / 65536])
def test_the_threshold_honours_p_to_a_65536th(dropout_p):
    assert abs(reference.keep_threshold(dropout_p) / 65536 - (1 - dropout_p)) <= 0.5 / 65536
