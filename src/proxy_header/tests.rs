use proptest::{prelude::*, sample::Index};

use super::*;

/// A client's connection as `SOURCE DESTINATION`.
fn between(source: &str, destination: &str) -> Addresses {
    Addresses { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

fn refused(bytes: impl AsRef<[u8]>) -> &'static str {
    parse(bytes.as_ref()).unwrap_err().0
}

/// A version 2 header with this command, family and rest.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[command, family], &length[..], rest].concat()
}

const V4: [u8; 12] = [192, 0, 2, 1, 127, 0, 0, 1, 0xab, 0xcd, 0, 80];

#[test]
fn version_1_is_a_line() {
    for (line, expected) in [
        ("TCP4 192.0.2.1 127.0.0.1 43981 80", Some(("192.0.2.1:43981", "127.0.0.1:80"))),
        ("TCP4 255.255.255.255 0.0.0.0 65535 0", Some(("255.255.255.255:65535", "0.0.0.0:0"))),
        ("TCP6 2001:db8::1 ::1 1 2", Some(("[2001:db8::1]:1", "[::1]:2"))),
        ("TCP6 ::ffff:192.0.2.1 ::ffff:127.0.0.1 1 2", Some(("192.0.2.1:1", "127.0.0.1:2"))),
        ("UNKNOWN", None),
        ("UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535", None),
    ] {
        let bytes = format!("PROXY {line}\r\nGET / HTTP/1.1\r\n");
        let addresses = expected.map(|(source, destination)| between(source, destination));
        let header = Header { length: "PROXY \r\n".len() + line.len(), addresses };
        assert_eq!(parse(bytes.as_bytes()), Ok(Some(header)), "{line}");
    }
}

#[test]
fn what_version_1_does_not_allow_is_refused() {
    for line in [
        "",
        "TCP4",
        "TCP4 192.0.2.1 127.0.0.1 1",
        "TCP4 192.0.2.1 127.0.0.1 1 2 3",
        "TCP4  192.0.2.1 127.0.0.1 1 2",
        "TCP4 192.0.2.1 127.0.0.1 1 2 ",
        "TCP4 192.0.2.1 127.0.0.1 65536 2",
        "TCP4 192.0.2.1 127.0.0.1 +1 2",
        "TCP4 192.0.2.1 127.0.0.1 1 000002",
        "TCP4 192.0.2.01 127.0.0.1 1 2",
        "TCP4 ::1 ::1 1 2",
        "TCP6 192.0.2.1 127.0.0.1 1 2",
        "TCP6 fe80::1%eth0 ::1 1 2",
        "UDP4 192.0.2.1 127.0.0.1 1 2",
        "tcp4 192.0.2.1 127.0.0.1 1 2",
        "\u{e9}",
    ] {
        assert!(refused(format!("PROXY {line}\r\n")).starts_with("a version 1 header"), "{line}");
    }
    assert!(refused("GET / HTTP/1.1\r\n").contains("does not begin with a PROXY protocol header"));
    assert!(refused("PROXY\r\n").contains("does not begin"));
    let longest = format!("PROXY UNKNOWN {}", "x".repeat(LONGEST_V1 - "PROXY UNKNOWN \r\n".len()));
    assert!(parse(format!("{longest}\r\n").as_bytes()).unwrap().is_some());
    assert_eq!(parse(format!("{longest}x").as_bytes()), Ok(None));
    assert!(refused(format!("{longest}x\r\n")).contains("107 bytes"));
}

#[test]
fn version_2_has_addresses_and_extensions() {
    let known = between("192.0.2.1:43981", "127.0.0.1:80");
    let v6 = [&Ipv6Addr::LOCALHOST.octets()[..], &[0x20; 16], &[0, 1, 0, 2]].concat();
    let [unix, long] = [[1; 216].as_slice(), &[1; 200]].map(<[u8]>::to_vec);
    for (command, family, rest, expected) in [
        (0x21, 0x11, V4.to_vec(), Some(known)),
        (0x21, 0x11, [&V4[..], &[4, 0, 2, 9, 9]].concat(), Some(known)),
        (0x21, 0x21, v6, Some(between("[::1]:1", "[2020:2020:2020:2020:2020:2020:2020:2020]:2"))),
        // Not TCP.
        (0x21, 0x12, V4.to_vec(), None),
        (0x21, 0x31, unix, None),
        (0x21, 0x00, long.clone(), None),
        // A health check: whatever follows is to be ignored.
        (0x20, 0x00, Vec::new(), None),
        (0x20, 0x11, long.clone(), None),
        (0x20, 0xff, long, None),
    ] {
        let mut bytes = v2(command, family, &rest);
        let header = Header { length: bytes.len(), addresses: expected };
        bytes.extend(b"hello");
        assert_eq!(parse(&bytes), Ok(Some(header)), "{command:x} {family:x}");
    }
}

