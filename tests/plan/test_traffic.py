"""Bytes between a device and its memory: hand-written programs whose bytes can be counted, and compiled ones."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.plan import hlo, traffic

KIB = 1024  # a float32[256]


def moved(body, computations=""):
    text = f"{computations}\nENTRY %main (a: f32[256]) -> f32[256] {{\n{body}\n}}\n"
    return traffic.bytes_moved(hlo.Module(text), unknown_trips=7)


SLICING = """
%inner (i0: f32[8,256], i1: s32[]) -> f32[256] {
  %i0 = f32[8,256]{1,0} parameter(0)
  %i1 = s32[] parameter(1)
  %d = f32[1,256]{1,0} dynamic-slice(%i0, %i1), dynamic_slice_sizes={1,256}
  ROOT %b = f32[256]{0} bitcast(%d)
}
%outer (o0: f32[8,256], o1: s32[], o2: f32[256]) -> f32[256] {
  %o2 = f32[256]{0} parameter(2)
  %o0 = f32[8,256]{1,0} parameter(0)
  %o1 = s32[] parameter(1)
  %f = f32[256]{0} fusion(%o0, %o1), kind=kLoop, calls=%inner
  ROOT %s = f32[256]{0} add(%f, %o2)
}
%update (u0: f32[8,256], u1: f32[256], u2: s32[]) -> f32[8,256] {
  %u0 = f32[8,256]{1,0} parameter(0)
  %u1 = f32[256]{0} parameter(1)
  %u2 = s32[] parameter(2)
  %c = f32[1,256]{1,0} bitcast(%u1)
  ROOT %w = f32[8,256]{1,0} dynamic-update-slice(%u0, %c, %u2)
}
%scattered (t0: f32[8,256], t1: s32[2], t2: f32[2,256]) -> f32[8,256] {
  %t0 = f32[8,256]{1,0} parameter(0)
  %t1 = s32[2]{0} parameter(1)
  %t2 = f32[2,256]{1,0} parameter(2)
  ROOT %w = f32[8,256]{1,0} scatter(%t0, %t1, %t2), to_apply=%add
}
%to_chip (c0: f32[8,256], c1: s32[]) -> f32[1,256] {
  %c0 = f32[8,256]{1,0} parameter(0)
  %c1 = s32[] parameter(1)
  ROOT %d = f32[1,256]{1,0:S(1)} dynamic-slice(%c0, %c1), dynamic_slice_sizes={1,256}
}
"""


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("  %a = f32[256]{0} parameter(0)\n  ROOT %b = f32[256]{0} negate(%a)", 2 * KIB),
        # In another memory of the device.
        ("  %a = f32[256]{0:T(256)S(1)} parameter(0)\n  ROOT %b = f32[256]{0} negate(%a)", KIB),
        # An array that stands in place already.
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  %u = f32[1,256]{1,0} parameter(2)\n"
            "  ROOT %b = f32[8,256]{1,0} dynamic-update-slice(%a, %u, %i)",
            2 * KIB,
        ),
        # The slice of a nested fusion, the other operand, the result; the number of the slice.
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  %x = f32[256]{0} parameter(2)\n"
            "  ROOT %b = f32[256]{0} fusion(%a, %i, %x), kind=kLoop, calls=%outer",
            3 * KIB + 4,
        ),
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %x = f32[256]{0} parameter(1)\n"
            "  %i = s32[] parameter(2)\n"
            "  ROOT %b = f32[8,256]{1,0} fusion(%a, %x, %i), kind=kLoop, calls=%update",
            2 * KIB + 4,
        ),
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %x = f32[256]{0} parameter(1)\n"
            "  %i = s32[] parameter(2)\n"
            "  %s = ((f32[8,256]{1,0}, f32[256]{0}, s32[]), f32[8,256]{1,0}, u32[])"
            " fusion-start(%a, %x, %i), kind=kLoop, calls=%update\n"
            "  ROOT %b = f32[8,256]{1,0} fusion-done(%s)",
            2 * KIB + 4,
        ),
        # Two rows of eight, which stand in place already; and where they go.
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[2]{0} parameter(1)\n"
            "  %u = f32[2,256]{1,0} parameter(2)\n"
            "  ROOT %b = f32[8,256]{1,0} fusion(%a, %i, %u), kind=kCustom, calls=%scattered",
            4 * KIB + 8,
        ),
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[2]{0} parameter(1)\n"
            "  %u = f32[2,256]{1,0} parameter(2)\n"
            "  ROOT %b = f32[8,256]{1,0} scatter(%a, %i, %u), to_apply=%add",
            4 * KIB + 8,
        ),
        # A slice is read wherever it goes, but not if its array is on the chip.
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  ROOT %b = f32[1,256]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%to_chip",
            KIB + 4,
        ),
        (
            "  %a = f32[8,256]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  ROOT %b = f32[1,256]{1,0:S(1)} dynamic-slice(%a, %i)",
            KIB,
        ),
        (
            "  %a = f32[8,256]{1,0:S(1)} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  ROOT %b = f32[1,256]{1,0} dynamic-slice(%a, %i)",
            KIB,
        ),
        # Started and waited for, which is one movement.
        (
            "  %a = f32[256]{0} parameter(0)\n"
            "  %s = ((f32[256]{0}), (f32[512]{0})) all-gather-start(%a)\n"
            "  ROOT %d = f32[512]{0} all-gather-done(%s)",
            3 * KIB,
        ),
        (
            "  %a = f32[256]{0} parameter(0)\n"
            "  %s = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%a)\n"
            "  ROOT %d = f32[256]{0:S(1)} copy-done(%s)",
            KIB,
        ),
    ],
)
def test_each_operation_moves_what_it_reads_and_writes(body, want):
    assert moved(body, SLICING) == want


def test_loops_count_as_often_as_they_run():
    body = """
%body (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  ROOT %y = f32[256]{0} negate(%x)
}
%condition (x: f32[256]) -> pred[] {
  %x = f32[256]{0} parameter(0)
  ROOT %c = pred[] custom-call(%x)
}
"""
    loop = "  %a = f32[256]{0} parameter(0)\n  ROOT %w = f32[256]{0} while(%a), condition=%condition, body=%body"
    assert moved(loop, body) == 7 * 2 * KIB  # an end that depends on data
    known = loop + ', backend_config={"known_trip_count":{"n":"3"}}'
    assert moved(known, body) == 3 * 2 * KIB


def test_a_compiled_product_reads_its_operands_and_writes_its_result():
    x, w = jnp.zeros((64, 128)), jnp.zeros((128, 32))
    text = jax.jit(lambda x, w: x @ w).lower(x, w).compile().as_text()
    assert traffic.bytes_moved(hlo.Module(text)) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_a_compiled_loop_over_layers_reads_every_layer_once():
    """A stack of layers of which each turn of a loop reads one, not all."""
    layers, width, rows = 16, 256, 8
    stack, x = jnp.zeros((layers, width, width)), jnp.zeros((rows, width))

    def run(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    text = jax.jit(run).lower(stack, x).compile().as_text()
    weights, states = layers * width * width * 4, layers * rows * width * 4
    got = traffic.bytes_moved(hlo.Module(text))
    # Cut from the stack, and read again by the product.
    assert weights + 2 * states <= got <= 3 * weights + 8 * states
