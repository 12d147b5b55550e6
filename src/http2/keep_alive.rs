//! Notices a peer that has vanished before the kernel would, by PINGs.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

use crate::stream::Backlog;

/// Sends PINGs to a silent client, as part of polling its connection.
pub struct KeepAlive {
    ping: Option<PingPong>,
    interval: Duration,
    timeout: Duration,
    timer: Pin<Box<Sleep>>,
    /// How many bytes had been received and taken when the timer was set.
    moved: u64,
    /// What waits for the peer in the kernel: a slow reader sees the PING late.
    backlog: Backlog,
    /// A PING was sent, and there is no reply yet.
    is_asked: bool,
    /// A PING has just been queued.
    has_just_asked: bool,
}

/// The peer is gone.
pub struct Silent;

impl KeepAlive {
    /// Sends a PING after `interval` without a byte, and waits `timeout` for a reply.
    pub fn new(ping: Option<PingPong>, interval: Duration, timeout: Duration) -> Self {
        let timer = Box::pin(sleep(interval));
        let backlog = Backlog::default();
        Self {
            ping,
            interval,
            timeout,
            timer,
            moved: 0,
            backlog,
            is_asked: false,
            has_just_asked: false,
        }
    }

    /// To be polled with the connection. `moved`: how many bytes were received, or taken by our kernel. `takes`: whether
    /// a [`Backlog`] has moved. Ready if a PING has to be written, or with an error if the peer is gone.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        moved: u64,
        takes: impl Fn(&mut Backlog) -> bool,
    ) -> Poll<Result<(), Silent>> {
        let Some(ping) = &mut self.ping else { return Poll::Pending };
        if std::mem::take(&mut self.has_just_asked) {
            self.moved = moved;
        }
        if self.is_asked && ping.poll_pong(cx).is_ready() {
            self.is_asked = false;
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let takes = takes(&mut self.backlog);
            let is_alive = std::mem::replace(&mut self.moved, moved) != moved || takes;
            if is_alive {
                self.timer.as_mut().reset(Instant::now() + self.interval);
            } else if self.is_asked {
                return Poll::Ready(Err(Silent));
            } else {
                // Fails only when the connection has ended, which is noticed elsewhere.
                let is_sent = ping.send_ping(Ping::opaque()).is_ok();
                (self.is_asked, self.has_just_asked) = (is_sent, is_sent);
                self.timer.as_mut().reset(Instant::now() + self.timeout);
                if is_sent {
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use bytes::Bytes;
    use tokio::{
        io::{DuplexStream, duplex},
        time::timeout,
    };

    use super::*;

    const MOMENT: Duration = Duration::from_millis(10);

    /// Ready once its peer, which never replies, is thought to be gone. `moved` says what has come and gone by
    /// the next look.
    async fn silent(mut moved: impl FnMut() -> u64, takes: impl Fn(&mut Backlog) -> bool) {
        let (client, server) = duplex(64 * 1024);
        let (peer, server) =
            tokio::join!(h2::client::handshake(client), h2::server::handshake(server));
        let _peer = peer.unwrap();
        let mut server: h2::server::Connection<DuplexStream, Bytes> = server.unwrap();
        let mut keep_alive = KeepAlive::new(server.ping_pong(), MOMENT, MOMENT);
        poll_fn(|cx| {
            loop {
                assert!(pin!(server.accept()).poll(cx).is_pending());
                match keep_alive.poll(cx, moved(), &takes) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(Silent)) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_peer_that_does_not_reply_is_gone_unless_it_still_takes_or_sends_something() {
        silent(|| 0, |_| false).await;
        let mut moved = 0;
        let moving = silent(
            || {
                moved += 1;
                moved
            },
            |_| false,
        );
        timeout(MOMENT * 20, moving).await.unwrap_err();
        timeout(MOMENT * 20, silent(|| 0, |_| true)).await.unwrap_err();
    }
}
