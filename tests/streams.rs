//! Standard output and standard error: full, closed, or read by nobody.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, PipeReader, Write as _, pipe},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use crate::support::{
    client, loopback,
    process::{ended, names_in, signal},
    scene::{ALIAS, Scene},
    scripts, trust, within,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;

/// How a stream may be lost.
const LOST: [&str; 3] = ["full", "closed", "without a reader"];

#[test]
fn commands_keep_their_exit_codes_whatever_becomes_of_stderr() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("broken.yaml"), "version: 1\nalias: []\n").unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    let cases: [(&[&str], i32); 7] = [
        (&["run", "--config", "broken.yaml"], 2),
        (&["run", "a=b.example", "--listen", &taken, "--admin", "none"], 2),
        (&["run", "--lisen"], 2),
        (&["wait", "--timeout", "1ms", "--admin", "127.0.0.1:1"], 1),
        (&["ca", "show"], 1),
        (&["exec", "a=b.example", "--", "sh", "-c", "exit 7"], 7),
        (&["exec", "a=b.example", "--", "./nowhere"], 127),
    ];
    for (arguments, expected) in cases {
        for lost in LOST {
            let status = truename_without(folder.path(), arguments, 2, lost).status().unwrap();
            assert_eq!(status.code(), Some(expected), "{arguments:?}, stderr {lost}");
        }
    }
    assert_eq!(names_in(&folder.path().join("tmp")), BTreeSet::new(), "private folders");
}

