//! Counts a peer's frames. What `h2` does not bound by itself is bounded here: frames that cost the peer
//! little, and that one with requests to make, or to respond to, sends few of.
//!
//! `h2` itself limits CONTINUATION frames, tiny DATA frames, streams reset before they were accepted and streams of
//! clients that it had to reset. The figures here are Envoy's, or stricter.
//!
//! It also ends a connection at its hundred and first empty DATA frame, however long it has lived, and some peers
//! send one whenever a body is flushed. These are hidden from it, and counted here.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::stream::{ByteStream, Socket};

const HEADER: usize = 9;
const PREFACE: usize = 24;

/// PRIORITY frames: this many, and as many again for each stream.
const PRIORITIES: u64 = 100;

/// HEADERS frames for each stream, and at first. Origins send several: `1xx` responses, and trailers.
const HEADS_A_STREAM: u64 = 100;
const HEADS_AT_FIRST: u64 = 1000;

/// WINDOW_UPDATE frames at first, for each stream, and for each DATA frame that the peer was sent.
const UPDATES_AT_FIRST: u64 = 5;
const UPDATES_A_STREAM: u64 = 2;
const UPDATES_A_FRAME: u64 = 20;

/// Other control frames (PING, SETTINGS, RST_STREAM, ...): initially, and for each second. One more is allowed
/// for each stream, and for each DATA frame in either direction.
const QUIET_AT_FIRST: u64 = 1000;
const QUIET_A_SECOND: u64 = 10;

/// Empty DATA frames of a client, with nothing of a body or a head in between.
const EMPTY_IN_A_ROW: u64 = 100;

/// What a peer sends too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flood {
    /// PRIORITY.
    #[error("too many PRIORITY frames")]
    Priorities,
    /// WINDOW_UPDATE.
    #[error("too many WINDOW_UPDATE frames")]
    Updates,
    /// PING, SETTINGS, RST_STREAM and other control frames.
    #[error("too many PING, SETTINGS or other control frames")]
    Control,
    /// HEADERS.
    #[error("too many HEADERS frames")]
    Heads,
    /// DATA without data.
    #[error("too many empty DATA frames")]
    Empty,
}

/// Frame types (RFC 9113 §6).
mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    /// An unknown type: such frames are discarded (RFC 9113 §5.5).
    pub const IGNORED: u8 = 0xff;
}

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const ACK: u8 = 1;

/// A peer's frames, as their headers pass by.
#[derive(Debug)]
pub struct Frames {
    since: Instant,
    /// The next frame's header, as far as it has arrived.
    header: [u8; HEADER],
    header_length: usize,
    /// How much of the current frame, or of the preface, is still to come.
    left: usize,
    kind: u8,
    /// A header block continues in the next frame.
    in_block: bool,
    last_stream: u32,
    frames: u64,
    streams: u64,
    heads: u64,
    data: u64,
    priorities: u64,
    updates: u64,
    quiet: u64,
    /// Empty DATA frames in a row, and how many there may be.
    empty: u64,
    max_empty: u64,
}

impl Frames {
    /// Of a client's connection, of which nothing was read, not even the preface.
    pub fn of_client() -> Self {
        Self { left: PREFACE, max_empty: EMPTY_IN_A_ROW, ..Self::of_origin() }
    }

    /// Of a connection to an origin, of which nothing was read.
    pub fn of_origin() -> Self {
        Self {
            since: Instant::now(),
            header: [0; HEADER],
            header_length: 0,
            left: 0,
            kind: kind::DATA,
            in_block: false,
            last_stream: 0,
            frames: 0,
            streams: 0,
            heads: 0,
            data: 0,
            priorities: 0,
            updates: 0,
            quiet: 0,
            empty: 0,
            max_empty: u64::MAX,
        }
    }

    /// Counts the frames in the next bytes, and changes the type of empty DATA frames so that they are ignored. One
    /// whose header is divided between two reads stays as it is.
    pub fn read(&mut self, mut bytes: &mut [u8]) {
        loop {
            let skipped = self.left.min(bytes.len());
            self.left -= skipped;
            bytes = &mut bytes[skipped..];
            let length = (HEADER - self.header_length).min(bytes.len());
            if length == 0 {
                return;
            }
            self.header[self.header_length..][..length].copy_from_slice(&bytes[..length]);
            self.header_length += length;
            if self.header_length == HEADER {
                self.header_length = 0;
                let in_block = self.in_block;
                self.begin();
                if length == HEADER && !in_block && self.is_empty_data() {
                    bytes[3] = kind::IGNORED;
                }
            }
            bytes = &mut bytes[length..];
        }
    }

