//! Loopback addresses at which the command finds the aliases without a proxy.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
};

use crate::config::{Alias, Protocol};

/// The last of the addresses 127.0.1.1 to 127.0.1.254.
const LAST: u8 = 254;

/// How many aliases are named in a line; the others are counted.
const MAX_NAMED: usize = 3;

/// Addresses from 127.0.1.1 on, each for one alias.
#[derive(Debug, Default)]
pub struct Addresses {
    used: u8,
}

impl Addresses {
    /// Gives every alias an address to listen on, if its ports can be bound there.
    ///
    /// Somebody else may take an address before it is bound: then call this again. It uses other addresses, until
    /// there are none left.
    pub fn place(&mut self, aliases: &mut [Alias]) -> Vec<Place> {
        let places = aliases.iter_mut().map(|alias| {
            let ports = ports(alias);
            let address = self.free(&ports);
            let listen = address.iter().flat_map(|&ip| ports.iter().map(move |&port| (ip, port)));
            alias.listen = listen.map(SocketAddr::from).collect();
            Place { alias: alias.name.clone(), ports, address }
        });
        places.collect()
    }

    /// An address on which all of `ports` are free.
    fn free(&mut self, ports: &[u16]) -> io::Result<IpAddr> {
        while self.used < LAST {
            self.used += 1;
            let address = IpAddr::from(Ipv4Addr::new(127, 0, 1, self.used));
            let bound = ports.iter().map(|&port| TcpListener::bind(SocketAddr::new(address, port)));
            match bound.collect::<io::Result<Vec<_>>>() {
                Ok(_) => return Ok(address),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => {
                    self.used -= 1;
                    return Err(error);
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "in use on 127.0.1.1 to 127.0.1.254"))
    }
}

/// The ports on which programs expect an alias.
fn ports(alias: &Alias) -> Vec<u16> {
    match alias.protocol {
        Protocol::Http => vec![80, 443],
        _ => vec![alias.target.as_ref().and_then(|target| target.port).unwrap_or(alias.port)],
    }
}

/// Where an alias is found.
#[derive(Debug)]
pub struct Place {
    /// Its name.
    pub alias: String,
    ports: Vec<u16>,
    /// Its address, or why it has none.
    pub address: io::Result<IpAddr>,
}

/// Tells people where the aliases are: "hosts file: webscaler-db is 127.0.1.1, port 5432".
pub fn describe(places: &[Place], hosts: Result<(), impl std::fmt::Display>) -> String {
    let placed = places.iter().filter_map(|place| Some((place, place.address.as_ref().ok()?)));
    let placed: Vec<_> = placed.collect();
    let mut text = match (&hosts, placed.is_empty()) {
        (_, true) => "no hosts file".to_owned(),
        (Ok(()), false) => {
            let each = placed.iter().map(|(place, address)| {
                format!("{} is {address}, {}", place.alias, numbers(&place.ports))
            });
            format!("hosts file: {}", some_of(each))
        }
        (Err(error), false) => {
            let each = placed.iter().map(|(place, address)| {
                format!("{} is at {address}, {}", place.alias, numbers(&place.ports))
            });
            format!("no hosts file ({error}): {}", some_of(each))
        }
    };
    let without = places.iter().filter_map(|place| {
        let error = place.address.as_ref().err()?;
        let ports = numbers(&place.ports);
        Some(format!("{} only through the proxy, as {ports} cannot be bound: {error}", place.alias))
    });
    let without: Vec<_> = without.collect();
    if !without.is_empty() {
        text.push_str("; ");
        text.push_str(&some_of(without.into_iter()));
    }
    text
}

fn numbers(ports: &[u16]) -> String {
    match ports {
        [port] => format!("port {port}"),
        ports => {
            let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
            format!("ports {}", ports.join(" and "))
        }
    }
}

fn some_of(mut each: impl ExactSizeIterator<Item = String>) -> String {
    let all = each.len();
    let named: Vec<_> = each.by_ref().take(MAX_NAMED).collect();
    match all - named.len() {
        0 => named.join(", "),
        more => format!("{}, and {more} more", named.join(", ")),
    }
}
