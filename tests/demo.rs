//! `truename demo`: whoever runs it must be able to believe it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
};

use crate::support::process;
use nix::sys::signal::Signal;
use tempfile::TempDir;

#[test]
fn told_once_the_story_holds_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let output = demo(&folder, &["--once"]).output().unwrap();
    let page = held(&output);

    for part in [
        "webscaler-manual.default.svc.cluster.local  canonical name = httpbin.org",
        "target host name 'webscaler-manual'",
        "SNI   httpbin.org",
        "https://webscaler-manual works, and both certificates are verified",
        "40 of 40 succeeded",
        "server certificate for \"db-eu.example.com\" does not match host name \"webscaler-db\"",
        "TLSv1.3",
        "the session's work goes on in db-us.example.com",
        "1 session ended between two statements (57P01), and each of ",
    ] {
        assert!(page.contains(part), "{part:?} is not in\n{page}");
    }
    for ip in ["127.0.0.11", "127.0.0.12", "127.0.0.13", "127.0.0.14"] {
        assert!(page.contains(&format!("{ip}   #")), "no bar for {ip} in\n{page}");
    }
    assert!(!page.contains('\x1b'), "colour in a pipe:\n{page}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[test]
fn two_demos_do_not_disturb_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let start = || demo(&folder, &["--once"]).stderr(Stdio::piped()).spawn().unwrap();
    let (one, other) = (start(), start());
    held(&one.wait_with_output().unwrap());
    held(&other.wait_with_output().unwrap());
}

#[test]
fn it_stays_up_for_its_curl_lines_until_it_is_told_to_go() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Running(demo(&folder, &[]).spawn().unwrap());
        let lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap).skip_while(|line| !line.starts_with("Try it"));
        assert!(lines.next().is_some(), "the demo ended before its curl lines");

        let first = lines.next().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{first} --silent --max-time 10")]).env("NO_PROXY", "*");
        let output = shell.output().unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(shown["args"]["test"], "value");

        let exec = lines.find(|line| line.contains(" exec --config ")).unwrap();
        let output = Command::new("sh").args(["-c", &format!("{exec} -sS")]).output().unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(shown["args"]["test"], "value");

        process::signal(&running.0, signal);
        assert_eq!(running.0.wait().unwrap().code(), Some(0), "{signal}");
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
}

fn demo(folder: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    command.arg("demo").args(arguments).env("TMPDIR", folder.path()).stdout(Stdio::piped());
    command
}

fn held(output: &Output) -> String {
    let page = String::from_utf8(output.stdout.clone()).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{page}\n{errors}");
    page
}

/// Killed where the test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
