//! What is special to aliases that speak PostgreSQL.

use super::{
    form::*,
    scalars::*,
    table::{choice, default_sections, section},
};

section! {
    /// PostgreSQL.
    #[derive(Copy, Eq)]
    pub struct Postgres {
        /// Which servers a session may go to, by what they report when it starts.
        role: Role as OneOf<Role> = Role::Any,
        /// Whether SCRAM with channel binding is offered to clients that connect in plaintext.
        channel_binding: ChannelBinding as OneOf<ChannelBinding> = ChannelBinding::Strip,
        /// How TLS to the target begins.
        negotiation: Negotiation as OneOf<Negotiation> = Negotiation::Request,
        /// Cancel what a client is waiting for when it disconnects.
        cancel_on_disconnect: bool as Bool = false,
    }
}

choice! {
    /// Which servers a session may go to.
    pub enum Role {
        /// Any server.
        Any = "any",
        /// A server that is not in hot standby.
        Primary = "primary",
        /// A server in hot standby.
        Standby = "standby",
    }
}

choice! {
    /// Whether a client in plaintext is offered SCRAM with channel binding.
    pub enum ChannelBinding {
        /// It is not: libpq gives up where it is offered without TLS.
        Strip = "strip",
        /// It is offered what the server offers.
        Pass = "pass",
    }
}

choice! {
    /// How TLS to a PostgreSQL server begins.
    pub enum Negotiation {
        /// With an SSLRequest.
        Request = "request",
        /// At once, with the ALPN protocol `postgresql`: PostgreSQL 17 and later.
        Direct = "direct",
    }
}

default_sections!(Postgres);
