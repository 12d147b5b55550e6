//! `truename wait`: a start-up probe without a shell.

use std::{
    fs,
    net::SocketAddr,
    process::{Output, Stdio},
};

use crate::support::{
    loopback,
    proxy::{Proxy, Setup},
    within,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    task::JoinHandle,
};

/// Longer than any test: who waits so long has not been told to give up.
const PATIENT: &str = "--timeout=1h";

#[tokio::test]
async fn it_finds_a_running_proxy_by_flag_variable_and_file() {
    let proxy = Proxy::start(&configuration("127.0.0.1:0")).await;
    let admin = proxy.admin().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("truename.yaml");
    fs::write(&file, configuration(&admin.to_string())).unwrap();

    let mut by_flag = wait(&[PATIENT, "--admin", &admin.to_string()]);
    ready(&mut by_flag).await;
    ready(wait(&[PATIENT]).env("TRUENAME_ADMIN", admin.to_string())).await;
    ready(wait(&[PATIENT, "--config"]).arg(&file)).await;
    ready(wait(&[PATIENT]).env("TRUENAME_CONFIG", &file)).await;

    // As in a pod: it listens on every address, and the probe is told so.
    let everywhere = format!("0.0.0.0:{}", admin.port());
    ready(&mut wait(&[PATIENT, "--admin", &everywhere])).await;
}

#[tokio::test]
async fn the_address_that_is_told_goes_before_the_file() {
    let proxy = Proxy::start(&configuration("127.0.0.1:0")).await;
    let admin = proxy.admin().await.to_string();
    let mut command = wait(&[PATIENT, "--admin", &admin]);
    ready(command.args(["--config", "/nowhere/truename.yaml"])).await;
}

#[tokio::test]
async fn without_time_it_asks_once() {
    let proxy = Proxy::start(&configuration("127.0.0.1:0")).await;
    let admin = proxy.admin().await.to_string();
    ready(&mut wait(&["--timeout", "0s", "--admin", &admin])).await;

    let (listener, mut asked) = asked_and_closed().await;
    let output = wait(&["--timeout", "0s", "--admin", &listener.address.to_string()]).output();
    let output = within("its end", output).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(" after 0s: "), "{said}");
    assert_eq!(asked.recv().await, Some(()));
    assert!(asked.try_recv().is_err(), "asked more than once");
}

#[tokio::test]
async fn it_waits_for_a_proxy_that_starts_later() {
    // What stands there first sees that it is asked, and is gone before the proxy begins.
    let (listener, mut asked) = asked_and_closed().await;
    let admin = listener.address;
    let waiting = tokio::spawn(wait(&[PATIENT, "--admin", &admin.to_string()]).output());
    within("the first try", asked.recv()).await.unwrap();
    assert!(!waiting.is_finished());
    listener.close().await;

    let proxy = Setup::new(&configuration(&admin.to_string())).spawn();
    let output = within("the wait to end", waiting).await.unwrap().unwrap();
    assert_eq!(told(&output), (Some(0), String::new()));
    assert_eq!(proxy.admin().await, admin);
}

#[tokio::test]
async fn it_asks_again_when_the_response_is_not_200() {
    let listener = loopback::listen_anywhere();
    let admin = listener.local_addr().unwrap().to_string();
    let mut command = wait(&[PATIENT, "--admin", &admin]);
    let output = tokio::spawn(async move { command.output().await.unwrap() });
    respond_next(&listener, "HTTP/1.1 503 Service Unavailable\r\n\r\n").await;
    respond_next(&listener, "HTTP/1.1 2000 Nearly\r\n\r\n").await;
    respond_next(&listener, "220 mail.example.com ESMTP\r\n").await;
    respond_next(&listener, "").await;
    assert!(!output.is_finished());
    let request = respond_next(&listener, "HTTP/1.1 200 OK\r\n\r\n").await;
    assert!(request.starts_with("GET /readyz HTTP/1.1\r\n"), "{request}");
    assert!(request.contains(&format!("\r\nHost: {admin}\r\n")), "{request}");
    let output = within("the wait to end", output).await.unwrap();
    assert_eq!(told(&output), (Some(0), String::new()));
}

#[tokio::test]
async fn a_listener_that_never_responds_is_asked_anew() {
    let listener = loopback::listen_anywhere();
    let admin = listener.local_addr().unwrap().to_string();
    let mut command = wait(&[PATIENT, "--admin", &admin]);
    let output = tokio::spawn(async move { command.output().await.unwrap() });
    let _hung = within("the first try", listener.accept()).await.unwrap();
    respond_next(&listener, "HTTP/1.1 200 OK\r\n\r\n").await;
    assert_eq!(told(&within("the wait to end", output).await.unwrap()).0, Some(0));
}

#[tokio::test]
async fn an_endless_status_line_is_not_read_to_its_end() {
    let listener = loopback::listen_anywhere();
    let admin = listener.local_addr().unwrap().to_string();
    let mut command = wait(&[PATIENT, "--admin", &admin]);
    let output = tokio::spawn(async move { command.output().await.unwrap() });
    let (mut stream, _) = within("the first try", listener.accept()).await.unwrap();
    within("it to hang up", async { while stream.write_all(&[b'a'; 4096]).await.is_ok() {} }).await;
    respond_next(&listener, "HTTP/1.1 200 OK\r\n\r\n").await;
    assert_eq!(told(&within("the wait to end", output).await.unwrap()).0, Some(0));
}

