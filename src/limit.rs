//! A limit that can be changed while permits are held.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A number of permits; 0 is no limit.
///
/// Lowering the limit revokes no permits: no more are given until enough have been returned. What began while there
/// was no limit does not count.
#[derive(Debug)]
pub struct Limit {
    size: AtomicUsize,
    permits: Arc<Semaphore>,
}

impl Limit {
    /// With `size` permits.
    pub fn new(size: usize) -> Self {
        Self { size: AtomicUsize::new(size), permits: Arc::new(Semaphore::new(size)) }
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// The semaphore of the permits; none if there is no limit.
    pub fn permits(&self) -> Option<&Arc<Semaphore>> {
        (self.size() > 0).then_some(&self.permits)
    }

    /// A permit, or none if there is no limit; `Err` with the limit if it is reached.
    pub fn try_acquire(&self) -> Result<Option<OwnedSemaphorePermit>, usize> {
        let Some(permits) = self.permits() else { return Ok(None) };
        permits.clone().try_acquire_owned().map(Some).map_err(|_| self.size())
    }

    /// Sets another limit. Must run in a runtime: permits that are still out are collected by a task.
    pub fn resize(&self, size: usize) {
        let before = self.size.swap(size, Ordering::Relaxed);
        if size >= before {
            self.permits.add_permits(size - before);
            return;
        }
        let owed = before - size - self.permits.forget_permits(before - size);
        if let Ok(owed @ 1..) = u32::try_from(owed) {
            let permits = self.permits.clone();
            tokio::spawn(async move {
                if let Ok(returned) = permits.acquire_many(owed).await {
                    returned.forget();
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lower_limit_takes_no_permit_away_and_gives_none_until_enough_are_back() {
        let limit = Limit::new(3);
        let mut held: Vec<_> = (0..3).map(|_| limit.try_acquire().unwrap()).collect();
        assert_eq!(limit.try_acquire().unwrap_err(), 3);
        limit.resize(1);
        tokio::task::yield_now().await;
        for _ in 0..2 {
            assert_eq!(limit.try_acquire().unwrap_err(), 1);
            held.pop();
            tokio::task::yield_now().await;
        }
        assert_eq!(limit.try_acquire().unwrap_err(), 1, "one is out");
        held.pop();
        held.push(limit.try_acquire().unwrap());
        limit.resize(2);
        held.push(limit.try_acquire().unwrap());
        assert_eq!(limit.try_acquire().unwrap_err(), 2);
        limit.resize(0);
        assert!(limit.try_acquire().unwrap().is_none(), "no limit");
    }

    #[tokio::test]
    async fn a_limit_raised_while_permits_are_owed_holds_in_the_end() {
        let limit = Limit::new(4);
        let held: Vec<_> = (0..4).map(|_| limit.try_acquire().unwrap()).collect();
        limit.resize(1);
        limit.resize(2);
        drop(held);
        tokio::task::yield_now().await;
        let _held: Vec<_> = (0..2).map(|_| limit.try_acquire().unwrap()).collect();
        assert_eq!(limit.try_acquire().unwrap_err(), 2);
    }
}
