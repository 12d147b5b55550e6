use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use tokio::time::sleep;

use super::*;

/// Regression: a reload forgot what was counted of endpoints, where DNS answered just before the timer that forgets
/// those that have left.
#[tokio::test]
async fn endpoints_are_counted_on_while_what_dns_says_is_not_applied_yet() {
    let endpoint: SocketAddr = "192.0.2.1:443".parse().unwrap();
    let dns = config::Dns {
        servers: vec!["192.0.2.53:53".parse().unwrap()],
        cluster_domain: Some("cluster.local".into()),
        namespace: Some("default".into()),
        ..config::Config::default().dns
    };
    let resolver = Resolver::new(dns);
    let target = Some("192.0.2.1".parse().unwrap());
    let alias = Arc::new(config::Alias { target, ..config::Alias::named("a") });
    // The timer comes first in one of a few.
    for _ in 0..50 {
        let series = AliasSeries::new("a", 1);
        let counts = series.endpoint(endpoint);
        counts.opened();
        counts.closed();
        let mut roots = RootStores::default();
        let upstream =
            Upstream::new(alias.clone(), &resolver, &mut roots, Arc::default(), series.clone());
        let mut run = pin!(Arc::new(upstream.unwrap()).run(CancellationToken::new()));
        for _ in 0..2 {
            let is_pending = poll_fn(|cx| Poll::Ready(run.as_mut().poll(cx).is_pending()));
            assert!(is_pending.await);
            // The timer is due by then, and what was asked for is answered.
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(series.endpoint(endpoint).total(), 1);
    }
}
