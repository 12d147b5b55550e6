//! Clients of HTTP/2 that send what costs them little and its reader much.

use crate::{
    clients::{Frames, hasty},
    support::{client::H2, scene::ALIAS, scripts, through::Through, within},
};

const PRIORITY: u8 = 2;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const UNKNOWN: u8 = 0xfe;
const ENHANCE_YOUR_CALM: u32 = 11;

#[tokio::test]
async fn a_client_that_floods_its_connection_with_frames_is_cut_off() {
    let through = Through::new("", scripts::answer).await;
    for (kind, payload) in [
        (PING, &[0; 8][..]),
        (Frames::SETTINGS, &[]),
        (PRIORITY, &[0, 0, 0, 0, 1]),
        (WINDOW_UPDATE, &[0, 0, 0, 1]),
        (UNKNOWN, &[]),
    ] {
        let mut frames = Frames::connect(through.address).await;
        let stream = if kind == PRIORITY { 5 } else { 0 };
        let flood = Frames::frame(kind, 0, stream, payload).repeat(3000);
        if frames.0.try_send(flood).await.is_ok() {
            is_cut_off(&mut frames, kind).await;
        }
        let mut other = H2::connect(through.address).await;
        assert_eq!(other.get(&format!("http://{ALIAS}/")).await.unwrap().head.status, 200);
    }
}

/// One after the other, so that none of them waits to be accepted.
#[tokio::test]
async fn a_client_that_resets_most_of_its_streams_at_once_is_cut_off() {
    let through = Through::new("", scripts::never_answer).await;
    let mut frames = Frames::connect(through.address).await;
    for stream in (0..1500).map(|number| 2 * number + 1) {
        frames
            .get(
                stream,
                &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", ALIAS)],
            )
            .await;
        let reset = Frames::frame(Frames::RST_STREAM, 0, stream, &8_u32.to_be_bytes());
        // What follows the reply has been read after the request was.
        let ping = Frames::frame(PING, 0, 0, &stream.to_be_bytes().repeat(2));
        if frames.0.try_send(ping).await.is_err() || !replied(&mut frames, stream).await {
            assert!(stream > 1000, "cut off after {stream}");
            return;
        }
        if frames.0.try_send(reset).await.is_err() {
            return;
        }
    }
    panic!("1500 resets were taken in silence");
}

#[tokio::test]
async fn a_frame_that_never_ends_is_given_up() {
    let (_origin, _proxy, address, _scene) = hasty("1s").await;
    let block = Frames::fields(&[(":method", "GET"), (":scheme", "http"), (":path", "/")]);
    for part in [
        Frames::frame(Frames::HEADERS, Frames::END_STREAM, 1, &block),
        Frames::frame(PING, 0, 0, &[0; 8])[..12].to_vec(),
        Frames::frame(PING, 0, 0, &[0; 8])[..3].to_vec(),
    ] {
        let mut frames = Frames::connect(address).await;
        frames.0.send(&part).await;
        is_cut_off(&mut frames, part[0]).await;
    }
}

/// It is told why, unless what it was still sending came in the way.
async fn is_cut_off(frames: &mut Frames, what: u8) {
    while let Some((kind, _, payload)) = frames.next().await {
        if kind == Frames::GOAWAY {
            assert_eq!(payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes(), "{what}");
        }
    }
}

/// Whether the reply to this PING comes before the connection ends.
async fn replied(frames: &mut Frames, number: u32) -> bool {
    loop {
        let Some(head) = within("a frame", frames.0.try_exactly(9)).await else { return false };
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = within("a payload", frames.0.try_exactly(length)).await;
        let Some(payload) = payload else { return false };
        match head[3] {
            PING if payload[..4] == number.to_be_bytes() => return true,
            Frames::GOAWAY => {
                assert_eq!(payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes());
                return false;
            }
            _ => {}
        }
    }
}
