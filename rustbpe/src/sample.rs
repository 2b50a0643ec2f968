//! Logits -> the next token of every row: what nanochat/sampling.py does in PyTorch, for the engine on a CPU.
//!
//! A row's token and its log-probability do not depend, to the bit, on the other rows or on the number of threads.

#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

use crate::isa::{per_isa, Isa};
use crate::math::{capped, exp, max, sum};
use crate::product::Place;

const BLOCK: usize = 256; // numbers whose sum or maximum is looked at first
const GROUP: usize = 16; // the same where the largest few are wanted

/// How one row is drawn.
#[derive(Clone, Copy)]
pub struct Draw {
    pub temperature: f32, // 0 = the likeliest token
    pub top_k: usize,     // 0 = the whole vocabulary
    pub top_p: f32,       // 1 or more = all of it
    pub uniform: f64,     // in [0, 1)
}

/// A token and its log-probability under the distribution drawn from: 0 for the likeliest, NaN where a logit is.
pub type Drawn = (usize, f64);

per_isa! {
    /// Rows of logits, each `stride` behind the one before, `vocab` of them read and overwritten; draws[i] and drawn[i] are row i's.
    pub fn draw_rows[][](isa: Isa, logits: Place<f32>, stride: usize, vocab: usize, cap: f32, draws: &[Draw], drawn: Place<Drawn>, first: usize, last: usize) {
        let _ = isa;
        for row in first..last {
            // SAFETY: no other member has this row.
            unsafe { *drawn.at(row) = draw(std::slice::from_raw_parts_mut(logits.at(row * stride), vocab), cap, draws[row]) };
        }
    }
}

#[inline(always)]
fn draw(logits: &mut [f32], cap: f32, how: Draw) -> Drawn {
    if logits.iter().fold(false, |found, logit| found | logit.is_nan()) {
        return (0, f64::NAN);
    }
    let is_nucleus = how.top_p < 1.0;
    if how.temperature == 0.0 {
        return (likeliest(logits), 0.0);
    }
    let peak = capped(max(logits), cap);
    let weight = |logit: f32| exp(((capped(logit, cap) - peak) / how.temperature).min(0.0));
    if how.top_k == 0 && !is_nucleus {
        for logit in logits.iter_mut() {
            *logit = weight(*logit);
        }
        return pick(logits, how.uniform);
    }
    let (mut kept, whole) = if how.top_k > 0 {
        let kept = largest(logits, how.top_k, weight);
        let whole = kept.iter().map(|&(_, weight)| weight as f64).sum();
        (kept, whole)
    } else {
        nucleus(logits, how.top_p, weight)
    };
    if is_nucleus {
        cut(&mut kept, how.top_p, whole);
    }
    let total: f64 = kept.iter().map(|&(_, weight)| weight as f64).sum();
    let (mut reached, target) = (0.0, how.uniform * total);
    let mut place = 0;
    for (i, &(_, weight)) in kept.iter().enumerate() {
        if weight > 0.0 {
            place = i; // rounding must not pick a token of probability 0
        }
        reached += weight as f64;
        if reached > target {
            break;
        }
    }
    (kept[place].0 as usize, (kept[place].1 as f64).ln() - total.ln())
}

/// The first of the largest.
#[inline(always)]
fn likeliest(logits: &[f32]) -> usize {
    let (mut best, mut place) = (f32::NEG_INFINITY, 0);
    for (number, block) in logits.chunks(BLOCK).enumerate() {
        let peak = max(block);
        if peak > best {
            (best, place) = (peak, number);
        }
    }
    let block = &logits[place * BLOCK..];
    place * BLOCK + block.iter().position(|&logit| logit == best).unwrap_or(0)
}

