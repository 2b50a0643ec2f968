//! Byte pair encoding, the training: count the pairs of neighbouring tokens, merge the most frequent, repeat.
//! It knows no Python and no pattern: words with their counts go in, merges come out.
//!
//! The rule for ties: among pairs of the same count the one with the smaller left id comes first, then the smaller right id.
//!
//! Two observations make it fast. A merge makes only pairs with its new token, so the count of a known pair never grows: a
//! pair that is rare today need not be watched until only rarer ones are left. And all occurrences of a pair come into being in
//! one merge, so they are written down once, and those that a later merge breaks are recognised when they are read.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::count::WordCounts;
use crate::table::PairTable;

pub type Pair = (u32, u32);

const BORDER: u32 = u32::MAX; // the slot between two words
const INSIDE: u32 = u32::MAX - 1; // a slot in the middle of a token
const MIN_WATCHED: usize = 4096; // pairs watched at a time, at least; a quarter of the missing merges if that is more

/// One byte of a distinct word. A token's id stands in its first and in its last slot; `weight` is the word's count.
#[derive(Clone, Copy)]
struct Slot {
    token: u32,
    weight: u32,
}

/// Counted words -> the first `num_merges` merges, fewer where nothing is left to merge. Merge i makes token 256 + i.
pub fn train(words: WordCounts, num_merges: usize) -> Result<Vec<Pair>, String> {
    train_watching(words, num_merges, MIN_WATCHED)
}

fn train_watching(words: WordCounts, num_merges: usize, min_watched: usize) -> Result<Vec<Pair>, String> {
    let slots = lay_out(&words)?;
    drop(words);
    let num_merges = num_merges.min(slots.len()); // a merge takes at least one token away
    let mut trainer = Trainer { slots, lengths: vec![1; 256], merges: Vec::new() };
    while trainer.merges.len() < num_merges {
        let missing = num_merges - trainer.merges.len();
        let (watched, threshold) = trainer.watch(min_watched.max(missing / 4));
        trainer.merge_watched(watched, threshold, num_merges);
        if threshold == 1 {
            break;
        }
    }
    Ok(trainer.merges)
}

/// All words side by side with a border before, between and behind them.
fn lay_out(words: &WordCounts) -> Result<Vec<Slot>, String> {
    let mut total = 1usize;
    let copies = |count: u64| (count as usize).div_ceil(u32::MAX as usize);
    words.for_each(|word, count| total += if word.len() > 1 { (word.len() + 1) * copies(count) } else { 0 });
    if total >= INSIDE as usize {
        return Err(format!("the distinct words of the text have {total} bytes, more than the {INSIDE} that fit: train on less text"));
    }
    let border = Slot { token: BORDER, weight: 0 };
    let mut slots = Vec::with_capacity(total);
    slots.push(border);
    words.for_each(|word, mut count| {
        // a count beyond 32 bits becomes several copies of the word, which comes to the same
        while word.len() > 1 && count > 0 {
            let weight = count.min(u32::MAX as u64) as u32;
            slots.extend(word.iter().map(|&byte| Slot { token: byte as u32, weight }));
            slots.push(border);
            count -= weight as u64;
        }
    });
    Ok(slots)
}

struct Trainer {
    slots: Vec<Slot>,
    lengths: Vec<u32>, // bytes of every token
    merges: Vec<Pair>,
}

/// The frequent pairs: how often each occurs and where (some of the places may be out of date).
struct Watched {
    counts: Vec<u64>,
    places: Vec<(u32, u32)>, // of each pair, as a range of `positions`
    positions: Vec<u32>,
    index: PairTable,
    queue: BinaryHeap<(u64, Reverse<Pair>, u32)>, // counts may be out of date: too large, never too small
}

impl Trainer {
    /// Calls `each(pair, position, weight)` for every two neighbouring tokens.
    #[inline(always)]
    fn for_each_pair(&self, mut each: impl FnMut(Pair, u32, u32)) {
        let mut at = 1;
        while at < self.slots.len() {
            let Slot { token, weight } = self.slots[at];
            if token == BORDER {
                at += 1;
                continue;
            }
            let next = at + self.lengths[token as usize] as usize;
            let right = self.slots[next].token;
            if right != BORDER {
                each((token, right), at as u32, weight);
            }
            at = next;
        }
    }

