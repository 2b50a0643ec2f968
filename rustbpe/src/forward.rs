//! The transformer's pass over new tokens against a cache of keys and values, for the engine: nanochat/decoder.py is its only caller.
//!
//! The same function as nanochat/gpt.py, without gradients: rotary positions, then QK-norm; relu^2; RMSNorm without weights. Activations are
//! float32 and become the weights' format where they meet them; the cache is of that format. A token's result does not depend, to the bit, on which
//! other tokens are in the pass, nor on the number of threads.

#![allow(clippy::needless_range_loop, clippy::too_many_arguments)] // loops over indices are what becomes vector code

use crate::isa::{isa, per_isa, Isa};
use crate::math::{dot, exp, sum, LANES};
use crate::product::{product, Matrix, Number, Output, Place};
use crate::sample::{draw_rows, Draw, Drawn};
use crate::team::Team;

const EPSILON: f32 = 1e-6;
const AHEAD: usize = 16; // keys or values between the one that is read and the one that is fetched
const WORK: usize = 200_000; // multiply-adds that are worth another thread

pub struct Layer<N: Number> {
    pub qkv: Matrix<N>,
    pub attn_proj: Matrix<N>,
    pub fc: Matrix<N>,
    pub mlp_proj: Matrix<N>,
}

/// Where keys and values are: those of (row, head, position) begin at row * strides[0] + head * strides[1] + position * strides[2] of their layer.
#[derive(Clone, Copy)]
pub struct Cache<'a, N> {
    pub keys: &'a [Place<N>], // of every layer
    pub values: &'a [Place<N>],
    pub strides: [usize; 3],
    pub prompts: &'a [Prompt<N>],
}

/// The first `length` positions of all rows that share it; those rows' own memory begins behind it. (head, position) is at head * head_stride + position * size.
pub struct Prompt<N> {
    pub keys: Vec<Place<N>>,
    pub values: Vec<Place<N>>,
    pub head_stride: usize,
    pub length: usize,
}

/// The new tokens `ids`: each continues `rows[i]` of the cache at `positions[i]`, and looks at all of that row up to itself.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    pub ids: &'a [i64],
    pub rows: &'a [i64],
    pub positions: &'a [i64],
    pub prompts: &'a [i64], // which of the cache's prompts the row begins with; -1 = none. Empty = none of them does
}

pub struct Transformer<N: Number> {
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub embedding: Vec<N>, // (vocabulary, width)
    pub layers: Vec<Layer<N>>,
    pub head: Matrix<N>,
    pub cos: Vec<f32>, // (positions, head_dim / 2)
    pub sin: Vec<f32>,
    pub team: Team,
    pub isa: Isa,
    pub x: Vec<f32>, // of the last step, kept for their memory
    pub logits: Vec<f32>,
    buffers: Buffers<N>,
}

#[derive(Default)]
struct Buffers<N> {
    input: Vec<N>, // what a product reads: (tokens, width)
    wide: Vec<N>,  // the same between the MLP's two
    qkv: Vec<f32>,
    scores: Vec<f32>,
}

impl<N: Number> Transformer<N> {
    pub fn new(width: usize, heads: usize, kv_heads: usize, layers: usize) -> Self {
        let empty = || Layer { qkv: Matrix::default(), attn_proj: Matrix::default(), fc: Matrix::default(), mlp_proj: Matrix::default() };
        Transformer {
            width,
            heads,
            kv_heads,
            head_dim: width / heads,
            embedding: Vec::new(),
            layers: (0..layers).map(|_| empty()).collect(),
            head: Matrix::default(),
            cos: Vec::new(),
            sin: Vec::new(),
            team: Team::default(),
            isa: isa(),
            x: Vec::new(),
            logits: Vec::new(),
            buffers: Buffers { input: Vec::new(), wide: Vec::new(), qkv: Vec::new(), scores: Vec::new() },
        }
    }

