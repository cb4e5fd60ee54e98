"""PyTorch's noise by numpy, to the last bit, so that a seed draws the same picture without PyTorch.

PyTorch's generator is the Mersenne Twister, which numpy has too. Pairs of uniform numbers become
pairs of normal ones by the transform of Box and Muller (Ann. Math. Stat. 29, 1958), with logarithm,
sine and cosine by the polynomials of the Cephes library (S. Moshier, single precision) and with
fused multiply-adds, as PyTorch computes them on x86. Other processors round otherwise; whoever
relies on the last bit compares first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_GROUP = 16
"""Numbers that are made together: from the first half come radii, from the second angles."""

_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
"""Of log(1 + x), from the highest power down."""

_LOG_2 = (0.693359375, -2.12194440e-4)
"""log 2 as a short number and what is left."""

_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)

_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
"""Pi / 4 as two short numbers and what is left."""


def torch_noise(seed: int, count: int) -> Floats:
    """Return what `torch.randn` gives on the CPU.

    Args:
        seed: Of the generator, below 2**32.
        count: Numbers, at least 16.
    """
    # The generator as PyTorch has it is the one of numpy that is called legacy.
    generator = np.random.RandomState(seed)
    uniform = _uniform(generator, count)
    whole = count // _GROUP * _GROUP
    noise = np.empty(count, np.float32)
    noise[:whole] = _normal(uniform[:whole])
    if whole < count:
        # The last group overlaps the one before, with numbers of its own.
        noise[-_GROUP:] = _normal(_uniform(generator, _GROUP))
    return noise


def _uniform(generator: np.random.RandomState, count: int) -> Floats:
    """Return numbers from 0 up, below 1, of 24 bits each."""
    bits = np.frombuffer(generator.bytes(4 * count), np.dtype("<u4")) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def _normal(uniform: Floats) -> Floats:
    """Return normal numbers of uniform ones, group by group."""
    groups = uniform.reshape(-1, 2, _GROUP // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - groups[:, 0]))
    sine, cosine = _sine_and_cosine(np.float32(2 * np.pi) * groups[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fused(a: Any, b: Any, c: Any) -> Floats:
    """Return a b + c, rounded once.

    A product of two of these numbers is exact in double precision.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return (product + np.asarray(c, np.float64)).astype(np.float32)


def _log(x: Floats) -> Floats:
    """Return the natural logarithm of numbers above 0: of x = m 2^e with m around 1."""
    x = np.maximum(x, np.finfo(np.float32).tiny)
    exponent = ((x.view(np.uint32) >> 23).astype(np.int32) - 126).astype(np.float32)
    half = np.float32(0.5).view(np.uint32)
    mantissa = ((x.view(np.uint32) & np.uint32(0x807FFFFF)) | half).view(np.float32)
    is_small = mantissa < np.float32(0.707106781186547524)
    exponent = exponent - is_small.astype(np.float32)
    rest = (mantissa - np.float32(1)) + np.where(is_small, mantissa, np.float32(0))
    square = rest * rest
    series = np.full_like(rest, np.float32(_LOG[0]))
    for coefficient in _LOG[1:]:
        series = _fused(series, rest, np.float32(coefficient))
    high, low = (np.float32(part) for part in _LOG_2)
    series = _fused(series * rest, square, exponent * low)
    series = _fused(-square, np.float32(0.5), series)
    return _fused(exponent, high, rest + series)


def _sine_and_cosine(x: Floats) -> tuple[Floats, Floats]:
    """Return both of angles from 0 up: by the octant, and series around its nearer end."""
    octant = (x * np.float32(4 / np.pi)).astype(np.int32)
    octant = (octant + 1) & ~1
    turns = octant.astype(np.float32)
    for part in _QUARTER_PI:
        x = _fused(turns, np.float32(-part), x)
    square = x * x
    cosine = np.full_like(x, np.float32(_COS[0]))
    for coefficient in _COS[1:]:
        cosine = _fused(cosine, square, np.float32(coefficient))
    cosine = _fused(cosine * square, square, -np.float32(0.5) * square) + np.float32(1)
    sine = np.full_like(x, np.float32(_SIN[0]))
    for coefficient in _SIN[1:]:
        sine = _fused(sine, square, np.float32(coefficient))
    sine = _fused(sine * square, x, x)
    is_near = (octant & 2) == 0
    sine_sign = np.where(octant & 4, np.float32(-1), np.float32(1))
    cosine_sign = np.where((octant + 2) & 4, np.float32(-1), np.float32(1))
    return (
        np.where(is_near, sine, cosine) * sine_sign,
        np.where(is_near, cosine, sine) * cosine_sign,
    )
