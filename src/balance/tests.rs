//! The behaviour of the whole balancer, with a simulated clock and seeded randomness.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 443))
}

fn addresses(count: u8) -> Vec<SocketAddr> {
    (1..=count).map(address).collect()
}

fn balancer(policy: config::Balance, count: u8, now: Instant) -> Balancer {
    let health = config::PassiveHealth { failures: 3, eject: 10 * SECOND, max_eject: 300 * SECOND };
    let balancer = Balancer::new(policy, health);
    balancer.update(&addresses(count), now);
    balancer
}

fn endpoint(balancer: &Balancer, n: u8) -> Arc<Endpoint> {
    let all = balancer.endpoints();
    all.into_iter().find(|endpoint| endpoint.address() == address(n)).unwrap()
}

/// Adds failures until the endpoint is ejected; panics if it never is.
fn eject(endpoint: &Endpoint, now: Instant) -> Duration {
    (0..3).find_map(|_| endpoint.failed(now)).unwrap()
}

/// A simulated load: a request per millisecond, with a response after the endpoint's latency.
struct Simulation {
    now: Instant,
    rng: fastrand::Rng,
    open: Vec<(Instant, InFlight)>,
}

impl Simulation {
    fn new(now: Instant) -> Simulation {
        Simulation { now, rng: fastrand::Rng::with_seed(7), open: Vec::new() }
    }

    /// Requests per address over `requests` picks.
    fn run(
        &mut self,
        balancer: &Balancer,
        requests: usize,
        latency: impl Fn(SocketAddr) -> Duration,
    ) -> BTreeMap<SocketAddr, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..requests {
            self.now += MS;
            let now = self.now;
            let (done, open) =
                std::mem::take(&mut self.open).into_iter().partition(|(end, _)| *end <= now);
            self.open = open;
            let done: Vec<(Instant, InFlight)> = done;
            for (end, mut request) in done {
                request.responded(end);
                request.endpoint().succeeded();
            }
            let endpoint = balancer.pick(now, &mut self.rng, &[]).unwrap();
            *counts.entry(endpoint.address()).or_default() += 1;
            self.open.push((now + latency(endpoint.address()), endpoint.begin(now)));
        }
        counts
    }
}

#[test]
fn every_policy_spreads_evenly_over_equal_endpoints() {
    use config::Balance::*;
    for policy in [P2c, RoundRobin, Random, LeastRequest] {
        let start = Instant::now();
        let balancer = balancer(policy, 4, start);
        let counts = Simulation::new(start).run(&balancer, 20_000, |_| 20 * MS);
        assert_eq!(counts.len(), 4, "{policy:?}");
        for count in counts.values() {
            assert!((4_500..=5_500).contains(count), "{policy:?} spreads {counts:?}");
        }
    }
}

#[test]
fn round_robin_goes_round() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::RoundRobin, 3, now);
    let mut rng = fastrand::Rng::with_seed(1);
    let picks: Vec<_> =
        (0..6).map(|_| balancer.pick(now, &mut rng, &[]).unwrap().address()).collect();
    assert_eq!(picks, [addresses(3), addresses(3)].concat());
}

#[test]
fn least_request_takes_the_idle_one() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::LeastRequest, 3, now);
    let mut rng = fastrand::Rng::with_seed(1);
    let _busy = [endpoint(&balancer, 1).begin(now), endpoint(&balancer, 3).begin(now)];
    for _ in 0..20 {
        assert_eq!(balancer.pick(now, &mut rng, &[]).unwrap().address(), address(2));
    }
}

#[test]
fn least_request_prefers_none_of_the_idle_ones() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::LeastRequest, 3, now);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut counts = BTreeMap::<SocketAddr, usize>::new();
    for _ in 0..3_000 {
        *counts.entry(balancer.pick(now, &mut rng, &[]).unwrap().address()).or_default() += 1;
    }
    assert!(counts.len() == 3 && counts.values().all(|count| *count > 900), "{counts:?}");
}

#[test]
fn p2c_keeps_away_from_an_endpoint_ten_times_slower() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 3, start);
    let slow = |at| if at == address(2) { 200 * MS } else { 20 * MS };
    let counts = Simulation::new(start).run(&balancer, 20_000, slow);
    assert!(counts[&address(2)] < 2_000, "the slow one got {counts:?}");
}

