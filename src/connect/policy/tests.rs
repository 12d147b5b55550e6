use super::*;

fn policy(allow: &[&str]) -> AddressPolicy {
    of_classes(&config::Policy::default().deny_addresses, allow)
}

fn of_classes(deny: &[AddressClass], allow: &[&str]) -> AddressPolicy {
    let policy = config::Policy {
        deny_addresses: deny.to_vec(),
        allow_addresses: allow.iter().map(|net| net.parse().unwrap()).collect(),
    };
    AddressPolicy::new(&policy, ["127.0.0.1:8080".parse().unwrap()])
}

fn denied(policy: &AddressPolicy, address: &str) -> bool {
    policy.check(SocketAddr::new(address.parse().unwrap(), 443)).is_err()
}

#[test]
fn denied_ranges_are_denied_in_every_form() {
    let policy = policy(&[]);
    for address in [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "169.254.0.1",
        "fe80::1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "0.0.0.0",
        "0.1.2.3",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::127.0.0.1",
        "64:ff9b:1:fffe::a9fe:a9fe",
        // The same prefix at 48, 56 and 64 bits.
        "64:ff9b:1:a9fe:a9:fe00::",
        "64:ff9b:1:a9:fe:a9fe::",
        "64:ff9b:1:0:a9:fea9:fe00::",
        "64:ff9b:1:7f00:0:100::",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2002:e000:1::1",
        // The client is 127.0.0.1, its bits inverted; then the server is.
        "2001:0:808:808:0:0:80ff:fffe",
        "2001:0:7f00:1:0:0:f7f7:f7f7",
        "2001:db8::5efe:169.254.169.254",
        "2001:db8::200:5efe:127.0.0.1",
        "fe80::5efe:10.0.0.1",
    ] {
        assert!(denied(&policy, address), "{address}");
    }
}

/// The addresses of each provider's documentation.
#[test]
fn addresses_that_hand_out_credentials_are_denied_as_metadata_in_every_form() {
    let policy = of_classes(&[AddressClass::Metadata], &[]);
    let v4 = [
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "169.254.0.23",
        "169.254.10.10",
        "169.254.42.42",
    ];
    for ip in v4 {
        let [a, b, c, d] = ip.parse::<Ipv4Addr>().unwrap().octets();
        let hex = format!("{a:02x}{b:02x}:{c:02x}{d:02x}");
        for form in [
            ip.to_owned(),
            format!("::ffff:{ip}"),
            format!("::{ip}"),
            format!("64:ff9b::{ip}"),
            format!("64:ff9b:1::{ip}"),
            format!("64:ff9b:1:{a:02x}{b:02x}:{c:02x}:{d:02x}00::"),
            format!("2002:{hex}::1"),
            format!("fd12::5efe:{ip}"),
        ] {
            assert!(denied(&policy, &form), "{form}");
        }
    }
    for ip in [
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:100::100:200",
        "fd00:a9fe:a9fe::1",
        "fd00:42::42",
        "fe80::a9fe:a9fe",
    ] {
        assert!(denied(&policy, ip), "{ip}");
    }
    assert!(!denied(&policy, "169.254.1.1"), "link-local, and no more than that");
}

#[test]
fn a_form_is_allowed_by_its_own_network_or_by_that_of_the_address_within() {
    let inside = policy(&["127.0.0.0/8"]);
    let outside = policy(&["2002::/16"]);
    for policy in [&inside, &outside] {
        assert!(!denied(policy, "2002:7f00:1::1"));
    }
    assert!(denied(&inside, "2002:a9fe:a9fe::1"));
    assert!(denied(&outside, "127.0.0.1"));
    // Each address within must be allowed: here the client of Teredo is, its server is not.
    assert!(denied(&inside, "2001:0:a9fe:a9fe:0:0:80ff:fffe"));
}

#[test]
fn private_and_public_addresses_pass() {
    let policy = policy(&[]);
    for address in [
        "10.0.0.5",
        "172.16.3.4",
        "192.168.1.1",
        "100.64.0.1",
        "93.184.216.34",
        "fd12::1",
        "2606:2800:220:1::1",
        "::ffff:10.0.0.1",
        "64:ff9b::808:808",
        "64:ff9b:1::8.8.8.8",
        "64:ff9b:1:fffe::10.0.0.1",
        "64:ff9b:1:808:8:800::",
        "64:ff9b:1:a00:0:500::",
        "64:ff9b:1:8:8:808::",
        "64:ff9b:1:0:8:808:800::",
        "2002:808:808::1",
        "2002:a00:1::1",
        "2001:0:808:808:0:0:f7f7:f7f7",
        "2001:db8::5efe:8.8.8.8",
        // AWS' DNS and time servers, beside its metadata service.
        "fd00:ec2::253",
        "fd00:ec2::123",
        "168.63.129.15",
    ] {
        assert!(!denied(&policy, address), "{address}");
    }
}

