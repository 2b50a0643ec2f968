//! The door to Python: convert, release the interpreter's lock, raise ValueError. The work is done behind it.

pub mod bpe;
pub mod count;
pub mod encode;
pub mod forward;
pub mod isa;
pub mod math;
pub mod product;
pub mod sample;
pub mod split;
pub mod table;
pub mod team;

#[cfg(feature = "python")]
mod python {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Mutex;

    use pyo3::exceptions::PyValueError;
    use pyo3::prelude::*;
    use pyo3::pybacked::PyBackedStr;
    use pyo3::sync::PyOnceLock;
    use pyo3::types::{PyBytes, PyInt, PyList, PyString};

    use crate::bpe;
    use crate::count::{Batch, Counting};
    use crate::encode::Encoder;
    use crate::forward::{Cache, Prompt, Tokens, Transformer, MAX_HEAD};
    use crate::isa::{is_fast, isa};
    use crate::product::{advise_huge_pages, Bf16, Number, Place};
    use crate::sample::Draw;
    use crate::split::{family_pattern, Splitter, DEFAULT_DIGITS};

    const BATCH_BYTES: usize = 1 << 20;
    const MAX_THREADS: usize = 8;
    const MAX_VOCAB_SIZE: usize = 1 << 30;

    fn value_error(message: String) -> PyErr {
        PyValueError::new_err(message)
    }

    /// One thread per core, 8 at most: a Python iterator feeds no more, and each keeps counts of its own.
    fn available_threads() -> usize {
        std::thread::available_parallelism().map_or(1, |threads| threads.get().min(MAX_THREADS))
    }

    /// A byte-level BPE vocabulary with its split pattern: trained here, or made of known ranks.
    #[pyclass(module = "rustbpe")]
    struct Tokenizer {
        pattern: String,
        tokens: Vec<Vec<u8>>, // the bytes of every id
        encoder: PyOnceLock<Encoder>,
        ints: PyOnceLock<Vec<Py<PyInt>>>, // one Python integer per id: a list of ids then costs no allocation per id
    }

    #[pymethods]
    impl Tokenizer {
        #[new]
        fn new() -> Self {
            Tokenizer::of(String::new(), Vec::new())
        }

        /// (token bytes, rank) pairs, ranks 0, 1, 2, ... each once, and a pattern (None = the default) -> Tokenizer.
        #[staticmethod]
        #[pyo3(signature = (mergeable_ranks, pattern=None))]
        fn from_ranks(py: Python<'_>, mergeable_ranks: Vec<(Bound<'_, PyBytes>, usize)>, pattern: Option<String>) -> PyResult<Self> {
            let count = mergeable_ranks.len();
            let mut tokens = vec![Vec::new(); count];
            for (token, rank) in &mergeable_ranks {
                if *rank >= count || !tokens[*rank].is_empty() {
                    return Err(value_error(format!(
                        "rank {rank} of the {count} mergeable ranks is too large or there twice: they must be 0 to {}, each once",
                        count.saturating_sub(1)
                    )));
                }
                tokens[*rank] = token.as_bytes().to_vec();
            }
            let tokenizer = Tokenizer::of(pattern.unwrap_or_else(|| family_pattern(DEFAULT_DIGITS)), tokens);
            tokenizer.encoder(py)?;
            Ok(tokenizer)
        }

