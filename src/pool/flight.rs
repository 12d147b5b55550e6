//! One dial for all requests that wait for the same HTTP/2 connection.

use tokio::sync::watch;

use crate::fault::Fault;

/// The dial that is under way for an HTTP/2 connection, if there is one.
#[derive(Debug, Default)]
pub(super) struct SingleFlight(Option<watch::Receiver<Option<Fault>>>);

/// A request's part in a dial.
#[derive(Debug)]
pub enum Flight {
    /// It dials, and drops this when done.
    Lead(Lead),
    /// Another request dials.
    Follow(Follow),
}

/// The request that dials. Tells the others the result, also if it is cancelled.
#[derive(Debug)]
pub struct Lead(watch::Sender<Option<Fault>>);

/// A request that waits for the leader.
#[derive(Debug)]
pub struct Follow(watch::Receiver<Option<Fault>>);

impl SingleFlight {
    pub(super) fn join(&mut self) -> Flight {
        match &self.0 {
            Some(flight) if flight.has_changed().is_ok() => Flight::Follow(Follow(flight.clone())),
            _ => {
                let (lead, flight) = watch::channel(None);
                self.0 = Some(flight);
                Flight::Lead(Lead(lead))
            }
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.0.as_ref().is_some_and(|flight| flight.has_changed().is_ok())
    }
}

impl Lead {
    /// Tells the followers that there is no connection: each of them would wait as long and fail in the same
    /// way. Dropping the leader instead has them look again.
    pub fn failed(self, fault: &Fault) {
        self.0.send_replace(Some(fault.clone()));
    }
}

impl Follow {
    /// Waits for the dial to end. Returns its failure, if it failed.
    pub async fn ended(mut self) -> Option<Fault> {
        // An error says that the leader is gone.
        let _ = self.0.changed().await;
        self.0.borrow().clone()
    }
}
