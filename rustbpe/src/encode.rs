//! Text -> token ids: merge the neighbours whose union has the lowest rank, the leftmost first, until no union is a token.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;

use crate::split::Splitter;
use crate::table::{hash_short, short_bytes, short_key, LongMap, PairTable, ShortTable, SHORT};

const NONE: u32 = u32::MAX;
const CACHED_IDS: usize = 4; // pieces of more tokens are rare, and merged anew each time
const CACHE_SIZE: usize = 1 << 15; // entries of 32 bytes; a newer piece takes an older one's place
const SCAN_LIMIT: usize = 64; // up to here the lowest rank is found by looking at all, beyond by a heap

/// A vocabulary with its split pattern, ready to encode.
pub struct Encoder {
    splitter: Splitter,
    bytes: [u32; 256],
    short: ShortTable<u32>,
    long: LongMap<u32>,
    unions: PairTable, // two tokens -> the token of their joined bytes, however that token was made
    caches: Mutex<Vec<Cache>>,
}

/// The ids of pieces met before, by the hash of the piece.
type Cache = Vec<(u128, [u32; CACHED_IDS])>;

impl Encoder {
    /// The bytes of token 0, 1, 2, ... -> an encoder. Bytes that several tokens share belong to the first of them.
    pub fn new(tokens: &[Vec<u8>], splitter: Splitter) -> Result<Encoder, String> {
        let mut encoder = Encoder {
            splitter,
            bytes: [NONE; 256],
            short: ShortTable::default(),
            long: LongMap::default(),
            unions: PairTable::with_capacity(4 * tokens.len()),
            caches: Mutex::new(Vec::new()),
        };
        for (id, token) in tokens.iter().enumerate() {
            let id = id as u32;
            match token.len() {
                0 => return Err(format!("token {id} has no bytes: the ranks are damaged, train or fetch them again")),
                1 if encoder.bytes[token[0] as usize] == NONE => encoder.bytes[token[0] as usize] = id,
                _ => {}
            }
            if encoder.id_of(token).is_none() {
                match token.len() {
                    ..=SHORT => *encoder.short.entry(short_key(token, 0, token.len())) = id,
                    _ => drop(encoder.long.insert(token.as_slice().into(), id)),
                }
            }
        }
        if let Some(byte) = encoder.bytes.iter().position(|&id| id == NONE) {
            return Err(format!("no token is the single byte {byte}: the ranks must hold all 256, train or fetch them again"));
        }
        for (id, token) in tokens.iter().enumerate() {
            if encoder.id_of(token) == Some(id as u32) {
                for cut in 1..token.len() {
                    if let (Some(left), Some(right)) = (encoder.id_of(&token[..cut]), encoder.id_of(&token[cut..])) {
                        encoder.unions.get_or_insert((left, right), id as u32);
                    }
                }
            }
        }
        Ok(encoder)
    }

    fn id_of(&self, piece: &[u8]) -> Option<u32> {
        match piece.len() {
            ..=SHORT => self.short.get(short_key(piece, 0, piece.len())),
            _ => self.long.get(piece).copied(),
        }
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let pooled = self.caches.lock().expect("no thread dies holding it").pop();
        let mut cache = pooled.unwrap_or_else(|| vec![(0, [NONE; CACHED_IDS]); CACHE_SIZE]);
        let done = self.encode_with(text, ids, &mut cache);
        self.caches.lock().expect("no thread dies holding it").push(cache);
        done
    }

    fn encode_with(&self, text: &str, ids: &mut Vec<u32>, cache: &mut Cache) -> Result<(), String> {
        let bytes = text.as_bytes();
        ids.reserve(bytes.len() / 3);
        self.splitter.for_each(text, |start, end| {
            if end - start == 1 {
                ids.push(self.bytes[bytes[start] as usize]);
            } else if end - start <= SHORT {
                let key = short_key(bytes, start, end);
                let entry = &mut cache[hash_short(key) as usize & (CACHE_SIZE - 1)];
                if entry.0 != key {
                    let first = ids.len();
                    let (piece, length) = short_bytes(key);
                    self.encode_piece(&piece[..length], ids);
                    if ids.len() - first <= CACHED_IDS {
                        entry.0 = key;
                        entry.1 = [NONE; CACHED_IDS];
                        entry.1[..ids.len() - first].copy_from_slice(&ids[first..]);
                    }
                } else {
                    ids.extend(entry.1.iter().take_while(|&&id| id != NONE));
                }
            } else {
                self.encode_piece(&bytes[start..end], ids);
            }
        })
    }

