//! Mail and LDAP with the servers and the clients that people have: Dovecot, OpenLDAP, Python, curl and ldapsearch; and the
//! example, as it stands.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::support::{
    curl::curl,
    loopback,
    proxy::Proxy,
    scene::Scene,
    unprivileged::{Daemon, Folder, user},
    within,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    sync::watch,
};
use truename::demo::dns;

const MAIL: &str = "mail.example.com";
/// Of the servers, at an address of their own.
const PORTS: [(&str, u16); 4] =
    [("smtp", 25870), ("imap", 21430), ("pop3", 21100), ("ldap", 23890)];

#[tokio::test]
async fn the_example_sends_and_reads_mail_and_asks_the_directory() {
    let world = World::new(MAIL).await;
    let (smtp, imap) = (world.address("mail-out").await, world.address("mail-in").await);
    let pop3 = world.address("mail-pop").await;
    let script = example("mail.py");
    let addresses = [smtp, imap, pop3].map(|address| address.to_string());
    let python = run("python3", &[&script, &addresses[0], &addresses[1], &addresses[2]]).await;
    assert_eq!(
        said(&python),
        "sent\nIMAP: 1 in the inbox, Subject: nightly report\nPOP3: 1 in the inbox\n",
        "{python:?}"
    );
    let mail =
        world.delivered.clone().wait_for(|mail| mail.contains("\r\n.\r\n")).await.unwrap().clone();
    assert!(mail.contains("Subject: nightly report\r\n") && mail.contains("all is well"), "{mail}");

    let url = format!("imap://{imap}/");
    let listed = curl(&["--user", "app:secret", &url]).await;
    assert_eq!((listed.code, listed.stdout.trim()), (0, "* LIST (\\HasNoChildren) \".\" INBOX"));
    let url = format!("pop3://{pop3}/1");
    let read = curl(&["--user", "app:secret", &url]).await;
    assert!(read.stdout.contains("all is well"), "{read:?}");
    let url = format!("smtp://{smtp}/");
    let noop = curl(&["--user", "app:secret", "-X", "NOOP", &url]).await;
    assert_eq!(noop.code, 0, "{noop:?}");

    // TLS from the first byte, by address and so without SNI.
    let tls = world.address("mail-in-tls").await;
    let roots = world.proxy.folder().join("state/truename/ca.pem");
    let url = format!("imaps://{tls}/");
    let listed = curl(&["--cacert", roots.to_str().unwrap(), "--user", "app:secret", &url]).await;
    assert_eq!((listed.code, listed.stdout.trim()), (0, "* LIST (\\HasNoChildren) \".\" INBOX"));
}

#[tokio::test]
async fn a_directory_that_requires_tls_is_searched_and_written_to_without_any() {
    let world = World::new(MAIL).await;
    let url = format!("ldap://{}", world.address("directory").await);
    let searched =
        ldap("ldapsearch", &["-LLL", "-H", &url, "-s", "base", "-b", "", "namingContexts"]).await;
    assert_eq!(said(&searched), "dn:\nnamingContexts: dc=example,dc=com\n\n", "{searched:?}");

    let entry = world.proxy.folder().join("entry.ldif");
    let ldif = "dn: dc=example,dc=com\nobjectClass: dcObject\nobjectClass: organization\ndc: example\no: Example\n";
    fs::write(&entry, ldif).unwrap();
    let admin = ["-H", &url, "-D", "cn=admin,dc=example,dc=com", "-w", "secret"];
    let added = ldap("ldapadd", &[&admin[..], &["-f", entry.to_str().unwrap()]].concat()).await;
    assert!(added.status.success(), "{added:?}");
    let searched =
        ldap("ldapsearch", &[&admin[..], &["-LLL", "-b", "dc=example,dc=com", "o"]].concat()).await;
    assert!(said(&searched).contains("o: Example"), "{searched:?}");

    // A client that asks for TLS itself is told by the server that it has it.
    let twice = ldap("ldapwhoami", &["-ZZ", "-H", &url]).await;
    assert!(complaint(&twice).contains("TLS already started"), "{twice:?}");
}