#[test]
fn an_allowed_network_overrides_a_class_but_never_an_own_listener() {
    let policy = policy(&["127.0.0.0/8"]);
    assert!(!denied(&policy, "127.0.0.1"));
    assert!(!denied(&policy, "::ffff:127.0.0.1"));
    for own in ["127.0.0.1:8080", "[::ffff:127.0.0.1]:8080", "0.0.0.0:8080", "[::]:8080"] {
        let own = own.parse().unwrap();
        assert_eq!(policy.check(own), Err(Denied::OwnListener(own)));
    }
}

/// Regression: a proxy that listens there could be led to itself, until it was out of descriptors.
#[test]
fn a_listener_on_an_ipv4_mapped_address_is_its_own_in_both_forms() {
    let listeners = ["[::ffff:10.0.0.9]:80", "[::ffff:0.0.0.0]:81"];
    let listeners = listeners.map(|address| address.parse().unwrap());
    let policy = AddressPolicy::new(&config::Policy::default(), listeners);
    for own in ["10.0.0.9:80", "[::ffff:10.0.0.9]:80", "[64:ff9b::10.0.0.9]:80", "127.0.0.1:81"] {
        let own = own.parse().unwrap();
        assert_eq!(policy.check(own), Err(Denied::OwnListener(own)));
    }
    let [local, own] = ["10.0.0.5:40000", "10.0.0.5:81"].map(|address| address.parse().unwrap());
    assert_eq!(policy.check_connected(local, own), Err(Denied::OwnListener(own)));
}

#[test]
fn a_wildcard_listener_makes_every_loopback_address_its_own() {
    let policy = AddressPolicy::new(&config::Policy::default(), ["0.0.0.0:80".parse().unwrap()]);
    let own = "127.3.2.1:80".parse().unwrap();
    assert_eq!(policy.check(own), Err(Denied::OwnListener(own)));
}

/// Regression: beside a listener on `0.0.0.0`, nothing that listened on `::1` with its port could be called.
#[test]
fn a_wildcard_listener_of_ipv4_takes_no_connection_over_ipv6() {
    let own = ["0.0.0.0:80".parse().unwrap(), "[::]:81".parse().unwrap()];
    let policy =
        AddressPolicy::new(&config::Policy { deny_addresses: vec![], ..Default::default() }, own);
    let own = |address: &str| policy.check(address.parse().unwrap()).is_err();
    assert!(!own("[::1]:80"));
    assert!(own("[::ffff:127.0.0.1]:80"));
    assert!(own("[::1]:81") && own("127.0.0.1:81"));
    let connected = |ip: &str, port| {
        let ip = ip.parse().unwrap();
        policy.check_connected(SocketAddr::new(ip, 40000), SocketAddr::new(ip, port)).is_err()
    };
    assert!(!connected("fd00::5", 80) && connected("10.0.0.5", 80));
    assert!(connected("fd00::5", 81) && connected("10.0.0.5", 81));
}

#[test]
fn a_wildcard_listener_is_its_own_at_the_address_that_the_connection_comes_from() {
    let own = ["0.0.0.0:80".parse().unwrap(), "10.0.0.9:81".parse().unwrap()];
    let policy = AddressPolicy::new(&config::Policy::default(), own);
    let check = |local: &str, endpoint: &str| {
        policy.check_connected(local.parse().unwrap(), endpoint.parse().unwrap())
    };
    let own = "10.0.0.5:80";
    assert_eq!(check("10.0.0.5:40000", own), Err(Denied::OwnListener(own.parse().unwrap())));
    for (local, endpoint) in [
        ("10.0.0.5:40000", "10.0.0.6:80"),
        ("10.0.0.5:40000", "10.0.0.5:443"),
        // Another process may listen there.
        ("10.0.0.5:40000", "10.0.0.5:81"),
    ] {
        assert_eq!(check(local, endpoint), Ok(()), "{local} {endpoint}");
    }
}
