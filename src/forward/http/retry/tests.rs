#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures_util::{FutureExt, stream};
use http::{HeaderMap, Method};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{
    body::{BoxError, RequestBody},
    fault::{Cause, Diagnosis, Kind, Stage},
};

#[derive(Debug, thiserror::Error)]
#[error("of the test")]
struct Failure;

impl Cause for Failure {}

/// What an attempt may come to, without a connection to say so.
#[derive(Clone, Copy, Debug)]
enum Came {
    Response(u16),
    Unconnected(Blame),
    Lost(Blame, Taken),
    Reset(Blame, Taken),
}

impl Came {
    fn outcome(self) -> Outcome<()> {
        let fault = |blame, taken| {
            let kind = match self {
                Self::Reset(..) => Kind::StreamReset,
                _ => Kind::ConnectionLost,
            };
            let stage = Stage::Response;
            Fault::new(Diagnosis { kind, stage, blame, taken, endpoint: None }, Failure)
        };
        match self {
            Self::Response(status) => Outcome::Response(StatusCode::from_u16(status).unwrap(), ()),
            Self::Unconnected(blame) => Outcome::Unconnected(fault(blame, Taken::Nothing)),
            Self::Lost(blame, taken) | Self::Reset(blame, taken) => {
                Outcome::Lost(fault(blame, taken))
            }
        }
    }
}

/// How much of a request's body has been read.
#[derive(Clone, Copy, Debug)]
enum Read {
    NoBody,
    Nothing,
    Little,
    TooMuch,
    Trailers,
}

impl Read {
    fn body(self) -> RequestBody {
        let frame = match self {
            Self::NoBody => return RequestBody::empty(),
            Self::Nothing | Self::Little => Frame::data(Bytes::from_static(b"little")),
            Self::TooMuch => Frame::data(Bytes::from(vec![0; 65 * 1024])),
            Self::Trailers => Frame::trailers(HeaderMap::new()),
        };
        let body = RequestBody::boxed(StreamBody::new(stream::iter([Ok::<_, BoxError>(frame)])));
        if !matches!(self, Self::Nothing) {
            body.handle().frame().now_or_never().unwrap().unwrap().unwrap();
        }
        body
    }

    fn is_untouched(self) -> bool {
        matches!(self, Self::NoBody | Self::Nothing | Self::Trailers)
    }

    fn can_be_repeated(self) -> bool {
        !matches!(self, Self::TooMuch | Self::Trailers)
    }
}

fn came() -> impl Strategy<Value = Came> {
    use Blame::{Alias, Client, Connection, Endpoint, Target};
    let blame = || select(vec![Client, Connection, Endpoint, Target, Alias]);
    let taken = select(vec![Taken::Nothing, Taken::Unknown, Taken::Some]);
    prop_oneof![
        select(vec![200, 204, 404, 408, 500, 502, 503, 504]).prop_map(Came::Response),
        blame().prop_map(Came::Unconnected),
        (blame(), taken.clone()).prop_map(|(blame, taken)| Came::Lost(blame, taken)),
        (blame(), taken).prop_map(|(blame, taken)| Came::Reset(blame, taken)),
    ]
}

fn read() -> impl Strategy<Value = Read> {
    select(vec![Read::NoBody, Read::Nothing, Read::Little, Read::TooMuch, Read::Trailers])
}

fn method() -> impl Strategy<Value = Method> {
    select(vec![
        Method::GET,
        Method::HEAD,
        Method::PUT,
        Method::DELETE,
        Method::POST,
        Method::PATCH,
    ])
}

fn tried() -> impl Strategy<Value = Tried> {
    (0_u32..4, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(retries, renewed, kept, elsewhere)| Tried {
            failed: Vec::new(),
            retries,
            renewed,
            kept,
            elsewhere,
        },
    )
}

fn rules() -> impl Strategy<Value = config::Retry> {
    use RetryOn::{Connect, Reset, Status};
    let when = vec(select(vec![Connect, Reset, Status(502), Status(503), Status(504)]), 0..4);
    (0_u32..4, when).prop_map(|(attempts, when)| config::Retry {
        attempts,
        when,
        ..config::Retry::default()
    })
}

