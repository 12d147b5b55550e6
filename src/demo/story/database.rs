//! The chapter about a database.

use std::{io, net::SocketAddr, process::Stdio, time::Duration};

use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

use super::Story;
use crate::demo::{
    curl::{self, CurlError},
    database::{Client, ClientError, request_tls},
    page::Page,
    world::{DATABASE, REGIONS, World},
};

/// How many orders are written before the move, and after it.
const ORDERS: u32 = 5;
/// Between two orders.
const PAUSE: Duration = Duration::from_millis(100);
/// For the move: DNS has to be asked again.
const MOVE: Duration = Duration::from_secs(20);
/// For a real `psql`.
const PSQL: Duration = Duration::from_secs(20);

/// Adds the chapter about the database to the story. Fails only if the page cannot be written.
pub async fn tell_of_database(
    world: &World,
    proxy: SocketAddr,
    page: &mut Page<impl io::Write>,
    story: &mut Story,
) -> io::Result<()> {
    page.chapter("6. A database that takes TLS only, and moves to another region")?;
    without_truename(world, page, story).await?;
    with_truename(proxy, page, story).await?;
    the_move(world, proxy, page, story).await
}

async fn without_truename(
    world: &World,
    page: &mut Page<impl io::Write>,
    story: &mut Story,
) -> io::Result<()> {
    let [region, _] = REGIONS;
    let address = SocketAddr::from((region.address, world.database_port()));
    page.command(&format!(
        "psql 'host={DATABASE} hostaddr={} port={} user=demo dbname=shop sslmode=verify-full sslrootcert={}'",
        address.ip(),
        address.port(),
        world.root_file().display()
    ))?;
    let roots = world.authority().roots();
    let held = match request_tls(address).await {
        Ok(stream) => match curl::handshake(stream, DATABASE, roots).await {
            Err(CurlError::NameMismatch { presented, .. }) => {
                let names = presented.join(", ");
                page.line(&format!(
                    "server certificate for \"{names}\" does not match host name \"{DATABASE}\""
                ))?;
                presented == [region.true_name]
            }
            Err(error) => page.line(&format!("{error}")).map(|()| false)?,
            Ok(_) => page.line("a session, although the name is wrong").map(|()| false)?,
        },
        Err(error) => page.line(&format!("{error}")).map(|()| false)?,
    };
    story.claim(page, held, "the certificate is not valid for the alias, so psql refuses it")
}

async fn with_truename(
    proxy: SocketAddr,
    page: &mut Page<impl io::Write>,
    story: &mut Story,
) -> io::Result<()> {
    let text = "SHOW tls";
    page.command(&psql(proxy, text))?;
    let shown = match real_psql(proxy, text).await {
        Some(shown) => shown,
        None => {
            page.line("(there is no psql here; the demo's own client sends the same)")?;
            let rows = async { Client::connect(proxy).await?.query(text).await };
            rows.await.map(|rows| rows.join("\n")).unwrap_or_else(|error| error.to_string())
        }
    };
    page.line(&shown)?;
    let held = shown == "TLSv1.3";
    story.claim(page, held, "a client without TLS has a session over TLS, with a verified server")
}

async fn the_move(
    world: &World,
    proxy: SocketAddr,
    page: &mut Page<impl io::Write>,
    story: &mut Story,
) -> io::Result<()> {
    let [from, to] = REGIONS;
    page.command("while sleep 0.1; do echo 'INSERT INTO orders …'; done | psql …   # one session")?;
    let mut writer = Writer { proxy, session: None, number: 0, shutdowns: 0 };
    let mut there = 0;
    let deadline = Instant::now() + MOVE;
    let mut last = String::new();
    while there < ORDERS && Instant::now() < deadline {
        if writer.number == ORDERS {
            page.line(&format!("the alias now leads to {}", to.true_name))?;
            world.move_database(to);
        }
        let region = match writer.write().await {
            Ok(region) => region,
            Err(error) => {
                page.line(&format!("order {}: {error}", writer.number))?;
                break;
            }
        };
        if region != last {
            page.line(&format!("order {} is written in {region}", writer.number))?;
            last.clone_from(&region);
        }
        there += u32::from(region == to.name);
        sleep(PAUSE).await;
    }
    let orders = world.orders().all();
    let moved = there == ORDERS && orders.values().next().is_some_and(|o| o.region == from.name);
    story.claim(page, moved, format!("the session's work goes on in {}", to.true_name))?;
    let once = orders.len() == writer.number as usize && orders.values().all(|o| o.times == 1);
    let count = orders.len();
    let text = format!(
        "{} session ended between two statements (57P01), and each of {count} orders was written once",
        writer.shutdowns
    );
    story.claim(page, once && writer.shutdowns == 1, text)?;
    let named = orders.values().all(|order| {
        let region = REGIONS.iter().find(|region| region.name == order.region);
        order.server_name.as_deref() == region.map(|region| region.true_name)
    });
    story.claim(page, named && count > 0, "each server's certificate was verified for its own name")
}

