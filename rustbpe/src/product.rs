//! Products of few rows with a weight matrix, in float32 or bfloat16.
//!
//! With few rows the weights' way from memory is what costs. They are packed into panels of 32 columns that are read once, in order. Every
//! sum runs over the inputs from first to last in one accumulator, whatever the number of rows or threads: a row's result never depends
//! on its neighbours, to the bit.

#![allow(clippy::needless_range_loop, clippy::too_many_arguments)] // loops over indices are what becomes vector code

use crate::isa::{per_isa, Isa};

pub const PANEL: usize = 32; // columns of a panel: two AVX-512 registers of float32
const TILE: usize = 12; // rows at once: 24 accumulators of 32 registers
const BLOCK: usize = 96; // rows that meet all panels before the next ones do: they stay in the core's own memory

/// Where the next panel is, or a tile's share of it: the first rows to read a panel wait for memory and those after them for sums, so each tile
/// fetches `bytes` a step meanwhile.
#[derive(Clone, Copy)]
pub struct Ahead {
    start: *const u8,
    bytes: usize,
}

impl Ahead {
    /// The share of tile `number` of `tiles`. The place need not exist.
    fn share(panel: *const u8, bytes: usize, steps: usize, number: usize, tiles: usize) -> Ahead {
        Ahead { start: panel.wrapping_add(number * steps * bytes / tiles), bytes: bytes / tiles }
    }

    fn halves(self, steps: usize) -> [Ahead; 2] {
        [0, 1].map(|half| Ahead { start: self.start.wrapping_add(half * steps * self.bytes / 2), bytes: self.bytes / 2 })
    }

    /// Few rows never wait for sums, and the processor sees by itself what they read.
    #[inline(always)]
    fn fetch<const M: usize>(self, step: usize) {
        #[cfg(target_arch = "x86_64")]
        if M > 3 {
            // SAFETY: a hint, which may point anywhere.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(self.start.wrapping_add(step * self.bytes).cast())
            };
        }
    }
}

/// What the weights, and the activations they are multiplied with, are stored as.
pub trait Number: Copy + Default + Send + Sync + 'static {
    type Packed: Copy + Default + Send + Sync; // PANEL columns of STEP inputs are [Packed; PANEL]
    const STEP: usize; // inputs in a packed number
    const AVX2_TILE: usize; // rows at once where there are 16 registers, half a panel each

    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    fn pack(values: [Self; 2]) -> Self::Packed;

    /// Eight of them as float32.
    ///
    /// # Safety
    /// The processor has AVX2, and eight numbers are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(place: *const Self) -> std::arch::x86_64::__m256;

    /// Of eight packed numbers those of input `part` < STEP as float32.
    ///
    /// # Safety
    /// The processor has AVX2, and eight packed numbers are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn unpacked(place: *const Self::Packed, part: usize) -> std::arch::x86_64::__m256;

    /// A row's input step * STEP + part, eight times.
    ///
    /// # Safety
    /// The processor has AVX2, and the input is there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn repeated(row: *const Self, step: usize, part: usize) -> std::arch::x86_64::__m256;

    /// Adds `rows` x `panels` to `sums`: P panels of `steps` packed lines, M rows.
    fn tile<const M: usize, const P: usize>(
        isa: Isa,
        rows: [*const Self; M],
        panels: [*const Self::Packed; P],
        steps: usize,
        sums: &mut [[[f32; PANEL]; P]; M],
        ahead: Ahead,
    );
}

