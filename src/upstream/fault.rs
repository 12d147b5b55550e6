//! The faults of an alias without a target, or without room for another request.

use std::sync::Arc;

use super::{LimitReached, NoTarget};
use crate::fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken};

impl Cause for NoTarget {
    fn fix(&self) -> Option<String> {
        match self {
            Self::Resolve(error) => Some(error.fix()),
            Self::Refused(refusal) => Some(refusal.fix()),
            Self::Unusable(error) => error.hint(),
            Self::Pending(_) => Some(
                "check that the DNS servers of resolv.conf, or of `dns.servers`, can be reached"
                    .into(),
            ),
        }
    }

    fn chain(&self) -> Option<&[Arc<str>]> {
        match self {
            Self::Resolve(error) => Some(error.chain()),
            Self::Refused(refusal) => Some(&refusal.chain),
            Self::Unusable(_) | Self::Pending(_) => None,
        }
    }
}

impl From<NoTarget> for Fault {
    fn from(error: NoTarget) -> Self {
        let (kind, stage) = match &error {
            NoTarget::Resolve(error) => (error.kind(), Stage::Resolve),
            NoTarget::Refused(_) => (Kind::NameNotAllowed, Stage::Policy),
            NoTarget::Unusable(error) => (error.kind(), Stage::Tls),
            NoTarget::Pending(_) => (Kind::DnsTimeout, Stage::Resolve),
        };
        let (blame, taken) = (Blame::Target, Taken::Nothing);
        Self::new(Diagnosis { kind, stage, blame, taken, endpoint: None }, error)
    }
}

impl Cause for LimitReached {
    fn fix(&self) -> Option<String> {
        Some("raise `limits.requests`".into())
    }
}

impl From<LimitReached> for Fault {
    fn from(error: LimitReached) -> Self {
        let diagnosis = Diagnosis {
            kind: Kind::LimitReached,
            stage: Stage::Request,
            blame: Blame::Alias,
            taken: Taken::Nothing,
            endpoint: None,
        };
        Self::new(diagnosis, error)
    }
}