/// The place where the cumulative sum of the weights passes uniform times their sum: blocks first, then inside one.
#[inline(always)]
fn pick(weights: &[f32], uniform: f64) -> Drawn {
    let sums: Vec<f64> = weights.chunks(BLOCK).map(|block| sum(block) as f64).collect();
    let total: f64 = sums.iter().sum();
    let (mut before, target) = (0.0, uniform * total);
    let mut number = 0;
    while number + 1 < sums.len() && before + sums[number] <= target {
        before += sums[number];
        number += 1;
    }
    let block = &weights[number * BLOCK..weights.len().min((number + 1) * BLOCK)];
    let mut place = 0;
    for (i, &weight) in block.iter().enumerate() {
        if weight > 0.0 {
            place = i; // rounding must not pick a token of probability 0
        }
        before += weight as f64;
        if before > target {
            break;
        }
    }
    (number * BLOCK + place, (block[place] as f64).ln() - total.ln())
}

/// The `count` largest logits' tokens and weights in falling order, the lower token first where two are equal.
#[inline(always)]
fn largest(logits: &[f32], count: usize, weight: impl Fn(f32) -> f32) -> Vec<(u32, f32)> {
    let count = count.min(logits.len());
    // `count` groups have a maximum of at least the count-th largest maximum, so `count` logits are that large
    let mut peaks: Vec<f32> = logits.chunks(GROUP).map(max).collect();
    let bound = match peaks.len() >= count {
        true => *peaks.select_nth_unstable_by(count - 1, |one, other| other.total_cmp(one)).1,
        false => f32::NEG_INFINITY,
    };
    let mut found: Vec<(u32, f32)> = Vec::new();
    for (number, group) in logits.chunks(GROUP).enumerate() {
        if group.iter().fold(false, |any, &logit| any | (logit >= bound)) {
            let start = (number * GROUP) as u32;
            found.extend((start..).zip(group.iter().copied()).filter(|&(_, logit)| logit >= bound));
        }
    }
    let order = |one: &(u32, f32), other: &(u32, f32)| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0));
    if found.len() > count {
        found.select_nth_unstable_by(count - 1, order);
        found.truncate(count);
    }
    found.sort_unstable_by(order);
    for (_, value) in &mut found {
        *value = weight(*value);
    }
    found
}

/// At least the tokens that reach top_p, likewise, and the weight of the whole vocabulary. They are nearly always among the first few hundred.
#[inline(always)]
fn nucleus(logits: &mut [f32], top_p: f32, weight: impl Fn(f32) -> f32) -> (Vec<(u32, f32)>, f64) {
    let few = largest(logits, BLOCK, &weight);
    let reached: f64 = few.iter().map(|&(_, weight)| weight as f64).sum();
    let mut whole = 0.0;
    for block in logits.chunks(BLOCK) {
        let mut weights = [0f32; BLOCK];
        for (weight_of, &logit) in weights.iter_mut().zip(block) {
            *weight_of = weight(logit);
        }
        whole += sum(&weights) as f64;
    }
    if few.len() == logits.len() || reached >= top_p as f64 * whole {
        return (few, whole);
    }
    (largest(logits, logits.len(), weight), whole)
}

