//! Repeated failures: logged in full when they begin, counted while they continue, and reported when
//! they have ended. One line for each would hide all other lines, and any client could cause them.

use std::{collections::HashMap, hash::Hash, sync::LazyLock, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// A failure that has not occurred for this long has ended.
const QUIET: Duration = Duration::from_secs(10);

/// The time until the first count. It doubles for each further one, up to the second value.
const PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// The most kinds that are distinguished. All others count as one.
const MAX_KINDS: usize = 32;

/// The current failures by their kind.
#[derive(Debug)]
pub struct Failures<K>(Mutex<HashMap<Option<K>, Going>>);

#[derive(Debug)]
struct Going {
    count: u64,
    /// How many of them have been reported.
    reported: u64,
    began: Instant,
    last: Instant,
    due: Instant,
    pause: Duration,
    /// The details of the last one.
    detail: String,
}

/// A report on a failure.
#[derive(Debug, PartialEq, Eq)]
pub struct Report<K> {
    /// Its kind; `None` for those beyond the limit of kinds.
    pub kind: Option<K>,
    /// How often it occurred since it began.
    pub count: u64,
    /// The time from the first to the last.
    pub lasted: Duration,
    /// The details of the last one.
    pub detail: String,
    /// Whether it has ended.
    pub has_ended: bool,
}

/// The kind of failed requests of an alias.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestFailure {
    /// The true name, if it is known.
    pub true_name: String,
    /// The stage that requests reach.
    pub stage: &'static str,
    /// The name in RFC 9209.
    pub error: &'static str,
    /// How to fix it. This distinguishes different causes with the same error name.
    pub fix: Option<String>,
}

/// The kind of failed requests that belong to no alias.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NoAliasFailure {
    /// The stage that requests reach.
    pub stage: &'static str,
    /// The name in RFC 9209.
    pub error: &'static str,
    /// The details: another host is another failure.
    pub detail: String,
}

impl<K> Default for Failures<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl Failures<NoAliasFailure> {
    /// Refused requests of the whole process.
    pub fn of_refused() -> &'static Self {
        static REFUSED: LazyLock<Failures<NoAliasFailure>> = LazyLock::new(Failures::default);
        &REFUSED
    }

    /// Requests of the whole process for hosts that are not an alias.
    pub fn of_other_hosts() -> &'static Self {
        static HOSTS: LazyLock<Failures<NoAliasFailure>> = LazyLock::new(Failures::default);
        &HOSTS
    }
}

impl<K: Clone + Eq + Hash> Failures<K> {
    /// Counts one. Returns whether it is the first of its kind, which must be logged in full.
    pub fn begins(&self, kind: K, detail: impl Into<String>) -> bool {
        self.begins_at(Instant::now(), kind, detail)
    }

    fn begins_at(&self, now: Instant, kind: K, detail: impl Into<String>) -> bool {
        let mut going = self.0.lock();
        let kind = Some(kind);
        let kind = if going.len() < MAX_KINDS || going.contains_key(&kind) { kind } else { None };
        // For when nothing calls `reports`, as in a program that embeds a client.
        if going.get(&kind).is_some_and(|failure| now - failure.last >= QUIET * 2) {
            going.remove(&kind);
        }
        let mut is_new = false;
        let failure = going.entry(kind).or_insert_with(|| {
            is_new = true;
            let (due, detail) = (now + PAUSES.0, String::new());
            Going { count: 0, reported: 1, began: now, last: now, due, pause: PAUSES.0, detail }
        });
        failure.count += 1;
        failure.last = now;
        failure.detail = detail.into();
        is_new
    }

    /// The reports to log now, on failures that continue and on those that have ended. To be called every second
    /// or so.
    pub fn reports(&self) -> Vec<Report<K>> {
        self.reports_at(Instant::now())
    }

    /// Removes all current failures and returns their reports.
    pub fn take(&self) -> Vec<Report<K>> {
        let going = std::mem::take(&mut *self.0.lock());
        let report = |(kind, going): (Option<K>, Going)| Report {
            kind,
            count: going.count,
            lasted: going.last - going.began,
            detail: going.detail,
            has_ended: false,
        };
        going.into_iter().map(report).collect()
    }

    fn reports_at(&self, now: Instant) -> Vec<Report<K>> {
        let mut reports = Vec::new();
        self.0.lock().retain(|kind, going| {
            let has_ended = now - going.last >= QUIET;
            if has_ended || going.due <= now && going.count > going.reported {
                going.reported = going.count;
                going.pause = (going.pause * 2).min(PAUSES.1);
                going.due = now + going.pause;
                reports.push(Report {
                    kind: kind.clone(),
                    count: going.count,
                    lasted: going.last - going.began,
                    detail: going.detail.clone(),
                    has_ended,
                });
            }
            !has_ended
        });
        reports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_said_once_counted_now_and_then_and_reported_when_it_has_ended() {
        let failures = Failures::default();
        let mut now = Instant::now();
        let mut said = 0;
        let mut counted = Vec::new();
        // Ten times a second, for two minutes.
        for number in 0..1200 {
            said += usize::from(failures.begins_at(now, "refused", format!("{number}")));
            counted.extend(failures.reports_at(now));
            now += Duration::from_millis(100);
        }
        assert_eq!(said, 1);
        let seconds: Vec<_> = counted.iter().map(|report| report.lasted.as_secs()).collect();
        assert_eq!(seconds, [10, 30, 70]);
        assert_eq!((counted[0].count, counted[0].detail.as_str()), (101, "100"));
        assert!(counted.iter().all(|report| !report.has_ended));

        now += QUIET;
        let [end] = failures.reports_at(now).try_into().unwrap();
        assert!(end.has_ended && end.count == 1200 && end.lasted.as_secs() == 119, "{end:?}");
        assert_eq!(failures.reports_at(now), []);
        assert!(failures.begins_at(now, "refused", "again"), "it begins again");
    }

    #[test]
    fn a_failure_begins_anew_after_a_while_though_nobody_asks_for_reports() {
        let failures = Failures::default();
        let now = Instant::now();
        assert!(failures.begins_at(now, "refused", ""));
        assert!(!failures.begins_at(now + QUIET, "refused", ""));
        assert!(failures.begins_at(now + QUIET * 3, "refused", ""));
    }

    #[test]
    fn kinds_are_told_apart_and_are_bounded() {
        let failures = Failures::default();
        let now = Instant::now();
        let said = (0..1000).filter(|kind| failures.begins_at(now, *kind, "")).count();
        assert_eq!(said, MAX_KINDS + 1);
        assert!(!failures.begins_at(now, 1, ""), "a known kind");
        let reports = failures.reports_at(now + QUIET);
        let others = reports.iter().find(|report| report.kind.is_none()).unwrap();
        assert_eq!((reports.len(), others.count), (MAX_KINDS + 1, 1000 - MAX_KINDS as u64));
    }
}
