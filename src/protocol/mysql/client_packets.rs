//! What a client sends once its session has begun, as far as it says that the session ends.

use super::packet;

/// The client ends its session.
const COM_QUIT: &[u8] = &[1, 0, 0, 0, 1];

/// The header of a compressed packet: its length, its sequence number, and the length of what is in it, or 0 if that is
/// not compressed.
const COMPRESSED_HEADER: usize = 7;

/// The packets of a client, which are only followed, in whatever pieces they come: the bytes of COM_QUIT may be anywhere
/// within others.
#[derive(Clone, Debug)]
pub struct ClientPackets {
    /// Whether client and server compress.
    compressed: bool,
    /// The beginning of the next header.
    header: [u8; COMPRESSED_HEADER],
    filled: usize,
    /// What is missing of the last payload.
    missing: usize,
    /// Whether the last packet is COM_QUIT, as far as it has come.
    quits: bool,
}

impl ClientPackets {
    /// Those that follow the server's OK.
    pub(super) fn new(compressed: bool) -> Self {
        Self { compressed, header: [0; COMPRESSED_HEADER], filled: 0, missing: 0, quits: false }
    }

    /// Follows more of them.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let expected =
                if self.missing > 0 { self.missing } else { self.header().len() - self.filled };
            let (piece, rest) = bytes.split_at(expected.min(bytes.len()));
            bytes = rest;
            if self.missing > 0 {
                self.payload(piece);
            } else {
                self.head(piece);
            }
        }
    }

    /// Whether the last thing that the client has said, whole, is that it ends the session.
    pub fn has_quit(&self) -> bool {
        self.quits && self.missing == 0
    }

    fn header(&self) -> &[u8] {
        let length = if self.compressed { COMPRESSED_HEADER } else { packet::HEADER };
        &self.header[..length]
    }

    /// The payload of a packet that ends the session: a compressed one has the other within it.
    fn quit(&self) -> &'static [u8] {
        if self.compressed { COM_QUIT } else { &COM_QUIT[packet::HEADER..] }
    }

    fn head(&mut self, piece: &[u8]) {
        self.quits = false;
        self.header[self.filled..][..piece.len()].copy_from_slice(piece);
        self.filled += piece.len();
        if self.filled < self.header().len() {
            return;
        }
        self.filled = 0;
        let [a, b, c, ..] = self.header;
        self.missing = usize::from(a) | usize::from(b) << 8 | usize::from(c) << 16;
        let begins = if self.compressed { self.header[4..] == [0; 3] } else { self.header[3] == 0 };
        self.quits = begins && self.missing == self.quit().len();
    }

    fn payload(&mut self, piece: &[u8]) {
        if self.quits {
            let quit = self.quit();
            self.quits = quit[quit.len() - self.missing..].starts_with(piece);
        }
        self.missing -= piece.len();
    }
}