    /// A frame's header is complete.
    fn begin(&mut self) {
        let [a, b, c, kind, flags, stream @ ..] = self.header;
        self.left = u32::from_be_bytes([0, a, b, c]) as usize;
        self.kind = kind;
        self.frames += 1;
        match kind {
            kind::DATA if self.left > 0 => {
                self.data += 1;
                self.empty = 0;
            }
            kind::DATA => {
                self.quiet += 1;
                self.empty += u64::from(flags & END_STREAM == 0);
            }
            kind::HEADERS | kind::CONTINUATION => {
                self.in_block = flags & END_HEADERS == 0;
                self.heads += u64::from(kind == kind::HEADERS);
                self.empty = 0;
                let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
                if stream > self.last_stream {
                    self.last_stream = stream;
                    self.streams += 1;
                }
            }
            kind::PRIORITY => self.priorities += 1,
            kind::WINDOW_UPDATE => self.updates += 1,
            kind::PING | kind::SETTINGS if flags & ACK != 0 => {}
            _ => self.quiet += 1,
        }
    }

    /// Whether the frame that has just begun is an empty DATA frame that does not end its stream.
    fn is_empty_data(&self) -> bool {
        let [_, _, _, _, flags, stream @ ..] = self.header;
        self.kind == kind::DATA
            && self.left == 0
            && flags & (END_STREAM | PADDED) == 0
            && stream != [0; 4]
    }

    /// Streams that the peer has opened.
    pub fn streams(&self) -> u64 {
        self.streams
    }

    /// Whether there were too many frames of a kind for the number of streams from both sides. `sent`: DATA frames
    /// sent to the peer.
    pub fn flood(&self, streams: u64, sent: u64) -> Option<Flood> {
        if self.priorities > PRIORITIES * (1 + streams) {
            return Some(Flood::Priorities);
        }
        if self.heads > HEADS_AT_FIRST + HEADS_A_STREAM * streams {
            return Some(Flood::Heads);
        }
        if self.empty > self.max_empty {
            return Some(Flood::Empty);
        }
        let updates = UPDATES_A_STREAM * streams + UPDATES_A_FRAME * sent;
        if self.updates > UPDATES_AT_FIRST + updates {
            return Some(Flood::Updates);
        }
        // Most connections never need the time.
        let quiet = QUIET_AT_FIRST + streams + self.data + sent;
        let is_flood = self.quiet > quiet
            && self.quiet > quiet + QUIET_A_SECOND * self.since.elapsed().as_secs();
        is_flood.then_some(Flood::Control)
    }

    /// The number of the frame that has begun and is not complete, or whose header block is not. An incomplete
    /// DATA frame does not count: its stream has an idle timer.
    pub fn midway(&self) -> Option<u64> {
        let is_midway =
            self.header_length > 0 || self.in_block || self.left > 0 && self.kind != kind::DATA;
        is_midway.then_some(self.frames)
    }
}

/// A stream whose frames are counted as they are read.
#[derive(Debug)]
pub struct Inspected<S> {
    stream: S,
    frames: Frames,
}

impl<S> Inspected<S> {
    /// Of a stream of which nothing was read.
    pub fn new(stream: S, frames: Frames) -> Self {
        Self { stream, frames }
    }

    /// What was read.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }
}

impl<S: ByteStream> ByteStream for Inspected<S> {
    fn socket(&self) -> Option<&Socket> {
        self.stream.socket()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Inspected<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.frames.read(&mut buf.filled_mut()[before..]);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Inspected<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.resize(HEADER + payload, 0);
        frame
    }

    fn after(frames: impl IntoIterator<Item = Vec<u8>>) -> Frames {
        let mut read = Frames::of_client();
        read.read(&mut [b'x'; PREFACE]);
        frames.into_iter().for_each(|mut frame| read.read(&mut frame));
        read
    }

    fn flood(frames: &Frames, sent: u64) -> Option<Flood> {
        frames.flood(frames.streams(), sent)
    }

    #[test]
    fn a_flood_of_each_kind_is_told_and_what_clients_do_is_none() {
        let pings = |count| after(vec![frame(kind::PING, 0, 0, 8); count]);
        assert_eq!(flood(&pings(1000), 0), None);
        assert_eq!(flood(&pings(1001), 0), Some(Flood::Control));
        assert_eq!(flood(&pings(1001), 1), None, "one for each frame that it was sent");
        let replies = after(vec![frame(kind::PING, ACK, 0, 8); 5000]);
        assert_eq!(flood(&replies, 0), None);
        let settings = after(vec![frame(kind::SETTINGS, 0, 0, 0); 1001]);
        assert_eq!(flood(&settings, 0), Some(Flood::Control));
        let unknown = after(vec![frame(0xfe, 0, 0, 0); 1001]);
        assert_eq!(flood(&unknown, 0), Some(Flood::Control));

        let priorities = |count| after(vec![frame(kind::PRIORITY, 0, 1, 5); count]);
        assert_eq!(flood(&priorities(100), 0), None);
        assert_eq!(flood(&priorities(101), 0), Some(Flood::Priorities));
        let updates = |count| after(vec![frame(kind::WINDOW_UPDATE, 0, 0, 4); count]);
        assert_eq!(flood(&updates(5), 0), None);
        assert_eq!(flood(&updates(6), 0), Some(Flood::Updates));
        assert_eq!(flood(&updates(25), 1), None);

        let empty = |count| vec![frame(kind::DATA, 0, 1, 0); count];
        assert_eq!(flood(&after(empty(100)), 0), None);
        assert_eq!(flood(&after(empty(101)), 0), Some(Flood::Empty));
        let flushed = (0..50).flat_map(|_| [empty(10), vec![frame(kind::DATA, 0, 1, 1)]].concat());
        assert_eq!(flood(&after(flushed), 0), None);

        // One for each stream, as with a client that resets what it no longer needs.
        let requests = (0..3000).flat_map(|number| {
            let stream = 2 * number + 1;
            [frame(kind::HEADERS, 5, stream, 20), frame(3, 0, stream, 4)]
        });
        assert_eq!(flood(&after(requests), 0), None);
    }

