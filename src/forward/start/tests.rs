//! Two peers on pipes, and the start between them.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};

use super::*;
use crate::{
    config::{ChannelBinding, Role},
    protocol::postgres::{ClientTls, Settings, Startup},
};

const SETTINGS: Settings = Settings {
    role: Role::Any,
    channel_binding: ChannelBinding::Strip,
    client_tls: ClientTls::Offered,
};
const STARTUP: &[u8] = b"\0\0\0\x12\0\x03\0\0user\0app\0\0";
const GSS: &[u8] = &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
const SSL: &[u8] = &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const ASKS: &[u8] = b"R\0\0\0\x08\0\0\0\x03";
const PASSWORD: &[u8] = b"p\0\0\0\x0bsecret\0";
const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
const ERROR: &[u8] = b"E\0\0\0\x10C28P01\0Mno\0\0";

/// The proxy's ends of the two pipes.
struct Between {
    starting: Starting<Startup>,
    client: DuplexStream,
    target: DuplexStream,
}

impl Between {
    fn new() -> (Self, DuplexStream, DuplexStream) {
        let (client, application) = duplex(1024);
        let (target, server) = duplex(1024);
        let starting = Starting::new(Startup::new(SETTINGS, false), BytesMut::new());
        (Self { starting, client, target }, application, server)
    }

    async fn next(&mut self, has_target: bool) -> Result<Turn, Fault> {
        let target = has_target.then_some(&mut self.target);
        let next = self.starting.next(&mut self.client, target);
        timeout(Duration::from_secs(10), next).await.expect("something to do")
    }

    /// With a client that has sent its StartupMessage, and a target that has it.
    async fn dialled() -> (Self, DuplexStream, DuplexStream) {
        let (mut between, mut application, mut server) = Self::new();
        application.write_all(STARTUP).await.unwrap();
        assert_eq!(between.next(false).await.unwrap(), Turn::Dial);
        between.starting.dialled();
        expect(&mut server, STARTUP, &mut between, true).await;
        (between, application, server)
    }
}

/// Runs the start until a peer has received exactly these bytes.
async fn expect(peer: &mut DuplexStream, bytes: &[u8], between: &mut Between, has_target: bool) {
    let mut received = vec![0; bytes.len()];
    tokio::select! {
        biased;
        read = peer.read_exact(&mut received) => drop(read.unwrap()),
        turn = between.next(has_target) => panic!("{turn:?}"),
    }
    assert_eq!(received, bytes);
}

#[tokio::test]
async fn a_session_begins_once_both_sides_have_had_their_say() {
    let (mut between, mut application, mut server) = Between::dialled().await;
    // Before it is asked: it is kept from the server until then.
    application.write_all(PASSWORD).await.unwrap();
    server.write_all(ASKS).await.unwrap();
    expect(&mut application, ASKS, &mut between, true).await;
    expect(&mut server, PASSWORD, &mut between, true).await;
    server.write_all(&[WELCOME, b"N"].concat()).await.unwrap();
    assert_eq!(between.next(true).await.unwrap(), Turn::Established);
    let mut welcome = vec![0; WELCOME.len()];
    application.read_exact(&mut welcome).await.unwrap();
    let (start, from_client, from_target) = between.starting.into_parts();
    assert_eq!((&welcome[..], &from_client[..], &from_target[..]), (WELCOME, &b""[..], &b"N"[..]));
    assert!(start.into_session().is_some());
}

#[tokio::test]
async fn tls_is_made_between_two_packets() {
    let (mut between, mut application, _server) = Between::new();
    application.write_all(GSS).await.unwrap();
    expect(&mut application, b"N", &mut between, false).await;
    application.write_all(SSL).await.unwrap();
    assert_eq!(between.next(false).await.unwrap(), Turn::StartTls);
    let mut yes = [0];
    application.read_exact(&mut yes).await.unwrap();
    assert_eq!(&yes, b"S");
    between.starting.secured();
    application.write_all(STARTUP).await.unwrap();
    assert_eq!(between.next(false).await.unwrap(), Turn::Dial);
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_start() {
    let (mut between, application, _server) = Between::new();
    drop(application);
    assert_eq!(between.next(false).await.unwrap(), Turn::Close);
    let (mut between, application, _server) = Between::dialled().await;
    drop(application);
    assert_eq!(between.next(true).await.unwrap(), Turn::Close);
}

#[tokio::test]
async fn what_a_server_says_before_it_leaves_reaches_the_client() {
    let (mut between, mut application, mut server) = Between::dialled().await;
    server.write_all(&[ASKS, ERROR].concat()).await.unwrap();
    drop(server);
    // Nobody takes the password, and the server's reason comes first.
    application.write_all(PASSWORD).await.unwrap();
    assert_eq!(between.next(true).await.unwrap(), Turn::Close);
    let mut received = vec![0; ASKS.len() + ERROR.len()];
    application.read_exact(&mut received).await.unwrap();
    assert_eq!(received, [ASKS, ERROR].concat());
}

#[tokio::test]
async fn a_server_that_just_leaves_is_told_to_the_client() {
    let (mut between, _application, server) = Between::dialled().await;
    drop(server);
    let fault = between.next(true).await.unwrap_err();
    let refusal = between.starting.refusal(&fault);
    assert!(refusal.starts_with(b"E") && refusal.windows(6).any(|code| code == b"C08006"));
}
