//! A body that is sent several times.

use futures_util::stream;
use http::HeaderMap;
use http_body_util::StreamBody;
use proptest::{collection::vec, prelude::*};

use super::{
    replay::{KEPT_AS_ONE, REPLAY_LIMIT},
    *,
};

type Part = Result<Frame<Bytes>, BoxError>;

fn body(parts: &[Vec<u8>], trailers: bool) -> RequestBody {
    let data = parts.iter().map(|part| Frame::data(Bytes::copy_from_slice(part)));
    let trailers = trailers.then(|| {
        let mut fields = HeaderMap::new();
        fields.insert("x-sum", http::HeaderValue::from_static("1"));
        Frame::trailers(fields)
    });
    let frames: Vec<Part> = data.chain(trailers).map(Ok).collect();
    RequestBody::boxed(StreamBody::new(stream::iter(frames)))
}

/// Reads `frames` of it at most: the data, and whether trailers and the end have come.
fn read(body: &mut RequestBody, frames: usize) -> (Vec<u8>, bool, bool) {
    let mut cx = Context::from_waker(Waker::noop());
    let (mut data, mut trailers) = (Vec::new(), false);
    for _ in 0..frames {
        if body.is_end_stream() {
            assert!(body.poll_ended(&mut cx).is_ready());
            return (data, trailers, true);
        }
        assert!(body.poll_ended(&mut cx).is_pending());
        match Pin::new(&mut *body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(part) => data.extend_from_slice(&part),
                Err(_) => trailers = true,
            },
            Poll::Ready(None) => {
                assert!(body.is_end_stream() && body.poll_ended(&mut cx).is_ready());
                return (data, trailers, true);
            }
            other => panic!("{other:?}"),
        }
    }
    (data, trailers, false)
}

proptest! {
    #[test]
    fn each_try_sends_the_whole_body_with_its_end_or_there_is_none(
        sizes in vec(prop_oneof![0..40_000_usize, 0..100_usize], 0..8),
        trailers in any::<bool>(),
        tries in vec(0..8_usize, 0..4),
    ) {
        let parts: Vec<_> = (0..).zip(sizes).map(|(n, size)| vec![n; size]).collect();
        let whole = parts.concat();
        let mut body = body(&parts, trailers);
        for frames in tries {
            let (data, ..) = read(&mut body, frames);
            prop_assert!(whole.starts_with(&data));
            if !body.rewind() {
                prop_assert!(trailers || whole.len() > REPLAY_LIMIT);
                return Ok(());
            }
        }
        let (data, trailed, ended) = read(&mut body, 20);
        prop_assert_eq!((data, trailed, ended), (whole, trailers, true));
    }
}

#[test]
fn a_body_in_pieces_of_a_byte_is_kept_in_few() {
    let mut body = body(&vec![b"x".to_vec(); REPLAY_LIMIT], false);
    let (data, ..) = read(&mut body, REPLAY_LIMIT);
    assert_eq!(data.len(), REPLAY_LIMIT);
    assert_eq!(body.stream.as_ref().unwrap().lock().replay.pieces(), REPLAY_LIMIT / KEPT_AS_ONE);
    assert!(body.rewind());
    assert_eq!(read(&mut body, REPLAY_LIMIT), (vec![b'x'; REPLAY_LIMIT], false, true));
}

/// Its bytes would be missing from the middle of what the next one sends.
#[test]
fn a_try_that_is_over_reads_nothing_more_of_the_body() {
    let mut first = body(&[b"a".to_vec(), b"b".to_vec()], false);
    let second = first.handle();
    let mut cx = Context::from_waker(Waker::noop());
    assert!(matches!(Pin::new(&mut first).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
    assert!(second.rewind());
    // There may be no retry budget for another attempt.
    assert!(matches!(Pin::new(&mut first).poll_frame(&mut cx), Poll::Ready(Some(Ok(_)))));
    assert!(second.rewind());
    let mut second = second.next_try();
    assert!(matches!(Pin::new(&mut first).poll_frame(&mut cx), Poll::Ready(Some(Err(_)))));
    assert_eq!(read(&mut second, 9), (b"ab".to_vec(), false, true));
}

#[test]
fn who_waits_for_the_end_is_woken_by_it() {
    struct Woken(std::sync::atomic::AtomicBool);
    impl std::task::Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let mut body = body(&[b"a".to_vec()], false);
    let woken = Arc::new(Woken(false.into()));
    let waker = Waker::from(woken.clone());
    assert!(body.handle().poll_ended(&mut Context::from_waker(&waker)).is_pending());
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(_)) = Pin::new(&mut body).poll_frame(&mut cx) {}
    assert!(woken.0.load(std::sync::atomic::Ordering::Relaxed));
}
