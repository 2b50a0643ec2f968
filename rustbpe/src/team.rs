//! Threads that wait between passes and run one function together, meeting at barriers inside it.
//!
//! A pass over a small model is a hundred products of some microseconds: waking threads for each of them would cost more than it
//! saves. Here they wake once a pass and then wait for each other by looking at a counter; whoever waits long yields its core.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::yield_now;

const SPINS: usize = 2_000; // looks at a counter before the core is yielded: some ten microseconds

/// A point that all members of a team reach before any goes on.
pub struct Barrier {
    members: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl Barrier {
    fn new(members: usize) -> Self {
        Barrier { members, arrived: AtomicUsize::new(0), round: AtomicUsize::new(0) }
    }

    pub fn wait(&self) {
        if self.members == 1 {
            return;
        }
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round + 1, Ordering::Release);
            return;
        }
        let mut looks = 0;
        while self.round.load(Ordering::Acquire) == round {
            looks += 1;
            if looks < SPINS {
                spin_loop()
            } else {
                yield_now()
            }
        }
    }
}

type Work = &'static (dyn Fn(usize, usize, &Barrier) + Sync); // (member, members, their barrier)

#[derive(Default)]
struct Order {
    number: usize, // counts the passes
    work: Option<(Work, usize, Arc<Barrier>)>,
    working: usize,
    is_over: bool,
}

#[derive(Default)]
struct Shared {
    order: Mutex<Order>,
    begin: Condvar,
    end: Condvar,
}

fn locked(shared: &Shared) -> MutexGuard<'_, Order> {
    shared.order.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The caller and `size - 1` threads of its own, started when first needed, ended with the team.
pub struct Team {
    shared: Arc<Shared>,
    size: usize,
    process: u32, // a fork copies the team and none of its threads
}

impl Default for Team {
    fn default() -> Self {
        Team { shared: Arc::default(), size: 1, process: std::process::id() }
    }
}

impl Team {
    /// Run `work` as members 0 to `members - 1` and wait for all of them. The caller is member 0.
    pub fn run(&mut self, members: usize, work: &(dyn Fn(usize, usize, &Barrier) + Sync)) {
        let barrier = Arc::new(Barrier::new(members));
        if members == 1 {
            return work(0, 1, &barrier);
        }
        if self.process != std::process::id() {
            std::mem::forget(std::mem::take(self)); // its lock may be held by a thread that is not here
        }
        for member in self.size..members {
            let shared = Arc::clone(&self.shared);
            let started = locked(&shared).number;
            std::thread::spawn(move || serve(&shared, member, started));
        }
        self.size = self.size.max(members);
        // SAFETY: the threads use `work` only until `working` is 0, and this function returns after that, or aborts.
        let lasting: Work = unsafe { std::mem::transmute(work) };
        {
            let mut order = locked(&self.shared);
            order.number += 1;
            order.working = self.size - 1;
            order.work = Some((lasting, members, Arc::clone(&barrier)));
            self.shared.begin.notify_all();
        }
        let abort = AbortOnPanic;
        work(0, members, &barrier);
        let mut order = locked(&self.shared);
        while order.working > 0 {
            order = self.shared.end.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        order.work = None;
        std::mem::forget(abort);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        locked(&self.shared).is_over = true;
        self.shared.begin.notify_all();
    }
}

/// A member that dies in the middle would leave the others waiting for ever, with borrowed memory that is gone.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

fn serve(shared: &Shared, member: usize, mut seen: usize) {
    loop {
        let mut order = locked(shared);
        while order.number == seen && !order.is_over {
            order = shared.begin.wait(order).unwrap_or_else(PoisonError::into_inner);
        }
        if order.is_over {
            return;
        }
        seen = order.number;
        let (work, members, barrier) = order.work.clone().expect("an order has work");
        drop(order);
        let abort = AbortOnPanic;
        if member < members {
            work(member, members, &barrier);
        }
        std::mem::forget(abort);
        let mut order = locked(shared);
        order.working -= 1;
        if order.working == 0 {
            shared.end.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_members_meet_at_every_barrier() {
        let mut team = Team::default();
        for members in [1, 3, 2, 5, 2] {
            let steps: Vec<AtomicUsize> = (0..members).map(|_| AtomicUsize::new(0)).collect();
            team.run(members, &|member, size, barrier| {
                assert_eq!(size, members);
                for step in 1..=200 {
                    steps[member].store(step, Ordering::Relaxed);
                    barrier.wait();
                    assert!(steps.iter().all(|other| other.load(Ordering::Relaxed) == step));
                    barrier.wait();
                }
            });
            assert!(steps.iter().all(|step| step.load(Ordering::Relaxed) == 200));
        }
    }
}
