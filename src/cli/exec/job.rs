//! The command in terms of job control: it may have its own process group, and it may stop.

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
    /// Whether the command gets the terminal's signals like we do. It may have created its own group or session.
    pub fn is_in_foreground(self) -> bool {
        let ours = Some(getpgrp());
        self.group() == ours && foreground() == ours
    }

    /// Stops this process if job control has stopped the command, or if it had the terminal: a shell waits for us, not
    /// for the command, and then takes the terminal back. Once the shell continues us, the command is continued.
    pub fn stop_with_it(self) {
        let Some(signal) = self.stopped() else { return };
        let (ours, before) = (Some(getpgrp()), foreground());
        let had_terminal = before == ours || before == self.group();
        let is_job_control = matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU);
        if before.is_none() || !(had_terminal || is_job_control) {
            return;
        }
        // We continue here. Has no effect in an orphaned group, where no shell could continue us.
        let _ = raise(Signal::SIGTSTP);
        // A command in our group is continued together with us.
        if self.group() == ours {
            return;
        }
        if let Some(before) = before.filter(|_| had_terminal && foreground() == ours) {
            let _ = terminal().map(|terminal| tcsetpgrp(terminal, before));
        }
        let _ = kill(self.0, Signal::SIGCONT);
    }

    /// The signal that stopped it, if it is stopped.
    fn stopped(self) -> Option<Signal> {
        // The end of the command is handled elsewhere.
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

/// Reaps children that we did not start: as the first process of a container, we become the parent of orphaned
/// processes, which would stay as zombies.
pub fn reap_others(command: Job) {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    // The end of the command is handled elsewhere.
    while let Ok(status) = waitid(Id::All, ended | WaitPidFlag::WNOWAIT)
        && let Some(pid) = status.pid().filter(|pid| *pid != command.0)
    {
        if waitid(Id::Pid(pid), ended).is_err() {
            return;
        }
    }
}

/// The foreground group of the terminal; `None` if we have no terminal.
fn foreground() -> Option<Pid> {
    terminal().and_then(|terminal| tcgetpgrp(terminal).ok())
}

fn terminal() -> Option<File> {
    File::open("/dev/tty").ok()
}
