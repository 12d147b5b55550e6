//! Servers of other people, as Debian has them: they run without root's rights, in a folder of their own.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::net::TcpStream;
use truename::demo::authority::LeafOptions;

use super::{process::signal, trust, within};

/// Who they run as where the tests run as root.
const NOBODY: u32 = 65534;

/// A folder that a server may write to. With `cert.pem` and `key.pem`.
pub struct Folder(TempDir);

impl Folder {
    /// With a certificate for this name.
    pub fn of(name: &str) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let leaf = trust::authority().issue(&[name], &[], LeafOptions::default()).unwrap();
        folder.file("cert.pem", &leaf.chain_pem);
        folder.file("key.pem", &leaf.key_pem);
        folder.give(folder.path());
        folder
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds a file.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, contents).unwrap();
        self.give(&path);
        path
    }

    /// Adds a folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir(&path).unwrap();
        self.give(&path);
        path
    }

    fn give(&self, path: &Path) {
        if is_root() {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
}

/// A running server, which ends when this is dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Starts it in `folder`, and waits until it listens at all of `addresses`.
    pub async fn start(folder: &Folder, command: &[&str], addresses: &[SocketAddr]) -> Self {
        let output = fs::File::create(folder.path().join("output.log")).unwrap();
        let mut arguments = command.to_vec();
        if is_root() {
            let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
            arguments = [&["setpriv"], &nobody[..], command].concat();
        }
        let child = Command::new(arguments[0])
            .args(&arguments[1..])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn();
        let daemon = Self(child.unwrap());
        within(&format!("{command:?} to listen"), async {
            for address in addresses {
                while TcpStream::connect(address).await.is_err() {}
            }
        })
        .await;
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        signal(&self.0, Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// The user and the group that servers run as.
pub fn user() -> (String, String) {
    let name = |option: &str| {
        let mut command = Command::new("id");
        command.arg(option);
        if is_root() {
            command.arg("nobody");
        }
        let output = command.output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    (name("-un"), name("-gn"))
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
