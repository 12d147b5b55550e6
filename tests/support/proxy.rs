//! The binary under test, with a configuration in a folder of its own.

use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{ChildStderr, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

use super::{client, trust, within};

/// Log lines kept for a test's questions and for its failure.
const MAX_LINES: usize = 20_000;

/// A proxy to be started.
pub struct Setup {
    yaml: String,
    files: Vec<(String, Vec<u8>)>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    shell: String,
}

impl Setup {
    /// A proxy with this configuration. In it `$FOLDER` is where its files are: `root.pem` (the
    /// tests' authority), and what [`Setup::file`] adds. Without an `admin:` it has one on any port.
    pub fn new(yaml: &str) -> Self {
        let has_admin = yaml.lines().any(|line| line.starts_with("admin:"));
        let yaml = if has_admin { yaml.to_owned() } else { with_admin(yaml) };
        let root = trust::authority().root_pem().to_owned();
        Self {
            yaml,
            files: vec![("root.pem".to_owned(), root.into_bytes())],
            arguments: Vec::new(),
            environment: Vec::new(),
            shell: String::new(),
        }
    }

    /// Puts a file into the folder.
    pub fn file(mut self, name: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), contents.into()));
        self
    }

    /// Adds an argument to `truename run --config FILE`.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Sets a variable.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Has a shell run these commands (`ulimit -n 9; `) in the process before the proxy does.
    pub fn shell(mut self, commands: &str) -> Self {
        commands.clone_into(&mut self.shell);
        self
    }

    /// Starts the process, without waiting for anything.
    pub fn spawn(self) -> Proxy {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in &self.files {
            std::fs::write(folder.path().join(name), contents).unwrap();
        }
        write_config(folder.path(), &self.yaml);

        let mut command = Command::new("sh");
        command.args(["-c", &format!("{}exec \"$0\" \"$@\"", self.shell)]);
        command
            .arg(env!("CARGO_BIN_EXE_truename"))
            .arg("run")
            .arg("--config")
            .arg(folder.path().join("truename.yaml"));
        command.args(&self.arguments).current_dir(folder.path());
        // What the developer's shell says about proxies must not reach the test.
        for (name, _) in std::env::vars_os() {
            let upper = name.to_string_lossy().to_uppercase();
            if upper.starts_with("TRUENAME_") || upper.ends_with("_PROXY") {
                command.env_remove(&name);
            }
        }
        // The local authority of a test is its own.
        command.env("XDG_STATE_HOME", folder.path().join("state"));
        command.envs(self.environment);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());

        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        let stderr = child.stderr.take().unwrap();
        let (notes, state) = watch::channel(State::default());
        let reader = thread::spawn(move || {
            read_log(stderr, &notes);
            let status = child.wait().unwrap();
            notes.send_modify(|state| state.exit = Some(status));
        });
        Proxy { folder, pid, state, reader: Some(reader) }
    }

    /// Starts the process and waits until it is ready, where it has an admin listener.
    pub async fn start(self) -> Proxy {
        let has_admin = !self.yaml.contains("admin: null") && !self.yaml.contains("listen: null");
        let proxy = self.spawn();
        if has_admin {
            proxy.ready().await;
        }
        proxy
    }
}

/// A running proxy, killed when dropped.
pub struct Proxy {
    folder: TempDir,
    pid: Pid,
    state: watch::Receiver<State>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy with this configuration and waits until it is ready.
    pub async fn start(yaml: &str) -> Self {
        Setup::new(yaml).start().await
    }

    /// Where the alias listens: the first address, if there are several.
    pub async fn address(&self, alias: &str) -> SocketAddr {
        self.addresses(alias, 1).await[0]
    }

    /// Where the alias listens, once it does so on `count` addresses.
    pub async fn addresses(&self, alias: &str, count: usize) -> Vec<SocketAddr> {
        let state = self.until("the alias' listeners", |state| state.of(alias).count() >= count);
        state.await.of(alias).collect()
    }

    /// Where the admin listener is.
    pub async fn admin(&self) -> SocketAddr {
        let bound = |state: &State| {
            state.bound.iter().find_map(|bound| match bound {
                Bound::Admin(address) => Some(*address),
                Bound::Alias(..) | Bound::Forward(_) => None,
            })
        };
        bound(&self.until("the admin listener", |state| bound(state).is_some()).await).unwrap()
    }

    /// Where the forward proxy listens: the latest address, if there were several.
    pub async fn forward_proxy(&self) -> SocketAddr {
        let bound = |state: &State| {
            state.bound.iter().rev().find_map(|bound| match bound {
                Bound::Forward(address) => Some(*address),
                Bound::Alias(..) | Bound::Admin(_) => None,
            })
        };
        let state = self.until("the forward proxy's listener", |state| bound(state).is_some());
        bound(&state.await).unwrap()
    }

