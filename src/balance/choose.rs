//! The policies: which of the eligible endpoints to pick.

use super::Endpoint;
use std::sync::Arc;
use tokio::time::Instant;

/// Latencies within this factor, or this many seconds, of each other count as equal. Then only the requests in
/// flight matter. The averages of equal endpoints differ by chance, and following them would send half as much to
/// one of them as to another for no reason.
const LIKE: f32 = 2.0;
const NOISE: f32 = 0.002;

/// Power of two choices: of two random endpoints, the one with the shorter expected wait.
///
/// Two are enough to avoid a slow endpoint. Since each pick compares another pair, there is no herd that runs to the
/// endpoint that looks best.
pub(super) fn p2c<'a>(
    members: &'a [Arc<Endpoint>],
    eligible: impl Fn(&Endpoint) -> bool,
    rng: &mut fastrand::Rng,
    now: Instant,
) -> Option<&'a Arc<Endpoint>> {
    // Usually all are eligible, and there is no need to count.
    if members.len() > 1 {
        let (a, b) = distinct_pair(members.len(), rng);
        if eligible(&members[a]) && eligible(&members[b]) {
            return Some(lighter(&members[a], &members[b], now));
        }
    }
    match count(members, &eligible) {
        0 | 1 => nth(members, &eligible, 0),
        several => {
            let (a, b) = distinct_pair(several, rng);
            let (a, b) = (nth(members, &eligible, a)?, nth(members, &eligible, b)?);
            Some(lighter(a, b, now))
        }
    }
}

/// A random endpoint.
pub(super) fn random<'a>(
    members: &'a [Arc<Endpoint>],
    eligible: impl Fn(&Endpoint) -> bool,
    rng: &mut fastrand::Rng,
) -> Option<&'a Arc<Endpoint>> {
    match count(members, &eligible) {
        0 => None,
        several => nth(members, &eligible, rng.usize(..several)),
    }
}

/// One after the other. `turn` counts the picks. It selects among the eligible ones, so that the successor of an
/// ejected endpoint does not get a double share.
pub(super) fn round_robin(
    members: &[Arc<Endpoint>],
    eligible: impl Fn(&Endpoint) -> bool,
    turn: usize,
) -> Option<&Arc<Endpoint>> {
    match count(members, &eligible) {
        0 => None,
        several => nth(members, &eligible, turn % several),
    }
}

/// The endpoint with the fewest requests in flight; a random one of several.
pub(super) fn least_request<'a>(
    members: &'a [Arc<Endpoint>],
    eligible: impl Fn(&Endpoint) -> bool,
    rng: &mut fastrand::Rng,
) -> Option<&'a Arc<Endpoint>> {
    let mut least: Option<(&Arc<Endpoint>, u32)> = None;
    let mut equals = 0;
    for endpoint in members.iter().filter(|endpoint| eligible(endpoint)) {
        // Read once, because other workers may change it between two reads.
        let in_flight = endpoint.in_flight();
        match least {
            Some((_, fewest)) if in_flight > fewest => continue,
            Some((_, fewest)) if in_flight == fewest => equals += 1,
            _ => equals = 1,
        }
        // The nth of n equals replaces the choice with probability 1/n, so all have the same chance.
        if rng.usize(..equals) == 0 {
            least = Some((endpoint, in_flight));
        }
    }
    least.map(|(endpoint, _)| endpoint)
}

fn lighter<'a>(a: &'a Arc<Endpoint>, b: &'a Arc<Endpoint>, now: Instant) -> &'a Arc<Endpoint> {
    let b_is_lighter = match (a.comparable_latency(now), b.comparable_latency(now)) {
        (Some(of_a), Some(of_b)) if of_a.max(of_b) > of_a.min(of_b) * LIKE + NOISE => {
            of_b * (b.in_flight() as f32 + 1.0) < of_a * (a.in_flight() as f32 + 1.0)
        }
        // Equal or unknown. An unknown one gets an equal share of the requests in flight.
        _ => b.in_flight() < a.in_flight(),
    };
    if b_is_lighter { b } else { a }
}

fn distinct_pair(len: usize, rng: &mut fastrand::Rng) -> (usize, usize) {
    let a = rng.usize(..len);
    let b = rng.usize(..len - 1);
    (a, if b >= a { b + 1 } else { b })
}

fn count(members: &[Arc<Endpoint>], eligible: &impl Fn(&Endpoint) -> bool) -> usize {
    members.iter().filter(|endpoint| eligible(endpoint)).count()
}

/// Falls back to the first eligible one, in case another thread has ejected some since the count.
fn nth<'a>(
    members: &'a [Arc<Endpoint>],
    eligible: &impl Fn(&Endpoint) -> bool,
    n: usize,
) -> Option<&'a Arc<Endpoint>> {
    let mut chosen = members.iter().filter(|endpoint| eligible(endpoint));
    chosen.nth(n).or_else(|| members.iter().find(|endpoint| eligible(endpoint)))
}