impl Number for f32 {
    type Packed = f32;
    const STEP: usize = 1;
    const AVX2_TILE: usize = 6; // 12 accumulators

    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn eight(place: *const f32) -> std::arch::x86_64::__m256 {
        std::arch::x86_64::_mm256_loadu_ps(place)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn unpacked(place: *const f32, _: usize) -> std::arch::x86_64::__m256 {
        std::arch::x86_64::_mm256_loadu_ps(place)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn repeated(row: *const f32, step: usize, _: usize) -> std::arch::x86_64::__m256 {
        std::arch::x86_64::_mm256_broadcast_ss(&*row.add(step))
    }

    fn pack(values: [f32; 2]) -> f32 {
        values[0]
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        isa: Isa,
        rows: [*const f32; M],
        panels: [*const f32; P],
        steps: usize,
        sums: &mut [[[f32; PANEL]; P]; M],
        ahead: Ahead,
    ) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the instructions, and the sizes are those below.
        match isa {
            Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { f32_tile(rows, panels, steps, sums, ahead) },
            Isa::Avx2 => return unsafe { avx2_tile::<f32, M, P>(rows, panels, steps, sums, ahead) },
            Isa::Plain => {}
        }
        let _ = (isa, ahead);
        let mut kept = [[[0f32; PANEL]; P]; M]; // a local array stays in registers
        for step in 0..steps {
            for p in 0..P {
                // SAFETY: a panel has `steps` lines of PANEL numbers, and a row has `steps`.
                let line = unsafe { &*panels[p].add(step * PANEL).cast::<[f32; PANEL]>() };
                for m in 0..M {
                    let input = unsafe { *rows[m].add(step) };
                    for j in 0..PANEL {
                        kept[m][p][j] = line[j].mul_add(input, kept[m][p][j]);
                    }
                }
            }
        }
        *sums = kept;
    }
}

/// The upper half of a float32.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Number for Bf16 {
    type Packed = u32; // the weights of two inputs, the first in the lower half
    const STEP: usize = 2;
    const AVX2_TILE: usize = 4; // 8, and the two halves of the weights

    /// To nearest, ties to even.
    #[inline(always)]
    fn from_f32(value: f32) -> Bf16 {
        let bits = value.to_bits();
        Bf16((bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn eight(place: *const Bf16) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(place.cast())), 16))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn unpacked(place: *const u32, part: usize) -> std::arch::x86_64::__m256 {
        half_of_each(std::arch::x86_64::_mm256_loadu_si256(place.cast()), part)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn repeated(row: *const Bf16, step: usize, part: usize) -> std::arch::x86_64::__m256 {
        half_of_each(std::arch::x86_64::_mm256_set1_epi32(row.cast::<i32>().add(step).read_unaligned()), part)
    }

    fn pack(values: [Bf16; 2]) -> u32 {
        values[0].0 as u32 | (values[1].0 as u32) << 16
    }

    #[inline(always)]
    fn tile<const M: usize, const P: usize>(
        isa: Isa,
        rows: [*const Bf16; M],
        panels: [*const u32; P],
        steps: usize,
        sums: &mut [[[f32; PANEL]; P]; M],
        ahead: Ahead,
    ) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the instructions, and the sizes are those below.
        match isa {
            Isa::Avx512Bf16 => return unsafe { bf16_tile(rows, panels, steps, sums, ahead) },
            Isa::Avx2 => return unsafe { avx2_tile::<Bf16, M, P>(rows, panels, steps, sums, ahead) },
            Isa::Avx512 | Isa::Plain => {}
        }
        let _ = (isa, ahead);
        let mut kept = [[[0f32; PANEL]; P]; M];
        for step in 0..steps {
            for p in 0..P {
                // SAFETY: a panel has `steps` lines of PANEL pairs, and a row has `steps` pairs.
                let line = unsafe { &*panels[p].add(step * PANEL).cast::<[u32; PANEL]>() };
                for m in 0..M {
                    let (first, second) = unsafe { ((*rows[m].add(2 * step)).to_f32(), (*rows[m].add(2 * step + 1)).to_f32()) };
                    for j in 0..PANEL {
                        let sum = f32::from_bits(line[j] << 16).mul_add(first, kept[m][p][j]);
                        kept[m][p][j] = f32::from_bits(line[j] & 0xffff_0000).mul_add(second, sum);
                    }
                }
            }
        }
        *sums = kept;
    }
}

/// Eight pairs of bfloat16 -> the first (part 0) or second of each as float32.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_of_each(pairs: std::arch::x86_64::__m256i, part: usize) -> std::arch::x86_64::__m256 {
    use std::arch::x86_64::*;
    _mm256_castsi256_ps(match part {
        0 => _mm256_slli_epi32(pairs, 16),
        _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32 as i32)),
    })
}

