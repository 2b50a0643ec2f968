//! How often each piece of text occurs. One counter a thread, added together at the end: the order never matters.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::split::Splitter;

/// Pieces of at most this many bytes are numbers, compared and hashed in a few instructions.
pub const SHORT: usize = 15;

/// A piece of 1 to 15 bytes -> one number: its bytes, and its length in the topmost byte, so that no piece is 0.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    debug_assert!((1..=SHORT).contains(&length));
    let bytes = match text.get(start..start + 16) {
        Some(window) => u128::from_le_bytes(window.try_into().expect("16 bytes")) & ((1u128 << (8 * length)) - 1),
        None => {
            let mut window = [0u8; 16];
            window[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(window)
        }
    };
    bytes | (length as u128) << 120
}

/// The bytes of a short key and how many of them count.
pub fn short_bytes(key: u128) -> ([u8; 16], usize) {
    let mut bytes = key.to_le_bytes();
    let length = bytes[15] as usize;
    bytes[15] = 0;
    (bytes, length)
}

/// 128 bits -> 64 well-mixed bits: the two halves of one product, folded.
#[inline(always)]
pub fn fold(low: u64, high: u64) -> u64 {
    let product = (low ^ 0x9E37_79B9_7F4A_7C15) as u128 * (high ^ 0xD6E8_FEB8_6659_FD93) as u128;
    (product >> 64) as u64 ^ product as u64
}

#[inline(always)]
pub fn hash_short(key: u128) -> u64 {
    fold(key as u64, (key >> 64) as u64)
}

/// Short keys -> a value each, by open addressing with linear probing.
pub struct ShortTable<V> {
    slots: Vec<(u64, u64, V)>, // the key's low and high half, (0, 0) = empty
    used: usize,
}

impl<V: Copy + Default> ShortTable<V> {
    pub fn new() -> Self {
        ShortTable { slots: vec![(0, 0, V::default()); 1024], used: 0 }
    }

    #[inline(always)]
    fn find(&self, key: u128) -> usize {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let last = self.slots.len() - 1;
        let mut at = hash_short(key) as usize & last;
        loop {
            let slot = &self.slots[at];
            if (slot.0 == low && slot.1 == high) || slot.1 == 0 {
                return at;
            }
            at = (at + 1) & last;
        }
    }

    pub fn get(&self, key: u128) -> Option<V> {
        let slot = &self.slots[self.find(key)];
        (slot.1 != 0).then_some(slot.2)
    }

    /// The value under `key`, made where it is missing.
    #[inline(always)]
    pub fn entry(&mut self, key: u128) -> &mut V {
        let mut at = self.find(key);
        if self.slots[at].1 == 0 {
            if self.used * 4 >= self.slots.len() * 3 {
                self.grow();
                at = self.find(key);
            }
            self.used += 1;
            self.slots[at] = (key as u64, (key >> 64) as u64, V::default());
        }
        &mut self.slots[at].2
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![(0, 0, V::default()); self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, doubled) {
            if slot.1 != 0 {
                let at = self.find(slot.0 as u128 | (slot.1 as u128) << 64);
                self.slots[at] = slot;
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u128, V)> + '_ {
        self.slots.iter().filter(|slot| slot.1 != 0).map(|slot| (slot.0 as u128 | (slot.1 as u128) << 64, slot.2))
    }

    pub fn len(&self) -> usize {
        self.used
    }
}

/// A quick hash for the byte strings that are too long for a key.
#[derive(Default)]
pub struct LongHasher(u64);

impl Hasher for LongHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = fold(self.0.rotate_left(5) ^ u64::from_le_bytes(word), bytes.len() as u64);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

pub type LongMap<V> = HashMap<Box<[u8]>, V, BuildHasherDefault<LongHasher>>;

/// Pieces and how often each was seen.
pub struct WordCounts {
    short: ShortTable<u64>,
    long: LongMap<u64>,
}

impl Default for WordCounts {
    fn default() -> Self {
        WordCounts { short: ShortTable::new(), long: LongMap::default() }
    }
}

impl WordCounts {
    /// One more of the piece text[start..end].
    #[inline(always)]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start <= SHORT {
            *self.short.entry(short_key(text, start, end)) += 1;
        } else {
            self.add_long(&text[start..end], 1);
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(known) => *known += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    /// Adds all of the other's counts to these.
    pub fn merge(mut self, mut other: WordCounts) -> WordCounts {
        if self.len() < other.len() {
            std::mem::swap(&mut self, &mut other);
        }
        for (key, count) in other.short.iter() {
            *self.short.entry(key) += count;
        }
        for (piece, count) in other.long {
            self.add_long(&piece, count);
        }
        self
    }

    /// Calls `each(piece, count)` for every distinct piece, in no particular order.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], u64)) {
        for (key, count) in self.short.iter() {
            let (bytes, length) = short_bytes(key);
            each(&bytes[..length], count);
        }
        for (piece, &count) in &self.long {
            each(piece, count);
        }
    }

    /// The number of distinct pieces.
    pub fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }
}

/// Some documents, one behind the other.
#[derive(Default)]
pub struct Batch {
    pub text: String,
    pub ends: Vec<usize>,
}

impl Batch {
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    fn count(&self, splitter: &Splitter, counts: &mut WordCounts) -> Result<(), String> {
        let mut start = 0;
        for &end in &self.ends {
            let document = &self.text[start..end];
            splitter.for_each(document, |from, to| counts.add(document.as_bytes(), from, to))?;
            start = end;
        }
        Ok(())
    }
}

/// Threads that count batches while their owner collects the next ones.
pub struct Counting {
    sender: SyncSender<Batch>,
    workers: Vec<JoinHandle<Result<WordCounts, String>>>,
}

impl Counting {
    pub fn start(splitter: Splitter, num_threads: usize) -> Counting {
        let (sender, receiver) = sync_channel::<Batch>(num_threads);
        let (receiver, splitter) = (Arc::new(Mutex::new(receiver)), Arc::new(splitter));
        let work = || {
            let (receiver, splitter) = (receiver.clone(), splitter.clone());
            std::thread::spawn(move || {
                let mut counts = WordCounts::default();
                loop {
                    let batch = receiver.lock().expect("receiving does not panic").recv();
                    match batch {
                        Ok(batch) => batch.count(&splitter, &mut counts)?,
                        Err(_) => return Ok(counts),
                    }
                }
            })
        };
        let workers = (0..num_threads).map(|_| work()).collect();
        Counting { sender, workers }
    }

    /// Hands over a batch; gives it back where every thread is busy and as many batches wait.
    pub fn offer(&self, batch: Batch) -> Option<Batch> {
        match self.sender.try_send(batch) {
            Err(TrySendError::Full(batch)) => Some(batch),
            _ => None, // where all threads have failed, `finish` says why
        }
    }

    /// Hands over a batch and waits as long as it takes.
    pub fn send(&self, batch: Batch) {
        let _ = self.sender.send(batch);
    }

    /// Waits for the threads -> the counts of all batches.
    pub fn finish(self) -> Result<WordCounts, String> {
        drop(self.sender);
        let mut total = WordCounts::default();
        for worker in self.workers {
            total = total.merge(worker.join().map_err(|_| "a counting thread died: this is a bug in rustbpe".to_string())??);
        }
        Ok(total)
    }
}
