//! A database in two regions, and a client: enough of PostgreSQL's protocol for `psql -c`, and no more. A server takes
//! sessions over TLS only, as cloud providers' do.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{error::Elapsed, timeout},
};
use tokio_rustls::TlsAcceptor;

/// "1234" and "5679", where a version would be.
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const VERSION_3: u32 = 196_608;

/// The longest message of either side.
const MAX_MESSAGE: usize = 64 * 1024;

/// For each step of a client, and for the start of a session at the server.
const DEADLINE: Duration = Duration::from_secs(20);

/// How many sessions a server has at once.
const MAX_SESSIONS: usize = 64;

/// What all regions have: the orders that were written, with how often and where the last time.
#[derive(Clone, Debug, Default)]
pub struct Orders(Arc<Mutex<BTreeMap<u32, Order>>>);

/// An order in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// How often it was written.
    pub times: usize,
    /// The region that wrote it.
    pub region: String,
    /// The server name of the session's handshake.
    pub server_name: Option<String>,
}

impl Orders {
    /// All of them, by number.
    pub fn all(&self) -> BTreeMap<u32, Order> {
        self.0.lock().clone()
    }

    fn write(&self, number: u32, session: &Session) {
        let mut orders = self.0.lock();
        let order = orders.entry(number).or_insert_with(|| Order {
            times: 0,
            region: String::new(),
            server_name: None,
        });
        order.times += 1;
        order.region.clone_from(&session.region);
        order.server_name.clone_from(&session.server_name);
    }
}

/// A server of one region. Dropping it ends its sessions.
#[derive(Debug)]
pub struct Database {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Database {
    /// Serves on a bound listener.
    pub fn serve(
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        region: &str,
        orders: Orders,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let region = region.to_owned();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut sessions = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while sessions.len() >= MAX_SESSIONS {
                    sessions.join_next().await;
                }
                let session = serve(stream, tls.clone().into(), region.clone(), orders.clone());
                sessions.spawn(async {
                    // Peers fail as they like.
                    let _ = session.await;
                });
            }
        });
        Ok(Self { address, _tasks: tasks })
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

struct Session {
    region: String,
    orders: Orders,
    server_name: Option<String>,
    tls_version: &'static str,
    in_transaction: bool,
}

async fn serve(
    mut stream: TcpStream,
    tls: TlsAcceptor,
    region: String,
    orders: Orders,
) -> io::Result<()> {
    let begun = timeout(DEADLINE, async {
        loop {
            match startup_code(&read_startup(&mut stream).await?) {
                SSL_REQUEST => {
                    stream.write_all(b"S").await?;
                    break;
                }
                GSS_REQUEST => stream.write_all(b"N").await?,
                _ => {
                    let text = "no pg_hba.conf entry for this host: no encryption";
                    stream.write_all(&error("FATAL", "28000", text)).await?;
                    return Err(io::ErrorKind::PermissionDenied.into());
                }
            }
        }
        let mut stream = tls.accept(stream).await?;
        if startup_code(&read_startup(&mut stream).await?) >> 16 != VERSION_3 >> 16 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok::<_, io::Error>(stream)
    });
    let mut stream = begun.await??;
    let connection = stream.get_ref().1;
    let mut session = Session {
        region,
        orders,
        server_name: connection.server_name().map(str::to_owned),
        tls_version: match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "TLSv1.2",
        },
        in_transaction: false,
    };
    let mut greeting = message(b'R', &0_u32.to_be_bytes());
    for (name, value) in [
        ("server_version", "17.0 (truename demo)"),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("standard_conforming_strings", "on"),
        ("in_hot_standby", "off"),
    ] {
        greeting.extend(message(b'S', format!("{name}\0{value}\0").as_bytes()));
    }
    greeting.extend(message(b'K', &fastrand::u64(..).to_be_bytes()));
    greeting.extend(message(b'Z', b"I"));
    stream.write_all(&greeting).await?;
    loop {
        let reply = match read_message(&mut stream).await? {
            (b'Q', body) => {
                let text = String::from_utf8_lossy(&body);
                let mut reply = session.query(text.trim_end_matches('\0'));
                reply.extend(session.ready());
                reply
            }
            (b'X', _) => return stream.shutdown().await,
            // After an error in the extended protocol everything up to Sync is ignored.
            (b'S', _) => session.ready(),
            (b'P', _) => error("ERROR", "0A000", "this demo has simple queries only"),
            _ => Vec::new(),
        };
        stream.write_all(&reply).await?;
    }
}

impl Session {
    fn ready(&self) -> Vec<u8> {
        message(b'Z', if self.in_transaction { b"T" } else { b"I" })
    }