#[test]
fn p2c_gives_a_slow_endpoint_a_second_chance() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, start);
    let mut simulation = Simulation::new(start);
    simulation.run(&balancer, 5_000, |at| if at == address(2) { 500 * MS } else { 5 * MS });
    let counts = simulation.run(&balancer, 70_000, |_| 5 * MS);
    assert!(counts[&address(2)] > 15_000, "the recovered one got {counts:?}");
}

#[test]
fn a_new_endpoint_is_not_flooded() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 3, start);
    let mut simulation = Simulation::new(start);
    simulation.run(&balancer, 5_000, |_| 20 * MS);
    balancer.update(&addresses(4), simulation.now);
    // Its fair share of the 200 requests is 50, although it has not responded to any yet.
    let counts = simulation.run(&balancer, 200, |_| 20 * MS);
    let newcomer = counts[&address(4)];
    assert!((25..=75).contains(&newcomer), "the new one got {counts:?}");
}

#[test]
fn a_new_endpoint_that_hangs_is_not_flooded() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 3, start);
    let mut simulation = Simulation::new(start);
    simulation.run(&balancer, 5_000, |_| 20 * MS);
    balancer.update(&addresses(4), simulation.now);
    let hanging = |at| if at == address(4) { 3_600 * SECOND } else { 20 * MS };
    let counts = simulation.run(&balancer, 200, hanging);
    assert!(counts[&address(4)] < 25, "the new one got {counts:?}");
}

#[test]
fn an_endpoint_without_a_response_yet_is_not_flooded_either() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, start);
    let mut simulation = Simulation::new(start);
    // The second does not respond within the run.
    let hanging = |at| if at == address(2) { 3_600 * SECOND } else { 20 * MS };
    let counts = simulation.run(&balancer, 1_000, hanging);
    assert!(counts[&address(2)] < 100, "the silent one got {counts:?}");
}

#[test]
fn a_flaky_endpoint_that_is_never_ejected_still_gets_less() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, start);
    let mut rng = fastrand::Rng::with_seed(3);
    let (mut now, mut flaky, mut fails) = (start, 0, true);
    for _ in 0..10_000 {
        now += MS;
        let picked = balancer.pick(now, &mut rng, &[]).unwrap();
        let mut request = picked.begin(now);
        now += MS;
        if picked.address() == address(1) {
            flaky += 1;
            fails = !fails;
            if fails {
                assert_eq!(picked.failed(now), None);
                continue;
            }
        }
        request.responded(now);
        picked.succeeded();
    }
    assert!(flaky < 1_000, "the flaky one got {flaky} of 10000");
}

#[test]
fn consecutive_failures_eject_and_the_endpoint_comes_back() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    let mut rng = fastrand::Rng::with_seed(1);
    let bad = endpoint(&balancer, 1);
    assert_eq!(bad.failed(now), None);
    assert_eq!(bad.failed(now), None);
    assert_eq!(bad.failed(now), Some(10 * SECOND));
    assert_eq!(bad.state(now), EndpointState::Ejected);
    assert_eq!(bad.ejected_for(now + 4 * SECOND), Some(6 * SECOND));
    for _ in 0..50 {
        assert_eq!(balancer.pick(now, &mut rng, &[]).unwrap().address(), address(2));
    }

    let later = now + 10 * SECOND;
    assert_eq!(bad.state(later), EndpointState::Active);
    let picked =
        (0..50).any(|_| balancer.pick(later, &mut rng, &[]).unwrap().address() == address(1));
    assert!(picked, "it takes requests again");
    assert_eq!(bad.failed(later), Some(20 * SECOND), "one more failure, twice the time");
}

#[test]
fn an_endpoint_that_served_its_ejection_is_not_held_to_its_past() {
    let start = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, start);
    eject(&endpoint(&balancer, 1), start);
    let mut simulation = Simulation::new(start + 10 * SECOND);
    let counts = simulation.run(&balancer, 1_000, |_| 5 * MS);
    assert!(counts[&address(1)] > 400, "the returned one got {counts:?}");
}

#[test]
fn a_dead_endpoint_is_ejected_within_a_few_requests() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    let mut rng = fastrand::Rng::with_seed(5);
    for n in 0_u32..20 {
        let now = now + n * MS;
        let picked = balancer.pick(now, &mut rng, &[]).unwrap();
        let mut request = picked.begin(now);
        if picked.address() == address(1) {
            let _ = picked.failed(now);
        } else {
            request.responded(now + MS);
            picked.succeeded();
        }
    }
    assert_eq!(endpoint(&balancer, 1).state(now), EndpointState::Ejected);
}

