//! `truename wait`: waits until a running proxy is ready; a startup probe that needs no shell.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    EXIT_FAILED, EXIT_USAGE,
    run::{self, ConfigError},
};
use crate::{
    config::{Admin, duration, print_duration},
    files::{self, WorkError},
    telemetry,
};

/// The time between two attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// The time limit of an attempt. A ready proxy responds at once; otherwise a new connection is tried.
const TRY_LIMIT: Duration = Duration::from_secs(1);
/// The least time of an attempt. The last one may exceed the timeout, because its error is the one reported.
const TRY_LEAST: Duration = Duration::from_millis(250);
/// The least time for reading the file, even if the timeout is shorter. It is enough for a file that does not hang.
const READ_LEAST: Duration = Duration::from_secs(1);
/// More than the longest status line of the proxy.
const MAX_STATUS_LINE: usize = 256;

/// Wait until a running proxy is ready; exit with 1 if it is not within the timeout
#[derive(Clone, Debug, clap::Args)]
pub struct Wait {
    /// How long to wait, such as `250ms`, `30s` or `1m`
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,

    /// The proxy's admin listener, if not the one in the file: an address, or a port of 127.0.0.1
    #[arg(long, value_name = "ADDR", env = "TRUENAME_ADMIN")]
    pub admin: Option<String>,

    /// The proxy's configuration file
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    pub config: Option<PathBuf>,
}

/// Why there is no address to connect to.
#[derive(Debug, thiserror::Error)]
enum WaitError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{0}")]
    File(#[from] WorkError),
    #[error("the proxy has no admin listener: set `admin.listen`, or start it with --admin ADDR")]
    NoAdmin,
    #[error(
        "the proxy's admin listener is on port 0, which means any free port: set a port in `admin.listen` or with --admin ADDR"
    )]
    AnyPort,
}

/// Why an attempt did not find the proxy ready.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no response within {0:?}")]
    Silent(Duration),
    #[error("GET /readyz returned `{0}`")]
    Responded(String),
    #[error("the server there does not speak HTTP")]
    NotHttp,
}

impl Wait {
    /// Waits, and returns the exit code.
    pub fn run(&self) -> ExitCode {
        super::block_on(self.perform())
    }

    async fn perform(&self) -> ExitCode {
        let deadline = Instant::now() + self.timeout;
        let wait = self.clone();
        let read_by = deadline.max(Instant::now() + READ_LEAST);
        let address = timeout_at(read_by, files::work(move || wait.address())).await;
        let admin = match address
            .map(|address| address.map_err(WaitError::from).and_then(|admin| admin))
        {
            Ok(Ok(admin)) => admin,
            Ok(Err(error)) => {
                telemetry::say(format_args!("truename: {error}"));
                return ExitCode::from(EXIT_USAGE);
            }
            Err(_) => {
                telemetry::say(format_args!(
                    "truename: the configuration {} could not be read within {:?}: the volume or \
                     pipe it is on does not respond",
                    self.config.as_deref().unwrap_or_else(|| Path::new("")).display(),
                    self.timeout.max(READ_LEAST),
                ));
                return ExitCode::from(EXIT_FAILED);
            }
        };
        match until_ready(admin, deadline).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                telemetry::say(format_args!(
                    "truename: no proxy is ready at {admin} after {}: {error}; start one with `truename run`, or name its admin listener with --admin ADDR or --config FILE",
                    print_duration(self.timeout)
                ));
                ExitCode::from(EXIT_FAILED)
            }
        }
    }

    /// The address to connect to. If it is given, the file is not read.
    fn address(&self) -> Result<SocketAddr, WaitError> {
        let listen = match (self.admin.as_deref(), self.config.as_deref()) {
            (Some("none"), _) => None,
            (Some(admin), _) => Some(run::address("--admin", admin)?),
            (None, Some(_)) => run::with_aliases(self.config.as_deref(), &[])?.admin.listen,
            (None, None) => Admin::default().listen,
        };
        let mut admin = listen.ok_or(WaitError::NoAdmin)?;
        if admin.port() == 0 {
            return Err(WaitError::AnyPort);
        }
        // A listener on all addresses is reached on loopback.
        match admin {
            SocketAddr::V4(v4) if v4.ip().is_unspecified() => {
                admin.set_ip(Ipv4Addr::LOCALHOST.into());
            }
            SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
                admin.set_ip(Ipv6Addr::LOCALHOST.into());
            }
            _ => {}
        }
        Ok(admin)
    }
}

/// Tries until the deadline. Returns the error of the last attempt.
async fn until_ready(admin: SocketAddr, deadline: Instant) -> Result<(), NotReady> {
    loop {
        let limit = deadline.duration_since(Instant::now()).clamp(TRY_LEAST, TRY_LIMIT);
        let asked = timeout(limit, ask(admin)).await;
        let Err(error) = asked.unwrap_or(Err(NotReady::Silent(limit))) else { return Ok(()) };
        if Instant::now() + PAUSE >= deadline {
            return Err(error);
        }
        sleep(PAUSE).await;
    }
}

async fn ask(admin: SocketAddr) -> Result<(), NotReady> {
    let mut stream = TcpStream::connect(admin).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut response = Vec::with_capacity(MAX_STATUS_LINE);
    let mut start = stream.take(MAX_STATUS_LINE as u64);
    while !response.contains(&b'\n') && start.read_buf(&mut response).await? > 0 {}
    let line = response.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    match line.trim_end().split_once(' ') {
        Some((version, status)) if version.starts_with("HTTP/1.") => {
            let is_ready = status.split(' ').next() == Some("200");
            // Another server must not send control sequences to the terminal.
            let shown = || status.chars().filter(|c| !c.is_control()).collect();
            if is_ready { Ok(()) } else { Err(NotReady::Responded(shown())) }
        }
        _ => Err(NotReady::NotHttp),
    }
}
