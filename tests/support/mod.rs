//! The world that whole-proxy tests run in: real sockets on loopback, real TLS, the real binary.
//!
//! * [`loopback`]: addresses and ports that no other test uses
//! * [`peer`]: one end of a connection, with what was on its wire; [`message`]: what it read there
//! * [`raw_origin`] and [`scripts`]: upstreams that misbehave, or that note every byte
//! * [`service_origin`]: upstreams with a response of the test's own making, trailers included
//! * [`client`]: the application's side; [`curl`]: the one that users have
//! * [`mariadb`]: a real MariaDB
//! * [`mysql`]: MySQL on the wire, and a stand-in for its server
//! * [`postgres`]: PostgreSQL on the wire, and a stand-in for its server; [`postgres_server`]: a real one
//! * [`trust`]: certificates, and the root that signed them
//! * [`ca`]: folders of local certificate authorities
//! * [`daemon`]: servers that users have, such as HAProxy
//! * [`unprivileged`]: such servers without the rights of root
//! * [`proxy`]: the binary under test; [`process`]: one that a test starts by itself; [`tools`]: other people's that `./test` installs
//!
//! * [`scene`]: all of them together, as most tests want them; [`through`]: the same around one
//!   scripted origin
//!
//! An upstream that behaves is `truename::demo::origin::Origin`. A test then reads:
//!
//! ```ignore
//! let mut scene = Scene::new(2).await;
//! let origins = scene.script(scripts::respond);
//! let proxy = Proxy::start(&scene.yaml("retry: {attempts: 1}")).await;
//! let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
//! assert_eq!(response.text(), "ok");
//! ```

pub mod ca;
pub mod client;
pub mod curl;
pub mod daemon;
pub mod loopback;
pub mod mariadb;
pub mod message;
pub mod mysql;
pub mod peer;
pub mod postgres;
pub mod postgres_server;
pub mod process;
pub mod proxy;
pub mod raw_origin;
pub mod scene;
pub mod scripts;
pub mod service_origin;
pub mod through;
pub mod tools;
pub mod trust;
pub mod unprivileged;

use std::{panic::Location, time::Duration};

/// What has not happened by then will not happen.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Awaits `future`, but for no longer than [`DEADLINE`]; says which line of the test lost it.
#[track_caller]
pub fn within<T>(what: &str, future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        match tokio::time::timeout(DEADLINE, future).await {
            Ok(output) => output,
            Err(_) => panic!("waited {DEADLINE:?} for {what}, at {caller}"),
        }
    }
}
