//! Hash tables for the three keys that training and encoding look up by the million: short pieces, long pieces, pairs of ids.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

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

impl<V: Copy + Default> Default for ShortTable<V> {
    fn default() -> Self {
        ShortTable { slots: vec![(0, 0, V::default()); 1024], used: 0 }
    }
}

impl<V: Copy + Default> ShortTable<V> {
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

    pub fn distinct(&self) -> usize {
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

const NO_TOKEN: u32 = u32::MAX;

/// Pairs of tokens -> a number each, by open addressing with linear probing.
pub struct PairTable {
    slots: Vec<(u32, u32, u32)>, // left, right, value; left NO_TOKEN = empty
    used: usize,
}

impl PairTable {
    pub fn with_capacity(pairs: usize) -> Self {
        PairTable { slots: vec![(NO_TOKEN, 0, 0); (pairs * 2).next_power_of_two()], used: 0 }
    }

    #[inline(always)]
    fn find(&self, pair: (u32, u32)) -> usize {
        let last = self.slots.len() - 1;
        let mut at = fold(pair.0 as u64, pair.1 as u64) as usize & last;
        loop {
            let slot = &self.slots[at];
            if (slot.0 == pair.0 && slot.1 == pair.1) || slot.0 == NO_TOKEN {
                return at;
            }
            at = (at + 1) & last;
        }
    }

    #[inline(always)]
    pub fn get(&self, pair: (u32, u32)) -> Option<u32> {
        let slot = &self.slots[self.find(pair)];
        (slot.0 != NO_TOKEN).then_some(slot.2)
    }

    /// The number of the pair, which becomes `value` if the pair is new.
    #[inline(always)]
    pub fn get_or_insert(&mut self, pair: (u32, u32), value: u32) -> u32 {
        let mut at = self.find(pair);
        if self.slots[at].0 == NO_TOKEN {
            if self.used * 4 >= self.slots.len() * 3 {
                self.grow();
                at = self.find(pair);
            }
            self.used += 1;
            self.slots[at] = (pair.0, pair.1, value);
        }
        self.slots[at].2
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![(NO_TOKEN, 0, 0); self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, doubled) {
            if slot.0 != NO_TOKEN {
                let at = self.find((slot.0, slot.1));
                self.slots[at] = slot;
            }
        }
    }
}