    /// Waits until every listener is bound.
    pub async fn ready(&self) {
        let admin = self.admin().await;
        within("/readyz", async {
            while client::get(admin, "localhost", "/readyz").await.status() != 200 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// What `/status` says.
    pub async fn status(&self) -> Value {
        let response = client::get(self.admin().await, "localhost", "/status").await;
        assert_eq!(response.status(), 200, "{}", response.text());
        response.json()
    }

    /// The value of one series of `/metrics`, as in `truename_endpoints{alias="a",state="active"}`.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let response = client::get(self.admin().await, "localhost", "/metrics").await;
        let lines = response.text().lines();
        let found = lines.filter_map(|line| line.rsplit_once(' ')).find(|(key, _)| *key == series);
        found.map(|(_, value)| value.parse().unwrap())
    }

    /// Waits until a line of the log holds `text`, and gives that line.
    pub async fn logged(&self, text: &str) -> String {
        let find = |state: &State| state.lines.iter().find(|line| line.contains(text)).cloned();
        find(&self.until(text, |state| find(state).is_some()).await).unwrap()
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.state.borrow().text()
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The folder of the configuration.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The roots of the local authority, which applications trust.
    pub fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        let file = self.folder().join("state/truename/ca.pem");
        for root in CertificateDer::pem_file_iter(file).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        Arc::new(roots)
    }

    /// Puts another configuration in the place of the running one: the proxy is not told.
    pub fn rewrite(&self, yaml: &str) {
        write_config(self.folder.path(), yaml);
    }

    /// Puts the file to work, which must succeed.
    pub async fn reload(&self) {
        let mut peer = client::connect(self.admin().await).await;
        let head = "POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        peer.send(head).await;
        assert_eq!(peer.response_to("POST").await.text(), "reloaded\n");
    }

    /// The most memory that the process has had so far (Linux' `VmHWM`), in bytes.
    pub fn peak_memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib * 1024
    }

    /// How many files the process may open: the soft and the hard limit.
    pub fn file_limit(&self) -> (String, String) {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.pid)).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    }

    /// How many files the process has open.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap().count()
    }

    /// Has the process open no more files than these; without a number, as many as it may.
    pub fn limit_open_files(&self, limit: Option<usize>) {
        let limit = limit.map_or_else(|| self.file_limit().1, |limit| limit.to_string());
        let mut command = Command::new("prlimit");
        command.args(["--pid", &self.pid.to_string(), &format!("--nofile={limit}:")]);
        assert!(command.status().unwrap().success(), "prlimit, of util-linux");
    }

    /// Lets the process write to files again after `ulimit -S -f 0`, which is as a full disk is.
    pub fn free_disk(&self) {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &self.pid.to_string(), "--fsize=unlimited:"]);
        assert!(command.status().unwrap().success(), "prlimit, of util-linux");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits until the process ends.
    pub async fn exit(&self) -> ExitStatus {
        let mut state = self.state.clone();
        let ended = state.wait_for(|state| state.exit.is_some());
        within("the proxy to end", ended).await.unwrap().exit.unwrap()
    }

    /// Waits until the log shows `enough`; a proxy that ends before is a failure. Either failure
    /// shows the log, as [`Proxy::drop`] prints it.
    async fn until(&self, what: &str, mut enough: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| enough(state) || state.exit.is_some());
        let settled = within(what, settled).await.unwrap().clone();
        if !enough(&settled) {
            panic!("the proxy ended ({}) before {what}", settled.exit.unwrap());
        }
        settled
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Once reaped, the number may be another process'.
        if self.state.borrow().exit.is_none() {
            kill(self.pid, Signal::SIGKILL).ok();
        }
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
        if thread::panicking() {
            eprintln!("the proxy's log:\n{}", self.log());
        }
    }
}

/// What the process has said.
#[derive(Clone, Debug, Default)]
struct State {
    lines: VecDeque<String>,
    bound: Vec<Bound>,
    exit: Option<ExitStatus>,
}

/// A listener, as the log announced it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// One of an alias.
    Alias(String, SocketAddr),
    /// The admin listener.
    Admin(SocketAddr),
    /// The forward proxy.
    Forward(SocketAddr),
}

impl State {
    fn of(&self, alias: &str) -> impl Iterator<Item = SocketAddr> {
        self.bound.iter().filter_map(move |bound| match bound {
            Bound::Alias(name, address) if name == alias => Some(*address),
            _ => None,
        })
    }

    fn note(&mut self, line: String) {
        self.bound.extend(Bound::parse(&line));
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

impl Bound {
    /// `listening` with `address` and `alias`, or `admin listening` or `forward proxy listening`
    /// with `address`: as JSON (the
    /// default where stderr is no terminal), or as text.
    pub fn parse(line: &str) -> Option<Self> {
        match serde_json::from_str::<Value>(line) {
            Ok(event) => {
                let fields = event.get("fields").unwrap_or(&event);
                let address = fields.get("address")?.as_str()?.parse().ok()?;
                match fields.get("message")?.as_str()? {
                    "listening" => {
                        Some(Self::Alias(fields.get("alias")?.as_str()?.to_owned(), address))
                    }
                    "admin listening" => Some(Self::Admin(address)),
                    "forward proxy listening" => Some(Self::Forward(address)),
                    _ => None,
                }
            }
            Err(_) => {
                let value = |key: &str| {
                    let (_, rest) = line.split_once(key)?;
                    let rest = rest.trim_start_matches('"');
                    rest.split([' ', '"']).next()
                };
                let address = value(" address=")?.parse().ok()?;
                if line.contains("admin listening ") {
                    Some(Self::Admin(address))
                } else if line.contains("forward proxy listening ") {
                    Some(Self::Forward(address))
                } else if line.contains("listening ") {
                    Some(Self::Alias(value(" alias=")?.to_owned(), address))
                } else {
                    None
                }
            }
        }
    }
}

fn write_config(folder: &Path, yaml: &str) {
    let yaml = yaml.replace("$FOLDER", folder.to_str().unwrap());
    std::fs::write(folder.join("truename.yaml"), yaml).unwrap();
}

fn read_log(stderr: ChildStderr, notes: &watch::Sender<State>) {
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { return };
        notes.send_modify(|state| state.note(line));
    }
}

/// The configuration with an admin listener, which stays where it is when a test rewrites the file.
pub fn with_admin(yaml: &str) -> String {
    format!("{yaml}\nadmin: {{listen: \"127.0.0.1:0\"}}\n")
}