#[test]
fn a_command_whose_output_is_lost_ends_quietly_or_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("truename.yaml"), "version: 1\naliases: [{name: a}]\n").unwrap();
    for arguments in
        [&["schema"][..], &["completions", "bash"], &["check", "--config", "truename.yaml"]]
    {
        for (lost, expected) in [("full", 1), ("closed", 0), ("without a reader", 0)] {
            let output = truename_without(folder.path(), arguments, 1, lost).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(expected), "{arguments:?} {lost}: {said}");
            let told = said.contains("cannot write to standard output: No space left on device");
            assert_eq!(told, expected == 1, "{arguments:?} {lost}: {said}");
        }
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_stops_no_request_and_what_was_dropped_is_counted_and_said() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let (mut proxy, log) = Unread::start(&scene).await;
    // As long as a path may well be, so that they fill any buffer: 16 MiB.
    let path = "x".repeat(8 * 1024);
    let mut peer = client::connect(proxy.address).await;
    for number in 0..2048 {
        peer.send(format!("GET /{number}/{path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    let dropped = proxy.dropped().await;
    assert!(dropped > 512, "{dropped}");

    let lines = thread::spawn(move || -> Vec<String> {
        BufReader::new(log).lines().map(|line| line.unwrap()).collect()
    });
    assert_eq!(proxy.terminate().await, Some(0));
    let lines: Vec<Value> =
        lines.join().unwrap().iter().map(|line| serde_json::from_str(line).expect(line)).collect();
    let sum: u64 = lines.iter().filter_map(|line| line["lines"].as_u64()).sum();
    let written = lines.iter().filter(|line| line["message"] == "request").count() as u64;
    assert_eq!((sum, sum + written), (dropped, 2048), "every line is written or counted");
}

#[tokio::test]
async fn a_log_that_nobody_reads_does_not_keep_a_process_from_its_end() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let (mut proxy, _log) = Unread::start(&scene).await;
    let path = "x".repeat(8 * 1024);
    let mut peer = client::connect(proxy.address).await;
    for _ in 0..32 {
        peer.send(format!("GET /{path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    drop(peer);
    assert_eq!(proxy.terminate().await, Some(0));
}

/// `clap` writes by itself.
#[tokio::test]
async fn what_is_wrong_with_the_arguments_waits_for_no_reader() {
    let folder = tempfile::tempdir().unwrap();
    let (_reader, mut writer) = pipe().unwrap();
    let size = nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    writer.write_all(&vec![b'x'; size.try_into().unwrap()]).unwrap();
    for arguments in [&["run", "--lisen"][..], &["no-command"], &[]] {
        let stderr = writer.try_clone().unwrap();
        let mut command = truename(folder.path(), arguments);
        let mut child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        assert_eq!(ended(&mut child).await, Some(2), "{arguments:?}");
    }
}

#[test]
fn help_that_cannot_be_written_is_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"]] {
        for (lost, expected) in [("full", 1), ("closed", 0), ("without a reader", 0)] {
            let output = truename_without(folder.path(), arguments, 1, lost).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(expected), "{arguments:?} {lost}: {said}");
        }
    }
}

/// `ulimit -f`, as by `LimitFSIZE` of a unit file: the kernel has a signal for who goes beyond it.
#[tokio::test]
async fn a_log_that_may_grow_no_further_stops_no_request() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let folder = tempfile::tempdir().unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut proxy = Unread::with(&scene, "ulimit -f 1024; ", log).await;
    let path = "x".repeat(8 * 1024);
    let mut peer = client::connect(proxy.address).await;
    for _ in 0..256 {
        peer.send(format!("GET /{path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    drop(peer);
    assert!(proxy.dropped().await > 0);
    assert_eq!(proxy.terminate().await, Some(0));
}

/// A proxy whose stderr is a pipe that nobody reads yet.
struct Unread {
    address: SocketAddr,
    admin: SocketAddr,
    child: Child,
    _folder: TempDir,
}

impl Unread {
    async fn start(scene: &Scene) -> (Self, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        (Self::with(scene, "", writer).await, reader)
    }

    /// With another stderr, and commands for the shell that starts it.
    async fn with(scene: &Scene, shell: &str, stderr: impl Into<Stdio>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = || loopback::listen_anywhere().local_addr().unwrap();
        let (address, admin) = (free(), free());
        let yaml = scene.yaml("").replace("127.0.0.1:0", &address.to_string());
        let yaml = yaml.replace("$FOLDER", folder.path().to_str().unwrap());
        fs::write(folder.path().join("root.pem"), trust::authority().root_pem()).unwrap();
        fs::write(folder.path().join("truename.yaml"), yaml).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{shell}exec \"$0\" \"$@\"")]);
        command.args([env!("CARGO_BIN_EXE_truename"), "run", "--config", "truename.yaml"]);
        command.args(["--admin", &admin.to_string()]);
        let mut command = dressed(command, folder.path());
        let child = command.stderr(stderr).spawn().unwrap();
        // The writing end that the test has goes with `command`.
        drop(command);
        within("the proxy to listen", async {
            while TcpStream::connect(admin).await.is_err()
                || TcpStream::connect(address).await.is_err()
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
        Self { address, admin, child, _folder: folder }
    }

    /// Lines that were dropped so far.
    async fn dropped(&self) -> u64 {
        let metrics = client::get(self.admin, "localhost", "/metrics").await;
        let mut lines = metrics.text().lines();
        let value = lines.find_map(|line| line.strip_prefix("truename_log_lines_dropped_total "));
        value.unwrap().parse().unwrap()
    }

    async fn terminate(&mut self) -> Option<i32> {
        signal(&self.child, Signal::SIGTERM);
        ended(&mut self.child).await
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The binary, with one of its streams lost.
fn truename_without(folder: &Path, arguments: &[&str], stream: u8, lost: &str) -> Command {
    let redirection = match lost {
        "full" => format!("{stream}>/dev/full"),
        "closed" => format!("{stream}>&-"),
        // Opened for both, then for writing only, and the reader goes.
        _ => format!("3<>gone {stream}>gone 3>&-"),
    };
    let mut command = Command::new("sh");
    command.args(["-c", &format!("rm -f gone; mkfifo gone; exec \"$0\" \"$@\" {redirection}")]);
    command.arg(env!("CARGO_BIN_EXE_truename")).args(arguments);
    dressed(command, folder)
}

fn truename(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    command.args(arguments);
    dressed(command, folder)
}

/// Without what the developer's shell says, and with folders of its own.
fn dressed(mut command: Command, folder: &Path) -> Command {
    for (name, _) in std::env::vars_os() {
        let upper = name.to_string_lossy().to_uppercase();
        if upper.starts_with("TRUENAME_") || upper.ends_with("_PROXY") {
            command.env_remove(&name);
        }
    }
    fs::create_dir_all(folder.join("tmp")).unwrap();
    command.env("TMPDIR", folder.join("tmp")).env("XDG_STATE_HOME", folder.join("state"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}
