//! What scripted origins do. Each is the life of one connection; a test with a wish of its own
//! writes it in place.

use super::raw_origin::Arrival;

/// Responds to every request with 200 and `ok`, and keeps the connection.
pub async fn respond(arrival: Arrival) {
    respond_times(arrival, usize::MAX).await;
}

/// Responds to `times` requests as a server that keeps the connection would, then closes it.
pub async fn respond_times(arrival: Arrival, times: usize) {
    reply(arrival, ok("ok"), times).await;
}

/// Responds to every request with exactly these bytes.
pub async fn always(arrival: Arrival, response: impl Into<Vec<u8>>) {
    reply(arrival, response.into(), usize::MAX).await;
}

/// Closes before the first byte.
pub async fn close_on_accept(arrival: Arrival) {
    drop(arrival);
}

/// Resets before the first byte.
pub async fn reset_on_accept(arrival: Arrival) {
    arrival.reset();
}

/// Never says a byte, not even of the handshake.
pub async fn never_shake_hands(mut arrival: Arrival) {
    tokio::io::copy(arrival.tcp(), &mut tokio::io::sink()).await.ok();
}

/// Reads a request and closes.
pub async fn close_after_request(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    conversation.request().await;
    conversation.peer.finish().await;
}

/// Reads a request and resets.
pub async fn reset_after_request(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    conversation.request().await;
    conversation.peer.reset();
}

/// Reads a request and never responds.
pub async fn never_respond(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    conversation.request().await;
    conversation.peer.hold().await;
}

/// Closes in the midst of the response's head.
pub async fn half_a_head(arrival: Arrival) {
    reply(arrival, b"HTTP/1.1 200 OK\r\nContent-Le".to_vec(), 1).await;
}

/// Closes in the midst of the response's body: 4 bytes of 100.
pub async fn half_a_body(arrival: Arrival) {
    reply(arrival, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec(), 1).await;
}

/// Closes in the midst of a chunked body.
pub async fn half_a_chunk(arrival: Arrival) {
    let response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf".to_vec();
    reply(arrival, response, 1).await;
}

/// Responds with something that is not HTTP.
pub async fn garbage(arrival: Arrival) {
    reply(arrival, b"\x00\xffthis is no HTTP\r\n\r\n".to_vec(), 1).await;
}

/// Gives every byte back, whatever the protocol; when the client is done, so is this.
pub async fn echo(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    loop {
        let bytes = conversation.peer.some().await;
        if bytes.is_empty() || conversation.peer.try_send(bytes).await.is_err() {
            return conversation.peer.finish().await;
        }
    }
}

/// Agrees to any `Upgrade`, as WebSocket's server would, and then gives every byte back.
pub async fn upgrade_and_echo(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    let Some(request) = conversation.request().await else { return };
    let response = match request.field("upgrade") {
        Some(protocol) => format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n"
        ),
        None => "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n".to_owned(),
    };
    let mut sent = conversation.peer.try_send(response).await;
    while sent.is_ok() {
        let bytes = conversation.peer.some().await;
        if bytes.is_empty() {
            return conversation.peer.finish().await;
        }
        sent = conversation.peer.try_send(bytes).await;
    }
}

/// A 200 with this body.
pub fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn reply(arrival: Arrival, response: Vec<u8>, times: usize) {
    let Some(mut conversation) = arrival.open().await else { return };
    for _ in 0..times {
        if conversation.request().await.is_none() {
            return;
        }
        if conversation.peer.try_send(&response).await.is_err() {
            return;
        }
    }
    conversation.peer.finish().await;
}
