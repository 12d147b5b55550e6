//! Processes that tests start by themselves, and what they leave behind.

use std::{collections::BTreeSet, fs, path::Path, process::Child};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::within;

/// Sends a signal.
pub fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

/// Waits for the end of a process, and gives its exit code.
pub async fn ended(child: &mut Child) -> Option<i32> {
    within("the process to end", async {
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

/// The names of what is in a folder.
pub fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