/// Drop the tokens before which top_p of the whole is reached (arXiv 1904.09751); the first stays.
fn cut(kept: &mut Vec<(u32, f32)>, top_p: f32, whole: f64) {
    let mut before = 0.0;
    let mut count = 0;
    for &(_, weight) in kept.iter() {
        if count > 0 && before >= top_p as f64 * whole {
            break;
        }
        before += weight as f64;
        count += 1;
    }
    kept.truncate(count);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::isa;

    fn logits(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + seed) * 7919 + seed * 104_729) % 9973) as f32 / 500.0 - 10.0).collect()
    }

    fn drawn(isa: Isa, mut logits: Vec<f32>, how: Draw) -> Drawn {
        let mut out = [(0, 0.0)];
        draw_rows(isa, Place(logits.as_mut_ptr()), logits.len(), logits.len(), 15.0, &[how], Place(out.as_mut_ptr()), 0, 1);
        out[0]
    }

    /// The distribution by its definition, in float64: (token, probability) in falling order of probability.
    fn expected(logits: &[f32], how: Draw) -> Vec<(usize, f64)> {
        let mut all: Vec<(usize, f64)> =
            logits.iter().map(|&logit| (15.0 * (logit as f64 / 15.0).tanh() / how.temperature as f64).exp()).enumerate().collect();
        all.sort_by(|one, other| other.1.total_cmp(&one.1));
        if how.top_k > 0 {
            all.truncate(how.top_k);
        }
        let whole: f64 = all.iter().map(|entry| entry.1).sum();
        let mut before = 0.0;
        all.retain(|entry| {
            let is_kept = before < how.top_p as f64 * whole;
            before += entry.1;
            is_kept
        });
        let whole: f64 = all.iter().map(|entry| entry.1).sum();
        all.into_iter().map(|(token, weight)| (token, weight / whole)).collect()
    }

    #[test]
    fn draws_follow_the_distribution_and_say_its_log_probability() {
        for count in [1, 5, 300, 4099] {
            for (temperature, top_k, top_p) in
                [(1.0, 0, 2.0), (0.7, 50, 2.0), (1.3, 5, 0.6), (1.0, 0, 0.9), (0.3, 0, 0.05), (2.0, 0, 0.99999)]
            {
                let draw_of = |uniform| Draw { temperature, top_k, top_p, uniform };
                let logits = logits(count, top_k + count);
                let distribution = expected(&logits, draw_of(0.0));
                let mut seen = vec![0usize; count];
                let draws = 2000;
                for i in 0..draws {
                    let (token, logprob) = drawn(isa(), logits.clone(), draw_of((i as f64 + 0.5) / draws as f64));
                    seen[token] += 1;
                    let exact = distribution.iter().find(|entry| entry.0 == token).expect("a token outside the distribution").1;
                    assert!((logprob - exact.ln()).abs() < 1e-5, "{count} {temperature} {top_k} {top_p}: {logprob} {}", exact.ln());
                }
                // uniforms at even distances: each token is drawn as often as its probability says, give or take one
                assert!(distribution.iter().all(|&(token, p)| (seen[token] as f64 - p * draws as f64).abs() <= 1.01));
            }
        }
    }

    #[test]
    fn all_instruction_sets_draw_the_same_bits() {
        for lower in [Isa::Plain, Isa::Avx2, Isa::Avx512].into_iter().filter(|&one| one <= isa()) {
            for (seed, (temperature, top_k, top_p)) in
                [(0.0, 0, 2.0), (1.0, 0, 2.0), (0.7, 50, 2.0), (1.3, 5, 0.6), (1.0, 0, 0.9)].into_iter().enumerate()
            {
                let how = Draw { temperature, top_k, top_p, uniform: 0.37 + seed as f64 / 10.0 };
                let (token, logprob) = drawn(lower, logits(3001, seed), how);
                assert_eq!((token, logprob.to_bits()), {
                    let best = drawn(isa(), logits(3001, seed), how);
                    (best.0, best.1.to_bits())
                });
            }
        }
    }

    #[test]
    fn the_likeliest_is_the_first_of_equals_and_a_nan_is_told() {
        let greedy = Draw { temperature: 0.0, top_k: 0, top_p: 2.0, uniform: 0.9 };
        let mut logits = vec![0.0; 1000];
        assert_eq!(drawn(isa(), logits.clone(), greedy), (0, 0.0));
        (logits[700], logits[999]) = (3.0, 3.0);
        assert_eq!(drawn(isa(), logits.clone(), greedy), (700, 0.0));
        assert_eq!(drawn(isa(), vec![f32::NEG_INFINITY; 3], greedy), (0, 0.0));
        logits[5] = f32::NAN;
        assert!(drawn(isa(), logits.clone(), greedy).1.is_nan());
        assert!(drawn(isa(), logits, Draw { temperature: 1.0, ..greedy }).1.is_nan());
    }
}
