"""NF4: codes and numbers against bitsandbytes, to the bit; runs against LoRA on the dequantised base, to the bit."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F

from nf4 import BLOCK, FrozenProduct, dequantise, encode, pairs_of_values, quantise

DTYPES = [torch.float32, torch.bfloat16]
PAIRS = pairs_of_values()


def make_weight(n_rows: int = 48, n_columns: int = 256, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> torch.Tensor:
    """Rows of a normal distribution, the scales of which differ by e to the power of spread, as one deviation."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(spread * torch.randn(n_rows, 1, generator=generator)) / math.sqrt(n_columns)
    return (torch.randn(n_rows, n_columns, generator=generator) * scales).to(dtype)


def unpack(weight: torch.Tensor) -> torch.Tensor:
    return dequantise(quantise(weight), PAIRS, torch.float32)


def row_errors(made: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (made.float() - weight.float()).norm(dim=1) / weight.float().norm(dim=1)


def bnb_unpack(weight: torch.Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True))


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_level_is_bitsandbytes_to_the_bit(dtype):
    weight = make_weight(dtype=dtype)
    weight[0, :16] = (PAIRS[:16, 1] + PAIRS[1:17, 1]).to(dtype) / 2  # on the borders and near them
    weight[0, 16] = 1
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    blocks = weight.float().view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    own = encode(blocks, largest).flatten()
    assert torch.equal(largest, state.absmax)
    assert torch.equal(own[::2] << 4 | own[1::2], codes.flatten())
    made = (PAIRS[codes.flatten().int()].view(-1, BLOCK) * largest[:, None]).view(weight.shape).to(dtype)
    assert torch.equal(made, bnb.dequantize_4bit(codes, state))


def test_rows_whose_scales_need_no_rounding_are_packed_as_bitsandbytes_packs_them():
    blocks = make_weight(12, 256).view(12, 4, BLOCK)
    blocks = blocks / blocks.abs().amax(2, keepdim=True) * torch.tensor([255.0, 1, 77, 128])[:, None]
    weight = blocks.flatten(1)
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(quantise(weight)[:, :128].flatten(), codes.flatten())
    assert torch.equal(unpack(weight), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_is_quantised_as_it_is_in_the_whole(dtype):
    weight = make_weight(dtype=dtype, spread=1.0)
    packed = quantise(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (48, 256 // 2 + 256 // 64 + 4)
    for rows in (slice(0, 1), slice(5, 17), slice(40, 48)):
        assert torch.equal(quantise(weight[rows]), packed[rows])
        assert torch.equal(dequantise(packed[rows], PAIRS, dtype), dequantise(packed, PAIRS, dtype)[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_no_larger_than_bitsandbytes(dtype):
    for spread in (0.0, 1.0):  # where rows differ in scale, its mean over the whole tensor fits none of them
        weight = make_weight(256, 512, dtype, spread)
        own, its = row_errors(unpack(weight), weight), row_errors(bnb_unpack(weight), weight)
        assert own.square().mean() <= its.square().mean() and own.max() < 0.11 and (spread == 0 or own.max() < its.max() / 2)


def test_zeros_stay_zeros_and_what_is_tiny_or_large_stays_finite():
    weight = make_weight(6)
    weight[0], weight[1, :64], weight[2, 5] = 0, 0, 0
    weight[3], weight[4] = weight[3] * 1e-38, weight[4] * 1e36
    made = unpack(weight)
    assert made.isfinite().all() and (made[weight == 0] == 0).all()
    assert row_errors(made[4:5] / 1e36, weight[4:5] / 1e36) < 0.11


# ---------------------------------------------------------------------------------------------------------------------
# The product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (2, 9), (1, 3, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_and_gradient_are_autograd_s_on_the_dequantised_weight(dtype, shape, with_bias):
    packed, bias = quantise(make_weight(dtype=dtype)), torch.randn(48, dtype=dtype) if with_bias else None
    x = torch.randn(*shape, 256, dtype=dtype, requires_grad=True)
    own, expected = FrozenProduct.apply(x, packed, bias, PAIRS), F.linear(x, dequantise(packed, PAIRS, dtype), bias)
    grad = torch.randn_like(own)
    assert torch.equal(own, expected)
    assert torch.equal(torch.autograd.grad(own, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_kept_for_the_backward_are_the_bytes_alone():
    kept, packed = [], quantise(make_weight())
    x = torch.randn(5, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        FrozenProduct.apply(x, packed, None, PAIRS)
    assert {tensor.data_ptr() for tensor in kept} <= {packed.data_ptr(), PAIRS.data_ptr()}