    /// -> x (tokens, width), what is after the last norm. Writes the tokens' keys and values into the cache.
    ///
    /// # Safety
    /// x and the cache are as large as the tokens' rows and positions say, the ids are of the vocabulary, and nobody else touches them.
    pub unsafe fn hidden(&mut self, x: Place<f32>, tokens: Tokens, cache: Cache<N>, threads: usize) {
        let (count, width) = (tokens.rows.len(), self.width);
        let qkv_width = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let reach = tokens.positions.iter().max().map_or(0, |&last| last as usize + 1);
        let weights: usize =
            self.layers.iter().map(|layer| layer.qkv.bytes() + layer.attn_proj.bytes() + layer.fc.bytes() + layer.mlp_proj.bytes()).sum();
        let members = threads.min(1 + count * weights / size_of::<N>() / WORK / 4).max(1);
        let is_new_row = tokens.rows.windows(2).all(|pair| pair[0] != pair[1]); // one token for each: nobody reads what another writes
        let buffers = &mut self.buffers;
        grow(&mut buffers.input, count * width, N::default());
        grow(&mut buffers.wide, count * 4 * width, N::default());
        grow(&mut buffers.qkv, count * qkv_width, 0.0);
        let scores_of_one = reach.next_multiple_of(LANES) + 2 * LANES; // members do not share cache lines
        grow(&mut buffers.scores, members * scores_of_one, 0.0);
        let (input, wide) = (Place(buffers.input.as_mut_ptr()), Place(buffers.wide.as_mut_ptr()));
        let (qkv, scores) = (Place(buffers.qkv.as_mut_ptr()), Place(buffers.scores.as_mut_ptr()));
        let tasks = attention_tasks(tokens, self.kv_heads);
        let (isa, layers, embedding) = (self.isa, &self.layers, &self.embedding);
        let heads = Heads { count: self.heads, kv_count: self.kv_heads, size: self.head_dim, cos: &self.cos, sin: &self.sin };

        self.team.run(members, &|member, members, barrier| {
            let share = |all: usize| (all * member / members, all * (member + 1) / members);
            let (first, last) = share(count);
            for token in first..last {
                for (i, value) in embedding[tokens.ids[token] as usize * width..][..width].iter().enumerate() {
                    *x.at(token * width + i) = value.to_f32();
                }
            }
            norm_rows(isa, x, x, width, first, last); // the residual stream from here on
            for (number, layer) in layers.iter().enumerate() {
                norm_rows(isa, x, input, width, first, last);
                barrier.wait();
                product(isa, input, count, &layer.qkv, Output::Store(qkv), member, members);
                barrier.wait();
                let mine = Place(scores.at(member * scores_of_one));
                let (begin, end) = share(tasks.len());
                let look = |phase| attend(isa, heads, qkv, tokens, cache, number, mine, input, &tasks[begin..end], phase);
                if is_new_row {
                    look(Phase::Both);
                } else {
                    look(Phase::Write);
                    barrier.wait();
                    look(Phase::Read);
                }
                barrier.wait();
                product(isa, input, count, &layer.attn_proj, Output::Add(x), member, members);
                barrier.wait();
                norm_rows(isa, x, input, width, first, last);
                barrier.wait();
                product(isa, input, count, &layer.fc, Output::ReluSquared(wide), member, members);
                barrier.wait();
                product(isa, wide, count, &layer.mlp_proj, Output::Add(x), member, members);
                barrier.wait();
            }
            norm_rows(isa, x, x, width, first, last);
        });
    }

    /// x (count, width) -> out (count, vocabulary), before the soft-cap.
    ///
    /// # Safety
    /// x and out are as large as that, and nobody else touches out.
    pub unsafe fn logits(&mut self, x: Place<f32>, count: usize, out: Place<f32>, threads: usize) {
        grow(&mut self.buffers.input, count * self.width, N::default());
        let input = Place(self.buffers.input.as_mut_ptr());
        for i in 0..count * self.width {
            *input.at(i) = N::from_f32(*x.at(i));
        }
        let members = threads.min(1 + count * self.head.bytes() / size_of::<N>() / WORK).max(1);
        let (isa, head) = (self.isa, &self.head);
        self.team.run(members, &|member, members, _| product(isa, input, count, head, Output::Store(out), member, members));
    }

