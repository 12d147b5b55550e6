//! `timeouts.response`: how long a target may take to answer, from the end of the request on.

use std::{future::poll_fn, pin::Pin, time::Duration};

use tokio::time::{Instant, sleep_until};

use crate::{body::RequestBody, connect::Wire};

/// A request that its target is still taking in is looked after so often within the limit.
const LOOKS: u32 = 16;

/// Awaits a response's head for as long as `limit` from the end of the request; `None` when that is
/// over.
///
/// A request has ended once its body has, and the target's kernel has all of it. `wire` is the
/// connection where it carries this request alone; elsewhere the body's end counts. What a target
/// stops taking in altogether counts as sent: else it would be waited for without end.
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
            // It goes on; or, at the first look, has not ended yet.
            deadline = now + limit;
        } else if taken.is_some() && progress.is_none() {
            // The last of it was taken since the last look.
            deadline = now + limit;
        } else if now >= deadline {
            return None;
        }
        taken = progress;
        look = progress.map(|_| now + pause);
    }
}