    /// Counts all pairs and watches about `wanted` of the most frequent -> (watched, the smallest count among them).
    fn watch(&self, wanted: usize) -> (Watched, u64) {
        let mut index = PairTable::with_capacity(1 << 12);
        let (mut pairs, mut counts, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        self.for_each_pair(|pair, _, weight| {
            let entry = index.get_or_insert(pair, counts.len() as u32) as usize;
            if entry == counts.len() {
                pairs.push(pair);
                counts.push(0u64);
                sizes.push(0u32);
            }
            counts[entry] += weight as u64;
            sizes[entry] += 1;
        });
        let threshold = match counts.len() > wanted {
            true => *counts.clone().select_nth_unstable_by_key(wanted, |&count| Reverse(count)).1,
            false => 1,
        };
        drop(index);
        let wanted = wanted.min(counts.len());
        let mut watched = Watched {
            counts: Vec::new(),
            places: Vec::new(),
            positions: Vec::new(),
            index: PairTable::with_capacity(2 * wanted),
            queue: BinaryHeap::with_capacity(2 * wanted),
        };
        for ((pair, count), size) in pairs.into_iter().zip(counts).zip(sizes) {
            if count >= threshold {
                watched.add(pair, count, size);
            }
        }
        let mut free: Vec<u32> = watched.places.iter().map(|place| place.0).collect();
        self.for_each_pair(|pair, position, _| {
            if let Some(entry) = watched.index.get(pair) {
                watched.positions[free[entry as usize] as usize] = position;
                free[entry as usize] += 1;
            }
        });
        (watched, threshold)
    }

    /// Merges the most frequent pair again and again, until none of `threshold` occurrences is left or there are enough merges.
    fn merge_watched(&mut self, mut watched: Watched, threshold: u64, num_merges: usize) {
        let (mut lefts, mut rights) = (Neighbours::new(256 + num_merges), Neighbours::new(256 + num_merges));
        while self.merges.len() < num_merges {
            let Some((count, Reverse(pair), entry)) = watched.queue.pop() else { break };
            let current = watched.counts[entry as usize];
            if current != count {
                if current >= threshold {
                    watched.queue.push((current, Reverse(pair), entry));
                }
                continue;
            }
            self.merge(pair, entry, &mut watched, threshold, &mut lefts, &mut rights);
        }
    }

    /// One merge: rewrites every occurrence of the pair, then adjusts the counts of the pairs around them.
    fn merge(&mut self, pair: Pair, entry: u32, watched: &mut Watched, threshold: u64, lefts: &mut Neighbours, rights: &mut Neighbours) {
        let (a, b) = pair;
        let new = 256 + self.merges.len() as u32;
        let (a_length, b_length) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        let mut undone = 0; // of the new pair (new, a), which the next merge in the same word may turn into (new, new)
        let (start, end) = watched.places[entry as usize];
        for i in start..end {
            let at = watched.positions[i as usize] as usize; // from left to right within a word, so "aaa" becomes (aa) a
            let next = at + a_length;
            if self.slots[at].token != a || self.slots[next].token != b {
                continue;
            }
            let weight = self.slots[at].weight as u64;
            let left = self.slots[at - 1].token;
            let right = self.slots[next + b_length].token;
            if left != BORDER {
                let left_length = if left == new { a_length + b_length } else { self.lengths[left as usize] as usize };
                if left == new {
                    undone += weight;
                }
                lefts.add(left, weight, (at - left_length) as u32);
            }
            if right != BORDER {
                rights.add(right, weight, at as u32);
            }
            self.slots[next].token = INSIDE;
            self.slots[next + b_length - 1].token = new;
            self.slots[at].token = new;
        }
        self.lengths.push((a_length + b_length) as u32);
        self.merges.push(pair);
        watched.counts[entry as usize] = 0;

        for &left in &lefts.seen {
            let weight = lefts.by_token[left as usize].weight;
            if left != new {
                watched.subtract((left, a), weight);
            }
            if weight >= threshold {
                lefts.by_token[left as usize].free = watched.add((left, new), weight, lefts.by_token[left as usize].size);
            }
        }
        lefts.place_and_clear(&mut watched.positions);
        for &right in &rights.seen {
            let mut weight = rights.by_token[right as usize].weight;
            if (b, right) != pair {
                watched.subtract((b, right), weight);
            }
            weight -= if right == a { undone } else { 0 };
            if weight >= threshold {
                rights.by_token[right as usize].free = watched.add((new, right), weight, rights.by_token[right as usize].size);
            }
        }
        rights.place_and_clear(&mut watched.positions);
    }
}

impl Watched {
    /// Watches one more pair -> the first of the `size` places in `positions` that are now its own, yet to be filled.
    fn add(&mut self, pair: Pair, count: u64, size: u32) -> u32 {
        let entry = self.counts.len() as u32;
        let start = self.positions.len() as u32;
        self.positions.resize(self.positions.len() + size as usize, 0);
        self.counts.push(count);
        self.places.push((start, start + size));
        self.index.get_or_insert(pair, entry);
        self.queue.push((count, Reverse(pair), entry));
        start
    }

