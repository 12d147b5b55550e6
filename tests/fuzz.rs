//! Damaged bytes, thousands of them, at every place where bytes come in. What comes out must be as
//! strict as what a careful server would write, and the proxy must live on.
//!
//! The damage is the same on every run. `TRUENAME_FUZZ_SEED=7 TRUENAME_FUZZ_CASES=100000 ./test damaged`
//! does other damage, and for longer; a failure names the seed and shows the bytes.

use std::{env, net::SocketAddr, sync::Arc, time::Duration};

use crate::support::{
    client,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, within,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use proptest::prelude::*;
use tokio::{task::JoinSet, time::timeout};
use truename::{
    detect::{Protocol, classify},
    forward::headers::{self, ClientView, TargetView},
};

const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";
const AT_ONCE: usize = 16;
/// A message without a response by then lacks its end.
const QUIET: Duration = Duration::from_millis(100);

const REQUESTS: &[&str] = &[
    "GET /a?b=c HTTP/1.1\r\nHost: webscaler-manual\r\nAccept: */*\r\n\r\n",
    "POST /p HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 5\r\n\r\nhello",
    "POST /c HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: chunked\r\n\r\n\
     5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: 1\r\n\r\n",
    "PUT / HTTP/1.1\r\nHost: webscaler-manual\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok",
    "GET http://webscaler-manual/x HTTP/1.1\r\nHost: webscaler-manual\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\n\r\n",
    "GET /1 HTTP/1.1\r\nHost: webscaler-manual\r\n\r\nGET /2 HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: webscaler-manual\r\nTE: trailers\r\nUpgrade: h2c\r\n\r\n",
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
];

const RESPONSES: &[&str] = &[
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\nT: 1\r\n\r\n",
    "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nto the end",
    "HTTP/1.1 302 Found\r\nLocation: https://httpbin.org/x\r\nSet-Cookie: a=b; Domain=httpbin.org\r\n\
     Content-Length: 0\r\n\r\n",
    "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nbytes",
];

const WORDS: &[&str] = &[
    "\r\n",
    "\n",
    "\r",
    "\0",
    " ",
    "\t",
    ":",
    ",",
    ";",
    "0",
    "-1",
    "\r\n\r\n",
    "0\r\n\r\n",
    "\u{ff}",
    "\r\n ",
    "Content-Length: 3\r\n",
    "Content-Length: 0\r\n",
    "content-length:\t5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity\r\n",
    "Transfer-Encoding:\x0bchunked\r\n",
    "Host: evil.example\r\n",
    "Connection: close\r\n",
    "Connection: host, content-length\r\n",
    "GET /smuggled HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.0",
    "ffffffffffffffff",
    "10000000000000000\r\n",
    "chunked",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "\x16\x03\x01",
];

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// The damage of one test: a seed for each case, and the corpus.
struct Damage {
    seed: u64,
    cases: u64,
    corpus: &'static [&'static str],
}

impl Damage {
    fn to(corpus: &'static [&'static str]) -> Self {
        let (seed, cases) = (number("TRUENAME_FUZZ_SEED", 1), number("TRUENAME_FUZZ_CASES", 1500));
        Self { seed, cases, corpus }
    }

    fn case(&self, case: u64) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(self.seed.wrapping_mul(1 << 32).wrapping_add(case));
        let mut bytes = self.corpus[rng.usize(..self.corpus.len())].as_bytes().to_vec();
        for _ in 0..rng.usize(0..5) {
            let at = rng.usize(..=bytes.len());
            let end = (at + rng.usize(0..12)).min(bytes.len());
            match rng.u8(0..6) {
                0 => bytes.insert(at, rng.u8(..)),
                1 => drop(bytes.drain(at..end)),
                2 => bytes.truncate(at),
                3 => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy);
                }
                _ => {
                    let word = WORDS[rng.usize(..WORDS.len())];
                    // Half of the words stand where a line begins: elsewhere they mean little.
                    let lines: Vec<_> =
                        (2..=bytes.len()).filter(|at| bytes[..*at].ends_with(b"\r\n")).collect();
                    let line = if lines.is_empty() { at } else { lines[rng.usize(..lines.len())] };
                    let at = if rng.bool() { line } else { at };
                    bytes.splice(at..at, word.bytes());
                }
            }
        }
        bytes
    }

    #[track_caller]
    fn show(&self, case: u64, what: &str) -> ! {
        let bytes = self.case(case);
        panic!("seed {} case {case}: {what}\n{:?}", self.seed, String::from_utf8_lossy(&bytes))
    }
}