/// Writes orders, as an application with a pool of one session does.
struct Writer {
    proxy: SocketAddr,
    session: Option<Client>,
    number: u32,
    /// How many sessions were ended by the server.
    shutdowns: usize,
}

impl Writer {
    /// Writes the next order, and gives the region that did it.
    async fn write(&mut self) -> Result<String, ClientError> {
        self.number += 1;
        let text = format!("INSERT INTO orders VALUES ({}) RETURNING region", self.number);
        loop {
            let mut session = match self.session.take() {
                Some(session) => session,
                None => Client::connect(self.proxy).await?,
            };
            match session.query(&text).await {
                Ok(rows) => {
                    self.session = Some(session);
                    return Ok(rows.concat());
                }
                // The statement was not run: it may be sent again.
                Err(error) if error.is_shutdown() && self.shutdowns < 3 => self.shutdowns += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

/// The command line of `psql` for a statement through truename.
pub fn psql(proxy: SocketAddr, text: &str) -> String {
    format!(
        "psql -Atc '{text}' 'host={} port={} user=demo dbname=shop sslmode=disable'",
        proxy.ip(),
        proxy.port()
    )
}

/// What a real `psql` prints; `None` if there is none.
async fn real_psql(proxy: SocketAddr, text: &str) -> Option<String> {
    let connection =
        format!("host={} port={} user=demo dbname=shop sslmode=disable", proxy.ip(), proxy.port());
    let mut command = Command::new("psql");
    // Neither the user's settings nor their start-up file.
    let settings = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG"));
    for (name, _) in settings {
        command.env_remove(name);
    }
    command.args(["-X", "-Atc", text, &connection]).stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(PSQL, command.output()).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return None,
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Some(format!("psql: {error}")),
        Err(_) => return Some("psql: no response within 20 s".to_owned()),
    };
    let shown = if output.status.success() { output.stdout } else { output.stderr };
    Some(String::from_utf8_lossy(&shown).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rustls::{ClientConfig, pki_types::ServerName};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
        net::TcpListener,
        task::JoinSet,
    };
    use tokio_rustls::TlsConnector;

    use super::*;

    /// Connects every client to the first region, whatever DNS says.
    async fn stay(world: &World, tasks: &mut JoinSet<()>) -> SocketAddr {
        let [region, _] = REGIONS;
        let target = SocketAddr::from((region.address, world.database_port()));
        let roots = world.authority().roots();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tls = TlsConnector::from(std::sync::Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tasks.spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let tls = tls.clone();
                tokio::spawn(async move {
                    // As libpq does on its own, before it gives up on encryption.
                    let mut first = [0; 8];
                    client.peek(&mut first).await.unwrap();
                    if first[4..] != VERSION_3 {
                        client.read_exact(&mut first).await.unwrap();
                        client.write_all(b"N").await.unwrap();
                    }
                    let name = ServerName::try_from(region.true_name).unwrap();
                    let stream = request_tls(target).await.unwrap();
                    let mut server = tls.connect(name, stream).await.unwrap();
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        address
    }

    const VERSION_3: [u8; 4] = [0, 3, 0, 0];

    async fn failures_of(world: &World, proxy: SocketAddr) -> (Vec<String>, String) {
        let (mut story, mut page) = (Story::default(), Page::plain(Vec::new()));
        tell_of_database(world, proxy, &mut page, &mut story).await.unwrap();
        let page = String::from_utf8(page.into_inner()).unwrap();
        (story.failures().map(str::to_owned).collect(), page)
    }

    #[tokio::test]
    async fn the_chapter_does_not_hold_with_a_proxy_that_does_not_follow_the_alias() {
        let (world, mut tasks) = (World::start().unwrap(), JoinSet::new());
        let proxy = stay(&world, &mut tasks).await;
        let (failures, page) = failures_of(&world, proxy).await;
        assert_eq!(failures.len(), 2, "{page}");
        assert_eq!(failures[0], "the session's work goes on in db-us.example.com", "{page}");
        assert!(failures[1].starts_with("0 session"), "{page}");
    }

    #[tokio::test]
    async fn the_chapter_does_not_hold_where_nobody_listens() {
        let world = World::start().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let nobody = listener.local_addr().unwrap();
        drop(listener);
        let (failures, page) = failures_of(&world, nobody).await;
        assert_eq!(failures.len(), 4, "{page}");
    }
}
