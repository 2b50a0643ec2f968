//! Functions of float32 as plain loops over LANES numbers, which become vector code and give the same bits on every instruction set.

#![allow(clippy::needless_range_loop)] // loops over indices are what becomes vector code

use crate::product::Number;

pub const LANES: usize = 16;

/// LANES sums side by side, then one.
#[inline(always)]
pub fn dot<N: Number>(one: &[f32], other: &[N]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, others) = (one.chunks_exact(LANES), other.chunks_exact(LANES));
    let (rest, other_rest) = (chunks.remainder(), others.remainder());
    for (a, b) in chunks.zip(others) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i].to_f32(), lanes[i]);
        }
    }
    for (i, (a, b)) in rest.iter().zip(other_rest).enumerate() {
        lanes[i] = a.mul_add(b.to_f32(), lanes[i]);
    }
    sum_of(lanes)
}

#[inline(always)]
pub fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (i, value) in rest.iter().enumerate() {
        lanes[i] += value;
    }
    sum_of(lanes)
}

#[inline(always)]
fn sum_of(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest number, -inf of none; NaN is passed over.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |one, &other| if other > one { other } else { one })
}

/// e^x for x <= 0, to 2 units in the last place; 0 below -87. Plain arithmetic, so that a loop of it becomes vector code.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to whole numbers
    let whole = x.max(-87.0).mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = whole - ROUND;
    let r = (-n).mul_add(1.428_606_8e-6, (-n).mul_add(0.693_145_75, x.max(-87.0))); // x - n ln 2, ln 2 in two parts
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = f32::mul_add(y, r, c);
    }
    let y = y * f32::from_bits((whole.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 {
        0.0
    } else {
        y
    }
}

/// cap * tanh(x / cap): the soft-cap of logits (nanochat/vocab_loss.py).
#[inline(always)]
pub fn capped(x: f32, cap: f32) -> f32 {
    let t = exp(-2.0 * x.abs() / cap);
    (cap * ((1.0 - t) / (1.0 + t))).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_exact_to_two_units_in_the_last_place() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = (x as f64).exp();
            assert!((exp(x) as f64 - exact).abs() <= 2.5e-7 * exact, "{x}: {} {exact}", exp(x));
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn the_soft_cap_is_exact_to_three_millionths() {
        for i in -200_000..=200_000 {
            let (x, y) = (i as f32 * 1e-3, capped(i as f32 * 1e-3, 15.0));
            assert!((y as f64 - 15.0 * (x as f64 / 15.0).tanh()).abs() < 3e-6, "{x}: {y}");
        }
        assert_eq!((capped(0.0, 15.0), capped(f32::INFINITY, 15.0), capped(f32::NEG_INFINITY, 15.0)), (0.0, 15.0, -15.0));
    }
}