/// The end of the first message in `bytes`, none while there is more to come; or what a strict
/// reader would stumble over.
fn read(bytes: &[u8], host: Option<&str>) -> Result<Option<usize>, String> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = bytes[..end].iter().map(|byte| char::from(*byte)).collect::<String>();
    let mut lines = head.split("\r\n");
    let start = lines.next().unwrap_or_default();
    if head.replace("\r\n", "").contains(['\r', '\n', '\0']) {
        return Err(format!("a line within a line: {head:?}"));
    }
    let token = |text: &str| {
        let odd = |c: char| !c.is_ascii_alphanumeric() && !"!#$%&'*+-.^_`|~".contains(c);
        !text.is_empty() && !text.contains(odd)
    };
    let (mut hosts, mut lengths, mut codings) = (Vec::new(), Vec::new(), Vec::new());
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(format!("no field: {line:?}"))?;
        if !token(name) {
            return Err(format!("no name: {line:?}"));
        }
        let value = value.trim_matches([' ', '\t']).to_owned();
        match &*name.to_ascii_lowercase() {
            "host" => hosts.push(value),
            "content-length" => lengths.push(value),
            "transfer-encoding" => codings.push(value.to_ascii_lowercase()),
            _ => {}
        }
    }
    let mut without_body = false;
    if let Some(host) = host {
        let parts: Vec<_> = start.split(' ').collect();
        let [method, target, "HTTP/1.1"] = parts[..] else {
            return Err(format!("no request: {start:?}"));
        };
        if !token(method) || !(target.starts_with('/') || target == "*") {
            return Err(format!("no request: {start:?}"));
        }
        if hosts != [host] {
            return Err(format!("hosts: {hosts:?}"));
        }
        without_body = lengths.is_empty() && codings.is_empty();
    } else {
        // A request with HTTP/1.0 gets a response with HTTP/1.0, without chunks.
        let old = start.strip_prefix("HTTP/1.0 ");
        if old.is_some() && !codings.is_empty() {
            return Err(format!("chunks in HTTP/1.0: {head:?}"));
        }
        let status = old.or(start.strip_prefix("HTTP/1.1 "));
        let status = status.ok_or(format!("no response: {start:?}"))?;
        without_body |= status.starts_with('1') || status.starts_with("204");
        without_body |= status.starts_with("304");
    }
    let body = end + 4;
    match (&lengths[..], &codings[..]) {
        _ if without_body => Ok(Some(body)),
        ([length], []) => {
            let length: usize = length.parse().map_err(|_| format!("length: {length:?}"))?;
            Ok((bytes.len() - body >= length).then_some(body + length))
        }
        ([], [coding]) if coding == "chunked" => {
            Ok(read_chunks(&bytes[body..])?.map(|length| body + length))
        }
        // Until the connection ends.
        ([], []) => Ok(None),
        _ => Err(format!("two framings: {lengths:?} {codings:?}")),
    }
}

fn read_chunks(bytes: &[u8]) -> Result<Option<usize>, String> {
    let mut at = 0;
    let line = |at: usize| {
        let end = bytes[at.min(bytes.len())..].windows(2).position(|window| window == b"\r\n");
        end.map(|length| &bytes[at..at + length])
    };
    loop {
        let Some(size) = line(at) else { return Ok(None) };
        let text = String::from_utf8_lossy(size);
        let hex = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let count = usize::from_str_radix(&text, 16).ok().filter(|_| hex);
        let count = count.ok_or(format!("chunk size: {text:?}"))?;
        at += size.len() + 2;
        if count == 0 {
            break;
        }
        if bytes.len() < at + count + 2 {
            return Ok(None);
        }
        if &bytes[at + count..at + count + 2] != b"\r\n" {
            return Err(format!("a chunk that does not end: {text}"));
        }
        at += count + 2;
    }
    loop {
        let Some(trailer) = line(at) else { return Ok(None) };
        at += trailer.len() + 2;
        if trailer.is_empty() {
            return Ok(Some(at));
        }
    }
}

