//! `Expect: 100-continue`: the client sends its body when the origin wants it, and gets one response.

use crate::support::{
    curl::curl, peer::Peer, raw_origin::Arrival, scene::ALIAS, scripts, through::Through,
};

const CONTINUE: &str = "HTTP/1.1 100 Continue\r\n\r\n";

#[tokio::test]
async fn the_client_is_told_to_go_on_when_the_origin_says_so() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let head = conversation.peer.head().await.unwrap();
        assert!(head.contains("Expect: 100-continue\r\n"), "{head}");
        conversation.peer.send(CONTINUE).await;
        assert_eq!(conversation.peer.exactly(5).await, b"hello");
        conversation.peer.send(scripts::ok("thanks")).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = expecting(&through).await;
    let first = peer.response().await;
    assert_eq!(first.head, CONTINUE);
    peer.send("hello").await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, "thanks"));
}

#[tokio::test]
async fn a_refusal_comes_instead_of_the_word_to_go_on() {
    for refusal in ["401 Unauthorized", "413 Content Too Large", "417 Expectation Failed"] {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            let response = format!("HTTP/1.1 {refusal}\r\nContent-Length: 2\r\n\r\nno");
            conversation.peer.send(response).await;
            // No byte of the body is due, and none may come.
            assert_eq!(conversation.peer.some().await, b"");
        })
        .await;
        let mut peer = expecting(&through).await;
        let response = peer.response().await;
        assert_eq!(response.start_line(), format!("HTTP/1.1 {refusal}"));
        assert_eq!(response.text(), "no");
        // The client goes, as it must where it keeps its body.
        peer.finish().await;
        assert_eq!(peer.rest().await.unwrap_or_default(), b"", "one response, and no more");
        let seen = through.origin.until(|seen| seen.ended == 1).await;
        assert_eq!(seen.connections, 1);
    }
}

#[tokio::test]
async fn a_client_that_sends_its_body_all_the_same_keeps_its_connection() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = expecting(&through).await;
    assert_eq!(peer.response().await.status(), 401);
    peer.try_send("hello").await.unwrap();
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap_or_default(), b"");
}

#[tokio::test]
async fn an_origin_that_says_nothing_gets_the_body_all_the_same() {
    let through = Through::new("", scripts::respond).await;
    let mut peer = expecting(&through).await;
    assert_eq!(peer.response().await.head, CONTINUE);
    peer.send("hello").await;
    assert_eq!(peer.response().await.text(), "ok");
    assert_eq!(through.last_request().text(), "hello");
}

#[tokio::test]
async fn a_body_that_does_not_wait_is_sent_once() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send(CONTINUE).await;
        assert_eq!(conversation.peer.exactly(5).await, b"hello");
        conversation.peer.send(scripts::ok("thanks")).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = expecting(&through).await;
    peer.send("hello").await;
    let mut response = peer.response().await;
    if response.status() == 100 {
        response = peer.response().await;
    }
    assert_eq!((response.status(), response.text()), (200, "thanks"));
}

#[tokio::test]
async fn a_word_to_go_on_that_nobody_asked_for_is_not_passed_on_but_other_words_are() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        // The second request may come on the same connection.
        while conversation.request().await.is_some() {
            let early = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
            conversation.peer.send(format!("{CONTINUE}{early}")).await;
            conversation.peer.send(scripts::ok("final")).await;
        }
    })
    .await;
    let responses = through.exchanges(&format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(responses[0].head, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
    assert_eq!((responses[1].status(), responses[1].text(), responses.len()), (200, "final", 2));
    // RFC 9110, section 15.2: HTTP/1.0 has no such responses.
    let response = through.exchanges(&format!("GET / HTTP/1.0\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!((response[0].status(), response[0].text(), response.len()), (200, "final", 1));
}

/// It would stand in the midst of the response's body (RFC 9110, section 10.1.1).
#[tokio::test]
async fn the_client_is_not_told_to_go_on_once_a_response_has_begun() {
    // The body was wanted by the time at which the origin had the client's own.
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        conversation.peer.send(head).await;
        assert_eq!(conversation.peer.exactly(5).await, b"hello");
        conversation.peer.send("6\r\nsecond\r\n0\r\n\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = expecting(&through).await;
    let head = peer.head().await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("connection: close\r\n"), "{head}");
    assert_eq!(peer.exactly(10).await, b"5\r\nfirst\r\n");
    // It waited as long as anybody waits for a word to go on.
    tokio::select! {
        bytes = peer.some() => panic!("{}", String::from_utf8_lossy(&bytes)),
        () = tokio::time::sleep(std::time::Duration::from_millis(1500)) => {}
    }
    peer.send("hello").await;
    assert_eq!(peer.rest().await.unwrap(), b"6\r\nsecond\r\n0\r\n\r\n");
}

#[tokio::test]
async fn curl_uploads_and_is_refused_as_it_expects() {
    for (response, status) in
        [(None, "200"), (Some("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), "403")]
    {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            if let Some(response) = response {
                conversation.peer.head().await.unwrap();
                conversation.peer.send(response).await;
                assert_eq!(conversation.peer.some().await, b"");
                return;
            }
            let head = conversation.peer.head().await.unwrap();
            assert!(head.contains("Expect: 100-continue\r\n"), "{head}");
            conversation.peer.send(CONTINUE).await;
            conversation.peer.exactly(2_000_000).await;
            conversation.peer.send(scripts::ok("thanks")).await;
            conversation.peer.hold().await;
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("upload");
        std::fs::write(&file, vec![b'x'; 2_000_000]).unwrap();
        let said = curl(&[
            "-w",
            "%{http_code} %{size_upload}",
            "-o",
            "/dev/null",
            "-H",
            &format!("Host: {ALIAS}"),
            "--expect100-timeout",
            "30",
            "-T",
            file.to_str().unwrap(),
            &format!("http://{}/", through.address),
        ])
        .await;
        let uploaded = if response.is_none() { "2000000" } else { "0" };
        assert_eq!(said.stdout, format!("{status} {uploaded}"), "{}", said.stderr);
    }
}

/// A connection on which the head of a request stands that waits with its body of five bytes.
async fn expecting(through: &Through) -> Peer {
    let mut peer = through.connect().await;
    let fields = "Expect: 100-continue\r\nContent-Length: 5";
    peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n\r\n")).await;
    peer
}
