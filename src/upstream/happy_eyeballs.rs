//! Happy Eyeballs (RFC 8305): if one endpoint takes long to connect, the next is tried in parallel.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::sleep;

/// RFC 8305 §5, "Connection Attempt Delay".
const DELAY: Duration = Duration::from_millis(250);

/// Why another endpoint is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Because {
    /// An attempt has failed.
    Failed,
    /// All current attempts take long.
    Slow,
}

/// What an attempt reports while it is running.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicBool>);

impl Progress {
    /// TCP is connected. From here on, a slow attempt indicates distance rather than a dead address.
    pub(super) fn opened(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The first connection that was established.
#[derive(Debug)]
pub(super) struct Won<E, T> {
    pub(super) connection: T,
    /// The endpoints that had more time, and were not connected by then.
    pub(super) overtaken: Vec<E>,
}

/// No attempt succeeded.
#[derive(Debug)]
pub(super) struct Failures<X> {
    earlier: Vec<X>,
    /// The last error.
    pub(super) last: X,
}

impl<X> Failures<X> {
    /// The first error.
    pub(super) fn first(self) -> X {
        self.earlier.into_iter().next().unwrap_or(self.last)
    }
}

/// Dials `first`, and further endpoints from `next`: after each failure, and whenever all current attempts are
/// slow.
pub(super) async fn race<E, T, X, F>(
    first: E,
    mut next: impl FnMut(Because) -> Option<E>,
    dial: impl Fn(E, Progress) -> F,
) -> Result<Won<E, T>, Failures<X>>
where
    E: Clone,
    F: Future<Output = Result<T, X>>,
{
    let mut under_way: Vec<(usize, E, Progress)> = Vec::new();
    let mut attempts = FuturesUnordered::new();
    let mut earlier = Vec::new();
    let mut candidate = Some(first);
    let mut slow = true;
    let mut number = 0;
    loop {
        if let Some(endpoint) = candidate.take() {
            let progress = Progress::default();
            number += 1;
            under_way.push((number, endpoint.clone(), progress.clone()));
            let attempt = dial(endpoint, progress);
            let this = number;
            attempts.push(async move { (this, attempt.await) });
        }
        tokio::select! {
            Some((ended, result)) = attempts.next() => match result {
                Ok(connection) => {
                    let earlier = under_way.into_iter().take_while(|(other, ..)| *other < ended);
                    let overtaken = earlier.map(|(_, endpoint, _)| endpoint).collect();
                    return Ok(Won { connection, overtaken });
                }
                Err(failure) => {
                    under_way.retain(|(other, ..)| *other != ended);
                    candidate = next(Because::Failed);
                    if candidate.is_none() && attempts.is_empty() {
                        return Err(Failures { earlier, last: failure });
                    }
                    earlier.push(failure);
                }
            },
            () = sleep(DELAY), if slow => {
                if !under_way.iter().any(|(.., progress)| progress.is_open()) {
                    candidate = next(Because::Slow);
                    slow = candidate.is_some();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::future::pending;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Endpoint {
        Up,
        Refuses(u8),
        BlackHole,
        /// TCP at once, and TLS long after others would have been up.
        Distant,
    }
    use Endpoint::{BlackHole, Distant, Refuses, Up};

    async fn dial(endpoint: Endpoint, progress: Progress) -> Result<Endpoint, Endpoint> {
        match endpoint {
            Up => Ok(endpoint),
            Refuses(_) => Err(endpoint),
            BlackHole => pending().await,
            Distant => {
                progress.opened();
                sleep(DELAY * 3).await;
                Ok(endpoint)
            }
        }
    }

    async fn race_of(
        endpoints: &[Endpoint],
    ) -> Result<Won<Endpoint, Endpoint>, Failures<Endpoint>> {
        let mut left = endpoints.iter().copied();
        let first = left.next().unwrap();
        race(first, |_| left.next(), dial).await
    }

    #[tokio::test]
    async fn the_next_endpoint_is_dialled_beside_a_slow_one_and_after_a_failure() {
        for (endpoints, overtaken) in [
            (&[Up, Refuses(0)][..], &[][..]),
            (&[BlackHole, Up], &[BlackHole]),
            (&[Refuses(0), Up], &[]),
            (&[BlackHole, BlackHole, Refuses(0), Up], &[BlackHole, BlackHole]),
        ] {
            let won = race_of(endpoints).await.unwrap();
            assert_eq!((won.connection, &won.overtaken[..]), (Up, overtaken), "{endpoints:?}");
        }
    }

    #[tokio::test]
    async fn an_endpoint_whose_tcp_is_up_is_waited_for_alone() {
        assert_eq!(race_of(&[Distant, Up]).await.unwrap().connection, Distant);
    }

    #[tokio::test]
    async fn where_all_fail_the_first_and_the_last_failure_are_known() {
        let failures = race_of(&[Refuses(1), Refuses(2), Refuses(3)]).await.unwrap_err();
        assert_eq!(failures.last, Refuses(3));
        assert_eq!(failures.first(), Refuses(1));
    }
}
