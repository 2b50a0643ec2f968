//! How often each piece of text occurs. One counter a thread, added together at the end: the order never matters.

use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::split::Splitter;
use crate::table::{short_bytes, short_key, LongMap, ShortTable, SHORT};

/// Pieces and how often each was seen.
#[derive(Default)]
pub struct WordCounts {
    short: ShortTable<u64>,
    long: LongMap<u64>,
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
        if self.distinct() < other.distinct() {
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
    pub fn distinct(&self) -> usize {
        self.short.distinct() + self.long.len()
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
