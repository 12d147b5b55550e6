//! Other people's servers, which `./test` installs: HAProxy, nginx, tinyproxy.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{net::TcpStream, time::sleep};
use truename::demo::authority::LeafOptions;

use super::{loopback, scene::TRUE_NAME, trust, within};

/// A running server, killed when dropped.
pub struct Daemon {
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
    _folder: TempDir,
}

impl Daemon {
    /// HAProxy with this configuration, in which `$ADDRESS` is where it is to listen and `$FOLDER` has `server.pem`: the
    /// certificate of the true name, with its key.
    pub async fn haproxy(config: &str) -> Self {
        let defaults = "defaults\n timeout connect 20s\n timeout client 20s\n timeout server 20s\n";
        Self::start("haproxy", &["-db", "-f", "$FOLDER/config"], &format!("{defaults}{config}"))
            .await
    }

    /// nginx with this inside of its `http`.
    pub async fn nginx(http: &str) -> Self {
        let config = format!(
            "daemon off; master_process off; pid $FOLDER/pid; error_log stderr;\n\
             events {{}}\n\
             http {{\n access_log off; client_body_temp_path $FOLDER/a; proxy_temp_path $FOLDER/b;\n\
             fastcgi_temp_path $FOLDER/c; uwsgi_temp_path $FOLDER/d; scgi_temp_path $FOLDER/e;\n\
             {http}\n}}\n"
        );
        Self::start("nginx", &["-p", "$FOLDER", "-c", "$FOLDER/config", "-e", "stderr"], &config)
            .await
    }

    /// tinyproxy with these further settings.
    pub async fn tinyproxy(settings: &str) -> Self {
        let config = format!("Listen $IP\nPort $PORT\nTimeout 60\nMaxClients 50\n{settings}\n");
        Self::start("tinyproxy", &["-d", "-c", "$FOLDER/config"], &config).await
    }

    /// Starts `program` with these arguments and waits until it listens.
    async fn start(program: &str, arguments: &[&str], config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = free_address();
        let filled = |text: &str| {
            let folder = folder.path().to_str().unwrap();
            text.replace("$FOLDER", folder)
                .replace("$ADDRESS", &address.to_string())
                .replace("$IP", &address.ip().to_string())
                .replace("$PORT", &address.port().to_string())
        };
        let leaf = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
        write(folder.path(), "server.pem", &format!("{}{}", leaf.chain_pem, leaf.key_pem));
        write(folder.path(), "config", &filled(config));
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
        command.args(arguments.iter().map(|argument| filled(argument)));
        command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}: `./test` installs it"));
        let mut daemon = Self { address, child, _folder: folder };
        within("a server to listen", daemon.listens(program)).await;
        daemon
    }

    async fn listens(&mut self, program: &str) {
        while TcpStream::connect(self.address).await.is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{program} has ended at once: {status}");
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One that nobody has bound: the address is this process' own, and the port is below those that the kernel gives.
fn free_address() -> SocketAddr {
    let port = 10_000 + std::process::id() % 20_000;
    SocketAddr::new(loopback::address(), port.try_into().unwrap())
}

fn write(folder: &Path, name: &str, contents: &str) {
    std::fs::write(folder.join(name), contents).unwrap();
}