        /// Trains on an iterable of str until there are `vocab_size` tokens, 256 of them single bytes, or nothing is left to merge.
        /// At most `buffer_size` texts or 1 MB are collected before they are counted by `num_threads` threads (0 = one per core, 8 at most).
        /// The merges do not depend on the threads. Ties go to the pair with the smaller left id, then the smaller right id.
        #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, num_threads=0))]
        fn train_from_iterator(
            &mut self,
            py: Python<'_>,
            iterator: &Bound<'_, PyAny>,
            vocab_size: i64,
            buffer_size: i64,
            pattern: Option<String>,
            num_threads: usize,
        ) -> PyResult<()> {
            if !(256..=MAX_VOCAB_SIZE as i64).contains(&vocab_size) {
                return Err(value_error(format!(
                    "vocab_size={vocab_size} is outside 256 to {MAX_VOCAB_SIZE}: the single bytes alone are 256 tokens"
                )));
            }
            if buffer_size < 1 {
                return Err(value_error(format!("buffer_size={buffer_size} texts cannot be collected: give 1 or more")));
            }
            let pattern = pattern.unwrap_or_else(|| family_pattern(DEFAULT_DIGITS));
            let splitter = Splitter::new(&pattern).map_err(value_error)?;
            let num_threads = if num_threads == 0 { available_threads() } else { num_threads };
            let counting = Counting::start(splitter, num_threads);
            let mut batch = Batch::default();
            for (number, item) in iterator.try_iter()?.enumerate() {
                let item = item?;
                let Ok(text) = item.cast::<PyString>() else {
                    let kind = item.get_type().name()?;
                    return Err(value_error(format!("item {number} of the iterator is of type {kind}, not str: give texts")));
                };
                batch.push(text.to_str()?);
                if batch.text.len() >= BATCH_BYTES || batch.ends.len() as i64 >= buffer_size {
                    if let Some(batch) = counting.offer(std::mem::take(&mut batch)) {
                        py.detach(|| counting.send(batch));
                    }
                }
            }
            let merges = py.detach(|| {
                counting.send(batch);
                bpe::train(counting.finish()?, vocab_size as usize - 256)
            });
            let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
            for (left, right) in merges.map_err(value_error)? {
                let joined = [tokens[left as usize].as_slice(), tokens[right as usize].as_slice()].concat();
                tokens.push(joined);
            }
            *self = Tokenizer::of(pattern, tokens);
            Ok(())
        }

        /// The split pattern; "" before training.
        fn get_pattern(&self) -> String {
            self.pattern.clone()
        }