/// Reads on until the end, or for a moment in which nothing comes.
async fn until_quiet(peer: &mut crate::support::peer::Peer) -> Vec<u8> {
    let mut all = Vec::new();
    while let Ok(bytes) = timeout(QUIET, peer.some()).await {
        if bytes.is_empty() {
            break;
        }
        all.extend(bytes);
    }
    all
}

async fn lives_on(proxy: &Proxy, address: SocketAddr) {
    assert_eq!(client::get(address, ALIAS, "/fine").await.text(), "ok");
    within("no request in flight", async { while proxy.metric(IN_FLIGHT).await != Some(0.0) {} })
        .await;
    assert!(!proxy.log().contains("panicked"), "{}", proxy.log());
}

fn yaml(scene: &Scene, keys: &str) -> String {
    let keys = format!("tls: {{mode: plaintext}}\nhealth: {{passive: {{failures: 0}}}}\n{keys}");
    scene.yaml(&keys) + "log: {access: false}\nlistener: {header_timeout: 1s}\n"
}

/// Runs all cases, so many at once.
async fn each_case<Run>(damage: &Arc<Damage>, run: impl Fn(u64) -> Run)
where
    Run: Future<Output = ()> + Send + 'static,
{
    let mut running = JoinSet::new();
    for case in 0..damage.cases {
        if running.len() == AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        running.spawn(run(case));
    }
    while let Some(case) = running.join_next().await {
        case.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_damaged_requests_only_such_leave_as_every_reader_reads_alike() {
    let mut scene = Scene::new(1).await;
    let stumbled = Arc::new(Mutex::new(Vec::new()));
    let host = scene.authority(TRUE_NAME);
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, {
        let stumbled = stumbled.clone();
        move |arrival: Arrival| {
            let (stumbled, host) = (stumbled.clone(), host.clone());
            async move {
                let Some(mut conversation) = arrival.open().await else { return };
                let mut unread = Vec::new();
                loop {
                    match read(&unread, Some(&host)) {
                        Ok(Some(end)) => {
                            unread.drain(..end);
                            conversation.peer.try_send(scripts::ok("ok")).await.ok();
                        }
                        Ok(None) => {
                            let more = conversation.peer.some().await;
                            if more.is_empty() {
                                return;
                            }
                            unread.extend(more);
                        }
                        Err(what) => {
                            let text = String::from_utf8_lossy(&unread).into_owned();
                            return stumbled.lock().push(format!("{what}\n{text:?}"));
                        }
                    }
                }
            }
        }
    });
    let proxy = Proxy::start(&yaml(&scene, "")).await;
    let address = proxy.address(ALIAS).await;
    let damage = Arc::new(Damage::to(REQUESTS));
    each_case(&damage, |case| {
        let damage = damage.clone();
        async move {
            let mut peer = client::connect(address).await;
            // It may be refused half way.
            peer.try_send(damage.case(case)).await.ok();
            let mut responses = until_quiet(&mut peer).await;
            // HTTP/2's responses have another parser.
            if damage.case(case).starts_with(b"PRI * HTTP/2.0") {
                return;
            }
            loop {
                match read(&responses, None) {
                    Ok(Some(end)) => drop(responses.drain(..end)),
                    Ok(None) => return,
                    Err(what) => damage.show(case, &what),
                }
            }
        }
    })
    .await;
    let stumbled = stumbled.lock().clone();
    assert!(stumbled.is_empty(), "seed {}: {}", damage.seed, stumbled.join("\n"));
    lives_on(&proxy, address).await;
    assert!(origin.seen().connections > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_damaged_responses_the_client_sees_one_and_can_tell_where_it_ends() {
    let mut scene = Scene::new(1).await;
    let damage = Arc::new(Damage::to(RESPONSES));
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), None, {
        let damage = damage.clone();
        move |arrival: Arrival| {
            let damage = damage.clone();
            async move {
                let Some(mut conversation) = arrival.open().await else { return };
                while let Some(head) = conversation.peer.head().await {
                    let target = head.split(' ').nth(1).unwrap();
                    let Ok(case) = target[1..].parse() else {
                        conversation.peer.try_send(scripts::ok("ok")).await.ok();
                        continue;
                    };
                    conversation.peer.try_send(damage.case(case)).await.ok();
                    if case % 2 == 0 {
                        return conversation.peer.finish().await;
                    }
                }
            }
        }
    });
    let proxy = Proxy::start(&yaml(&scene, "timeouts: {response: 300ms, idle: 300ms}")).await;
    let address = proxy.address(ALIAS).await;
    each_case(&damage, |case| {
        let damage = damage.clone();
        async move {
            let mut peer = client::connect(address).await;
            let request =
                format!("GET /{case} HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
            peer.send(request).await;
            let mut response = peer.rest().await.unwrap_or_default();
            loop {
                match read(&response, None) {
                    Ok(Some(end)) => {
                        let interim = response.starts_with(b"HTTP/1.1 1");
                        response.drain(..end);
                        if !interim && !response.is_empty() {
                            let rest = String::from_utf8_lossy(&response).into_owned();
                            damage.show(case, &format!("behind the response: {rest:?}"));
                        }
                    }
                    Ok(None) => return,
                    Err(what) => damage.show(case, &what),
                }
            }
        }
    })
    .await;
    lives_on(&proxy, address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_frames_of_http2_end_the_proxy() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let _origin = RawOrigin::start(listener, None, scripts::respond);
    let proxy = Proxy::start(&yaml(&scene, "http: {version: \"1.1\"}")).await;
    let address = proxy.address(ALIAS).await;
    let damage = Arc::new(Damage::to(&[]));
    each_case(&damage, |case| {
        let mut rng = fastrand::Rng::with_seed(damage.seed.wrapping_add(case));
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
        for _ in 0..rng.usize(1..12) {
            let length = rng.usize(0..40);
            bytes.extend([
                0,
                0,
                length as u8 ^ u8::from(rng.u8(..8) == 0),
                rng.u8(..11),
                rng.u8(..),
            ]);
            bytes.extend([0, 0, 0, rng.u8(..8)]);
            // Indexed fields mostly: they are a request more often than noise is.
            bytes.extend(
                (0..length).map(|_| if rng.bool() { 0x80 | rng.u8(1..62) } else { rng.u8(..) }),
            );
        }
        async move {
            let mut peer = client::connect(address).await;
            peer.try_send(bytes).await.ok();
            until_quiet(&mut peer).await;
        }
    })
    .await;
    lives_on(&proxy, address).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn what_is_detected_does_not_change_with_more_bytes(
        preface in 0..=24usize,
        rest in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..preface], &rest].concat();
        let mut known: Option<Protocol> = None;
        for length in 0..=bytes.len() {
            let now = classify(&bytes[..length]);
            prop_assert!(known.is_none() || now == known, "{:?} then {:?}", known, now);
            known = now;
        }
        prop_assert!(known.is_some() || bytes.len() < 24, "never decided");
    }

    #[test]
    fn no_bytes_of_a_field_make_repair_panic_or_touch_others(
        value in proptest::collection::vec(any::<u8>(), 0..60),
        at in 0..5usize,
        seed in "(https?:)?//(httpbin.org|alias)(:[0-9]{0,5})?|a=b; ?domain ?= ?\\.?httpbin.org;?",
    ) {
        let names = ["location", "set-cookie", "access-control-allow-origin", "origin", "referer"];
        let bytes = [seed.as_bytes(), &value].concat();
        let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
        let mut fields = HeaderMap::new();
        fields.append(HeaderName::from_static(names[at]), value.clone());
        fields.append("x-other", value.clone());
        let authority = "httpbin.org".parse().unwrap();
        let target = TargetView { scheme: "https", authority: &authority };
        let client = ClientView { scheme: "http", authority: "alias".parse().unwrap(), origin: None };
        headers::repair_request(&mut fields, |host| host == "alias", target);
        headers::repair_response(&mut fields, &client, target);
        prop_assert_eq!(fields.get("x-other"), Some(&value));
        prop_assert_eq!(fields.len(), 2);
    }
}
