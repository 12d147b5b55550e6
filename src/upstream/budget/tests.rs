use std::{collections::VecDeque, sync::atomic::AtomicUsize, thread};

use proptest::prelude::*;

use super::*;

/// The same, said in the plainest way.
#[derive(Default)]
struct Model {
    requests: VecDeque<u64>,
    shared: VecDeque<u64>,
    besides: VecDeque<u64>,
}

impl Model {
    fn withdraw(&mut self, percent: u64, second: u64) -> bool {
        let recent = |times: &VecDeque<u64>, window: u64| {
            times.iter().filter(|time| second - **time < window).count() as u64
        };
        let requests = recent(&self.requests, 10);
        if percent == 0 {
            return false;
        }
        if recent(&self.shared, 10) < requests * percent / 100 {
            self.shared.push_back(second);
            return true;
        }
        let granted = recent(&self.besides, 1) < 3;
        if granted {
            self.besides.push_back(second);
        }
        granted
    }
}

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Request(usize),
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0..4_000_u64).prop_map(Step::Wait),
        8 => (0..3_usize).prop_map(Step::Request),
        4 => Just(Step::Retry),
    ]
}

proptest! {
    #[test]
    fn a_retry_is_granted_as_the_plainest_count_has_it(
        percent in 0..=100_u64,
        steps in prop::collection::vec(step(), 0..400),
    ) {
        let mut now = Instant::now();
        let began = now;
        let budget = Budget::new(percent as f64 / 100.0, 3, now);
        let mut model = Model::default();
        for step in steps {
            let second = (now - began).as_secs();
            match step {
                Step::Wait(millis) => now += Duration::from_millis(millis),
                Step::Request(worker) => {
                    budget.deposit(worker, now);
                    model.requests.push_back(second);
                }
                Step::Retry => prop_assert_eq!(
                    budget.withdraw(now),
                    model.withdraw(percent, second)
                ),
            }
        }
    }
}

#[test]
fn sixty_percent_are_sixty_percent() {
    let now = Instant::now();
    for percent in 1..=100 {
        let budget = Budget::new(f64::from(percent) / 100.0, 1, now);
        (0..1_000).for_each(|_| budget.deposit(0, now));
        let granted = (0..2_000).filter(|_| budget.withdraw(now)).count();
        assert_eq!(granted, percent as usize * 10 + BESIDES as usize, "{percent}%");
    }
}

#[test]
fn a_quiet_alias_has_three_a_second() {
    let began = Instant::now();
    let budget = Budget::new(0.2, 1, began);
    for second in 0..100 {
        let now = began + Duration::from_secs(second);
        assert_eq!((0..10).filter(|_| budget.withdraw(now)).count(), 3);
    }
}

#[test]
fn what_is_not_asked_for_within_ten_seconds_is_gone() {
    let began = Instant::now();
    let budget = Budget::new(1.0, 1, began);
    (0..100).for_each(|_| budget.deposit(0, began));
    let later = began + Duration::from_secs(10);
    assert_eq!((0..100).filter(|_| budget.withdraw(later)).count(), 3);
}

#[test]
fn workers_that_withdraw_at_once_get_no_more_together() {
    let now = Instant::now();
    for _ in 0..50 {
        let budget = Budget::new(0.5, 4, now);
        let granted = AtomicUsize::new(0);
        thread::scope(|scope| {
            for worker in 0..4 {
                let (budget, granted) = (&budget, &granted);
                scope.spawn(move || {
                    (0..100).for_each(|_| budget.deposit(worker, now));
                    let mine = (0..200).filter(|_| budget.withdraw(now)).count();
                    granted.fetch_add(mine, Ordering::Relaxed);
                });
            }
        });
        let granted = granted.into_inner();
        assert!(granted <= 203, "{granted}");
        assert!(granted >= 50, "{granted}");
    }
}
