//! What `./test` installs into `target/tools`: programs that users have, and distributions too old.

use std::path::{Path, PathBuf};

/// A Python that has `requests`, `httpx`, and drivers of databases.
pub fn python() -> PathBuf {
    installed("python/bin/python")
}

/// A Node whose own `fetch` obeys proxy variables.
pub fn node() -> PathBuf {
    installed("bin/node")
}

/// The folder of Node's modules.
pub fn node_modules() -> PathBuf {
    installed("node_modules")
}

/// The folder of plugins of MariaDB's server.
pub fn mariadb_plugins() -> PathBuf {
    installed("mariadb/usr/lib/mysql/plugin")
}

#[track_caller]
fn installed(program: &str) -> PathBuf {
    // Beside the folder of the build's profile, wherever that is.
    let folders = Path::new(env!("CARGO_BIN_EXE_truename")).ancestors();
    let found = folders.map(|folder| folder.join("tools").join(program)).find(|file| file.exists());
    found.unwrap_or_else(|| panic!("target/tools/{program} is not there: ./test installs it"))
}