/// The same for 16 registers of 8: so many columns at a time that the accumulators, 12 at most, stay there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_tile<N: Number, const M: usize, const P: usize>(
    rows: [*const N; M],
    panels: [*const N::Packed; P],
    steps: usize,
    sums: &mut [[[f32; PANEL]; P]; M],
    ahead: Ahead,
) {
    for p in 0..P {
        let panel = panels[p];
        if M <= 3 {
            avx2_columns::<N, M, 4>(rows, panel, steps, std::array::from_fn(|m| sums[m][p].as_mut_ptr()), ahead);
        } else {
            let [first, second] = ahead.halves(steps);
            avx2_columns::<N, M, 2>(rows, panel, steps, std::array::from_fn(|m| sums[m][p].as_mut_ptr()), first);
            avx2_columns::<N, M, 2>(rows, panel.add(16), steps, std::array::from_fn(|m| sums[m][p][16..].as_mut_ptr()), second);
        }
    }
}

/// W registers of columns.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_columns<N: Number, const M: usize, const W: usize>(
    rows: [*const N; M],
    panel: *const N::Packed,
    steps: usize,
    sums: [*mut f32; M],
    ahead: Ahead,
) {
    use std::arch::x86_64::*;
    let mut kept = [[_mm256_setzero_ps(); W]; M];
    for step in 0..steps {
        ahead.fetch::<M>(step);
        for part in 0..N::STEP {
            let line: [__m256; W] = std::array::from_fn(|w| N::unpacked(panel.add(step * PANEL + 8 * w), part));
            for m in 0..M {
                let input = N::repeated(rows[m], step, part);
                for w in 0..W {
                    kept[m][w] = _mm256_fmadd_ps(line[w], input, kept[m][w]);
                }
            }
        }
    }
    for (kept, sums) in kept.iter().zip(sums) {
        for w in 0..W {
            _mm256_storeu_ps(sums.add(8 * w), kept[w]);
        }
    }
}