/// The certificates of the servers are for another name.
#[tokio::test]
async fn every_client_shows_why_it_cannot_be_served() {
    let world = World::new("mx.example.net").await;
    let expected =
        "certificate is not valid for `mail.example.com`: it is valid for `mx.example.net`";
    let fix = "fix: if this is the right server, set `tls.server_name: mx.example.net`";
    for (call, alias) in
        [("smtplib.SMTP", "mail-out"), ("imaplib.IMAP4", "mail-in"), ("poplib.POP3", "mail-pop")]
    {
        let address = world.address(alias).await;
        let (ip, port) = (address.ip(), address.port());
        let code = format!("import smtplib, imaplib, poplib; {call}('{ip}', {port})");
        let refused = complaint(&run("python3", &["-c", &code]).await);
        assert!(refused.contains(expected), "{refused}");
        assert!(refused.contains(fix), "{refused}");
    }
    let url = format!("ldap://{}", world.address("directory").await);
    let refused = complaint(&ldap("ldapsearch", &["-H", &url]).await);
    assert!(refused.starts_with("ldap_bind: Server is unavailable (52)"), "{refused}");
    assert!(refused.contains(expected) && refused.contains(fix), "{refused}");
    let url = format!("smtp://{}/", world.address("mail-out").await);
    let refused = curl(&["-v", "-X", "NOOP", &url]).await;
    assert!(refused.stderr.contains(fix), "{refused:?}");
    assert_eq!(*world.delivered.borrow(), "");
}

/// Dovecot and OpenLDAP, and a proxy with the example's configuration.
struct World {
    proxy: Proxy,
    /// What Dovecot has submitted.
    delivered: watch::Receiver<String>,
    _scene: Scene,
    _daemons: [Daemon; 2],
    _folder: Folder,
}

impl World {
    /// Servers with a certificate for this name.
    async fn new(name: &str) -> Self {
        let scene = Scene::new(1).await;
        let ip = loopback::address();
        scene.dns.zone([dns::address(MAIL, 60, ip)]);
        let folder = Folder::of(name);
        let delivery = loopback::listen_anywhere();
        let dovecot = dovecot(&folder, ip, delivery.local_addr().unwrap()).await;
        let slapd = slapd(&folder, ip).await;
        let (delivered, mail) = watch::channel(String::new());
        tokio::spawn(deliver(delivery, delivered));
        let proxy = Proxy::start(&configuration(&scene)).await;
        Self { proxy, delivered: mail, _scene: scene, _daemons: [dovecot, slapd], _folder: folder }
    }

    async fn address(&self, alias: &str) -> SocketAddr {
        self.proxy.address(alias).await
    }
}

/// The example's, with the ports of the servers here, any port for the aliases, and the tests' authority.
fn configuration(scene: &Scene) -> String {
    let mut text = fs::read_to_string(example("truename.yaml")).unwrap();
    for (nth, port) in ["5870", "1430", "1100", "3890", "9930"].into_iter().enumerate() {
        let any = format!("listen: [\"127.0.1.{}:0\"]", nth + 1);
        text = text.replace(&format!("listen: [{port}]"), &any);
    }
    for (protocol, port) in PORTS {
        let key = format!("    protocol: {protocol}");
        let tls = "tls: {ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}";
        text = text.replace(&key, &format!("    port: {port}\n    {tls}\n{key}"));
    }
    let dns = scene.dns.address();
    format!(
        "dns: {{servers: [\"{dns}\"], cluster_domain: cluster.local, namespace: default}}\n\
         policy: {{allow_addresses: [\"127.0.0.0/8\"]}}\n{text}"
    )
}