proptest! {
    /// Each assertion is a sentence of docs/reference.md.
    #[test]
    fn a_request_is_sent_again_as_the_reference_says(
        came in came(), read in read(), method in method(), tried in tried(), rules in rules()
    ) {
        let body = read.body();
        let asked = Asked { method: &method, body: &body };
        let next = next(&came.outcome(), asked, &tried, &rules);
        let idempotent = method.is_idempotent() && read.is_untouched();
        let listed = |when| rules.when.contains(&when);
        let has_attempts = tried.retries < rules.attempts;
        // "The first pooled connection that turns out dead is free."
        let free = tried.kept && !tried.renewed;

        let expected = match came {
            // "A connection that could not be made is retried on another endpoint, or at the next target."
            Came::Unconnected(Blame::Connection | Blame::Endpoint | Blame::Target) => {
                let again = listed(RetryOn::Connect) && tried.elsewhere && has_attempts;
                again.then_some((RetryReason::Connect, On::AnotherEndpoint, false))
            }
            Came::Unconnected(_) => None,
            // "never after a byte of the response"
            Came::Lost(_, Taken::Some) | Came::Reset(_, Taken::Some) => None,
            Came::Lost(Blame::Client, _) | Came::Reset(Blame::Client, _) => None,
            // "a request that was lost [...] and provably not read, whatever the method"
            Came::Lost(_, Taken::Nothing) | Came::Reset(_, Taken::Nothing) => (free || has_attempts)
                .then_some((RetryReason::Reuse, On::NewConnection, free)),
            // "Requests with an idempotent method whose body was not consumed are also retried when a pooled
            // connection broke before the response, and with `reset`"
            Came::Lost(_, Taken::Unknown) if tried.kept => (idempotent && (free || has_attempts))
                .then_some((RetryReason::Reuse, On::NewConnection, free)),
            Came::Lost(_, Taken::Unknown) => (idempotent && listed(RetryOn::Reset) && has_attempts)
                .then_some((RetryReason::Reset, On::NewConnection, false)),
            // "HTTP/2: a reset of the stream with another code [...] | idempotent, and only with `reset`"
            Came::Reset(_, Taken::Unknown) => (idempotent && listed(RetryOn::Reset) && has_attempts)
                .then_some((RetryReason::Reset, On::AnotherEndpoint, false)),
            // "a `408` [...] may be notice of an idle time-out, or meant | idempotent"
            Came::Response(408) => (idempotent && tried.kept && (free || has_attempts))
                .then_some((RetryReason::Reuse, On::NewConnection, free)),
            // "and with [...] `50x`"
            Came::Response(status) => {
                let again = idempotent && listed(RetryOn::Status(status)) && has_attempts;
                again.then_some((RetryReason::Status, On::AnotherEndpoint, false))
            }
        };
        // What was read of a body must be there to be sent again.
        let expected = expected.filter(|_| read.can_be_repeated());
        let expected = expected.map_or(Next::Respond, |(reason, on, is_free)| {
            Next::Again(Retry { reason, on, is_free })
        });
        prop_assert_eq!(next, expected);
    }

    #[test]
    fn no_request_is_sent_more_often_than_attempts_and_once_for_a_kept_connection(
        came in vec(came(), 8), kept in vec(any::<bool>(), 8), rules in rules()
    ) {
        let body = RequestBody::empty();
        let asked = Asked { method: &Method::GET, body: &body };
        let mut tried = Tried { elsewhere: true, ..Tried::default() };
        let mut again = 0;
        for (came, kept) in came.into_iter().zip(kept) {
            // Once only new connections are used, none has served before.
            tried.kept = kept && !tried.renewed;
            let Next::Again(retry) = next(&came.outcome(), asked, &tried, &rules) else { break };
            tried.count(retry);
            again += 1;
        }
        prop_assert!(again <= rules.attempts + 1);
    }
}
