//! What a server reports of itself.

use super::message::take_text;
use crate::config::Role;

/// Longer than any version of PostgreSQL and its derivatives.
const MAX_VERSION: usize = 100;

/// The reported parameters that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerParameters {
    in_hot_standby: Option<bool>,
    default_transaction_read_only: Option<bool>,
    server_version: Option<Box<str>>,
}

/// What a server is to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerRole {
    /// It takes writes.
    Primary,
    /// It is in hot standby, and follows another.
    Standby,
}

impl ServerParameters {
    /// What the server is; `None` where it does not report that, as PostgreSQL before 14 and most poolers.
    pub fn role(&self) -> Option<ServerRole> {
        Some(if self.in_hot_standby? { ServerRole::Standby } else { ServerRole::Primary })
    }

    /// Whether its transactions are read-only unless they say otherwise.
    pub fn default_transaction_read_only(&self) -> Option<bool> {
        self.default_transaction_read_only
    }

    /// Its version, as it writes it.
    pub fn server_version(&self) -> Option<&str> {
        self.server_version.as_deref()
    }

    /// Takes note of a ParameterStatus; false where that is malformed.
    pub(super) fn report(&mut self, mut body: &[u8]) -> bool {
        let (Some(name), Some(value)) = (take_text(&mut body), take_text(&mut body)) else {
            return false;
        };
        match name {
            b"in_hot_standby" => self.in_hot_standby = Some(value == b"on"),
            b"default_transaction_read_only" => {
                self.default_transaction_read_only = Some(value == b"on");
            }
            b"server_version" => {
                let value = String::from_utf8_lossy(&value[..value.len().min(MAX_VERSION)]);
                self.server_version = Some(value.replace(char::is_control, "").into());
            }
            _ => {}
        }
        body.is_empty()
    }
}

impl ServerRole {
    /// Whether a session that wants `role` may be here.
    pub fn serves(self, role: Role) -> bool {
        match role {
            Role::Any => true,
            Role::Primary => self == Self::Primary,
            Role::Standby => self == Self::Standby,
        }
    }

    /// As the configuration has it.
    pub fn as_configured(self) -> Role {
        match self {
            Self::Primary => Role::Primary,
            Self::Standby => Role::Standby,
        }
    }

    /// The word for it in the configuration.
    pub fn word(self) -> &'static str {
        self.as_configured().word()
    }
}
