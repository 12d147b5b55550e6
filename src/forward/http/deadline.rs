//! `timeouts.response`: how long a target may take to respond, counted from the end of the request.

use std::{future::poll_fn, pin::Pin, time::Duration};

use tokio::time::{Instant, sleep_until};

use crate::{body::RequestBody, connect::Wire};

/// How often, within the limit, the progress of a request that the target is still receiving is checked.
const LOOKS: u32 = 16;

/// Awaits a response's head for up to `limit` from the end of the request; `None` after that.
///
/// A request has ended once its body has, and the target's kernel has all of it. `wire` is the
/// connection, if it carries only this request; otherwise all of the body has to fit into the target's window. If the target stops
/// reading altogether, the request counts as sent, because the wait must have an end.
pub(super) async fn within<F: Future>(
    limit: Duration,
    mut response: Pin<&mut F>,
    body: &RequestBody,
    wire: Option<&Wire>,
) -> Option<F::Output> {
    tokio::select! {
        biased;
        response = response.as_mut() => return Some(response),
        () = poll_fn(|cx| body.poll_ended(cx)) => {}
    }
    let pause = (limit / LOOKS).max(Duration::from_millis(1));
    let mut deadline = Instant::now() + limit;
    let mut look = wire.map(|_| Instant::now() + pause);
    let mut taken = None;
    loop {
        tokio::select! {
            biased;
            response = response.as_mut() => return Some(response),
            () = sleep_until(look.unwrap_or(deadline).min(deadline)) => {}
        }
        let now = Instant::now();
        let progress = wire.and_then(Wire::undelivered);
        if progress.is_some() && progress != taken {
            // It is making progress; or, at the first check, has not ended yet.
            deadline = now + limit;
        } else if taken.is_some() && progress.is_none() {
            // The last of it was acknowledged since the last check.
            deadline = now + limit;
        } else if now >= deadline {
            return None;
        }
        taken = progress;
        look = progress.map(|_| now + pause);
    }
}
