//! What one keep-alive request costs in system calls once everything is warm. Each costs about a
//! microsecond, so that a read too many is felt before any instruction is.
//!
//! The real binary runs under strace with one worker. Two requests are marks: what the worker asks
//! of the kernel from the first byte of the one to the first byte of the other is counted.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use crate::support::{
    client,
    peer::Peer,
    proxy::Setup,
    scene::{ALIAS, Scene},
    scripts,
};

/// Calls of one request, and what each is for: plaintext HTTP/1.1 in, TLS 1.3 out, no body, an
/// response in one piece, on connections that are there already, with the access log off.
const TABLE: [(&str, Ending, u32, &[&str]); 4] = [
    ("recvfrom", Ending::Done, 2, &["the request", "the response"]),
    ("recvfrom", Ending::WouldBlock, 1, &["the kept connection has not been closed by the origin"]),
    ("sendto", Ending::Done, 2, &["the request", "the response"]),
    ("getsockopt", Ending::Done, 1, &["the origin had the request before it responded (TCP_INFO)"]),
];

/// The worker sleeps this often a request: until it is there, and until its response is. Where one of
/// them is there already it does not.
const MOST_WAITS: u32 = 2;

/// How a worker sleeps, on one processor or another.
const WAITS: [&str; 2] = ["epoll_wait", "epoll_pwait"];

/// What an allocator asks of the kernel. It does so now and then, and not for each request.
const MEMORY: [&str; 5] = ["brk", "madvise", "mmap", "mprotect", "munmap"];

/// Calls that may come from elsewhere in all: memory, and waits for what wakes a worker besides.
const STRAY: u32 = COUNTED / 20;

/// Requests that are counted.
const COUNTED: u32 = 200;
/// Requests before them: handshakes, lazily made things, the first allocations, and what a socket is set to
/// after its first kilobytes are theirs.
const WARM_UP: u32 = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ending {
    Done,
    WouldBlock,
}

#[tokio::test]
async fn a_keep_alive_request_makes_the_system_calls_of_the_table_and_no_other() {
    assert_that_processes_can_be_traced();
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = format!("{}workers: 1\nlog: {{access: false}}\n", scene.yaml(""));
    // One file a thread: what two do at once does not interrupt either's lines.
    let setup = Setup::new(&yaml).shell("exec strace -ff -qq -o calls \"$0\" \"$@\"; ");
    let proxy = setup.start().await;

    let mut application = client::connect(proxy.address(ALIAS).await).await;
    for _ in 0..WARM_UP {
        ask(&mut application, "/").await;
    }
    ask(&mut application, "/first").await;
    for _ in 1..COUNTED {
        ask(&mut application, "/").await;
    }
    ask(&mut application, "/last").await;
    // What strace has seen is whole once its process has ended.
    let mut admin = client::connect(proxy.admin().await).await;
    admin.send("POST /quit HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(proxy.exit().await.success());

    let mut calls = counted(&between_marks(proxy.folder()));
    let mut taken = |names: &[&str]| -> u32 {
        let of_call = |name: &&str| calls.remove(&((*name).to_owned(), Ending::Done));
        names.iter().filter_map(of_call).sum()
    };
    let waits = taken(&WAITS);
    assert!(waits <= MOST_WAITS * COUNTED + STRAY, "{waits} times asleep in {COUNTED} requests");
    let of_memory = taken(&MEMORY);
    assert!(of_memory <= STRAY, "{of_memory} calls for memory in {COUNTED} requests");

    for (call, ending, times, reasons) in TABLE {
        assert_eq!(reasons.len(), times as usize, "each {call} ({ending:?}) has its reason");
    }
    let stated = TABLE.map(|(call, ending, times, _)| ((call.to_owned(), ending), times * COUNTED));
    assert_eq!(
        calls,
        BTreeMap::from(stated),
        "calls of {COUNTED} requests as they were, against the table"
    );
}

async fn ask(application: &mut Peer, path: &str) {
    application.send(format!("GET {path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(application.response().await.text(), "ok");
}

fn assert_that_processes_can_be_traced() {
    let traced = Command::new("strace").args(["-qq", "-o", "/dev/null", "true"]).output();
    let traced = traced.expect("strace is needed: ./test installs it");
    assert!(
        traced.status.success(),
        "this test counts system calls with strace, which may not trace processes here: {}\
         a container needs the capability SYS_PTRACE, or a seccomp profile that allows ptrace",
        String::from_utf8_lossy(&traced.stderr)
    );
}

/// The lines of the thread that served the marks, from the one until before the other.
fn between_marks(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let traces = files.filter(|path| path.file_stem().is_some_and(|stem| stem == "calls"));
    let traces: Vec<String> = traces.map(|path| fs::read_to_string(path).unwrap()).collect();
    let mut marked = traces.iter().filter(|trace| trace.contains("\"GET /first "));
    let worker = marked.next().expect("a thread that read the first mark");
    assert!(marked.next().is_none(), "one worker serves the whole connection");

    let from_first = worker.lines().skip_while(|line| !line.contains("\"GET /first "));
    let mut lines = from_first.map(str::to_owned).collect::<Vec<_>>();
    let last = lines.iter().position(|line| line.contains("\"GET /last "));
    lines.truncate(last.expect("the thread that read the first mark read the last"));
    lines
}

/// How often each call was made, and with what end.
fn counted(lines: &[String]) -> BTreeMap<(String, Ending), u32> {
    let mut calls = BTreeMap::new();
    for line in lines {
        let (call, rest) = line.split_once('(').unwrap_or_else(|| panic!("no call: {line}"));
        let ending = match rest.rsplit_once(" = ").map(|(_, result)| result) {
            Some(result) if result.starts_with("-1 EAGAIN") => Ending::WouldBlock,
            Some(result) if !result.starts_with('-') => Ending::Done,
            _ => panic!("a call that failed: {line}"),
        };
        *calls.entry((call.to_owned(), ending)).or_default() += 1;
    }
    calls
}
