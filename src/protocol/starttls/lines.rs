//! Lines of text, as servers of mail send them.

use bytes::{BufMut as _, BytesMut};

use super::{MAX_RECEIVED, StartTlsError};

/// Takes lines, and counts what it has taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lines {
    taken: usize,
}

impl Lines {
    /// The next line, without its end; `None` while it is incomplete.
    pub(super) fn take(
        &mut self,
        received: &mut BytesMut,
    ) -> Result<Option<BytesMut>, StartTlsError> {
        let room = MAX_RECEIVED - self.taken;
        let end = received.iter().take(room).position(|byte| *byte == b'\n');
        let Some(end) = end else {
            return match received.len() < room {
                true => Ok(None),
                false => Err(StartTlsError::TooMuch),
            };
        };
        self.taken += end + 1;
        let mut line = received.split_to(end + 1);
        line.truncate(end);
        if line.last() == Some(&b'\r') {
            line.truncate(end - 1);
        }
        // Clients may see an end of a line there, or of the text.
        match line.iter().any(|byte| matches!(byte, b'\r' | b'\0')) {
            true => Err(StartTlsError::unexpected(&line)),
            false => Ok(Some(line)),
        }
    }
}

/// Adds a line with its end.
pub(super) fn put_line(line: &[u8], to: &mut BytesMut) {
    to.put_slice(line);
    to.put_slice(b"\r\n");
}