#[test]
fn what_version_2_does_not_allow_is_refused() {
    for (bytes, expected) in [
        (v2(0x31, 0x11, &V4), "unknown version"),
        (v2(0x22, 0x11, &V4), "unknown command"),
        (v2(0x21, 0x41, &V4), "unknown address family"),
        (v2(0x21, 0x13, &V4), "unknown address family or protocol"),
        (v2(0x21, 0x11, &V4[..11]), "shorter than its addresses"),
        (v2(0x21, 0x11, &[&V4[..], &[4, 0]].concat()), "ends within an extension"),
        (v2(0x21, 0x11, &[&V4[..], &[4, 0, 2, 9]].concat()), "ends within an extension"),
        (v2(0x21, 0x11, &[&V4[..], &[3, 0, 4, 1, 2, 3, 4]].concat()), "checksum"),
        (v2(0x21, 0x11, &[&V4[..], &[3, 0, 0]].concat()), "checksum"),
        (v2(0x21, 0x11, &[0; LONGEST_V2 - FIXED + 1]), "16 KiB"),
    ] {
        assert!(refused(&bytes).contains(expected), "{expected}: {}", refused(&bytes));
    }
    // Before all of it was received.
    assert!(refused(&v2(0x21, 0x11, &[0; LONGEST_V2])[..FIXED]).contains("16 KiB"));
}

#[test]
fn a_checksum_is_that_of_the_header_without_it() {
    assert_eq!(crc32c(b"123456789".iter().copied()), 0xe306_9283, "RFC 3720's own");
    let rest = |sum: [u8; 4]| [&V4[..], &[4, 0, 1, 7, 3, 0, 4], &sum, &[4, 0, 0]].concat();
    let sum = crc32c(v2(0x21, 0x11, &rest([0; 4])).into_iter());
    let whole = v2(0x21, 0x11, &rest(sum.to_be_bytes()));
    assert!(parse(&whole).unwrap().unwrap().addresses.is_some());
    let kind = FIXED + V4.len() + 4;
    for index in (SIGNATURE.len() + 2..whole.len()).filter(|index| *index != kind) {
        let mut damaged = whole.clone();
        damaged[index] ^= 1;
        assert!(!matches!(parse(&damaged), Ok(Some(_))), "at {index}");
    }
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| address(ip, port))
}

fn any_version() -> impl Strategy<Value = ProxyVersion> {
    prop_oneof![Just(ProxyVersion::V1), Just(ProxyVersion::V2)]
}

proptest! {
    #[test]
    fn what_is_written_is_read_once_all_of_it_has_arrived(
        version in any_version(),
        ends in prop::option::of((any_address(), any_address())),
        behind in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let addresses = ends.map(|(source, destination)| Addresses { source, destination });
        let mut bytes = encode(version, addresses.as_ref());
        let length = bytes.len();
        bytes.extend(behind);
        for cut in 0..=bytes.len() {
            let expected = (cut >= length).then_some(Header { length, addresses });
            prop_assert_eq!(parse(&bytes[..cut]), Ok(expected), "{}", cut);
        }
    }

    #[test]
    fn what_was_decided_stays_so_whatever_follows(
        version in any_version(),
        at in any::<Index>(),
        with in any::<u8>(),
        behind in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let some = between("192.0.2.1:43981", "127.0.0.1:80");
        let mut bytes = encode(version, Some(&some));
        let at = at.index(bytes.len());
        bytes[at] = with;
        bytes.extend(behind);
        let whole = parse(&bytes);
        for cut in 0..bytes.len() {
            let part = parse(&bytes[..cut]);
            prop_assert!(part == Ok(None) || part == whole, "{}: {:?} and {:?}", cut, part, whole);
        }
    }
}
