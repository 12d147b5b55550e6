use super::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// A connection that has served one request, and its other end.
async fn kept() -> (Arc<Wire>, WireStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (mut stream, wire) = Wire::new(TcpStream::connect(address).await.unwrap());
    let (mut peer, _) = listener.accept().await.unwrap();
    stream.write_all(b"request").await.unwrap();
    peer.read_exact(&mut [0; 7]).await.unwrap();
    peer.write_all(b"response").await.unwrap();
    stream.read_exact(&mut [0; 8]).await.unwrap();
    (wire, stream, peer)
}

/// Closes with a RST, whatever was read.
fn abort(peer: TcpStream) {
    SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
    drop(peer);
}

#[tokio::test]
async fn a_request_to_a_peer_that_had_closed_was_not_read() {
    for read in [false, true] {
        let (wire, mut stream, peer) = kept().await;
        drop(peer);
        let mark = wire.mark();
        stream.write_all(b"lost").await.unwrap();
        if read {
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        }
        for _ in 0..2 {
            assert_eq!(wire.verdict(mark).await, Verdict::Closed, "read: {read}");
        }
    }
}

#[tokio::test]
async fn a_request_whose_rest_meets_a_broken_pipe_was_not_read_either() {
    let (wire, mut stream, peer) = kept().await;
    drop(peer);
    let mark = wire.mark();
    let error = loop {
        if let Err(error) = stream.write_all(b"lost").await {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(wire.verdict(mark).await, Verdict::Closed);
}

#[tokio::test]
async fn a_request_that_the_kernel_did_not_take_was_not_sent() {
    let (wire, mut stream, peer) = kept().await;
    abort(peer);
    let mark = wire.mark();
    assert!(stream.write_all(b"lost").await.is_err());
    assert_eq!(wire.verdict(mark).await, Verdict::Unsent);
}

#[tokio::test]
async fn a_request_that_a_half_closed_peer_can_read_is_not_taken_for_lost() {
    let (wire, mut stream, mut peer) = kept().await;
    peer.shutdown().await.unwrap();
    let mark = wire.mark();
    stream.write_all(b"read").await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    // As soon as its kernel has said that it has it, whether or not anybody reads.
    assert_eq!(wire.verdict(mark).await, Verdict::Acknowledged);
    peer.read_exact(&mut [0; 4]).await.unwrap();
    drop(peer);
    assert_eq!(wire.verdict(mark).await, Verdict::Acknowledged);
}

#[tokio::test]
async fn a_reset_alone_proves_nothing() {
    for read in [false, true] {
        let (wire, mut stream, mut peer) = kept().await;
        let mark = wire.reuse();
        stream.write_all(b"taken").await.unwrap();
        peer.readable().await.unwrap();
        if read {
            peer.read_exact(&mut [0; 5]).await.unwrap();
        }
        // What is not read is a reason for a RST by itself.
        if read {
            abort(peer)
        } else {
            drop(peer)
        }
        for _ in 0..2 {
            assert_eq!(wire.verdict(mark).await, Verdict::Reset, "read: {read}");
        }
        // What is read and written after the one that told it.
        assert_eq!(stream.read(&mut [0]).await.unwrap_or_default(), 0);
        assert!(stream.write_all(b"more").await.is_err());
        assert_eq!(wire.verdict(mark).await, Verdict::Reset, "read: {read}");
    }
}

#[tokio::test]
async fn a_peer_that_has_the_request_when_it_closes_may_have_read_it() {
    for reset in [false, true] {
        let (wire, mut stream, mut peer) = kept().await;
        let mark = wire.mark();
        stream.write_all(b"taken").await.unwrap();
        peer.read_exact(&mut [0; 5]).await.unwrap();
        // The FIN acknowledges it, also where a RST comes behind.
        peer.shutdown().await.unwrap();
        if reset {
            abort(peer)
        } else {
            drop(peer)
        }
        for _ in 0..2 {
            assert_eq!(wire.verdict(mark).await, Verdict::Acknowledged, "reset: {reset}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_was_cut_proves_nothing() {
    let (wire, mut stream, peer) = kept().await;
    let mark = wire.mark();
    stream.write_all(b"taken").await.unwrap();
    wire.cut();
    assert!(stream.write_all(b"more").await.is_err());
    drop(peer);
    assert!(!wire.verdict(mark).await.proves_unread());
}

#[tokio::test]
async fn what_a_peer_has_yet_to_take_is_known() {
    let (wire, mut stream, mut peer) = kept().await;
    let more = vec![0; 8 * 1024 * 1024];
    let mut writing = std::pin::pin!(stream.write_all(&more));
    tokio::select! {
        biased;
        _ = &mut writing => panic!("more than any kernel's buffers"),
        () = sleep(Duration::from_millis(20)) => {}
    }
    let first = wire.undelivered().expect("a full window");
    let reading = async {
        let mut read = vec![0; more.len()];
        peer.read_exact(&mut read).await.unwrap();
    };
    tokio::join!(reading, async { writing.await.unwrap() });
    while let Some(undelivered) = wire.undelivered() {
        assert!(undelivered > first);
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_comes_before_the_request_is_there_is_told_apart() {
    let (wire, mut stream, mut peer) = kept().await;
    let mark = wire.mark();
    stream.write_all(b"request").await.unwrap();
    peer.write_all(b"response").await.unwrap();
    stream.read_exact(&mut [0; 8]).await.unwrap();
    assert!(!wire.is_unacknowledged_since(mark), "a response acknowledges its request");
    assert!(!wire.is_unacknowledged_since(wire.mark()), "nothing was written");
}
