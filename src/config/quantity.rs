//! Parses and prints durations, sizes, percentages and addresses to listen on.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use thiserror::Error;

/// A duration or an address that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct BadValue(String);

/// The longest duration. Much longer ones would overflow when added to an instant.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

const NANOSECONDS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60 * 1_000_000_000),
    ("h", 3600 * 1_000_000_000),
    ("d", 24 * 3600 * 1_000_000_000),
];

const BYTES: &[(&str, usize)] = &[
    ("B", 1),
    ("kB", 1000),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
];

/// Parses `250ms`, `5s`, `1h30m`: whole numbers, each with its unit.
pub fn duration(text: &str) -> Result<Duration, BadValue> {
    let bad = |why: &str| {
        BadValue(format!("`{text}` {why}; use a duration such as `250ms`, `5s` or `1h`"))
    };
    if text.is_empty() {
        return Err(bad("is not a duration"));
    }
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let unit_end = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_end);
        if number.is_empty() {
            return Err(bad("is not a whole number with a unit"));
        }
        if unit.is_empty() {
            return Err(bad(if next.starts_with('.') {
                "has a fraction; use a smaller unit"
            } else {
                "has no unit"
            }));
        }
        let Some((_, size)) = NANOSECONDS.iter().find(|(name, _)| *name == unit) else {
            return Err(bad("has an unknown unit; the units are ns, us, ms, s, m, h, d"));
        };
        total = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*size))
            .and_then(|part| total.checked_add(part))
            .ok_or_else(|| bad("is longer than 366d"))?;
        rest = next;
    }
    match Duration::from_nanos(total) {
        time if time <= LONGEST => Ok(time),
        _ => Err(bad("is longer than 366d")),
    }
}

/// Prints it in the largest of h, s, ms, us, ns that needs no fraction.
pub(crate) fn print_duration(time: Duration) -> String {
    let nanos = time.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    ["h", "s", "ms", "us"]
        .iter()
        .filter_map(|unit| NANOSECONDS.iter().find(|(name, _)| name == unit))
        .find(|(_, size)| nanos.is_multiple_of(u128::from(*size)))
        .map_or_else(
            || format!("{nanos}ns"),
            |(unit, size)| format!("{}{unit}", nanos / u128::from(*size)),
        )
}

/// Parses `64KiB`, or a number of bytes.
pub(super) fn size(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = if unit.is_empty() { "B" } else { unit };
    BYTES
        .iter()
        .find(|(name, _)| *name == unit)
        .and_then(|(_, size)| number.parse::<usize>().ok()?.checked_mul(*size))
        .ok_or_else(|| {
            format!("`{text}` is not a size such as `64KiB` (units: B, KiB, MiB, GiB, kB, MB)")
        })
}

/// Prints it in the largest binary unit that needs no fraction.
pub(super) fn print_size(size: usize) -> String {
    BYTES
        .iter()
        .rev()
        .filter(|(unit, _)| unit.ends_with("iB"))
        .find(|(_, unit_size)| size != 0 && size.is_multiple_of(*unit_size))
        .map_or_else(
            || format!("{size}B"),
            |(unit, unit_size)| format!("{}{unit}", size / unit_size),
        )
}

/// Parses `20%` as 0.2. Rounded to six decimal places of the percentage.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').filter(|number| {
        number.starts_with(|c: char| c.is_ascii_digit())
            && number.bytes().all(|b| b.is_ascii_digit() || b == b'.')
    });
    number
        .and_then(|number| number.parse::<f64>().ok())
        .filter(|percent| *percent <= 100.0)
        .map(|percent| (percent * 1e6).round() / 1e8)
        .ok_or_else(|| format!("`{text}` is not a percentage from `0%` to `100%`, such as `20%`"))
}

/// Rounded like [`percent`], because 0.07 × 100 is 7.000000000000001.
pub(super) fn print_percent(share: f64) -> String {
    format!("{}%", (share * 1e8).round() / 1e6)
}

/// Parses `127.0.0.1:8080`, `[::1]:8080`, or a port on 127.0.0.1.
pub fn listen_address(text: &str) -> Result<SocketAddr, BadValue> {
    let example = "`127.0.0.1:8080`, `[::1]:8080`, or `8080` for port 8080 of 127.0.0.1";
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return match text.parse::<u16>() {
            Ok(port) => Ok((Ipv4Addr::LOCALHOST, port).into()),
            Err(_) => Err(BadValue(format!("`{text}` is not a port from 0 to 65535"))),
        };
    }
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Err(BadValue(format!("`{text}` has no port; use an address such as {example}")));
    }
    if let Some(port) = text.strip_prefix(':') {
        return Err(BadValue(format!(
            "`{text}` has no IP; use `{port}` for loopback, or `0.0.0.0:{port}` for every interface"
        )));
    }
    Err(BadValue(format!(
        "`{text}` is not an address to listen on; use an IP with a port, such as {example}"
    )))
}
