//! What is said before TLS, over a real socket.

#![allow(clippy::unwrap_used)]

use tokio::net::TcpListener;

use super::*;
use crate::{
    config::{self, Negotiation},
    fault::{Kind, Stage},
    protocol::postgres,
};

/// What becomes of an SSLRequest to which a server responds so, and then closes.
async fn negotiated(response: &'static [u8]) -> Result<(), Fault> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap();
    let server = async {
        let (mut peer, _) = listener.accept().await.unwrap();
        let mut request = [0; 8];
        peer.read_exact(&mut request).await.unwrap();
        assert_eq!(request, postgres::Packet::SSL_REQUEST);
        peer.write_all(response).await.unwrap();
    };
    let client = async {
        let settings = config::Policy {
            allow_addresses: vec!["127.0.0.0/8".parse().unwrap()],
            ..Default::default()
        };
        let policy = AddressPolicy::new(&settings, []);
        let deadline = Deadline::new(Instant::now(), Duration::from_secs(10));
        let keepalive = Duration::from_secs(60);
        let request = ConnectRequest {
            endpoint,
            policy: &policy,
            keepalive,
            deadline,
            via: None,
            header: None,
        };
        let mut opened = open(&request).await.unwrap();
        let opening = postgres::Opening::new(Negotiation::Request);
        opened.negotiate(Opening::Postgres(opening), deadline).await
    };
    tokio::join!(client, server).0
}

#[tokio::test]
async fn tls_is_asked_for_before_it_begins() {
    negotiated(b"S").await.unwrap();
}

#[tokio::test]
async fn a_server_without_tls_is_left_with_nothing_said() {
    for (response, kind, words) in [
        (&b"N"[..], Kind::TlsProtocol, "does not support TLS"),
        (b"H", Kind::ResponseInvalid, "not PostgreSQL"),
        (b"", Kind::ConnectionLost, "closed the connection instead"),
    ] {
        let fault = negotiated(response).await.unwrap_err();
        assert_eq!((fault.kind(), fault.stage()), (kind, Stage::Tls));
        assert!(fault.is_of_endpoint() && fault.fix().is_some());
        assert!(fault.to_string().contains(words), "{fault}");
    }
}