        /// [(token bytes, rank)] in the order of the ranks: the 256 bytes, then the merges.
        fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
            self.tokens.iter().enumerate().map(|(rank, token)| (PyBytes::new(py, token), rank)).collect()
        }

        #[getter]
        fn vocab_size(&self) -> usize {
            self.tokens.len()
        }

        /// str -> its ids, as tiktoken would give them for the same ranks and pattern.
        fn encode<'py>(&self, py: Python<'py>, text: PyBackedStr) -> PyResult<Bound<'py, PyList>> {
            let encoder = self.encoder(py)?;
            let mut ids = Vec::new();
            py.detach(|| encoder.encode(&text, &mut ids)).map_err(value_error)?;
            self.to_list(py, &ids)
        }

        /// [str] -> the ids of each, in the same order, by `num_threads` threads (0 = one per core, 8 at most).
        #[pyo3(signature = (texts, num_threads=1))]
        fn encode_batch<'py>(&self, py: Python<'py>, texts: Vec<PyBackedStr>, num_threads: usize) -> PyResult<Bound<'py, PyList>> {
            let encoder = self.encoder(py)?;
            let num_threads = if num_threads == 0 { available_threads() } else { num_threads }.min(texts.len());
            let encoded = py.detach(|| encode_all(encoder, &texts, num_threads)).map_err(value_error)?;
            let lists: Vec<_> = encoded.iter().map(|ids| self.to_list(py, ids)).collect::<PyResult<_>>()?;
            PyList::new(py, lists)
        }
    }

    impl Tokenizer {
        fn of(pattern: String, tokens: Vec<Vec<u8>>) -> Self {
            Tokenizer { pattern, tokens, encoder: PyOnceLock::new(), ints: PyOnceLock::new() }
        }

        fn encoder(&self, py: Python<'_>) -> PyResult<&Encoder> {
            if self.tokens.is_empty() {
                return Err(value_error("this tokenizer has 0 tokens: train it or make it of ranks first".to_string()));
            }
            self.encoder.get_or_try_init(py, || Encoder::new(&self.tokens, Splitter::new(&self.pattern)?)).map_err(value_error)
        }

        fn to_list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
            let ints = self.ints.get_or_init(py, || (0..self.tokens.len()).map(|id| PyInt::new(py, id).unbind()).collect());
            PyList::new(py, ids.iter().map(|&id| ints[id as usize].bind(py)))
        }
    }

    /// Each thread takes the next text that nobody has taken.
    fn encode_all(encoder: &Encoder, texts: &[PyBackedStr], num_threads: usize) -> Result<Vec<Vec<u32>>, String> {
        let taken = AtomicUsize::new(0);
        let results = Mutex::new(vec![Vec::new(); texts.len()]);
        let work = || -> Result<(), String> {
            let mut done = Vec::new();
            loop {
                let index = taken.fetch_add(1, Ordering::Relaxed);
                let Some(text) = texts.get(index) else { break };
                let mut ids = Vec::new();
                encoder.encode(text, &mut ids)?;
                done.push((index, ids));
            }
            let mut results = results.lock().expect("no thread dies holding it");
            for (index, ids) in done {
                results[index] = ids;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..num_threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            others.into_iter().map(|other| other.join().expect("encoding does not panic")).fold(own, Result::and)
        })?;
        Ok(results.into_inner().expect("no thread dies holding it"))
    }

    /// Text -> the pieces that a pattern (None = the default) cuts it into.
    #[pyfunction]
    #[pyo3(signature = (text, pattern=None))]
    fn split<'py>(py: Python<'py>, text: PyBackedStr, pattern: Option<String>) -> PyResult<Vec<Bound<'py, PyString>>> {
        let splitter = Splitter::new(&pattern.unwrap_or_else(|| family_pattern(DEFAULT_DIGITS))).map_err(value_error)?;
        let mut pieces = Vec::new();
        splitter.for_each(&text, |start, end| pieces.push(PyString::new(py, &text[start..end]))).map_err(value_error)?;
        Ok(pieces)
    }

    /// The pattern of the default family with at most `digits` digits (1 to 3) in a piece.
    #[pyfunction]
    #[pyo3(signature = (digits=DEFAULT_DIGITS))]
    fn default_pattern(digits: usize) -> PyResult<String> {
        match digits {
            1..=3 => Ok(family_pattern(digits)),
            _ => Err(value_error(format!("digits={digits}, but a piece holds at most 1, 2 or 3 digits: give one of them"))),
        }
    }

    /// The weights of a GPT, packed for a CPU, and its pass over new tokens. Tensors come as addresses of contiguous memory: nanochat/decoder.py
    /// vouches for them.
    #[pyclass(module = "rustbpe")]
    struct CpuTransformer(Weights);

    enum Weights {
        Float32(Transformer<f32>),
        Bfloat16(Transformer<Bf16>),
    }

    impl<N: Number> Transformer<N> {
        /// Addresses of q, k, v, attention's projection and the MLP's two for each layer, and of the head.
        unsafe fn take(&mut self, embedding: usize, layers: &[[usize; 6]], head: usize, vocab_size: usize, rotary: (usize, usize, usize)) {
            let (width, kv_width) = (self.width, self.kv_heads * self.head_dim);
            for (mine, &[q, k, v, attn_proj, fc, mlp_proj]) in self.layers.iter_mut().zip(layers) {
                mine.qkv.pack(&[(q as *const N, width), (k as *const N, kv_width), (v as *const N, kv_width)], width);
                mine.attn_proj.pack(&[(attn_proj as *const N, width)], width);
                mine.fc.pack(&[(fc as *const N, 4 * width)], width);
                mine.mlp_proj.pack(&[(mlp_proj as *const N, width)], 4 * width);
            }
            self.embedding = std::slice::from_raw_parts(embedding as *const N, vocab_size * width).to_vec();
            self.head.pack(&[(head as *const N, vocab_size)], width);
            let (cos, sin, count) = rotary;
            self.cos = std::slice::from_raw_parts(cos as *const f32, count).to_vec();
            self.sin = std::slice::from_raw_parts(sin as *const f32, count).to_vec();
        }

        /// `hidden`, all of whose places are addresses.
        unsafe fn continued(
            &mut self,
            x: usize,
            tokens: Tokens,
            (keys, values): (&[usize], &[usize]),
            strides: [usize; 3],
            prompts: &[(Vec<usize>, Vec<usize>, usize, usize)],
            threads: usize,
        ) {
            let places = |addresses: &[usize]| -> Vec<Place<N>> { addresses.iter().map(|&address| Place(address as *mut N)).collect() };
            let prompts: Vec<Prompt<N>> = prompts
                .iter()
                .map(|(keys, values, head_stride, length)| Prompt {
                    keys: places(keys),
                    values: places(values),
                    head_stride: *head_stride,
                    length: *length,
                })
                .collect();
            let cache = Cache { keys: &places(keys), values: &places(values), strides, prompts: &prompts };
            self.hidden(Place(x as *mut f32), tokens, cache, threads)
        }
    }

    macro_rules! of_either {
        ($weights:expr, $model:ident => $body:expr) => {
            match $weights {
                Weights::Float32($model) => $body,
                Weights::Bfloat16($model) => $body,
            }
        };
    }

    #[pymethods]
    impl CpuTransformer {
        #[new]
        fn new(width: usize, heads: usize, kv_heads: usize, layers: usize, is_bfloat16: bool) -> PyResult<Self> {
            if heads == 0
                || kv_heads == 0
                || !width.is_multiple_of(heads)
                || !heads.is_multiple_of(kv_heads)
                || !(width / heads).is_multiple_of(2)
                || width / heads > MAX_HEAD
            {
                return Err(value_error(format!(
                    "width={width}, heads={heads}, kv_heads={kv_heads}: heads must have one even size of at most {MAX_HEAD}"
                )));
            }
            Ok(CpuTransformer(match is_bfloat16 {
                false => Weights::Float32(Transformer::new(width, heads, kv_heads, layers)),
                true => Weights::Bfloat16(Transformer::new(width, heads, kv_heads, layers)),
            }))
        }

        /// Whether this processor runs it fast: x86 with AVX2, or ARM.
        #[staticmethod]
        fn is_fast() -> bool {
            is_fast()
        }

        /// Ask for large pages in memory that nobody has written to yet.
        #[staticmethod]
        fn advise_huge_pages(address: usize, bytes: usize) {
            advise_huge_pages(address as *const u8, bytes)
        }

        /// The instruction set that is used: plain, avx2, avx512 or avx512bf16.
        #[staticmethod]
        fn instructions() -> String {
            format!("{:?}", isa()).to_lowercase()
        }

        /// Pack weights anew, given by their addresses. `layers`: those of (q, k, v, attention's projection, fc, the MLP's projection); rotary: (cos, sin, numbers in each).
        fn take(
            &mut self,
            py: Python<'_>,
            embedding: usize,
            layers: Vec<[usize; 6]>,
            head: usize,
            vocab_size: usize,
            rotary: (usize, usize, usize),
        ) {
            // SAFETY: the caller's tensors are of the sizes given to `new`, and live until this returns.
            py.detach(|| of_either!(&mut self.0, model => unsafe { model.take(embedding, &layers, head, vocab_size, rotary) }))
        }

        /// Token ids[i] -> x (tokens, width) float32, what is after the last norm. Token i continues row rows[i] (int64) of the cache at positions[i].
        /// keys, values: addresses by layer; strides of (row, head, position) in numbers; room: for (rows, positions of each). prompts: what rows share as
        /// their first positions, (keys, values, stride of heads, length); prompt_of: which of them a token's row begins with, -1 = none.
        #[allow(clippy::too_many_arguments)]
        fn hidden(
            &mut self,
            py: Python<'_>,
            x: usize,
            ids: Vec<i64>,
            rows: Vec<i64>,
            positions: Vec<i64>,
            keys: Vec<usize>,
            values: Vec<usize>,
            strides: [usize; 3],
            room: (usize, usize),
            prompts: Vec<(Vec<usize>, Vec<usize>, usize, usize)>,
            prompt_of: Vec<i64>,
            threads: usize,
        ) -> PyResult<()> {
            let tokens = Tokens { ids: &ids, rows: &rows, positions: &positions, prompts: &prompt_of };
            self.check(tokens, (&keys, &values), room, &prompts)?;
            // SAFETY: rows and positions lie inside the caches, and x has a row for each token.
            py.detach(
                || of_either!(&mut self.0, model => unsafe { model.continued(x, tokens, (&keys, &values), strides, &prompts, threads) }),
            );
            Ok(())
        }

        /// `hidden`, `logits` and `draw` at once, of one token for each row: a server's other threads wait for the interpreter's lock between calls.
        /// `vocab` of the logits are drawn from.
        #[allow(clippy::too_many_arguments)]
        fn next(
            &mut self,
            py: Python<'_>,
            ids: Vec<i64>,
            rows: Vec<i64>,
            positions: Vec<i64>,
            keys: Vec<usize>,
            values: Vec<usize>,
            strides: [usize; 3],
            room: (usize, usize),
            prompts: Vec<(Vec<usize>, Vec<usize>, usize, usize)>,
            prompt_of: Vec<i64>,
            vocab: usize,
            cap: f32,
            draws: Vec<(f32, usize, f32)>,
            uniforms: Vec<f64>,
            threads: usize,
        ) -> PyResult<(Vec<usize>, Vec<f64>)> {
            let tokens = Tokens { ids: &ids, rows: &rows, positions: &positions, prompts: &prompt_of };
            self.check(tokens, (&keys, &values), room, &prompts)?;
            let stride = of_either!(&self.0, model => model.head.columns);
            let draws = settings(draws, uniforms, ids.len(), vocab, stride)?;
            Ok(py.detach(|| {
                of_either!(&mut self.0, model => {
                    let (mut x, mut logits) = (std::mem::take(&mut model.x), std::mem::take(&mut model.logits));
                    x.resize(ids.len() * model.width, 0.0);
                    logits.resize(ids.len() * stride, 0.0);
                    let (x_place, logits_place) = (Place(x.as_mut_ptr()), Place(logits.as_mut_ptr()));
                    // SAFETY: rows and positions lie inside the caches, x and logits have a row for each token.
                    let drawn = unsafe {
                        model.continued(x.as_mut_ptr() as usize, tokens, (&keys, &values), strides, &prompts, threads);
                        model.logits(x_place, ids.len(), logits_place, threads);
                        model.draw(logits_place, stride, vocab, cap, &draws, threads)
                    };
                    (model.x, model.logits) = (x, logits);
                    drawn.into_iter().unzip()
                })
            }))
        }

        /// x (count, width) float32 -> out (count, vocabulary) float32, before the soft-cap.
        fn logits(&mut self, py: Python<'_>, x: usize, count: usize, out: usize, threads: usize) {
            // SAFETY: both are as large as that.
            py.detach(
                || of_either!(&mut self.0, model => unsafe { model.logits(Place(x as *mut f32), count, Place(out as *mut f32), threads) }),
            )
        }

        /// Logits (rows, vocab) float32 at `stride`, which are overwritten -> tokens and log-probabilities. draws: (temperature, top_k, top_p) of each row;
        /// temperature 0 = the likeliest, top_k 0 = all, top_p 1 = all. cap: of the soft-cap, which is applied here.
        #[allow(clippy::too_many_arguments)]
        fn draw(
            &mut self,
            py: Python<'_>,
            logits: usize,
            stride: usize,
            vocab: usize,
            cap: f32,
            draws: Vec<(f32, usize, f32)>,
            uniforms: Vec<f64>,
            threads: usize,
        ) -> PyResult<(Vec<usize>, Vec<f64>)> {
            let rows = draws.len();
            let draws = settings(draws, uniforms, rows, vocab, stride)?;
            // SAFETY: the caller's logits are as large as that.
            Ok(py.detach(|| {
                of_either!(&mut self.0, model => unsafe { model.draw(Place(logits as *mut f32), stride, vocab, cap, &draws, threads) })
                    .into_iter()
                    .unzip()
            }))
        }
    }

    fn settings(draws: Vec<(f32, usize, f32)>, uniforms: Vec<f64>, rows: usize, vocab: usize, stride: usize) -> PyResult<Vec<Draw>> {
        if draws.len() != rows || uniforms.len() != rows || vocab == 0 || vocab > stride {
            return Err(value_error(format!(
                "{rows} rows, {} settings, {} random numbers, {vocab} of {stride} logits",
                draws.len(),
                uniforms.len()
            )));
        }
        Ok((draws.into_iter().zip(uniforms))
            .map(|((temperature, top_k, top_p), uniform)| Draw { temperature, top_k, top_p, uniform })
            .collect())
    }

    impl CpuTransformer {
        /// ValueError for tokens outside the vocabulary or the cache.
        fn check(
            &self,
            tokens: Tokens,
            (keys, values): (&[usize], &[usize]),
            (num_rows, capacity): (usize, usize),
            prompts: &[(Vec<usize>, Vec<usize>, usize, usize)],
        ) -> PyResult<()> {
            let Tokens { ids, rows, positions, prompts: prompt_of } = tokens;
            let (layers, angles, vocab) =
                of_either!(&self.0, model => (model.layers.len(), model.cos.len() * 2 / model.head_dim, model.head.columns));
            if let Some(id) = ids.iter().find(|id| !(0..vocab as i64).contains(id)) {
                return Err(value_error(format!("token {id} is outside the vocabulary of {vocab}: encode with the model's own tokenizer")));
            }
            let of_layers = |addresses: &[usize]| addresses.len() == layers;
            let fits = |(i, (&row, &position)): (usize, (&i64, &i64))| {
                let shared = match prompt_of.get(i) {
                    Some(&number) if number >= 0 => prompts.get(number as usize).map_or(usize::MAX, |prompt| prompt.3),
                    _ => 0,
                };
                (0..num_rows as i64).contains(&row)
                    && (0..angles as i64).contains(&position)
                    && shared <= position as usize
                    && position as usize - shared < capacity
            };
            let whole = rows.len() == positions.len()
                && ids.len() == rows.len()
                && (prompt_of.is_empty() || prompt_of.len() == rows.len())
                && of_layers(keys)
                && of_layers(values)
                && prompts.iter().all(|prompt| of_layers(&prompt.0) && of_layers(&prompt.1));
            if !whole || !rows.iter().zip(positions).enumerate().all(fits) {
                return Err(value_error(format!(
                    "{} tokens at positions up to {} do not fit {layers} layers of {num_rows} rows of {capacity} positions behind {} prompts, of which {angles} have angles",
                    rows.len(), positions.iter().max().unwrap_or(&0), prompts.len()
                )));
            }
            Ok(())
        }
    }

    #[pymodule]
    fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add_class::<Tokenizer>()?;
        module.add_class::<CpuTransformer>()?;
        module.add_function(wrap_pyfunction!(split, module)?)?;
        module.add_function(wrap_pyfunction!(default_pattern, module)?)
    }
}