    fn encode_piece(&self, piece: &[u8], ids: &mut Vec<u32>) {
        match self.id_of(piece) {
            Some(id) => ids.push(id),
            None if piece.len() <= SCAN_LIMIT => self.merge_by_scan(piece, ids),
            None => self.merge_by_heap(piece, ids),
        }
    }

    fn union(&self, left: u32, right: u32) -> u32 {
        self.unions.get((left, right)).unwrap_or(NONE)
    }

    fn merge_by_scan(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut length = piece.len();
        let mut parts = [NONE; SCAN_LIMIT];
        let mut unions = [NONE; SCAN_LIMIT]; // of each part with the next
        for (part, &byte) in parts.iter_mut().zip(piece) {
            *part = self.bytes[byte as usize];
        }
        for i in 0..length - 1 {
            unions[i] = self.union(parts[i], parts[i + 1]);
        }
        loop {
            let (mut best, mut at) = (NONE, 0);
            for (i, &union) in unions[..length - 1].iter().enumerate() {
                if union < best {
                    (best, at) = (union, i);
                }
            }
            if best == NONE {
                break;
            }
            parts[at] = best;
            parts.copy_within(at + 2..length, at + 1);
            unions.copy_within(at + 1..length - 1, at);
            length -= 1;
            unions[length - 1] = NONE;
            if at > 0 {
                unions[at - 1] = self.union(parts[at - 1], best);
            }
            if at + 1 < length {
                unions[at] = self.union(best, parts[at + 1]);
            }
        }
        ids.extend_from_slice(&parts[..length]);
    }

    /// The same in O(n log n): a linked list of parts, and a heap of unions in which stale ones are recognised.
    fn merge_by_heap(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let length = piece.len();
        let mut parts: Vec<u32> = piece.iter().map(|&byte| self.bytes[byte as usize]).collect();
        let mut next: Vec<usize> = (1..=length).collect();
        let mut previous: Vec<usize> = (0..length).map(|i| i.wrapping_sub(1)).collect();
        let mut queue = BinaryHeap::new();
        let offer = |queue: &mut BinaryHeap<_>, parts: &[u32], left: usize, right: usize| {
            let union = self.union(parts[left], parts[right]);
            if union != NONE {
                queue.push(Reverse((union, left, parts[left], parts[right])));
            }
        };
        for i in 1..length {
            offer(&mut queue, &parts, i - 1, i);
        }
        while let Some(Reverse((union, left, left_id, right_id))) = queue.pop() {
            let right = next[left];
            if parts[left] != left_id || right >= length || parts[right] != right_id {
                continue;
            }
            parts[left] = union;
            parts[right] = NONE;
            next[left] = next[right];
            if next[left] < length {
                previous[next[left]] = left;
                offer(&mut queue, &parts, left, next[left]);
            }
            if previous[left] < length {
                offer(&mut queue, &parts, previous[left], left);
            }
        }
        ids.extend(parts.into_iter().filter(|&id| id != NONE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heap_merges_as_the_scan_does() {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        tokens.extend(["ab", "bc", "abc", "aa", "aaa", "cab", "bcab", "aaab", "cc"].map(|token| token.as_bytes().to_vec()));
        let encoder = Encoder::new(&tokens, Splitter::new(r"[\s\S]+").unwrap()).unwrap();
        let mut state = 7u32;
        for _ in 0..20_000 {
            let piece: Vec<u8> = (0..2 + state as usize % 40)
                .map(|_| {
                    state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                    b"abc"[(state >> 16) as usize % 3]
                })
                .collect();
            let (mut scan, mut heap) = (Vec::new(), Vec::new());
            encoder.merge_by_scan(&piece, &mut scan);
            encoder.merge_by_heap(&piece, &mut heap);
            assert_eq!(scan, heap);
        }
    }
}
