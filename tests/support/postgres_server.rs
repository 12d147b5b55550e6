//! A real PostgreSQL server, with TLS only and SCRAM, and its own clients.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, geteuid},
};
use tempfile::TempDir;

use super::{loopback, trust, within};

/// The password of the user `app`.
pub const PASSWORD: &str = "secret";

/// A running server; dropping it ends it.
pub struct PostgresServer {
    /// Where it listens.
    pub address: SocketAddr,
    folder: TempDir,
    child: Child,
}

impl PostgresServer {
    /// A new cluster at this address, whose certificate is valid for `name`, with further settings.
    pub async fn start(address: SocketAddr, name: &str, settings: &[&str]) -> Self {
        let folder = folder();
        let password = folder.path().join("password");
        write(&password, PASSWORD);
        let mut initdb = as_server("initdb");
        initdb.args(["--no-sync", "--username=app", "--auth=scram-sha-256", "--encoding=UTF8"]);
        initdb.arg("--pwfile").arg(&password).arg("-D").arg(folder.path().join("data"));
        let made = initdb.output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let hba = "hostssl all,replication all all scram-sha-256\n";
        fs::write(folder.path().join("data/pg_hba.conf"), hba).unwrap();
        Self::run(folder, address, name, settings).await
    }

    /// A streaming standby of `primary`.
    pub async fn standby(primary: &Self, address: SocketAddr, name: &str) -> Self {
        let folder = folder();
        let mut copy = as_server("pg_basebackup");
        copy.args([
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
            "--wal-method=stream",
        ]);
        copy.arg("-D").arg(folder.path().join("data")).arg("-d").arg(format!(
            "host={} port={} user=app sslmode=require",
            primary.address.ip(),
            primary.address.port()
        ));
        let copied = copy.env("PGPASSWORD", PASSWORD).output().unwrap();
        assert!(copied.status.success(), "{copied:?}");
        Self::run(folder, address, name, &[]).await
    }

    async fn run(folder: TempDir, address: SocketAddr, name: &str, settings: &[&str]) -> Self {
        let leaf = trust::authority().issue(&[name], &[], Default::default()).unwrap();
        write(&folder.path().join("server.crt"), &leaf.chain_pem);
        write(&folder.path().join("server.key"), &leaf.key_pem);
        let path = |file: &str| folder.path().join(file).to_str().unwrap().to_owned();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut postgres = as_server("postgres");
        postgres.arg("-D").arg(folder.path().join("data"));
        for setting in [
            format!("listen_addresses={}", address.ip()),
            format!("port={}", address.port()),
            format!("unix_socket_directories={}", folder.path().display()),
            format!("ssl_cert_file={}", path("server.crt")),
            format!("ssl_key_file={}", path("server.key")),
            "ssl=on".to_owned(),
            "fsync=off".to_owned(),
        ]
        .iter()
        .map(String::as_str)
        .chain(settings.iter().copied())
        {
            postgres.arg("-c").arg(setting);
        }
        let child = postgres.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let server = Self { address, folder, child };
        server.logged("ready to accept").await;
        server
    }

    /// Waits until its log has this text.
    pub async fn logged(&self, text: &str) {
        let log = self.folder.path().join("log");
        within(text, async {
            while !fs::read_to_string(&log).unwrap().contains(text) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Has a standby become a primary.
    pub async fn promote(&self) {
        let mut promote = as_server("pg_ctl");
        let promoted =
            promote.args(["promote", "-w", "-D"]).arg(self.folder.path().join("data")).output();
        let promoted = promoted.unwrap();
        assert!(promoted.status.success(), "{promoted:?}");
    }

    /// Kills it, as a crash of the machine would.
    pub fn kill(&self) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGQUIT).unwrap();
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.kill();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            eprintln!("the server's log:\n{log}");
        }
    }
}

/// An address for a server.
pub fn address() -> SocketAddr {
    loopback::listen_anywhere().local_addr().unwrap()
}

/// `psql`, without what the developer's shell says to it, at the alias.
pub fn psql(alias: SocketAddr, options: &str, arguments: &[&str]) -> Command {
    client("psql", alias, options, &[&["-XAtq", "-v", "ON_ERROR_STOP=1"], arguments].concat())
}

/// A client of PostgreSQL's own that takes a connection string as its last argument.
pub fn client(program: &str, alias: SocketAddr, options: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(bin(program));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(&name);
        }
    }
    command.env("PGPASSWORD", PASSWORD).stdin(Stdio::null()).args(arguments).arg(format!(
        "host={} port={} user=app dbname=postgres {options}",
        alias.ip(),
        alias.port()
    ));
    command
}

/// What a program wrote, which must have succeeded.
#[track_caller]
pub fn written(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A folder of the user that the server runs as.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    give(folder.path());
    folder
}

fn write(file: &Path, contents: &str) {
    fs::write(file, contents).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    give(file);
}

/// A server refuses to run as root.
fn give(file: &Path) {
    if geteuid().is_root() {
        let user = User::from_name("postgres").unwrap().expect("postgres: ./test installs it");
        chown(file, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
}

/// A program of the server's, as the user that it runs as.
fn as_server(program: &str) -> Command {
    let mut command = if geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(bin(program));
        command
    } else {
        Command::new(bin(program))
    };
    command.current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C.UTF-8").env("HOME", "/");
    command
}

/// Debian has the server's programs in a folder for each version.
#[track_caller]
fn bin(program: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(program));
    found
        .filter(|file| file.exists())
        .max()
        .unwrap_or_else(|| panic!("{program}: ./test installs it"))
}
