//! How a peer that has vanished is noticed before the kernel would.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

/// Asks a silent peer whether it is there.
pub struct KeepAlive {
    ping: Option<PingPong>,
    interval: Duration,
    timeout: Duration,
    timer: Pin<Box<Sleep>>,
    /// How much had come when the timer was set.
    received: u64,
    /// It was asked, and has not replied.
    is_asked: bool,
}

/// The peer is gone.
pub struct Silent;

impl KeepAlive {
    /// Asks after `interval` without a byte, and waits for `timeout`.
    pub fn new(ping: Option<PingPong>, interval: Duration, timeout: Duration) -> Self {
        let timer = Box::pin(sleep(interval));
        Self { ping, interval, timeout, timer, received: 0, is_asked: false }
    }

    /// To be polled with the connection. `received` is how many bytes have come. Ready where a PING is to
    /// be written, or with an error where the peer is gone.
    pub fn poll(&mut self, cx: &mut Context<'_>, received: u64) -> Poll<Result<(), Silent>> {
        let Some(ping) = &mut self.ping else { return Poll::Pending };
        if self.is_asked && ping.poll_pong(cx).is_ready() {
            self.is_asked = false;
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let came = std::mem::replace(&mut self.received, received) != received;
            if came {
                self.timer.as_mut().reset(Instant::now() + self.interval);
            } else if self.is_asked {
                return Poll::Ready(Err(Silent));
            } else {
                // It fails at the connection's end only, which is noticed elsewhere.
                let is_sent = ping.send_ping(Ping::opaque()).is_ok();
                self.is_asked = is_sent;
                self.timer.as_mut().reset(Instant::now() + self.timeout);
                if is_sent {
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Pending
    }
}
