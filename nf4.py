"""NF4 by hand (Dettmers et al. 2023, QLoRA): frozen weights in 4 bits, each row by itself, to be read and sharded like any other.

A packed row: in / 2 bytes of codes, two a byte; in / 64 bytes, each the scale of a block in steps; 4 bytes, the row's step, fp32.
"""

import torch
import torch.nn.functional as F

BLOCK = 64  # numbers that share a scale
# What the 16 codes stand for: quantiles of a normal distribution, which weights come near to; bitsandbytes' to the bit
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def encode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(..., 64) fp32, (...) fp32 → (..., 64) uint8: of each number divided by its block's scale, the nearest of NF4."""
    values = torch.tensor(NF4, device=blocks.device)
    return torch.bucketize(blocks * (1 / scales)[..., None], (values[1:] + values[:-1]) / 2, out_int32=True).byte()


def quantise(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) of any float type → (out, in / 2 + in / 64 + 4) uint8; of a block's scales that are tried it has the best."""
    blocks, values = weight.float().unflatten(1, (-1, BLOCK)), torch.tensor(NF4, device=weight.device)
    largest = blocks.abs().amax(2)
    step = largest.amax(1, keepdim=True).clamp(min=1e-30) / 255
    scales, least = largest, torch.full_like(largest, torch.inf)
    for more in range(0, 49, 8):  # from the largest up: below, a block would be less off, but not what a model misses most
        tried = (largest / step + more).round().clamp(1, 255)
        errors = (values[encode(blocks, tried * step).int()] * tried[..., None] - blocks / step[..., None]).square_().sum(2)
        scales, least = torch.where(errors < least, tried, scales), torch.minimum(errors, least)
    codes = encode(blocks, scales * step).flatten(1)
    return torch.cat([codes[:, ::2] << 4 | codes[:, 1::2], scales.byte(), step.view(torch.uint8)], 1)


def pairs_of_values() -> torch.Tensor:
    """(256, 2) fp32: the two numbers that a byte of codes stands for."""
    return torch.cartesian_prod(torch.tensor(NF4), torch.tensor(NF4))


def dequantise(packed: torch.Tensor, pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """quantise's (out, …) uint8 → (out, in): value x (scale x step), in fp32 and rounded once."""
    n_blocks = (packed.shape[1] - 4) // (BLOCK // 2 + 1)
    codes, scales, step = packed.split([n_blocks * BLOCK // 2, n_blocks, 4], 1)
    scales = scales * step.clone(memory_format=torch.contiguous_format).view(torch.float32)
    values = F.embedding(codes.int(), pairs).view(*scales.shape, BLOCK)  # an index would be copied in 64 bits first
    return values.mul_(scales[..., None]).flatten(1).to(dtype)  # in place, since it is a temporary of 4 bytes a weight


class FrozenProduct(torch.autograd.Function):
    """x @ W.T + b of a frozen packed W, which is made again for the backward; kept until then are its bytes alone."""

    @staticmethod
    def forward(ctx, x, packed, bias, pairs):
        ctx.save_for_backward(packed, pairs)
        return F.linear(x, dequantise(packed, pairs, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantise(*ctx.saved_tensors, grad.dtype), None, None, None