#[tokio::test]
async fn nobody_there_is_exit_1_with_the_address_and_what_came_of_it() {
    // Nobody listens there any more.
    let admin = loopback::listen_anywhere().local_addr().unwrap();
    let said = gives_up("200ms", admin).await;
    for part in [&format!("{admin} after 200ms"), "Connection refused", "--admin", "--config"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(gives_up("0s", admin).await.contains("Connection refused"));
}

#[tokio::test]
async fn a_file_that_hangs_is_waited_for_no_longer_than_all_else() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("truename.yaml");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let output = output(wait(&["--timeout", "1500ms", "--config"]).arg(&pipe)).await;
    let (code, said) = told(&output);
    assert_eq!(code, Some(1), "{said}");
    let parts = [pipe.to_str().unwrap(), "could not be read within 1.5s", "does not respond"];
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
}

#[tokio::test]
async fn the_line_says_what_another_server_responded() {
    for (response, told) in [
        ("HTTP/1.1 404 Not Found\x1b[2J\r\n\r\n", "GET /readyz returned `404 Not Found[2J`"),
        ("220 mail.example.com ESMTP\r\n", "does not speak HTTP"),
    ] {
        let listener = loopback::listen_anywhere();
        let admin = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            loop {
                respond_next(&listener, response).await;
            }
        });
        let said = gives_up("300ms", admin).await;
        server.abort();
        assert!(said.contains(told), "{told:?} is not in {said}");
    }
    let hole = loopback::Blackhole::bind(SocketAddr::new(loopback::address(), 0));
    let said = gives_up("100ms", hole.address).await;
    assert!(said.contains("no response within"), "{said}");
}

#[tokio::test]
async fn what_cannot_be_asked_is_exit_2_and_says_what_to_write() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let none = file("none.yaml", "version: 1\naliases: [{name: a}]\nadmin: {listen: null}\n");
    let any = file("any.yaml", &configuration("127.0.0.1:0"));
    let bad = file("bad.yaml", "version: 1\naliases: [{name: a}]\nadmin: {lisen: 9990}\n");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--timeout", "30"], &["--timeout", "has no unit", "`5s`"]),
        (&["--timeout", "soon"], &["--timeout", "soon"]),
        (&["--admin", "localhost"], &["--admin: ", "localhost"]),
        (&["--admin", "none"], &["no admin listener", "--admin ADDR"]),
        (&["--admin", "127.0.0.1:0"], &["any free port", "--admin ADDR"]),
        (&["--config", &none], &["no admin listener", "`admin.listen`"]),
        (&["--config", &any], &["any free port", "`admin.listen`"]),
        (&["--config", &bad], &["bad.yaml:3:", "did you mean `listen`?"]),
        (&["--config", "/nowhere/truename.yaml"], &["/nowhere/truename.yaml"]),
        (&["webscaler-manual"], &["webscaler-manual", "Usage: truename wait"]),
    ];
    for (arguments, parts) in cases {
        let output = output(&mut wait(arguments)).await;
        let (code, said) = told(&output);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        for part in *parts {
            assert!(said.contains(part), "{part:?} is not in what {arguments:?} says: {said}");
        }
    }
}

/// Somebody else's listener, which takes connections and closes them.
struct Other {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Other {
    async fn close(self) {
        self.task.abort();
        self.task.await.ok();
    }
}

/// Tells of each connection that it has closed.
async fn asked_and_closed() -> (Other, mpsc::UnboundedReceiver<()>) {
    let listener = loopback::listen_anywhere();
    let address = listener.local_addr().unwrap();
    let (told, asked) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            told.send(()).ok();
        }
    });
    (Other { address, task }, asked)
}

/// Reads one request, gives it this response, and hangs up.
async fn respond_next(listener: &TcpListener, response: &str) -> String {
    let (mut stream, _): (TcpStream, _) = within("a try", listener.accept()).await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let read = within("the request", stream.read_buf(&mut request)).await.unwrap();
        assert!(read > 0, "it hung up within its request");
    }
    stream.write_all(response.as_bytes()).await.unwrap();
    String::from_utf8(request).unwrap()
}

fn configuration(admin: &str) -> String {
    format!(
        "version: 1\naliases:\n  - name: webscaler-manual\n    listen: [\"127.0.0.1:0\"]\n    \
         target: 127.0.0.1:9\nadmin: {{listen: \"{admin}\"}}\n"
    )
}

/// The command, without what the developer's shell says to it; killed with the test that gave it up.
fn wait(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TRUENAME_") {
            command.env_remove(&name);
        }
    }
    command.arg("wait").args(arguments).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn ready(command: &mut Command) {
    assert_eq!(told(&output(command).await), (Some(0), String::new()), "{command:?}");
}

/// What it says when it gives up: one line.
async fn gives_up(timeout: &str, admin: SocketAddr) -> String {
    let mut command = wait(&["--timeout", timeout, "--admin", &admin.to_string()]);
    let (code, said) = told(&output(&mut command).await);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("truename: "), "{said}");
    said
}

async fn output(command: &mut Command) -> Output {
    within("the command to end", command.output()).await.unwrap()
}

/// The exit code, and all that was said.
fn told(output: &Output) -> (Option<i32>, String) {
    let said = [output.stdout.as_slice(), &output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}