    /// Rows of logits, `stride` numbers each of which `vocab` count and are overwritten -> drawn[i], as draws[i] says. `cap`: of the soft-cap.
    ///
    /// # Safety
    /// The logits are as large as that, and nobody else touches them.
    pub unsafe fn draw(&mut self, logits: Place<f32>, stride: usize, vocab: usize, cap: f32, draws: &[Draw], threads: usize) -> Vec<Drawn> {
        let mut drawn = vec![(0, 0.0); draws.len()];
        let (isa, count, places) = (self.isa, draws.len(), Place(drawn.as_mut_ptr()));
        let members = threads.min(1 + count * vocab / (WORK / 4)).max(1);
        self.team.run(members, &|member, members, _| {
            draw_rows(isa, logits, stride, vocab, cap, draws, places, count * member / members, count * (member + 1) / members)
        });
        drawn
    }
}

/// (token, key head) pairs. Rows that share a prompt follow each other head by head, so that its keys and values stay in the core's own cache.
fn attention_tasks(tokens: Tokens, kv_heads: usize) -> Vec<(u32, u32)> {
    let mut order: Vec<u32> = (0..tokens.rows.len() as u32).collect();
    if tokens.prompts.is_empty() {
        return order.into_iter().flat_map(|token| (0..kv_heads as u32).map(move |head| (token, head))).collect();
    }
    order.sort_by_key(|&token| tokens.prompts[token as usize]);
    let of_one = |one: &u32, other: &u32| tokens.prompts[*one as usize] == tokens.prompts[*other as usize];
    order
        .chunk_by(of_one)
        .flat_map(|rows| (0..kv_heads as u32).flat_map(move |head| rows.iter().map(move |&token| (token, head))))
        .collect()
}

fn grow<T: Clone>(buffer: &mut Vec<T>, size: usize, value: T) {
    if buffer.len() < size {
        buffer.resize(size, value);
    }
}

#[derive(Clone, Copy)]
pub struct Heads<'a> {
    count: usize,
    kv_count: usize,
    size: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

#[derive(Clone, Copy, PartialEq)]
pub enum Phase {
    Write, // rotate the keys, put them and the values into the cache
    Read,  // rotate the queries and look
    Both,
}

per_isa! {
    /// RMSNorm of rows first to last of x (rows, width), in place where `to` is x.
    pub fn norm_rows[N: Number][N](isa: Isa, x: Place<f32>, to: Place<N>, width: usize, first: usize, last: usize) {
        let _ = isa;
        for row in first..last {
            // SAFETY: no other member has these rows. The row is read whole before its first number is written.
            unsafe {
                let start = x.at(row * width);
                let factor = 1.0 / (sum_of_squares(std::slice::from_raw_parts(start, width)) / width as f32 + EPSILON).sqrt();
                for i in 0..width {
                    *to.at(row * width + i) = N::from_f32(*start.add(i) * factor);
                }
            }
        }
    }
}

#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f32 {
    dot(values, values)
}

/// x turned by its position's angle, then normed: (x1 cos + x2 sin, x2 cos - x1 sin).
#[inline(always)]
fn turn_and_norm(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, to: &mut [f32]) {
    let half = x.len() / 2;
    let (first, second) = x.split_at(half);
    let (to_first, to_second) = to.split_at_mut(half);
    for i in 0..half {
        to_first[i] = first[i] * cos[i] + second[i] * sin[i];
        to_second[i] = second[i] * cos[i] - first[i] * sin[i];
    }
    let factor = scale / (sum_of_squares(to) / to.len() as f32 + EPSILON).sqrt();
    for value in to.iter_mut() {
        *value *= factor;
    }
}

per_isa! {
    /// Attention of some (token, key head) pairs: qkv (tokens, heads + 2 kv heads, size) -> to (tokens, heads, size).
    pub fn attend[N: Number][N](isa: Isa, heads: Heads, qkv: Place<f32>, tokens: Tokens, cache: Cache<N>, layer: usize, scores: Place<f32>, to: Place<N>, tasks: &[(u32, u32)], phase: Phase) {
        match heads.size {
            32 => attend_sized::<N, 32>(isa, heads, qkv, tokens, cache, layer, scores, to, tasks, phase),
            64 => attend_sized::<N, 64>(isa, heads, qkv, tokens, cache, layer, scores, to, tasks, phase),
            128 => attend_sized::<N, 128>(isa, heads, qkv, tokens, cache, layer, scores, to, tasks, phase),
            _ => attend_sized::<N, 0>(isa, heads, qkv, tokens, cache, layer, scores, to, tasks, phase),
        }
    }
}