    #[test]
    fn an_origin_may_send_as_much_as_it_is_asked_for() {
        let of_origin = |kind, payload, count| {
            let mut read = Frames::of_origin();
            (0..count).for_each(|_| read.read(&mut frame(kind, END_HEADERS, 1, payload)));
            read
        };
        let heads = of_origin(kind::HEADERS, 20, 1200);
        assert_eq!(heads.flood(1, 0), Some(Flood::Heads));
        assert_eq!(heads.flood(2, 0), None);
        let resets = of_origin(3, 4, 1200);
        assert_eq!(resets.flood(100, 0), Some(Flood::Control));
        assert_eq!(resets.flood(1200, 0), None, "it refuses every stream");
        let updates = of_origin(kind::WINDOW_UPDATE, 4, 100);
        assert_eq!(updates.flood(1, 1), Some(Flood::Updates));
        assert_eq!(updates.flood(1, 5), None);
    }

    #[test]
    fn what_has_begun_and_not_ended_is_told_but_for_data() {
        assert!(Frames::of_client().midway().is_none());
        assert!(after([frame(kind::HEADERS, END_HEADERS, 1, 5)]).midway().is_none());
        assert!(after([frame(kind::HEADERS, 0, 1, 5)]).midway().is_some());
        let block = [frame(kind::HEADERS, 0, 1, 5), frame(kind::CONTINUATION, END_HEADERS, 1, 5)];
        assert!(after(block).midway().is_none());
        let cut =
            |kind, length| after([frame(kind, 4, 1, 20)[..length].to_vec()]).midway().is_some();
        assert!(cut(kind::DATA, 5) && !cut(kind::DATA, 12) && !cut(kind::DATA, 29));
        assert!(cut(kind::HEADERS, 12) && cut(kind::PING, 28) && !cut(kind::PING, 29));
    }

    #[test]
    fn only_empty_data_frames_that_end_nothing_are_hidden() {
        let data = |flags, stream, payload| frame(kind::DATA, flags, stream, payload);
        for (before, hidden) in [
            (data(0, 1, 0), true),
            (data(END_STREAM, 1, 0), false),
            (data(PADDED, 1, 0), false),
            // An error of the connection (RFC 9113 §6.1).
            (data(0, 0, 0), false),
            (data(0, 1, 5), false),
            (frame(kind::SETTINGS, 0, 0, 0), false),
        ] {
            let mut after = [frame(kind::PING, 0, 0, 8), before.clone()].concat();
            Frames::of_origin().read(&mut after);
            assert_eq!(after[17..] != before, hidden, "{before:?}");
            assert_eq!(after[20] == kind::IGNORED, hidden, "{before:?}");
        }
        // Within a header block, any other frame is an error (RFC 9113 §6.10).
        let mut block = [frame(kind::HEADERS, 0, 1, 5), data(0, 1, 0)].concat();
        let before = block.clone();
        Frames::of_origin().read(&mut block);
        assert_eq!(block, before);
        let mut divided = data(0, 1, 0);
        let mut read = Frames::of_origin();
        read.read(&mut divided[..4]);
        read.read(&mut divided[4..]);
        assert_eq!(divided, data(0, 1, 0));
    }

    proptest! {
        #[test]
        fn it_does_not_matter_in_which_pieces_frames_come(
            frames in prop::collection::vec((0_u8..11, any::<u8>(), 0_u32..9, 0_usize..40), 0..40),
            piece in 1_usize..30,
        ) {
            let frames: Vec<_> = frames.into_iter().map(|(k, f, s, p)| frame(k, f, s, p)).collect();
            let whole = after(frames.clone());
            let parts = after(frames.concat().chunks(piece).map(<[u8]>::to_vec));
            prop_assert_eq!(whole.midway(), parts.midway());
            let counts = |f: &Frames| (f.streams, f.data, f.priorities, f.updates, f.quiet);
            prop_assert_eq!(counts(&whole), counts(&parts));
        }
    }
}
