//! First bytes of clients, valid or not.

use super::*;
use crate::tls::{
    authority::Subject,
    server::{AcceptError, Accepted, Asked, ServerCertificates, ServerTls},
    store::Serving,
};
use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection};
use std::net::{IpAddr, Ipv4Addr};

#[tokio::test]
async fn a_whole_hello_for_a_name_that_is_served_begins_a_handshake() {
    // Nothing follows it, so the handshake cannot finish.
    let error = accept(&hello()).await.unwrap_err();
    assert!(matches!(error, AcceptError::Handshake(_)), "{error}");
    let stranger = replaced(&hello(), b"api.example.com", b"apx.example.com");
    let error = accept(&stranger).await.unwrap_err();
    assert!(
        matches!(&error, AcceptError::UnknownName { name, .. } if name.as_deref() == Some("apx.example.com"))
    );
}

#[test]
fn tickets_are_under_keys_that_are_replaced_every_six_hours() {
    assert_eq!(server().0.ticket_lifetime(), Some(2 * 6 * 3600));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_bytes_end_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(run(&bytes).is_err());
    }

    #[test]
    fn any_bytes_in_a_handshake_record_end_in_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..2048),
        length in any::<u16>(),
    ) {
        let mut record = vec![0x16, 3, 1];
        record.extend(length.to_be_bytes());
        record.extend(bytes);
        prop_assert!(run(&record).is_err());
    }

    #[test]
    fn a_hello_with_any_bytes_changed_ends_in_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        end in any::<prop::sample::Index>(),
    ) {
        let mut hello = hello();
        for (at, byte) in changes {
            let at = at.index(hello.len());
            hello[at] = byte;
        }
        hello.truncate(end.index(hello.len()) + 1);
        prop_assert!(run(&hello).is_err());
    }
}

fn run(bytes: &[u8]) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let accepted = runtime.block_on(accept(bytes));
    // Every error can be printed.
    accepted.map(drop).map_err(|error| error.to_string())
}

/// Accepts a client that sends only these bytes and reads the response.
async fn accept(bytes: &[u8]) -> Result<Accepted<DuplexStream>, AcceptError> {
    let (mut near, far) = duplex(64 * 1024);
    let names = || NAME.to_owned();
    let (tls, certificates) = server();
    let client = async {
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let mut response = Vec::new();
        near.read_to_end(&mut response).await.unwrap();
    };
    let choose = |name: Option<&str>| {
        let alias = name.is_none_or(|name| name == NAME).then_some(NAME);
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        certificates.find(Asked { alias, any: false, name, address }).cloned()
    };
    let accept = tls.accept(far, choose, names, None);
    timeout(DEADLINE, async { tokio::join!(accept, client).0 }).await.expect("an end")
}

fn server() -> (ServerTls, ServerCertificates) {
    let subject = Subject::new(NAME, [NAME.to_owned()], []);
    let serving = Serving::in_memory(&[subject], &Serving::default()).unwrap();
    (ServerTls::new().unwrap(), ServerCertificates::local(serving.certificates()))
}

fn hello() -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(NAME).unwrap();
    let mut hello = Vec::new();
    ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut hello).unwrap();
    hello
}

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}
