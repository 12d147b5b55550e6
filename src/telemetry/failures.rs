//! Failures that repeat: logged in full when they begin, counted while they go on, and reported when
//! they have ended. One line for each would bury all others, and any client can cause them at will.

use std::{collections::HashMap, hash::Hash, sync::LazyLock, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// A failure that has not been seen for so long has ended.
const QUIET: Duration = Duration::from_secs(10);

/// How long until the first count; each further one takes twice as long, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(60));

/// Kinds that are told apart. All others are one.
const MAX_KINDS: usize = 32;

/// Failures that are going on, by what tells them apart.
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
    /// What was said of the last one.
    detail: String,
}

/// What became of a failure.
#[derive(Debug, PartialEq, Eq)]
pub struct Report<K> {
    /// Which; `None` for those that there were too many kinds of.
    pub kind: Option<K>,
    /// How often since it began.
    pub count: u64,
    /// From the first to the last.
    pub lasted: Duration,
    /// What was said of the last one.
    pub detail: String,
    /// It has not been seen for a while.
    pub has_ended: bool,
}

/// What tells failed requests of an alias apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestFailure {
    /// The true name, where it is known.
    pub true_name: String,
    /// How far requests come.
    pub stage: &'static str,
    /// The name in RFC 9209.
    pub error: &'static str,
    /// What mends it: two reasons of one name differ here.
    pub fix: Option<String>,
}

/// What tells failed requests apart that belong to no alias.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NoAliasFailure {
    /// How far requests come.
    pub stage: &'static str,
    /// The name in RFC 9209.
    pub error: &'static str,
    /// What is said of it: another host is another failure.
    pub detail: String,
}

impl<K> Default for Failures<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl Failures<NoAliasFailure> {
    /// Requests that went nowhere, of the whole process.
    pub fn of_refused() -> &'static Self {
        static REFUSED: LazyLock<Failures<NoAliasFailure>> = LazyLock::new(Failures::default);
        &REFUSED
    }

    /// Requests for hosts that are no alias, of the whole process.
    pub fn of_other_hosts() -> &'static Self {
        static HOSTS: LazyLock<Failures<NoAliasFailure>> = LazyLock::new(Failures::default);
        &HOSTS
    }
}

impl<K: Clone + Eq + Hash> Failures<K> {
    /// Counts one. Whether it is the first of its kind, so that it is to be logged in full.
    pub fn begins(&self, kind: K, detail: impl Into<String>) -> bool {
        self.begins_at(Instant::now(), kind, detail)
    }

    fn begins_at(&self, now: Instant, kind: K, detail: impl Into<String>) -> bool {
        let mut going = self.0.lock();
        let kind = Some(kind);
        let kind = if going.len() < MAX_KINDS || going.contains_key(&kind) { kind } else { None };
        // Where nobody asks for reports, as in a program that embeds a client.
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

    /// What is to be logged now of those that go on, and of those that have ended: to be asked every
    /// second or so.
    pub fn reports(&self) -> Vec<Report<K>> {
        self.reports_at(Instant::now())
    }

    /// What has been going on until now. Each begins anew after this.
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
        assert!(failures.begins_at(now, "refused", "again"), "begun anew");
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
        assert!(!failures.begins_at(now, 1, ""), "a kind that is known");
        let reports = failures.reports_at(now + QUIET);
        let others = reports.iter().find(|report| report.kind.is_none()).unwrap();
        assert_eq!((reports.len(), others.count), (MAX_KINDS + 1, 1000 - MAX_KINDS as u64));
    }
}
