//! `protocol: mysql` in front of a real MariaDB that takes nothing but TLS, with the clients that users have; and those
//! clients in front of a stand-in for MySQL, whose cache is cold.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
};

use tokio::{io::AsyncReadExt as _, net::TcpStream};
use truename::demo::dns;

use crate::support::{
    mariadb::{MariaDb, PRIMARY},
    mysql::{PASSWORD, Server, ThroughMysql},
    proxy::Proxy,
    scene::{ALIAS, ALIAS_IN_DNS, Scene},
    tools, within,
};

/// A proxy for an alias that leads to the server.
async fn through(server: &MariaDb, keys: &str) -> (Scene, Proxy, SocketAddr) {
    let mut scene = Scene::new(1).await;
    drop(scene.take_listeners());
    scene.port = server.address.port();
    scene.dns.zone([
        dns::cname(ALIAS_IN_DNS, 60, PRIMARY),
        dns::address(PRIMARY, 60, server.address.ip()),
    ]);
    let proxy = Proxy::start(&scene.yaml(&format!("protocol: mysql\n{keys}"))).await;
    let address = proxy.address(ALIAS).await;
    (scene, proxy, address)
}

/// Runs a program to its end, on a thread that may block.
async fn run(mut command: Command) -> Output {
    let output = tokio::task::spawn_blocking(move || {
        let output = command.output();
        output.unwrap_or_else(|error| panic!("{command:?}: {error}"))
    });
    within("a client", output).await.unwrap()
}

