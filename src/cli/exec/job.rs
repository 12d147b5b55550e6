//! The command as a shell's job control sees it: it may have a process group of its own, and it may stop.

use std::fs::File;

use nix::{
    sys::{
        signal::{Signal, kill, raise},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{Pid, getpgid, getpgrp, tcgetpgrp, tcsetpgrp},
};

/// The command.
#[derive(Clone, Copy)]
pub struct Job(pub Pid);

impl Job {
    /// Whether the command gets what the terminal gives to us: it may have left for a session of its own.
    pub fn is_in_foreground(self) -> bool {
        let ours = Some(getpgrp());
        self.group() == ours && foreground() == ours
    }

    /// Stops where job control has stopped the command, or where it had the terminal: a shell that waits for us, and
    /// not for the command, takes the terminal back then. Once the shell continues us, so does the command.
    pub fn stop_with_it(self) {
        let Some(signal) = self.stopped() else { return };
        let (ours, before) = (Some(getpgrp()), foreground());
        let had_terminal = before == ours || before == self.group();
        let is_job_control = matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU);
        if before.is_none() || !(had_terminal || is_job_control) {
            return;
        }
        // This is where we go on. Has no effect where there is nobody to continue us.
        let _ = raise(Signal::SIGTSTP);
        // Whoever continues our group continues a command that is in it.
        if self.group() == ours {
            return;
        }
        if let Some(before) = before.filter(|_| had_terminal && foreground() == ours) {
            let _ = terminal().map(|terminal| tcsetpgrp(terminal, before));
        }
        let _ = kill(self.0, Signal::SIGCONT);
    }

    /// What has stopped it, where it stands still.
    fn stopped(self) -> Option<Signal> {
        // The end of the command is not for us to see.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(self.0), flags) {
            Ok(WaitStatus::Stopped(_, signal)) => Some(signal),
            _ => None,
        }
    }

    fn group(self) -> Option<Pid> {
        getpgid(Some(self.0)).ok()
    }
}

/// Takes note of the end of children that we did not start: of those whose own parents have ended, where this is the
/// first process of a container. They would stay there as zombies.
pub fn reap_others(command: Job) {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    // The command's end is awaited elsewhere.
    while let Ok(status) = waitid(Id::All, ended | WaitPidFlag::WNOWAIT)
        && let Some(pid) = status.pid().filter(|pid| *pid != command.0)
    {
        if waitid(Id::Pid(pid), ended).is_err() {
            return;
        }
    }
}

/// The group that the terminal belongs to; none where we have no terminal.
fn foreground() -> Option<Pid> {
    terminal().and_then(|terminal| tcgetpgrp(terminal).ok())
}

fn terminal() -> Option<File> {
    File::open("/dev/tty").ok()
}