#[test]
fn a_success_forgets_failures() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    let endpoint = endpoint(&balancer, 1);
    for _ in 0..5 {
        assert_eq!(endpoint.failed(now), None);
        assert_eq!(endpoint.failed(now), None);
        endpoint.succeeded();
    }
    assert_eq!(endpoint.state(now), EndpointState::Active);
}

#[test]
fn the_last_usable_endpoint_is_never_ejected() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    eject(&endpoint(&balancer, 1), now);
    let last = endpoint(&balancer, 2);
    for _ in 0..10 {
        assert_eq!(last.failed(now), None);
    }
    assert_eq!(last.state(now), EndpointState::Active);
    assert!(!balancer.has_healthy(now), "but a failover is due");
    assert!(balancer.has_healthy(now + 10 * SECOND), "and after a while another trial");
}

#[test]
fn when_all_are_out_all_are_used() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 3, now);
    eject(&endpoint(&balancer, 1), now);
    eject(&endpoint(&balancer, 2), now);
    // The third, which was usable, is removed.
    balancer.update(&addresses(2), now);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut picked: Vec<_> =
        (0..50).map(|_| balancer.pick(now, &mut rng, &[]).unwrap().address()).collect();
    picked.sort();
    picked.dedup();
    assert_eq!(picked, addresses(2));
}

#[test]
fn without_a_limit_of_failures_nothing_is_ejected() {
    let now = Instant::now();
    let health = config::PassiveHealth { failures: 0, eject: SECOND, max_eject: SECOND };
    let balancer = Balancer::new(config::Balance::P2c, health);
    balancer.update(&addresses(2), now);
    let endpoint = endpoint(&balancer, 1);
    assert!((0..100).all(|_| endpoint.failed(now).is_none()));
    assert_eq!(endpoint.state(now), EndpointState::Active);
}

#[test]
fn a_failed_health_check_takes_an_endpoint_out() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::RoundRobin, 2, now);
    let mut rng = fastrand::Rng::with_seed(1);
    endpoint(&balancer, 1).mark_healthy(false);
    for _ in 0..10 {
        assert_eq!(balancer.pick(now, &mut rng, &[]).unwrap().address(), address(2));
    }
    endpoint(&balancer, 1).mark_healthy(true);
    assert_eq!(endpoint(&balancer, 1).state(now), EndpointState::Active);
}

#[test]
fn a_retry_goes_elsewhere_while_there_is_an_elsewhere() {
    use config::Balance::*;
    let now = Instant::now();
    for policy in [P2c, RoundRobin, Random, LeastRequest] {
        let balancer = balancer(policy, 3, now);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..20 {
            let again = balancer.pick(now, &mut rng, &[address(1), address(3)]).unwrap();
            assert_eq!(again.address(), address(2), "{policy:?}");
            assert!(balancer.pick(now, &mut rng, &addresses(3)).is_some(), "{policy:?}");
        }
    }
}

#[test]
fn an_empty_set_has_no_pick() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 0, now);
    assert!(balancer.pick(now, &mut fastrand::Rng::with_seed(1), &[]).is_none());
    assert!(!balancer.has_healthy(now));
}

#[test]
fn an_address_named_twice_counts_once() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 0, now);
    balancer.update(&[address(1), address(2), address(1)], now);
    assert_eq!(balancer.endpoints().len(), 2);
}

#[test]
fn an_address_that_leaves_retires_until_its_requests_end() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    let leaving = endpoint(&balancer, 2);
    let request = leaving.begin(now);
    balancer.update(&addresses(1), now);
    assert_eq!(leaving.state(now), EndpointState::Retiring);
    assert_eq!(balancer.endpoints().len(), 2);
    drop(request);
    assert_eq!(balancer.endpoints().len(), 1);
}

#[test]
fn an_address_that_returns_while_it_retires_is_the_same_endpoint() {
    let now = Instant::now();
    let balancer = balancer(config::Balance::P2c, 2, now);
    let leaving = endpoint(&balancer, 2);
    let _request = leaving.begin(now);
    balancer.update(&addresses(1), now);
    balancer.update(&addresses(2), now);
    assert!(Arc::ptr_eq(&leaving, &endpoint(&balancer, 2)));
    assert_eq!(leaving.state(now), EndpointState::Active);
}

