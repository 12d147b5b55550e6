//! A hosts file of the command's own, in which each alias is a loopback address: what a program without a setting for
//! a proxy needs.
//!
//! It is mounted over `/etc/hosts` in a mount namespace that only the command and its children are in. A process with
//! threads cannot enter one, and neither can its child between fork and exec without unsafe code: so `truename` starts
//! itself again with a hidden command, which enters it and then becomes the command.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs, io,
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread::sleep,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
    unistd::{getegid, geteuid},
};
use tokio::time::Instant;

use super::{code_of, say_not_run};
use crate::{
    config::{FileError, read_file},
    telemetry,
};

/// The hidden command.
const COMMAND: &str = "exec-with-hosts";

const HOSTS: &str = "/etc/hosts";

/// The most that is read of the machine's own file.
const MAX_SIZE: usize = 1 << 20;

/// How long it may take to find out whether the system allows a mount. It takes milliseconds, unless a file hangs.
const CHECK: Duration = Duration::from_secs(5);

/// A command that has its own hosts file.
#[derive(Debug)]
pub struct WithHosts {
    hosts: PathBuf,
    /// With its arguments; if it is empty, only whether the system permits the hosts file is found out.
    command: Vec<OsString>,
}

impl WithHosts {
    /// Parses `exec-with-hosts FILE [CMD]...`, if these are such arguments. It is no command for people: they are
    /// shown it neither in the help nor in completions.
    pub fn given(mut arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        arguments.next().filter(|name| name == COMMAND)?;
        Some(Self { hosts: arguments.next()?.into(), command: arguments.collect() })
    }

    /// Becomes the command.
    pub fn run(&self) -> ExitCode {
        if let Err(error) = enter(&self.hosts) {
            telemetry::say(&error);
            return ExitCode::FAILURE;
        }
        let mut words = self.command.iter();
        let Some(program) = words.next() else { return ExitCode::SUCCESS };
        let error = Command::new(program).args(words).exec();
        // Trying has made SIGPIPE fatal, and stderr may have no reader.
        let mut pipe = SigSet::empty();
        pipe.add(Signal::SIGPIPE);
        let _ = pipe.thread_block();
        say_not_run(program, &error);
        ExitCode::from(code_of(&error))
    }

    /// The command line of this command, from the program on.
    pub fn command_line<'a>(
        hosts: &'a Path,
        command: &'a [OsString],
    ) -> impl Iterator<Item = &'a OsStr> {
        let own = [SELF.as_ref(), COMMAND.as_ref(), hosts.as_os_str()];
        own.into_iter().chain(command.iter().map(OsString::as_os_str))
    }
}

/// The program that runs. It can be started even if its file has been replaced.
const SELF: &str = "/proc/self/exe";

/// Why a command can have no hosts file of its own.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    #[error("--no-hosts")]
    Declined,
    #[error(
        "the system permits no more mount namespaces: see the sysctls user.max_mnt_namespaces and \
         user.max_user_namespaces"
    )]
    TooMany,
    #[error("the system does not permit a mount namespace: {0}")]
    Namespace(nix::Error),
    #[error("the system does not permit a mount over {HOSTS}: {0}")]
    Mount(nix::Error),
    #[error("cannot set up a user namespace: {0}")]
    Ids(io::Error),
    #[error("cannot read {HOSTS}: {0}")]
    Read(FileError),
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot start {SELF}: {0}")]
    Start(io::Error),
    #[error("mounting over {HOSTS} took longer than 5s")]
    Hangs,
    #[error("{0}")]
    Refused(String),
}

impl From<nix::Error> for HostsError {
    /// Of entering a namespace.
    fn from(error: nix::Error) -> Self {
        match error {
            nix::Error::ENOSPC | nix::Error::EUSERS => Self::TooMany,
            error => Self::Namespace(error),
        }
    }
}

/// Enters a mount namespace in which `hosts` is the hosts file. The process must have one thread.
fn enter(hosts: &Path) -> Result<(), HostsError> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
        // In a user namespace, root would lose its rights to the files of others.
        if geteuid().is_root() {
            return Err(error.into());
        }
        let (user, group) = (geteuid(), getegid());
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
        let set = |file: &str, value: String| {
            fs::write(format!("/proc/self/{file}"), value).map_err(HostsError::Ids)
        };
        // The ids stay what they are. Without this the map of groups cannot be written (user_namespaces(7)).
        set("setgroups", "deny".to_owned())?;
        set("uid_map", format!("{user} {user} 1"))?;
        set("gid_map", format!("{group} {group} 1"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .and_then(|()| mount(Some(hosts), HOSTS, none, MsFlags::MS_BIND, none))
        .map_err(HostsError::Mount)
}

/// Writes a hosts file with `entries` at `path`, and makes sure that a command can have it.
pub fn prepare(path: &Path, entries: &[Entry]) -> Result<(), HostsError> {
    let machines = read_file(HOSTS.as_ref(), MAX_SIZE).map_err(HostsError::Read)?;
    let machines = String::from_utf8_lossy(&machines);
    let write = |source| HostsError::Write { path: path.to_owned(), source };
    fs::write(path, text(&machines, entries)).map_err(write)?;
    let mut check = Command::new(SELF)
        .args(WithHosts::command_line(path, &[]).skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(HostsError::Start)?;
    let deadline = Instant::now() + CHECK;
    loop {
        match check.try_wait().map_err(HostsError::Start)? {
            Some(status) if status.success() => return Ok(()),
            Some(_) => {
                let output = check.wait_with_output().map_err(HostsError::Start)?;
                let reason = String::from_utf8_lossy(&output.stderr);
                return Err(HostsError::Refused(reason.trim().to_owned()));
            }
            None if Instant::now() >= deadline => {
                // It may be in a call that nothing interrupts; it ends after that.
                let _ = check.kill();
                return Err(HostsError::Hangs);
            }
            None => sleep(Duration::from_millis(1)),
        }
    }
}

/// An alias in the hosts file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub address: IpAddr,
    /// All its names.
    pub names: Vec<String>,
}

/// The machine's hosts file with `entries` instead of what it says about their names. Some resolvers take the first
/// line with a name, others all of them.
fn text(machines: &str, entries: &[Entry]) -> String {
    let is_ours = |name: &str| {
        let name = name.to_ascii_lowercase();
        entries.iter().any(|entry| entry.names.contains(&name))
    };
    let mut text = String::new();
    for Entry { address, names } in entries {
        let _ = writeln!(text, "{address} {}", names.join(" "));
    }
    for line in machines.lines() {
        let (fields, comment) = match line.find('#') {
            Some(at) => line.split_at(at),
            None => (line, ""),
        };
        let mut words = fields.split_ascii_whitespace();
        let address = words.next().unwrap_or_default();
        let names: Vec<_> = words.collect();
        let kept: Vec<_> = names.iter().copied().filter(|name| !is_ours(name)).collect();
        if kept.len() == names.len() {
            let _ = writeln!(text, "{line}");
        } else if !kept.is_empty() {
            let _ = writeln!(text, "{address} {} {comment}", kept.join(" "));
        }
    }
    text
}

#[cfg(test)]
mod tests;