/// SMTP submission, IMAP and POP3, none of which takes a password in plaintext. What is submitted goes on to `relay`.
async fn dovecot(folder: &Folder, ip: IpAddr, relay: SocketAddr) -> Daemon {
    let (user, group) = user();
    let at = folder.path().display();
    folder.folder("run");
    folder.folder("mail");
    let listeners = [("submission", PORTS[0].1), ("imap", PORTS[1].1), ("pop3", PORTS[2].1)];
    let mut text = format!(
        "protocols = imap pop3 submission\n\
         base_dir = {at}/run\nstate_dir = {at}/run\nlog_path = {at}/dovecot.log\nlisten = {ip}\n\
         default_internal_user = {user}\ndefault_internal_group = {group}\ndefault_login_user = {user}\n\
         ssl = required\nssl_cert = <{at}/cert.pem\nssl_key = <{at}/key.pem\n\
         disable_plaintext_auth = yes\nauth_mechanisms = plain apop\nfirst_valid_uid = 1\n\
         hostname = {MAIL}\nsubmission_relay_host = {}\nsubmission_relay_port = {}\n\
         mail_location = maildir:{at}/mail\n\
         passdb {{\n  driver = static\n  args = password=secret\n}}\n\
         userdb {{\n  driver = static\n  args = uid={user} gid={group} home={at}\n}}\n\
         service anvil {{\n  chroot =\n}}\nservice stats {{\n  chroot =\n}}\n",
        relay.ip(),
        relay.port(),
    );
    for (name, port) in listeners {
        let with_tls = format!("{name}s");
        text.push_str(&format!(
            "service {name}-login {{\n  chroot =\n  inet_listener {name} {{\n    port = {port}\n  }}\n  \
             inet_listener {with_tls} {{\n    port = 0\n  }}\n}}\n"
        ));
    }
    let file = folder.file("dovecot.conf", text);
    let addresses = listeners.map(|(_, port)| SocketAddr::new(ip, port));
    let command = ["/usr/sbin/dovecot", "-F", "-c", file.to_str().unwrap()];
    Daemon::start(folder, &command, &addresses).await
}

/// A directory that answers nothing without TLS.
async fn slapd(folder: &Folder, ip: IpAddr) -> Daemon {
    let at = folder.path().display();
    folder.folder("db");
    let file = folder.file(
        "slapd.conf",
        format!(
            "include /etc/ldap/schema/core.schema\nmodulepath /usr/lib/ldap\nmoduleload back_mdb\n\
             TLSCertificateFile {at}/cert.pem\nTLSCertificateKeyFile {at}/key.pem\nsecurity tls=1\n\
             database mdb\ndirectory {at}/db\nmaxsize 10485760\nsuffix dc=example,dc=com\n\
             rootdn cn=admin,dc=example,dc=com\nrootpw secret\n"
        ),
    );
    // A copy of it is not bound to the folders that a distribution's AppArmor profile lists.
    let program = folder.path().join("slapd");
    fs::copy("/usr/sbin/slapd", &program).unwrap();
    let address = SocketAddr::new(ip, PORTS[3].1);
    let url = format!("ldap://{address}");
    let (program, file) = (program.to_str().unwrap(), file.to_str().unwrap());
    Daemon::start(folder, &[program, "-f", file, "-h", &url, "-d", "0"], &[address]).await
}

/// The SMTP server behind Dovecot: takes everything.
async fn deliver(listener: TcpListener, delivered: watch::Sender<String>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let (read, mut write) = tcp.into_split();
        let mut lines = BufReader::new(read);
        let mut is_mail = false;
        let mut response = "220 relay\r\n";
        loop {
            if write.write_all(response.as_bytes()).await.is_err() {
                break;
            }
            let mut line = String::new();
            if !matches!(lines.read_line(&mut line).await, Ok(1..)) {
                break;
            }
            response = match (is_mail, line.trim_end()) {
                (true, end) => {
                    delivered.send_modify(|mail| mail.push_str(&line));
                    is_mail = end != ".";
                    if is_mail { "" } else { "250 delivered\r\n" }
                }
                (false, "DATA") => {
                    is_mail = true;
                    "354 go ahead\r\n"
                }
                _ => "250 ok\r\n",
            };
        }
    }
}

async fn ldap(program: &str, arguments: &[&str]) -> Output {
    run(program, &[&["-x", "-o", "nettimeout=15"], arguments].concat()).await
}

async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env_remove("MAIL_USER")
        .env_remove("MAIL_PASSWORD");
    let ended = tokio::task::spawn_blocking(move || command.output().unwrap());
    within(program, ended).await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn example(file: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/mail").join(file).display().to_string()
}