#[test]
fn concurrent_failures_leave_one_endpoint_usable() {
    let now = Instant::now();
    for _ in 0..500 {
        let balancer = balancer(config::Balance::P2c, 2, now);
        let both_have_one_left = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for endpoint in balancer.endpoints() {
                let ready = &both_have_one_left;
                scope.spawn(move || {
                    assert_eq!(endpoint.failed(now), None);
                    assert_eq!(endpoint.failed(now), None);
                    ready.wait();
                    endpoint.failed(now)
                });
            }
        });
        let usable =
            balancer.endpoints().iter().filter(|e| e.state(now) == EndpointState::Active).count();
        assert_eq!(usable, 1);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Update(Vec<u8>),
    Begin { tried: Vec<u8> },
    Respond(usize),
    End(usize),
    Fail(usize),
    Succeed(usize),
    Health(usize, bool),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let few = || prop::collection::vec(1_u8..6, 0..6);
    prop_oneof![
        few().prop_map(Step::Update),
        few().prop_map(|tried| Step::Begin { tried }),
        any::<usize>().prop_map(Step::Respond),
        any::<usize>().prop_map(Step::End),
        any::<usize>().prop_map(Step::Fail),
        any::<usize>().prop_map(Step::Succeed),
        (any::<usize>(), any::<bool>()).prop_map(|(n, healthy)| Step::Health(n, healthy)),
        (0_u64..40_000).prop_map(Step::Wait),
    ]
}

fn policy() -> impl Strategy<Value = config::Balance> {
    use config::Balance::*;
    prop_oneof![Just(P2c), Just(RoundRobin), Just(Random), Just(LeastRequest)]
}

proptest! {
    #[test]
    fn invariants_hold_whatever_happens(
        policy in policy(),
        seed: u64,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let mut now = Instant::now();
        let mut rng = fastrand::Rng::with_seed(seed);
        let balancer = balancer(policy, 3, now);
        let mut current = addresses(3);
        let mut open: Vec<InFlight> = Vec::new();
        for step in steps {
            let members = balancer.set.members.load_full();
            match step {
                Step::Update(list) => {
                    let list: Vec<_> = list.into_iter().map(address).collect();
                    balancer.update(&list, now);
                    let after = balancer.set.members.load_full();
                    for old in members.iter() {
                        let stayed = after.iter().find(|new| new.address() == old.address());
                        prop_assert!(stayed.is_none_or(|new| Arc::ptr_eq(old, new)));
                        prop_assert_eq!(stayed.is_none(), old.state(now) == EndpointState::Retiring);
                    }
                    current = list;
                }
                Step::Begin { tried } => {
                    let tried: Vec<_> = tried.into_iter().map(address).collect();
                    let Some(picked) = balancer.pick(now, &mut rng, &tried) else {
                        prop_assert!(current.is_empty());
                        continue;
                    };
                    prop_assert!(current.contains(&picked.address()));
                    let usable: Vec<_> =
                        members.iter().filter(|e| e.state(now) == EndpointState::Active).collect();
                    prop_assert!(usable.is_empty() || picked.state(now) == EndpointState::Active);
                    let elsewhere = usable.iter().any(|e| !tried.contains(&e.address()));
                    prop_assert!(!elsewhere || !tried.contains(&picked.address()));
                    let untried = !tried.contains(&picked.address());
                    prop_assert_eq!(balancer.has_untried(now, &tried), untried);
                    open.push(picked.begin(now));
                }
                Step::Respond(n) if !open.is_empty() => {
                    let n = n % open.len();
                    open[n].responded(now);
                }
                Step::End(n) if !open.is_empty() => drop(open.swap_remove(n % open.len())),
                Step::Fail(n) if !members.is_empty() => {
                    let failing = &members[n % members.len()];
                    if failing.failed(now).is_some() {
                        prop_assert_eq!(failing.state(now), EndpointState::Ejected);
                        prop_assert!(
                            members.iter().any(|e| e.state(now) == EndpointState::Active),
                            "the last one was ejected"
                        );
                    }
                }
                Step::Succeed(n) if !members.is_empty() => members[n % members.len()].succeeded(),
                Step::Health(n, healthy) if !members.is_empty() => {
                    members[n % members.len()].mark_healthy(healthy);
                }
                Step::Wait(ms) => now += Duration::from_millis(ms),
                _ => {}
            }
            for endpoint in balancer.endpoints() {
                let counted =
                    open.iter().filter(|r| Arc::ptr_eq(r.endpoint(), &endpoint)).count();
                prop_assert_eq!(endpoint.in_flight() as usize, counted);
            }
        }
        drop(open);
        prop_assert!(balancer.endpoints().iter().all(|endpoint| endpoint.in_flight() == 0));
    }
}
