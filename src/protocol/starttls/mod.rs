//! STARTTLS: what is said to a server of mail or LDAP before TLS, and what a client is sent that cannot be served.
//!
//! Nothing that was received before TLS counts after it, save the greeting of an SMTP or POP3 server: it is kept,
//! and passed to the client once the server is verified.

mod ber;
mod error;
mod imap;
mod ldap;
mod lines;
mod pop3;
mod refusal;
mod smtp;

use std::net::IpAddr;

use bytes::{Bytes, BytesMut};

pub use error::StartTlsError;

use super::Step;
use crate::{config, fault::Fault};

/// The most bytes that a server may send before TLS.
pub const MAX_RECEIVED: usize = 16 * 1024;

/// The protocols whose TLS begins with STARTTLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartTls {
    /// SMTP (RFC 3207).
    Smtp,
    /// IMAP (RFC 9051 §6.2.1).
    Imap,
    /// POP3 (RFC 2595 §4).
    Pop3,
    /// LDAP (RFC 4511 §4.14).
    Ldap,
}

impl StartTls {
    /// That of an alias' protocol, if it has one.
    pub fn of(protocol: config::Protocol) -> Option<Self> {
        match protocol {
            config::Protocol::Smtp => Some(Self::Smtp),
            config::Protocol::Imap => Some(Self::Imap),
            config::Protocol::Pop3 => Some(Self::Pop3),
            config::Protocol::Ldap => Some(Self::Ldap),
            config::Protocol::Http
            | config::Protocol::Tcp
            | config::Protocol::Postgres
            | config::Protocol::Mysql => None,
        }
    }

    /// Whether more of what the client sends has to be known before it can be refused. `sent` is what it has sent so far.
    pub fn awaits_request(self, sent: &[u8]) -> bool {
        self == Self::Ldap && ldap::Request::is_incomplete(sent)
    }

    /// What a client is sent whose connection cannot be served. `sent` is what the client has sent so far: an LDAP
    /// client that waits for a response gets one.
    pub fn refusal(self, why: &Fault, sent: &[u8]) -> Bytes {
        match self {
            Self::Smtp => refusal::smtp(why),
            Self::Imap => refusal::imap(why),
            Self::Pop3 => refusal::pop3(why),
            Self::Ldap => refusal::ldap(why, sent),
        }
    }
}

/// What is said to a server before TLS, on one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening(Exchange);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Exchange {
    Smtp(smtp::Opening),
    Imap(imap::Opening),
    Pop3(pop3::Opening),
    Ldap(ldap::Opening),
}

impl Opening {
    /// On a connection on which nothing has been said.
    pub fn new(protocol: StartTls) -> Self {
        Self(match protocol {
            StartTls::Smtp => Exchange::Smtp(smtp::Opening::default()),
            StartTls::Imap => Exchange::Imap(imap::Opening::default()),
            StartTls::Pop3 => Exchange::Pop3(pop3::Opening::default()),
            StartTls::Ldap => Exchange::Ldap(ldap::Opening::default()),
        })
    }

    /// Says which address the connection is made from: an SMTP client without a name calls itself by it.
    pub fn made_from(&mut self, local: IpAddr) {
        if let Exchange::Smtp(opening) = &mut self.0 {
            opening.made_from(local);
        }
    }

    /// What to do next, given what was received and not yet taken.
    ///
    /// No byte may be behind the server's consent: it would be read as if it had come by TLS.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Step, StartTlsError> {
        let step = match &mut self.0 {
            Exchange::Smtp(opening) => opening.next(received),
            Exchange::Imap(opening) => opening.next(received),
            Exchange::Pop3(opening) => opening.next(received),
            Exchange::Ldap(opening) => opening.next(received),
        }?;
        match step {
            Step::StartTls(_) if !received.is_empty() => Err(StartTlsError::BytesBeforeTls),
            step => Ok(step),
        }
    }
}

#[cfg(test)]
mod tests;