    /// What comes of a statement.
    fn query(&mut self, text: &str) -> Vec<u8> {
        let text = text.trim().trim_end_matches(';').trim().to_lowercase();
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        match words[..] {
            [] => message(b'I', b""),
            ["begin"] => {
                self.in_transaction = true;
                complete("BEGIN")
            }
            ["commit" | "end"] => {
                self.in_transaction = false;
                complete("COMMIT")
            }
            ["show", "region"] => rows("region", &[&self.region], "SHOW"),
            ["show", "tls"] => rows("tls", &[self.tls_version], "SHOW"),
            ["select", "count(*)", "from", "orders"] => {
                let count = self.orders.all().len().to_string();
                rows("count", &[&count], "SELECT 1")
            }
            ["insert", "into", "orders", "values", number, "returning", "region"] => {
                let number = number.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
                match number.and_then(|number| number.parse().ok()) {
                    Some(number) => {
                        self.orders.write(number, self);
                        rows("region", &[&self.region], "INSERT 0 1")
                    }
                    None => error("ERROR", "22P02", "an order is a number"),
                }
            }
            _ => error(
                "ERROR",
                "42601",
                "this demo knows BEGIN, COMMIT, SHOW region, SHOW tls, SELECT count(*) FROM orders and \
                 INSERT INTO orders VALUES (1) RETURNING region",
            ),
        }
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    // All bodies here are short.
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

fn error(severity: &str, code: &str, text: &str) -> Vec<u8> {
    let fields = format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0");
    message(b'E', fields.as_bytes())
}

fn complete(tag: &str) -> Vec<u8> {
    message(b'C', format!("{tag}\0").as_bytes())
}

/// Rows of one column of text.
fn rows(column: &str, values: &[&str], tag: &str) -> Vec<u8> {
    // Table 0, column 0, type 25 (text), of any length, without a modifier, in text.
    let kind = [0_u8, 0, 0, 0, 0, 0, 0, 0, 0, 25, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    let mut reply = message(b'T', &[&[0, 1][..], column.as_bytes(), &[0], &kind].concat());
    for value in values {
        let length = u32::try_from(value.len()).unwrap_or_default().to_be_bytes();
        reply.extend(message(b'D', &[&[0, 1][..], &length, value.as_bytes()].concat()));
    }
    reply.extend(complete(tag));
    reply
}

async fn read_startup(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await?;
    read_body(stream, length).await
}

fn startup_code(body: &[u8]) -> u32 {
    body.first_chunk().map_or(0, |code| u32::from_be_bytes(*code))
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await?;
    let length = stream.read_u32().await?;
    Ok((kind, read_body(stream, length).await?))
}

/// `length` counts its own four bytes.
async fn read_body(stream: &mut (impl AsyncRead + Unpin), length: u32) -> io::Result<Vec<u8>> {
    let length = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
    let length = length.filter(|&length| length <= MAX_MESSAGE);
    let mut body = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// A client's session, in plaintext.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
}

impl Client {
    /// `psql "host=ADDRESS sslmode=disable"`.
    pub async fn connect(address: SocketAddr) -> Result<Self, ClientError> {
        within(async {
            let mut stream = TcpStream::connect(address).await?;
            let parameters = b"user\0demo\0database\0shop\0\0";
            let length = u32::try_from(parameters.len() + 8).unwrap_or_default();
            let startup = [&length.to_be_bytes()[..], &VERSION_3.to_be_bytes(), parameters];
            stream.write_all(&startup.concat()).await?;
            let mut client = Self { stream };
            client.until_ready().await?;
            Ok(client)
        })
        .await
    }

    /// Runs a statement, and gives the first column of its rows.
    pub async fn query(&mut self, text: &str) -> Result<Vec<String>, ClientError> {
        within(async {
            self.stream.write_all(&message(b'Q', format!("{text}\0").as_bytes())).await?;
            self.until_ready().await
        })
        .await
    }

    async fn until_ready(&mut self) -> Result<Vec<String>, ClientError> {
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            match read_message(&mut self.stream).await {
                Ok((b'Z', _)) => return failure.map_or(Ok(rows), Err),
                // Two bytes of a count, four of a length.
                Ok((b'D', body)) => {
                    let value = body.get(6..).unwrap_or_default();
                    rows.push(String::from_utf8_lossy(value).into_owned());
                }
                Ok((b'E', body)) => failure = Some(ClientError::of_server(&body)),
                Ok(_) => {}
                Err(error) => return Err(failure.unwrap_or(error.into())),
            }
        }
    }

    /// Ends the session.
    pub async fn close(mut self) {
        let _ = self.stream.write_all(&message(b'X', b"")).await;
    }
}

/// Asks for TLS as `psql` does with `sslmode=verify-full`, up to the handshake.
pub async fn request_tls(address: SocketAddr) -> Result<TcpStream, ClientError> {
    within(async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&[&8_u32.to_be_bytes()[..], &SSL_REQUEST.to_be_bytes()].concat()).await?;
        match stream.read_u8().await? {
            b'S' => Ok(stream),
            _ => Err(ClientError::Io(io::ErrorKind::Unsupported.into())),
        }
    })
    .await
}

async fn within<T>(step: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    timeout(DEADLINE, step).await?
}

/// Why a statement has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server says so.
    #[error("{severity}:  {text} ({code})")]
    Server {
        /// FATAL or ERROR.
        severity: String,
        /// The SQLSTATE.
        code: String,
        /// The message.
        text: String,
    },
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A timeout.
    #[error("no response within 20 s")]
    Timeout(#[from] Elapsed),
}

impl ClientError {
    fn of_server(body: &[u8]) -> Self {
        let mut fields = BTreeMap::new();
        for field in body.split(|&byte| byte == 0) {
            if let Some((&kind, text)) = field.split_first() {
                fields.insert(kind, String::from_utf8_lossy(text).into_owned());
            }
        }
        let mut field = |kind| fields.remove(&kind).unwrap_or_default();
        Self::Server { severity: field(b'S'), code: field(b'C'), text: field(b'M') }
    }

    /// Whether the server ended the session between two statements, so that none was lost: 57P01.
    pub fn is_shutdown(&self) -> bool {
        matches!(self, Self::Server { code, .. } if code == "57P01")
    }
}