    fn subtract(&mut self, pair: Pair, weight: u64) {
        if let Some(entry) = self.index.get(pair) {
            self.counts[entry as usize] -= weight;
        }
    }
}

const UNPLACED: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Neighbour {
    weight: u64,
    size: u32,
    free: u32,
}

/// The tokens found on one side of a merged pair: how much each weighs and where. A new pair needs no hashing for it.
struct Neighbours {
    by_token: Vec<Neighbour>,
    seen: Vec<u32>,
    found: Vec<(u32, u32)>, // (token, position of the pair it forms)
}

impl Neighbours {
    fn new(vocab_size: usize) -> Self {
        Neighbours { by_token: vec![Neighbour { weight: 0, size: 0, free: UNPLACED }; vocab_size], seen: Vec::new(), found: Vec::new() }
    }

    #[inline(always)]
    fn add(&mut self, token: u32, weight: u64, position: u32) {
        let neighbour = &mut self.by_token[token as usize];
        if neighbour.size == 0 {
            self.seen.push(token);
        }
        neighbour.weight += weight;
        neighbour.size += 1;
        self.found.push((token, position));
    }

    /// Writes the positions of those pairs that are watched, and forgets everything.
    fn place_and_clear(&mut self, positions: &mut [u32]) {
        for (token, position) in self.found.drain(..) {
            let free = &mut self.by_token[token as usize].free;
            if *free != UNPLACED {
                positions[*free as usize] = position;
                *free += 1;
            }
        }
        for token in self.seen.drain(..) {
            self.by_token[token as usize] = Neighbour { weight: 0, size: 0, free: UNPLACED };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merges(words: &[&str], num_merges: usize) -> Vec<Pair> {
        let mut counts = WordCounts::default();
        for word in words {
            counts.add(word.as_bytes(), 0, word.len());
        }
        train(counts, num_merges).unwrap()
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        let pair = |a: char, b: char| (a as u32, b as u32);
        assert_eq!(merges(&["hello", " world"], 3), vec![pair(' ', 'w'), pair('e', 'l'), ('h' as u32, 257)]);
    }

    #[test]
    fn training_ends_when_nothing_is_left_to_merge() {
        assert_eq!(merges(&["aaa"], 10), vec![(97, 97), (256, 97)]);
        assert_eq!(merges(&["a", "b"], 10), vec![]);
    }

    #[test]
    fn merges_do_not_depend_on_how_many_pairs_are_watched() {
        let mut state = 99u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 16) % below
        };
        for letters in [2, 3, 26, 90] {
            for _ in 0..100 {
                let words: Vec<String> =
                    (0..random(60)).map(|_| (0..1 + random(12)).map(|_| (b'!' + random(letters) as u8) as char).collect()).collect();
                let count = || {
                    let mut counts = WordCounts::default();
                    words.iter().for_each(|word| counts.add(word.as_bytes(), 0, word.len()));
                    counts
                };
                let all = train_watching(count(), 80, usize::MAX).unwrap();
                for min_watched in [1, 2, 30] {
                    assert_eq!(train_watching(count(), 80, min_watched).unwrap(), all, "{words:?}");
                }
            }
        }
    }
}