/// What a client prints that succeeds.
async fn printed(command: Command) -> String {
    let text = format!("{command:?}");
    let output = run(command).await;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{text}: {errors}\n{}",
        String::from_utf8_lossy(&output.stdout)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The client of MariaDB.
fn mariadb(address: SocketAddr, user: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("mariadb");
    let ports = [format!("-h{}", address.ip()), format!("-P{}", address.port())];
    command.args(["--no-defaults", "--protocol=tcp", "-psecret"]).arg(format!("-u{user}"));
    command.args(ports).args(arguments);
    command
}

/// A script for a client's driver. Its arguments are the port, the user, the password and a file of roots, if TLS is to
/// be used.
fn driver(program: &Path, script: &str, address: SocketAddr, arguments: [&str; 3]) -> Command {
    let mut command = Command::new(program);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/databases").join(script);
    command.arg(file).arg(address.port().to_string()).args(arguments);
    command.env("NODE_PATH", tools::node_modules());
    command
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_mariadb_without_tls_have_sessions_over_tls() {
    let server = MariaDb::start().await;
    let (_scene, _proxy, address) = through(&server, "").await;
    let secure = "show session status where variable_name in ('Ssl_version', 'Ssl_cipher')";
    for user in ["app", "modern"] {
        let shown = printed(mariadb(address, user, &["--skip-ssl", "-e", secure])).await;
        assert!(shown.contains("TLSv1.3") && shown.contains("TLS_AES"), "{user}: {shown}");
    }
    let shown = printed(mariadb(address, "app", &["--skip-ssl", "--compress", "-e", "\\s"])).await;
    assert!(shown.contains("Server version:\t\t") && shown.contains("MariaDB"), "{shown}");
    let refused = run(mariadb(address, "nobody", &["--skip-ssl", "-e", "select 1"])).await;
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("ERROR 1045 (28000): Access denied for user 'nobody'"), "{refused}");

    let (python, node) = (tools::python(), tools::node());
    for user in ["app", "modern"] {
        for script in ["pymysql_driver.py", "mysql2_driver.js", "mariadb_driver.js"] {
            // No plugin for it.
            if user == "modern" && script == "mysql2_driver.js" {
                continue;
            }
            let program = if script.ends_with("py") { &python } else { &node };
            let printed = printed(driver(program, script, address, [user, "secret", ""])).await;
            assert_eq!(printed.trim(), "TLSv1.3", "{script} {user}");
        }
    }
    let arguments = ["app", "secret", ""];
    let printed = printed(driver(&python, "connector_driver.py", address, arguments)).await;
    assert_eq!(printed.trim(), "TLSv1.3\nTLSv1.3", "in Python, and libmysqlclient");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_mariadb_with_tls_verify_the_alias() {
    let server = MariaDb::start().await;
    let (_scene, proxy, address) = through(&server, "tls_in: true").await;
    let roots = proxy.folder().join("state/truename/ca.pem");
    let roots = roots.to_str().unwrap();
    let ca = format!("--ssl-ca={roots}");
    let arguments = [&ca[..], "--ssl-verify-server-cert", "-e", "\\s"];
    let shown = printed(mariadb(address, "app", &arguments)).await;
    assert!(shown.contains("Cipher in use is TLS_AES"), "{shown}");
    let (python, node) = (tools::python(), tools::node());
    for script in
        ["pymysql_driver.py", "mysql2_driver.js", "mariadb_driver.js", "connector_driver.py"]
    {
        let program = if script.ends_with("py") { &python } else { &node };
        let printed = printed(driver(program, script, address, ["app", "secret", roots])).await;
        assert!(printed.lines().all(|line| line == "TLSv1.3"), "{script}: {printed}");
    }
    let refused = run(mariadb(address, "app", &["--skip-ssl", "-e", "select 1"])).await;
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("this listener takes TLS only"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_server_counts_no_client_that_leaves() {
    let server = MariaDb::start().await;
    let (_scene, proxy, address) = through(&server, "").await;
    for length in [0, 1, 4] {
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe.read_exact(&mut vec![0; length]).await.unwrap();
    }
    let left = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    within("all to be gone", async { while proxy.metric(&left).await != Some(0.0) {} }).await;
    let counted = "select sum(sum_connect_errors + count_handshake_errors) from performance_schema.host_cache";
    assert!(
        ["0.0000\n", "0\n", "NULL\n"].contains(&&server.query(counted)[..]),
        "{}",
        server.log()
    );
    // One that had been counted would be refused now.
    printed(mariadb(address, "app", &["--skip-ssl", "-e", "select 1"])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drivers_log_in_to_mysql_by_a_cold_cache_and_by_a_warm_one() {
    let plain = ["pymysql_login.py", "mysql2_login.js", "mariadb_login.js"];
    for (keys, plugin, scripts) in [
        ("", "caching_sha2_password", &plain[..]),
        // mysql2 has none for it.
        ("", "sha256_password", &["pymysql_login.py", "mariadb_login.js"]),
        ("tls_in: true", "caching_sha2_password", &["libmysqlclient_login.py"]),
        ("tls_in: true", "sha256_password", &["libmysqlclient_login.py"]),
    ] {
        let server = Server::of("caching_sha2_password", plugin);
        let through = ThroughMysql::serving(&server, keys).await;
        let roots = through.proxy.folder().join("state/truename/ca.pem");
        let (python, node) = (tools::python(), tools::node());
        for script in scripts {
            server.forget();
            for _ in 0..2 {
                let program = if script.ends_with("py") { &python } else { &node };
                let arguments = ["app", PASSWORD, roots.to_str().unwrap()];
                let printed = printed(driver(program, script, through.address, arguments)).await;
                assert_eq!(printed.trim(), "in", "{script} {plugin}");
            }
        }
        assert_eq!(server.state().logins, (2 * scripts.len(), 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_does_what_it_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/mysql");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let server = MariaDb::start().await;
    let scene = Scene::new(1).await;
    scene.dns.zone([dns::address(PRIMARY, 60, server.address.ip())]);
    let roots = "tls: {ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}";
    // A server and ports of this machine's; all else is as it stands.
    let yaml = read("truename.yaml")
        .replace(":3306", ":0")
        .replace("protocol: mysql", &format!("protocol: mysql\n    {roots}"))
        .replace(PRIMARY, &format!("\"{PRIMARY}:{}\"", server.address.port()));
    let dns = scene.dns.address();
    let yaml = format!(
        "{yaml}dns: {{servers: [\"{dns}\"]}}\npolicy: {{allow_addresses: [\"127.0.0.0/8\"]}}\n"
    );
    let proxy = Proxy::start(&yaml).await;
    let state = proxy.folder().join("state");
    let mut ran = 0;
    let readme = read("README.md");
    for command in readme.lines().filter_map(|line| line.strip_prefix("$ mariadb ")) {
        let Some((options, statement)) = command.split_once(" -e ") else { continue };
        let alias = if options.contains("127.0.1.1") { "webscaler-db" } else { "secure-db" };
        let address = proxy.address(alias).await;
        let options = options
            .replace(" -p ", &format!(" -psecret -P {} ", address.port()))
            .replace("$HOME/.local/state", state.to_str().unwrap());
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("mariadb --no-defaults {options} -e {statement}"));
        let shown = printed(shell).await;
        let expected = readme.lines().skip_while(|line| !line.ends_with(command)).skip(1);
        for line in expected.take_while(|line| *line != "```") {
            assert!(shown.contains(line), "{command}: {shown}");
        }
        ran += 1;
    }
    assert_eq!(ran, 2);
}
