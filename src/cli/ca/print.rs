//! The output of `truename ca`.

use std::io::{self, Write};

use serde_json::json;

use crate::tls::{
    store::{Found, Store},
    truststore::JAVA_PASSWORD,
};

/// The most names that an error lists.
pub(super) const MANY: usize = 20;

/// Prints the authorities and their common files as text.
pub(super) fn list(store: &Store, found: &[Found], out: &mut impl Write) -> io::Result<()> {
    for found in found {
        let (begins, ends) = found.root.validity();
        let names: Vec<&str> = found.root.names().iter().map(String::as_str).collect();
        writeln!(out)?;
        writeln!(out, "{}", found.alias)?;
        writeln!(out, "  names   {}", names.join(", "))?;
        writeln!(out, "  valid   {begins} to {ends}")?;
        writeln!(out, "  sha256  {}", found.root.fingerprint())?;
        writeln!(out, "  root    {}", found.root_file.display())?;
        match &found.key_file {
            Some(file) => writeln!(out, "  key     {} (keep private)", file.display())?,
            None => writeln!(out, "  key     held by the server that it was issued for")?,
        }
    }
    writeln!(out)?;
    writeln!(out, "roots       {}", store.roots_file().display())?;
    writeln!(out, "bundle      {} (these roots and the public ones)", store.bundle().display())?;
    writeln!(out, "truststore  {} (the same for Java)", store.truststore().display())
}

/// Prints the same as JSON.
pub(super) fn json(store: &Store, found: &[Found], out: &mut impl Write) -> io::Result<()> {
    let authorities: Vec<_> = found
        .iter()
        .map(|found| {
            let (not_before, not_after) = found.root.validity();
            json!({
                "alias": found.alias,
                "id": found.root.id(),
                "names": found.root.names(),
                "not_before": not_before,
                "not_after": not_after,
                "fingerprint_sha256": found.root.fingerprint(),
                "root": found.root_file,
                "key": found.key_file,
            })
        })
        .collect();
    let shown = json!({
        "directory": store.directory(),
        "root": store.roots_file(),
        "bundle": store.bundle(),
        "truststore": store.truststore(),
        "authorities": authorities,
    });
    writeln!(out, "{shown:#}")
}

pub(super) fn how_to_trust(store: &Store, out: &mut impl Write) -> io::Result<()> {
    let (roots, bundle, truststore) = (store.roots_file(), store.bundle(), store.truststore());
    let (roots, bundle, truststore) = (roots.display(), bundle.display(), truststore.display());
    let each = store.directory().join("*.root.pem");
    let each = each.display();
    writeln!(
        out,
        "
Applications that speak TLS to an alias must trust its root. They read these files at startup:
  curl               curl --cacert {roots} https://ALIAS:PORT/
  OpenSSL, Go, Ruby  SSL_CERT_FILE={bundle}
  Python requests    REQUESTS_CA_BUNDLE={bundle}
  Node.js            NODE_EXTRA_CA_CERTS={roots}
  Java               -Djavax.net.ssl.trustStore={truststore} -Djavax.net.ssl.trustStorePassword={JAVA_PASSWORD}
  Debian, Ubuntu     for root in {each}; do
                       cp \"$root\" /usr/local/share/ca-certificates/truename-$(basename \"$root\" .pem).crt
                     done; update-ca-certificates"
    )
}