/// D is the heads' size where the compiler may know it, else 0.
#[inline(always)]
fn attend_sized<N: Number, const D: usize>(
    isa: Isa,
    heads: Heads,
    qkv: Place<f32>,
    tokens: Tokens,
    cache: Cache<N>,
    layer: usize,
    scores: Place<f32>,
    to: Place<N>,
    tasks: &[(u32, u32)],
    phase: Phase,
) {
    let size = if D == 0 { heads.size } else { D };
    let (lines, half) = (heads.count / heads.kv_count, size / 2);
    let mut turned = [0f32; MAX_HEAD];
    let mut sums = [[0f32; MAX_HEAD]; 2];
    for &(token, kv_head) in tasks {
        let (token, kv_head) = (token as usize, kv_head as usize);
        let (row, position) = (tokens.rows[token] as usize, tokens.positions[token] as usize);
        let (cos, sin) = (&heads.cos[position * half..][..half], &heads.sin[position * half..][..half]);
        let prompt = match tokens.prompts.get(token) {
            Some(&number) if number >= 0 => Some(&cache.prompts[number as usize]),
            _ => None,
        };
        let shared = prompt.map_or(0, |prompt| prompt.length);
        let (start, stride) = (row * cache.strides[0] + kv_head * cache.strides[1], cache.strides[2]);
        // SAFETY: the caller vouches for the sizes; each (token, key head) has places of its own.
        unsafe {
            let mine = qkv.at(token * (heads.count + 2 * heads.kv_count) * size);
            let (keys, values) = (cache.keys[layer].at(start), cache.values[layer].at(start));
            if phase != Phase::Read {
                let key = std::slice::from_raw_parts(mine.add((heads.count + kv_head) * size), size);
                let place = (position - shared) * stride;
                let value = mine.add((heads.count + heads.kv_count + kv_head) * size);
                turn_and_norm(key, cos, sin, 1.0, &mut turned[..size]);
                for d in 0..size {
                    *keys.add(place + d) = N::from_f32(turned[d]);
                    *values.add(place + d) = N::from_f32(*value.add(d));
                }
            }
            if phase == Phase::Write {
                continue;
            }
            let (prompt_keys, prompt_values) = match prompt {
                Some(prompt) => {
                    (prompt.keys[layer].at(kv_head * prompt.head_stride), prompt.values[layer].at(kv_head * prompt.head_stride))
                }
                None => (keys, values),
            };
            for line in 0..lines {
                let head = kv_head * lines + line;
                let query = std::slice::from_raw_parts(mine.add(head * size), size);
                turn_and_norm(query, cos, sin, 1.0 / (size as f32).sqrt(), &mut turned[..size]);
                let scores = std::slice::from_raw_parts_mut(scores.0, position + 1);
                let (of_prompt, of_row) = scores.split_at_mut(shared);
                let peak = score::<N, D>(isa, &turned[..size], prompt_keys, size, of_prompt).max(score::<N, D>(
                    isa,
                    &turned[..size],
                    keys,
                    stride,
                    of_row,
                ));
                for score in scores.iter_mut() {
                    *score = exp(*score - peak);
                }
                let factor = 1.0 / sum(scores);
                sums[0][..size].fill(0.0);
                sums[1][..size].fill(0.0);
                let (of_prompt, of_row) = scores.split_at(shared);
                mix::<N, D>(isa, of_prompt, prompt_values, size, 0, &mut sums, size);
                mix::<N, D>(isa, of_row, values, stride, shared % 2, &mut sums, size);
                for d in 0..size {
                    *to.at((token * heads.count + head) * size + d) = N::from_f32((sums[0][d] + sums[1][d]) * factor);
                }
            }
        }
    }
}

