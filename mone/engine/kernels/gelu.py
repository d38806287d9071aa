"""GELU on the way out of a product, where it can take longer than the product itself.

Both GELUs are 0.5 x (1 + tanh(x (a + b x^2))): the approximation by definition, the exact one with a and b fitted to
the error function, which leaves at most 2.8e-4. Processors have an instruction for tanh, of a relative error below
5e-4, which leaves at most 2.5e-4 |x| more. Both together are an eighth of what rounding to bfloat16 may do to x;
float16 and float32, whose rounding is finer, get the error function itself.

For one value, on sm_90: the error function 22 instructions and 2 of the slow unit for functions, the polynomial 12,
tanh 5, the bias among them, and 1 of the slow unit.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

# pyright: reportCallIssue=false, reportArgumentType=false

FORMS = ("gelu", "gelu_tanh", "gelu_fast", "gelu_tanh_fast", "gelu_poly")


def form_of(approximate: str, dtype: torch.dtype) -> str:
    """Which of the forms is right for a module's `approximate` and a dtype that results are rounded to."""
    form = "gelu_tanh" if approximate == "tanh" else "gelu"
    return form if dtype in (torch.float16, torch.float32) else form + "_fast"


def has_tanh(device: torch.device) -> bool:
    """Whether the device has the instruction; without it a sigmoid stands for it."""
    return device.type == "cuda" and torch.version.hip is None and not knobs.runtime.interpret


@triton.jit
def _erf_gelu(x):
    """With the error function of Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half = 0.5 * poly * tl.exp2(-1.4426950408889634 * z * z)
    return x * tl.where(x < 0, half, 1.0 - half)


@triton.jit
def _tanh_gelu(half, A: tl.constexpr, B: tl.constexpr, TANH: tl.constexpr):
    """Of twice what it is given."""
    inner = half * (2 * A + 8 * B * (half * half))
    if TANH:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half
    return 2.0 * half * tl.sigmoid(2.0 * inner)


@triton.jit
def _poly_gelu(x):
    """With a polynomial fitted to the normal distribution up to 4.25; the error is below 1e-4."""
    y = tl.minimum(tl.maximum(x, -4.25), 4.25)
    s = y * y
    odd = 6.55270068e-05 + s * (-2.93879649e-06 + s * (7.57081169e-08 + s * -8.46037905e-10))
    odd = 0.398420041 + s * (-0.0654534952 + s * (0.00925782056 + s * (-0.000940446927 + s * odd)))
    return x * (0.5 + y * odd)


@triton.jit
def activate(x, bias, FORM: tl.constexpr, TANH: tl.constexpr):
    """A form of GELU of x + bias, or with an empty name the sum itself; TANH: the device has the instruction."""
    if FORM == "":
        return x + bias
    if FORM == "gelu":
        return _erf_gelu(x + bias)
    if FORM == "gelu_poly":
        return _poly_gelu(x + bias)
    half = 0.5 * x + 0.5 * bias  # one instruction
    if FORM == "gelu_fast":
        return _tanh_gelu(half, 0.8001570728575322, 0.034700895977356414, TANH)
    return _tanh_gelu(half, 0.7978845608028654, 0.035677408136300125, TANH and FORM == "gelu_tanh_fast")
