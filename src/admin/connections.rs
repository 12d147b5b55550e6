//! The admin listener's connections. Their number is limited, and a client with many connections cannot
//! prevent a probe from getting its response.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// The limit of connections from loopback. Those from elsewhere have their own limit of the same size.
const MAX_CONNECTIONS: usize = 64;

/// The open connections. A new one is never refused: at the limit, a connection of the address that has the
/// most is closed, preferably an idle one, and of these the oldest.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    next: u64,
    /// Sorted by age.
    open: BTreeMap<u64, Open>,
}

struct Open {
    peer: IpAddr,
    in_use: bool,
    evicted: CancellationToken,
}

/// One connection's place, until it is dropped.
pub(super) struct Place {
    number: u64,
    evicted: CancellationToken,
    connections: Connections,
}

/// A request on a connection, from its head to the end of its response.
pub(super) struct InUse {
    number: u64,
    connections: Connections,
}

impl Connections {
    /// A place for a new connection, and whether another one had to be closed for it.
    pub(super) fn admit(&self, peer: IpAddr) -> (Place, bool) {
        let mut table = self.0.lock();
        let peer = peer.to_canonical();
        let evicted = CancellationToken::new();
        let number = table.next;
        table.next += 1;
        table.open.insert(number, Open { peer, in_use: false, evicted: evicted.clone() });
        let made_room = table.make_room(number, peer.is_loopback());
        (Place { number, evicted, connections: self.clone() }, made_room)
    }
}

impl Table {
    fn make_room(&mut self, newcomer: u64, loopback: bool) -> bool {
        let rivals = || self.open.iter().filter(|(_, open)| open.peer.is_loopback() == loopback);
        let mut held: HashMap<IpAddr, usize> = HashMap::new();
        for (_, open) in rivals() {
            *held.entry(open.peer).or_default() += 1;
        }
        if held.values().sum::<usize>() <= MAX_CONNECTIONS {
            return false;
        }
        let others = rivals().filter(|(number, _)| **number != newcomer);
        let last = others
            .max_by_key(|(number, open)| (held.get(&open.peer), !open.in_use, Reverse(**number)));
        let Some(number) = last.map(|(number, _)| *number) else { return false };
        if let Some(open) = self.open.remove(&number) {
            open.evicted.cancel();
        }
        true
    }

    fn in_use(&mut self, number: u64, in_use: bool) {
        if let Some(open) = self.open.get_mut(&number) {
            open.in_use = in_use;
        }
    }
}

impl Place {
    /// Waits until the connection must be closed to make room.
    pub(super) fn evicted(&self) -> WaitForCancellationFuture<'_> {
        self.evicted.cancelled()
    }

    /// Marks the connection as in use until the value is dropped.
    pub(super) fn in_use(&self) -> InUse {
        self.connections.0.lock().in_use(self.number, true);
        InUse { number: self.number, connections: self.connections.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.0.lock().open.remove(&self.number);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.connections.0.lock().in_use(self.number, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_evicted(place: &Place) -> bool {
        place.evicted.is_cancelled()
    }

    fn admit(connections: &Connections, peer: IpAddr, count: usize) -> Vec<Place> {
        (0..count).map(|_| connections.admit(peer).0).collect()
    }

    #[test]
    fn who_holds_most_makes_room_and_its_oldest_idle_connection_goes() {
        let connections = Connections::default();
        let flood = admit(&connections, from(1), MAX_CONNECTIONS - 1);
        let _busy = flood[0].in_use();
        let kubelet = connections.admit(from(2)).0;
        assert!(!flood.iter().any(is_evicted), "there was room");
        let scraper = connections.admit(from(3)).0;
        assert!(is_evicted(&flood[1]) && !is_evicted(&flood[0]), "the oldest that is idle");
        let more = admit(&connections, from(1), 500);
        assert!(!is_evicted(&kubelet) && !is_evicted(&scraper));
        assert!(!is_evicted(more.last().unwrap()), "the newest is served");
        assert_eq!(connections.0.lock().open.len(), MAX_CONNECTIONS);
    }

    #[test]
    fn a_connection_in_use_goes_where_all_of_its_address_are() {
        let connections = Connections::default();
        let slow = admit(&connections, from(1), MAX_CONNECTIONS);
        let _slow: Vec<_> = slow.iter().map(Place::in_use).collect();
        let probe = connections.admit(from(2)).0;
        assert!(is_evicted(&slow[0]) && !is_evicted(&probe));
    }

    #[test]
    fn loopback_has_its_own_room() {
        let connections = Connections::default();
        let own = admit(&connections, IpAddr::from([127, 0, 0, 1]), MAX_CONNECTIONS);
        let mapped = connections.admit("::ffff:10.0.0.9".parse().unwrap()).0;
        let outside: Vec<_> = (0..200).map(|last| connections.admit(from(last)).0).collect();
        assert!(!own.iter().any(is_evicted));
        assert!(is_evicted(&mapped), "the oldest of many with one each");
        assert_eq!(outside.iter().filter(|place| !is_evicted(place)).count(), MAX_CONNECTIONS);
    }

    #[test]
    fn a_connection_that_ends_leaves_its_place() {
        let connections = Connections::default();
        let place = connections.admit(from(1)).0;
        let in_use = place.in_use();
        drop(place);
        drop(in_use);
        assert!(connections.0.lock().open.is_empty());
    }
}
