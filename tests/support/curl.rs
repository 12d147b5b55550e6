//! The real curl, as users drive the proxy with it.

use std::process::{Command, Stdio};

use super::within;

/// What curl did.
#[derive(Debug)]
pub struct Curl {
    /// Its exit code.
    pub code: i32,
    /// Its output.
    pub stdout: String,
    /// Its complaints.
    pub stderr: String,
}

/// Runs `curl -sS` with these arguments and without the proxies of the developer's shell.
#[track_caller]
pub fn curl(arguments: &[&str]) -> impl Future<Output = Curl> {
    let mut command = Command::new("curl");
    // Its own deadline, so that none is left behind by a test that timed out.
    command.args(["-sS", "--noproxy", "*", "--max-time", "15"]).args(arguments);
    command.stdin(Stdio::null());
    within("curl", async move {
        let output = tokio::task::spawn_blocking(move || command.output().expect("curl")).await;
        let output = output.unwrap();
        Curl {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    })
}
