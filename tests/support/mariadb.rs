//! A real MariaDB, as distributions have it, that takes nothing but TLS.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;
use truename::demo::authority::LeafOptions;

use super::{loopback, tools, trust, within};

/// The name in its certificate.
pub const PRIMARY: &str = "primary-db.example.com";

/// Its users: one of each plugin. It is new, and one interrupted handshake would make it block this host.
const USERS: &str = "create user app@'%' identified by 'secret';\n\
     grant all on *.* to app@'%';\n\
     create user modern@'%' identified via ed25519 using password('secret');\n\
     create database shop;\n\
     grant all on shop.* to modern@'%';\n";

/// A running server; dropping it ends it.
pub struct MariaDb {
    /// Where it listens.
    pub address: SocketAddr,
    process: Child,
    folder: TempDir,
}

impl MariaDb {
    /// A new one, without any data.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let leaf = trust::authority().issue(&[PRIMARY], &[], LeafOptions::default()).unwrap();
        fs::write(path("cert.pem"), leaf.chain_pem).unwrap();
        fs::write(path("key.pem"), leaf.key_pem).unwrap();
        fs::write(path("users.sql"), USERS).unwrap();
        // As root it runs only where that is said.
        let user = format!("--user={}", if nix::unistd::geteuid().is_root() { "root" } else { "" });
        let user = (user != "--user=").then_some(user);
        let data = format!("--datadir={}", path("data").display());
        // Each names its temporary tables alike.
        let temporary = format!("--tmpdir={}", folder.path().display());
        run(Command::new("mariadb-install-db")
            .arg("--no-defaults")
            .args(&user)
            .arg(&data)
            .arg(&temporary)
            .args(["--auth-root-authentication-method=normal", "--skip-test-db"]));
        let port = loopback::port_of_its_own();
        let process = Command::new("mariadbd")
            .arg("--no-defaults")
            .args(&user)
            .arg(&data)
            .arg(&temporary)
            .arg(format!("--socket={}", path("socket").display()))
            .arg(format!("--pid-file={}", path("pid").display()))
            .arg(format!("--port={port}"))
            .arg(format!("--ssl-cert={}", path("cert.pem").display()))
            .arg(format!("--ssl-key={}", path("key.pem").display()))
            .arg(format!("--init-file={}", path("users.sql").display()))
            .arg(format!("--plugin-dir={}", tools::mariadb_plugins().display()))
            .args([
                "--bind-address=127.0.0.1",
                "--require-secure-transport=ON",
                "--plugin-load-add=auth_ed25519",
                "--performance-schema=ON",
                "--performance-schema-max-thread-instances=50",
                "--max-connect-errors=1",
                "--innodb-buffer-pool-size=16M",
                "--innodb-flush-method=fsync",
            ])
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        let address = (Ipv4Addr::LOCALHOST, port).into();
        let mut server = Self { address, process, folder };
        within("MariaDB to start", server.ready()).await;
        server
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// What a statement gives, asked over its Unix socket by its administrator: nothing of it is counted.
    pub fn query(&self, statement: &str) -> String {
        let socket = format!("--socket={}", self.folder.path().join("socket").display());
        let output = run(Command::new("mariadb")
            .args(["--no-defaults", "-uroot", "-N", &socket])
            .args(["-e", statement]));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until it listens.
    async fn ready(&mut self) {
        while !self.log().contains("ready for connections") {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("MariaDB ended with {status}: {}", self.log());
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a program to its end.
#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