/// The same with the accumulators in AVX-512 registers, which the compiler does not manage for many rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn f32_tile<const M: usize, const P: usize>(
    rows: [*const f32; M],
    panels: [*const f32; P],
    steps: usize,
    sums: &mut [[[f32; PANEL]; P]; M],
    ahead: Ahead,
) {
    use std::arch::x86_64::*;
    let mut kept = [[[_mm512_setzero_ps(); 2]; P]; M];
    for step in 0..steps {
        ahead.fetch::<M>(step);
        for p in 0..P {
            let line = panels[p].add(step * PANEL);
            let halves = [_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(16))];
            for m in 0..M {
                let input = _mm512_set1_ps(*rows[m].add(step));
                for half in 0..2 {
                    kept[m][p][half] = _mm512_fmadd_ps(halves[half], input, kept[m][p][half]);
                }
            }
        }
    }
    store(&kept, sums);
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const M: usize, const P: usize>(kept: &[[[std::arch::x86_64::__m512; 2]; P]; M], sums: &mut [[[f32; PANEL]; P]; M]) {
    for (kept, sums) in kept.as_flattened().iter().zip(sums.as_flattened_mut()) {
        for half in 0..2 {
            std::arch::x86_64::_mm512_storeu_ps(sums.as_mut_ptr().add(16 * half), kept[half]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_lanes(bits: std::arch::x86_64::__m512i) -> std::arch::x86_64::__m512bh {
    std::mem::transmute(bits)
}

/// The same by the processor's own instruction for pairs of bfloat16, which no loop compiles to.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn bf16_tile<const M: usize, const P: usize>(
    rows: [*const Bf16; M],
    panels: [*const u32; P],
    steps: usize,
    sums: &mut [[[f32; PANEL]; P]; M],
    ahead: Ahead,
) {
    use std::arch::x86_64::*;
    let mut kept = [[[_mm512_setzero_ps(); 2]; P]; M];
    for step in 0..steps {
        ahead.fetch::<M>(step);
        for p in 0..P {
            let line = panels[p].add(step * PANEL).cast::<__m512i>();
            let halves: [__m512bh; 2] = [bf16_lanes(_mm512_loadu_si512(line)), bf16_lanes(_mm512_loadu_si512(line.add(1)))];
            for m in 0..M {
                let pair: __m512bh = bf16_lanes(_mm512_set1_epi32(rows[m].cast::<i32>().add(step).read_unaligned()));
                for half in 0..2 {
                    kept[m][p][half] = _mm512_dpbf16_ps(kept[m][p][half], pair, halves[half]);
                }
            }
        }
    }
    store(&kept, sums);
}

/// A weight matrix (columns, inputs), packed.
#[derive(Default)]
pub struct Matrix<N: Number> {
    pub inputs: usize,
    pub columns: usize,
    panels: Vec<N::Packed>,
}

impl<N: Number> Matrix<N> {
    /// Of weights (columns, inputs) that stand one after the other in `parts`, each with its number of columns.
    ///
    /// # Safety
    /// Each pointer leads to columns x inputs numbers.
    pub unsafe fn pack(&mut self, parts: &[(*const N, usize)], inputs: usize) {
        self.inputs = inputs;
        self.columns = parts.iter().map(|part| part.1).sum();
        let steps = inputs.div_ceil(N::STEP);
        self.panels.clear();
        self.panels.reserve_exact(self.columns.div_ceil(PANEL) * steps * PANEL);
        advise_huge_pages(self.panels.as_ptr().cast(), self.panels.capacity() * size_of::<N::Packed>());
        self.panels.resize(self.columns.div_ceil(PANEL) * steps * PANEL, N::Packed::default());
        let rows = parts.iter().flat_map(|&(start, columns)| (0..columns).map(move |column| start.add(column * inputs)));
        for (column, row) in rows.enumerate() {
            let row = std::slice::from_raw_parts(row, inputs);
            let panel = &mut self.panels[column / PANEL * steps * PANEL + column % PANEL..];
            for (step, values) in row.chunks(N::STEP).enumerate() {
                panel[step * PANEL] = N::pack([values[0], values.get(1).copied().unwrap_or_default()]);
            }
        }
    }

    pub fn bytes(&self) -> usize {
        self.panels.len() * size_of::<N::Packed>()
    }
}

/// Ask the kernel for pages of 2 MiB in this memory, which nobody has written to yet: whoever reads much of it then finds it faster.
pub fn advise_huge_pages(start: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const MADV_HUGEPAGE: i32 = 14;
        extern "C" {
            fn madvise(start: *const u8, bytes: usize, advice: i32) -> i32;
        }
        let first = (start as usize).next_multiple_of(PAGE);
        let bytes = bytes.saturating_sub(first - start as usize) / PAGE * PAGE;
        // SAFETY: whole pages of our own memory. A refusal changes nothing.
        unsafe { madvise(first as *const u8, bytes, MADV_HUGEPAGE) };
    }
    let _ = (start, bytes);
}

/// A place that members of a team write to, each at other columns or rows.
#[derive(Clone, Copy)]
pub struct Place<T>(pub *mut T);
unsafe impl<T> Send for Place<T> {}
unsafe impl<T> Sync for Place<T> {}

impl<T> Place<T> {
    #[inline(always)]
    pub fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// What becomes of a product.
#[derive(Clone, Copy)]
pub enum Output<N> {
    Store(Place<f32>),
    Add(Place<f32>),
    ReluSquared(Place<N>),
}

per_isa! {
    /// This member's share of the columns of input (rows, matrix.inputs) times the matrix, to `output` (rows, matrix.columns).
    pub fn product[N: Number][N](isa: Isa, input: Place<N>, rows: usize, matrix: &Matrix<N>, output: Output<N>, member: usize, members: usize) {
        let panels = matrix.columns.div_ceil(PANEL);
        let (first, last) = (panels * member / members, panels * (member + 1) / members);
        let steps = matrix.inputs.div_ceil(N::STEP);
        let packed = |panel: usize| matrix.panels.as_ptr().wrapping_add(panel * steps * PANEL).cast::<u8>();
        let bytes = PANEL * size_of::<N::Packed>(); // of a panel, at each step
        let mut row = 0;
        while row < rows {
            let end = rows.min(row + BLOCK);
            let mut panel = first;
            while end - row == 1 && panel + 4 <= last { // one row waits for each sum: four panels at once
                some::<N, 1, 4>(isa, input, row, matrix, panel, steps, output, Ahead::share(packed(panel), bytes, steps, 0, 1));
                panel += 4;
            }
            let tiles = (end - row).div_ceil(if isa == Isa::Avx2 { N::AVX2_TILE } else { TILE });
            for panel in panel..last {
                let (mut row, mut number) = (row, 0);
                while row < end {
                    let left = end - row;
                    let size = match isa {
                        Isa::Avx2 => left.div_ceil(left.div_ceil(N::AVX2_TILE)), // tiles of like size
                        _ => left,
                    };
                    let ahead = Ahead::share(packed(panel + 1), bytes, steps, number, tiles);
                    row += match size {
                        1 => some::<N, 1, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        2 => some::<N, 2, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        3 => some::<N, 3, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        4 => some::<N, 4, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        5 => some::<N, 5, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        6..=7 => some::<N, 6, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        8..=11 | 16 => some::<N, 8, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                        _ => some::<N, TILE, 1>(isa, input, row, matrix, panel, steps, output, ahead),
                    };
                    number += 1;
                }
            }
            row = end;
        }
    }
}

/// M rows and P panels -> M.
#[inline(always)]
fn some<N: Number, const M: usize, const P: usize>(
    isa: Isa,
    input: Place<N>,
    row: usize,
    matrix: &Matrix<N>,
    panel: usize,
    steps: usize,
    output: Output<N>,
    ahead: Ahead,
) -> usize {
    let mut sums = [[[0f32; PANEL]; P]; M];
    // SAFETY: the caller's input has rows of `matrix.inputs` numbers, and a panel begins every steps * PANEL.
    let rows = std::array::from_fn(|m| input.at((row + m) * matrix.inputs).cast_const());
    let panels = std::array::from_fn(|p| matrix.panels[(panel + p) * steps * PANEL..(panel + p + 1) * steps * PANEL].as_ptr());
    N::tile(isa, rows, panels, steps, &mut sums, ahead);
    for (m, sums) in sums.iter().enumerate() {
        for (p, sums) in sums.iter().enumerate() {
            let column = (panel + p) * PANEL;
            let count = PANEL.min(matrix.columns - column);
            let place = (row + m) * matrix.columns + column;
            // SAFETY: output is (rows, columns), and no other member has these columns.
            unsafe {
                match output {
                    Output::Store(to) => std::ptr::copy_nonoverlapping(sums.as_ptr(), to.at(place), count),
                    Output::Add(to) => {
                        for j in 0..count {
                            *to.at(place + j) += sums[j];
                        }
                    }
                    Output::ReluSquared(to) => {
                        for j in 0..count {
                            let x = sums[j].max(0.0);
                            *to.at(place + j) = N::from_f32(x * x);
                        }
                    }
                }
            }
        }
    }
    M
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::isa;

    fn check<N: Number>(isa: Isa, of: fn(f32) -> f32, tolerance: f32) {
        for (inputs, columns) in [(2, 1), (6, 31), (32, 32), (64, 200), (256, 96)] {
            let value = |i: usize| of(((i * 7919 + 13) % 1000) as f32 / 500.0 - 1.0);
            let weights: Vec<N> = (0..inputs * columns).map(|i| N::from_f32(value(i))).collect();
            let cut = columns / 3;
            let mut matrix = Matrix::default();
            unsafe { matrix.pack(&[(weights.as_ptr(), cut), (weights[cut * inputs..].as_ptr(), columns - cut)], inputs) };
            let mut alone = Vec::new();
            for rows in [1, 2, 3, 5, 7, 8, 11, 12, 13, 16, 17, 29, 97, 200] {
                let mut input: Vec<N> = (0..rows * inputs).map(|i| N::from_f32(value(3 * i + 1))).collect();
                let mut output = vec![f32::NAN; rows * columns];
                for members in [1, 3] {
                    for member in 0..members {
                        product(isa, Place(input.as_mut_ptr()), rows, &matrix, Output::Store(Place(output.as_mut_ptr())), member, members);
                    }
                    for row in 0..rows {
                        for column in 0..columns {
                            let exact: f64 =
                                (0..inputs).map(|i| value(3 * (row * inputs + i) + 1) as f64 * value(column * inputs + i) as f64).sum();
                            assert!((output[row * columns + column] as f64 - exact).abs() < tolerance as f64, "{rows} {row} {column}");
                        }
                    }
                    if rows == 1 {
                        alone = output.clone();
                    }
                    assert_eq!(alone, output[..columns], "{rows} rows change the first");
                }
            }
        }
    }

    #[test]
    fn products_are_exact_sums_and_a_row_does_not_know_its_neighbours() {
        for isa in [Isa::Plain, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|&one| one <= isa()) {
            check::<f32>(isa, |x| x, 1e-4);
            check::<Bf16>(isa, |x| f32::from_bits((Bf16::from_f32(x).0 as u32) << 16), 1e-3);
        }
    }
}
