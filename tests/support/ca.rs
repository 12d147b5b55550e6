//! `truename ca`, and the folders that it makes.

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use truename::tls::authority::{Authority, DAY, Seconds, now, pem};

/// How long a root lasts.
pub const LIFETIME: Seconds = 5 * 365 * DAY;

/// `ca init`, and what it said.
#[track_caller]
pub fn init(directory: &Path, aliases: &[&str]) -> String {
    let output = truename_ca(&[&["init"], aliases].concat(), directory);
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// `ca show`, for machines.
#[track_caller]
pub fn show(directory: &Path) -> serde_json::Value {
    let output = truename_ca(&["show", "--json"], directory);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The ids of an alias' authorities.
#[track_caller]
pub fn ids(directory: &Path, alias: &str) -> Vec<String> {
    let shown = show(directory);
    let all = shown["authorities"].as_array().unwrap();
    let of_alias = all.iter().filter(|one| one["alias"] == alias);
    of_alias.map(|one| one["id"].as_str().unwrap().to_owned()).collect()
}

pub fn truename_ca(arguments: &[&str], directory: &Path) -> Output {
    let mut command = truename(&["ca"]);
    command.args(arguments).arg("--directory").arg(directory).output().unwrap()
}

/// The binary, without what the developer's shell says to it.
pub fn truename(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TRUENAME_") {
            command.env_remove(&name);
        }
    }
    command.env("XDG_STATE_HOME", "/nonexistent").args(arguments).stdin(Stdio::null());
    command
}

/// Puts an authority of `names` into the folder that was made some time ago (or, where that is negative,
/// will be). Gives its id.
pub fn plant(directory: &Path, alias: &str, names: &[&str], age: Seconds) -> String {
    let names: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let addresses = BTreeSet::from([Ipv4Addr::LOCALHOST]);
    let authority = Authority::make(alias, &names, &addresses, now() - age).unwrap();
    let id = authority.root().id().to_owned();
    fs::create_dir_all(directory).unwrap();
    let file = |kind: &str| directory.join(format!("{alias}.{id}.{kind}.pem"));
    fs::write(file("key"), authority.to_pem()).unwrap();
    fs::write(file("root"), pem(authority.root().der())).unwrap();
    id
}

/// The files of a folder, by name.
pub fn files(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The file of this kind that an alias has one of.
#[track_caller]
pub fn only(directory: &Path, alias: &str, kind: &str) -> PathBuf {
    let ids = ids(directory, alias);
    assert_eq!(ids.len(), 1, "{ids:?}");
    directory.join(format!("{alias}.{}.{kind}.pem", ids[0]))
}

/// Asserts that `ca.pem` and `bundle.pem` hold the roots that are in the folder, and no other.
#[track_caller]
pub fn assert_derived(directory: &Path) {
    let roots: BTreeSet<String> = files(directory)
        .iter()
        .filter(|name| name.ends_with(".root.pem"))
        .map(|name| fs::read_to_string(directory.join(name)).unwrap())
        .collect();
    let trusted = fs::read_to_string(directory.join("ca.pem")).unwrap();
    assert_eq!(certificates(&trusted), roots, "ca.pem");
    let bundle = fs::read_to_string(directory.join("bundle.pem")).unwrap();
    assert!(bundle.starts_with(&trusted) && bundle.len() > trusted.len() + 100_000, "bundle.pem");
}

/// The certificates of a PEM file.
pub fn certificates(text: &str) -> BTreeSet<String> {
    let end = "-----END CERTIFICATE-----\n";
    text.split_inclusive(end).filter(|part| part.ends_with(end)).map(str::to_owned).collect()
}

pub fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What `openssl x509 -text` says of a certificate, on one line.
#[track_caller]
pub fn described(certificate: &Path) -> String {
    let mut openssl = Command::new("openssl");
    let output =
        openssl.args(["x509", "-noout", "-text", "-in"]).arg(certificate).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let words = text(&output.stdout);
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Has a process obey the modes of files, as root does not by itself: for [`Setup::shell`].
///
/// [`Setup::shell`]: super::proxy::Setup::shell
pub const OBEY_MODES: &str = "test \"$(id -u)\" != 0 || exec setpriv \
    --bounding-set=-dac_override,-dac_read_search \"$0\" \"$@\"; ";
