use std::time::Duration;

use tokio::time::sleep;

use super::*;
use crate::resolve::Resolver;

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
    let target = Some("192.0.2.1".parse().unwrap());
    let alias = config::Alias { target, ..config::Alias::named("a") };
    // The timer comes first in one of a few.
    for _ in 0..50 {
        let mut registry = Registry::new(Resolver::new(dns.clone()), Arc::default(), 1);
        let planned = registry.inventory().plan(std::slice::from_ref(&alias), &dns).unwrap();
        let series = planned[0].series().clone();
        let counts = series.endpoint(endpoint);
        counts.opened();
        counts.closed();
        registry.commit(&planned, &dns);
        // The timer is due by then, and what was asked for is answered.
        sleep(Duration::from_millis(5)).await;
        assert_eq!(series.endpoint(endpoint).total(), 1);
    }
}