/// scores[i] = query . key i -> the largest.
#[inline(always)]
unsafe fn score<N: Number, const D: usize>(isa: Isa, query: &[f32], keys: *const N, stride: usize, scores: &mut [f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if D != 0 && isa >= Isa::Avx2 {
        return score_fours::<N, D>(isa, query.as_ptr(), keys, stride, scores);
    }
    let _ = isa;
    let mut peak = f32::NEG_INFINITY;
    for (i, score) in scores.iter_mut().enumerate() {
        *score = dot(query, std::slice::from_raw_parts(keys.add(i * stride), query.len()));
        peak = peak.max(*score);
    }
    peak
}

/// The same for four keys at once: their 32 lanes become four sums together, where the compiler would make each alone.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn score_fours<N: Number, const D: usize>(isa: Isa, query: *const f32, keys: *const N, stride: usize, scores: &mut [f32]) -> f32 {
    use std::arch::x86_64::*;
    let Some(last) = scores.len().checked_sub(1) else { return f32::NEG_INFINITY };
    let mut peaks = _mm_set1_ps(f32::NEG_INFINITY);
    for (four, scores) in scores.chunks_mut(4).enumerate() {
        let mut lanes = [_mm256_setzero_ps(); 4];
        let places: [*const N; 4] = std::array::from_fn(|i| keys.wrapping_add(last.min(4 * four + i) * stride)); // the last again where there are fewer
        fetch_ahead::<N, D>(isa, keys.wrapping_add((4 * four + AHEAD) * stride), stride, 4);
        for d in (0..D).step_by(8) {
            let part = _mm256_loadu_ps(query.add(d));
            for i in 0..4 {
                lanes[i] = _mm256_fmadd_ps(part, N::eight(places[i].add(d)), lanes[i]);
            }
        }
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(lanes[0], lanes[1]), _mm256_hadd_ps(lanes[2], lanes[3]));
        let sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
        peaks = _mm_max_ps(peaks, sums);
        if scores.len() == 4 {
            _mm_storeu_ps(scores.as_mut_ptr(), sums);
        } else {
            let mut four = [0f32; 4];
            _mm_storeu_ps(four.as_mut_ptr(), sums);
            scores.copy_from_slice(&four[..scores.len()]);
        }
    }
    let mut four = [0f32; 4];
    _mm_storeu_ps(four.as_mut_ptr(), peaks);
    four.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Tell the processor that `count` keys or values will be read soon. They need not exist. Zen 5 by itself does not keep up; on Zen 3 (AVX2) what it fetches
/// by itself is faster.
#[inline(always)]
fn fetch_ahead<N, const D: usize>(isa: Isa, start: *const N, stride: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in 0..if isa >= Isa::Avx512 { count } else { 0 } {
        for byte in (0..D * size_of::<N>()).step_by(64) {
            // SAFETY: a hint, which may point anywhere.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                    start.wrapping_add(i * stride).cast::<i8>().wrapping_add(byte),
                )
            };
        }
    }
    let _ = (isa, start, stride, count);
}

/// Adds weights[i] * value i to sums[(first + i) % 2]: even and odd positions apart, so that one addition does not wait for the other, and in
/// the same order wherever a row is cut into its prompt and its own.
#[inline(always)]
unsafe fn mix<N: Number, const D: usize>(
    isa: Isa,
    weights: &[f32],
    values: *const N,
    stride: usize,
    first: usize,
    sums: &mut [[f32; MAX_HEAD]; 2],
    size: usize,
) {
    if D == 0 {
        for (i, &weight) in weights.iter().enumerate() {
            let value = std::slice::from_raw_parts(values.add(i * stride), size);
            for (sum, &value) in sums[(first + i) % 2].iter_mut().zip(value) {
                *sum = value.to_f32().mul_add(weight, *sum);
            }
        }
        return;
    }
    let mut kept: [[f32; D]; 2] = std::array::from_fn(|half| *sums[(first + half) % 2].as_ptr().cast()); // local arrays of known size stay in registers
    let pairs = weights.chunks_exact(2);
    let last = pairs.remainder();
    for (i, pair) in pairs.enumerate() {
        fetch_ahead::<N, D>(isa, values.wrapping_add((2 * i + AHEAD) * stride), stride, 2);
        for half in 0..2 {
            add_scaled(&mut kept[half], pair[half], &*values.add((2 * i + half) * stride).cast::<[N; D]>());
        }
    }
    if let [weight] = last {
        add_scaled(&mut kept[0], *weight, &*values.add((weights.len() - 1) * stride).cast::<[N; D]>());
    }
    for (half, kept) in kept.iter().enumerate() {
        sums[(first + half) % 2][..D].copy_from_slice(kept);
    }
}

#[inline(always)]
fn add_scaled<N: Number, const D: usize>(sums: &mut [f32; D], weight: f32, value: &[N; D]) {
    let mut wide = [0f32; D]; // on its own, or the compiler widens one number after the other
    for d in 0..D {
        wide[d] = value[d].to_f32();
    }
    for d in 0..D {
        sums[d] = wide[d].mul_add(weight, sums[d]);
    }
}

pub const MAX_HEAD: usize = 512; // numbers of a head

#[cfg(test)]
mod tests {
    use super::*;
    use crate::product::Bf16;

    /// Logits of 9 tokens in two rows, 6 of one and 3 of the other, fed at once and one by one.
    fn logits_of<N: Number>(isa: Isa, heads: usize, kv_heads: usize, size: usize, at_once: bool) -> Vec<f32> {
        let (width, vocab, room) = (heads * size, 50, 8);
        let mut seed = 1u32;
        let mut draw = |count: usize, scale: f32| -> Vec<f32> {
            (0..count)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    ((seed >> 8) as f32 / (1 << 24) as f32 - 0.5) * scale
                })
                .collect()
        };
        let mut model: Transformer<N> = Transformer::new(width, heads, kv_heads, 2);
        model.isa = isa;
        let mut fill = |matrix: &mut Matrix<N>, columns: usize, inputs: usize| {
            let weights: Vec<N> = draw(columns * inputs, 0.6).into_iter().map(N::from_f32).collect();
            unsafe { matrix.pack(&[(weights.as_ptr(), columns)], inputs) };
        };
        for layer in &mut model.layers {
            fill(&mut layer.qkv, (heads + 2 * kv_heads) * size, width);
            fill(&mut layer.attn_proj, width, width);
            fill(&mut layer.fc, 4 * width, width);
            fill(&mut layer.mlp_proj, width, 4 * width);
        }
        fill(&mut model.head, vocab, width);
        let angles: Vec<f32> = (0..room).flat_map(|at| (0..size / 2).map(move |i| at as f32 / (i + 1) as f32)).collect();
        (model.cos, model.sin) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        model.embedding = draw(vocab * width, 2.0).into_iter().map(N::from_f32).collect();
        let mut x = vec![0f32; 9 * width];
        let mut memory = vec![N::default(); 4 * 2 * kv_heads * room * size];
        let places: Vec<Place<N>> = memory.chunks_mut(2 * kv_heads * room * size).map(|part| Place(part.as_mut_ptr())).collect();
        let cache = Cache { keys: &places[..2], values: &places[2..], strides: [kv_heads * room * size, room * size, size], prompts: &[] };
        let (ids, rows, positions) = ([3, 1, 4, 1, 5, 9, 2, 6, 49], [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]);
        for part in if at_once { vec![0..9] } else { (0..9).map(|i| i..i + 1).collect() } {
            let tokens = Tokens { ids: &ids[part.clone()], rows: &rows[part.clone()], positions: &positions[part.clone()], prompts: &[] };
            unsafe { model.hidden(Place(x[part.start * width..].as_mut_ptr()), tokens, cache, 2) };
        }
        let mut logits = vec![0f32; 9 * vocab];
        unsafe { model.logits(Place(x.as_mut_ptr()), 9, Place(logits.as_mut_ptr()), 2) };
        logits
    }

    #[test]
    fn all_instruction_sets_agree_and_tokens_at_once_are_tokens_one_by_one() {
        for (heads, kv_heads, size) in [(2, 1, 32), (2, 2, 64), (1, 1, 128), (4, 2, 6)] {
            for lower in [Isa::Plain, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|&one| one <= isa()) {
                let (best, found) =
                    (logits_of::<f32>(isa(), heads, kv_heads, size, true), logits_of::<f32>(lower, heads, kv_heads, size, true));
                assert!(best.iter().zip(&found).all(|(one, other)| (one - other).abs() < 1e-3), "{lower:?} {size}");
                assert_eq!(found, logits_of::<f32>(lower, heads, kv_heads, size, false), "{lower:?} {size}");
                let (best, found) =
                    (logits_of::<Bf16>(isa(), heads, kv_heads, size, true), logits_of::<Bf16>(lower, heads, kv_heads, size, true));
                assert!(best.iter().zip(&found).all(|(one, other)| (one - other).abs() < 0.5), "{lower:?} {size}");
                assert_eq!(found, logits_of::<Bf16>(lower, heads, kv_heads, size, false), "{lower:?} {size}");
            }
        }
    }
}
