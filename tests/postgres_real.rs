//! `protocol: postgres` with a real PostgreSQL, TLS only and SCRAM, and the clients that people have.

use std::{
    fs::{self, File},
    net::SocketAddr,
    process::{Child, Command, Output, Stdio},
};

use nix::sys::signal::Signal;
use truename::demo::dns;

use crate::support::{
    postgres_server::{self, PostgresServer, client, psql, written},
    process,
    proxy::Proxy,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    tools, within,
};

/// Whether the server sees TLS, and which.
const TLS: &str = "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()";

/// A server with a proxy before it.
struct Real {
    server: PostgresServer,
    proxy: Proxy,
    alias: SocketAddr,
    _scene: Scene,
}

impl Real {
    async fn new(keys: &str, name: &str, settings: &[&str]) -> Self {
        let mut scene = Scene::new(1).await;
        drop(scene.take_listeners());
        let address = SocketAddr::new(scene.addresses[0], scene.port);
        let server = PostgresServer::start(address, name, settings).await;
        let proxy = Proxy::start(&scene.yaml(&format!("protocol: postgres\n{keys}"))).await;
        let alias = proxy.address(ALIAS).await;
        Self { server, proxy, alias, _scene: scene }
    }

    async fn query(&self, options: &str, query: &str) -> Output {
        output(psql(self.alias, options, &["-c", query])).await
    }
}

#[tokio::test]
async fn psql_has_tls_to_the_server_under_scram_and_copies_much_both_ways() {
    const ROWS: usize = 65_536;
    let real = Real::new("", TRUE_NAME, &[]).await;
    for options in ["sslmode=disable", "sslmode=prefer", "sslmode=require channel_binding=disable"]
    {
        assert_eq!(written(&real.query(options, TLS).await), "t|TLSv1.3\n", "{options}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy");
    let out = format!(
        "copy (select repeat(chr(97 + n % 26), 1023) from generate_series(1, {ROWS}) n) to stdout"
    );
    let mut copy = psql(real.alias, "sslmode=disable", &["-c", &out]);
    copy.stdout(File::create(&file).unwrap());
    written(&output(copy).await);
    assert_eq!(fs::metadata(&file).unwrap().len(), ROWS as u64 * 1024);
    let script = "create table t (a text); copy t from stdin";
    let mut copy = psql(real.alias, "sslmode=disable", &["-c", script]);
    copy.stdin(File::open(&file).unwrap());
    written(&output(copy).await);
    let same =
        "select count(*), bool_and(length(a) = 1023 and a = repeat(left(a, 1), 1023)) from t";
    assert_eq!(written(&real.query("", same).await), format!("{ROWS}|t\n"));
}

#[tokio::test]
async fn what_the_server_says_of_a_login_reaches_psql() {
    let real = Real::new("", TRUE_NAME, &[]).await;
    let mut wrong = psql(real.alias, "sslmode=disable", &["-c", "select 1"]);
    wrong.env("PGPASSWORD", "wrong");
    let output = output(wrong).await;
    assert!(text(&output.stderr).contains("password authentication failed"), "{output:?}");
    // What binds to TLS cannot pass, and the hint says so.
    let output = real.query("sslmode=require", "select 1").await;
    assert!(text(&output.stderr).contains("set channel_binding=disable"), "{output:?}");
}

#[tokio::test]
async fn psql_is_told_why_there_is_no_session() {
    let real = Real::new("", "other.example.com", &[]).await;
    let output = real.query("sslmode=disable", "select 1").await;
    let said = text(&output.stderr);
    assert!(said.contains("FATAL") && said.contains("other.example.com"), "{output:?}");

    let real = Real::new("", TRUE_NAME, &["ssl=off"]).await;
    let output = real.query("sslmode=disable", "select 1").await;
    assert!(text(&output.stderr).contains("does not support TLS"), "{output:?}");
}

#[tokio::test]
async fn ctrl_c_in_psql_cancels_the_query() {
    let real = Real::new("", TRUE_NAME, &[]).await;
    let mut sleeps = psql(real.alias, "", &["-c", "select pg_sleep(600)"]);
    let child = sleeps.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    asleep(&real).await;
    process::signal(&child, Signal::SIGINT);
    let output = ended(child).await;
    assert!(text(&output.stderr).contains("canceling statement due to user request"));
}

#[tokio::test]
async fn a_server_that_is_killed_takes_its_sessions_with_it() {
    let real = Real::new("", TRUE_NAME, &[]).await;
    let mut sleeps = psql(real.alias, "", &["-c", "select pg_sleep(600)"]);
    let child = sleeps.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    asleep(&real).await;
    real.server.kill();
    let output = ended(child).await;
    assert!(!output.status.success());
    let output = real.query("", "select 1").await;
    assert!(text(&output.stderr).contains("FATAL:  truename: "), "{output:?}");
}

#[tokio::test]
async fn drivers_of_python_work_as_they_do_without_a_proxy() {
    let real = Real::new("", TRUE_NAME, &[]).await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/postgres_drivers.py");
    let mut drivers = Command::new(tools::python());
    drivers.args([script, &real.alias.ip().to_string(), &real.alias.port().to_string()]);
    let child = drivers.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(written(&ended(child).await), "ok\n");
    assert!(!real.proxy.log().contains("panicked"));
}

#[tokio::test]
async fn fifty_clients_of_pgbench_see_a_move_as_on_change_says() {
    let mut scene = Scene::new(2).await;
    drop(scene.take_listeners());
    let names = ["one.example", "two.example"];
    let mut servers = Vec::new();
    for (name, ip) in names.into_iter().zip(&scene.addresses) {
        scene.dns.zone([dns::address(name, 60, *ip)]);
        let address = SocketAddr::new(*ip, scene.port);
        let server = PostgresServer::start(address, name, &[]).await;
        written(&output(client("pgbench", address, "", &["-i", "-q"])).await);
        servers.push(server);
    }
    for on_change in ["keep", "drain", "close"] {
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, names[0])]);
        let keys = format!("protocol: postgres\non_change: {on_change}");
        let proxy = Proxy::start(&scene.restless_yaml(&keys)).await;
        let alias = proxy.address(ALIAS).await;
        let port = "select inet_server_addr()";
        let leads_to = async |server: usize| {
            let now = output(psql(alias, "", &["-c", port])).await;
            now.status.success()
                && text(&now.stdout).trim() == servers[server].address.ip().to_string()
        };
        assert!(leads_to(0).await);
        let seconds = if on_change == "keep" { "4" } else { "60" };
        let mut bench = client(
            "pgbench",
            alias,
            "sslmode=disable",
            &["-S", "-n", "-c", "50", "-j", "2", "-T", seconds],
        );
        let child = bench.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // All have connected, and had their first response.
        let ran = "select count(*) from pg_stat_activity where query like 'SELECT abalance%'";
        within("50 sessions", async {
            let asks = async || output(psql(servers[0].address, "", &["-c", ran])).await;
            while written(&asks().await) != "50\n" {}
        })
        .await;
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, names[1])]);
        within("the alias to lead to the second server", async { while !leads_to(1).await {} })
            .await;
        let output = ended(child).await;
        let (out, said) = (text(&output.stdout), text(&output.stderr));
        if on_change == "keep" {
            assert!(output.status.success(), "{said}");
            assert!(out.contains("number of failed transactions: 0 "), "{out}");
        } else {
            // pgbench does not connect again.
            assert!(!output.status.success(), "{out}");
            assert!(said.contains("the alias leads to another server now"), "{said}");
            if on_change == "drain" {
                assert!(!said.contains("server closed the connection unexpectedly"), "{said}");
            }
        }
    }
}

#[tokio::test]
async fn sessions_for_a_primary_follow_a_promotion_of_its_standby() {
    let mut scene = Scene::new(2).await;
    drop(scene.take_listeners());
    let address = |nth: usize| SocketAddr::new(scene.addresses[nth], scene.port);
    let primary = PostgresServer::start(address(0), TRUE_NAME, &[]).await;
    let standby = PostgresServer::standby(&primary, address(1), TRUE_NAME).await;
    let keys = "protocol: postgres\npostgres: {role: primary}";
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let alias = proxy.address(ALIAS).await;
    let ask = async || output(psql(alias, "", &["-c", "select pg_is_in_recovery()"])).await;
    let mut refused = 0;
    for _ in 0..6 {
        let output = ask().await;
        match output.status.success() {
            true => assert_eq!(text(&output.stdout), "f\n"),
            false => refused += 1,
        }
    }
    assert!(refused <= 1, "{refused}");
    primary.kill();
    standby.promote().await;
    within("a session with the new primary", async { while !ask().await.status.success() {} })
        .await;
    assert_eq!(written(&ask().await), "f\n");
}

/// Waits until a query sleeps at the server.
async fn asleep(real: &Real) {
    let asleep = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)' \
                  and state = 'active'";
    within("the query to run", async {
        while written(&output(psql(real.server.address, "", &["-c", asleep])).await) != "1\n" {}
    })
    .await;
}

/// Runs a program, while DNS and whatever else this process serves goes on.
async fn output(mut command: Command) -> Output {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    within("the program to end", output).await.unwrap()
}

/// What a program has written by its end. It may not wait for ever.
async fn ended(child: Child) -> Output {
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    within("the program to end", output).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn the_example_does_what_its_page_says() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/postgres/");
    let yaml = fs::read_to_string(format!("{folder}truename.yaml")).unwrap();
    let page = fs::read_to_string(format!("{folder}README.md")).unwrap();
    let name = "primary-db.example.com";
    let address = postgres_server::address();
    let server = PostgresServer::start(address, name, &[]).await;
    // As it stands, but for its addresses and whom it trusts.
    let target = format!(
        "target: \"{address}\"\n    tls: {{server_name: {name}, ca: {{system: false, webpki: false, \
         files: [\"$FOLDER/root.pem\"]}}}}"
    );
    let here = yaml
        .replace("127.0.0.1:5432", "127.0.0.1:0")
        .replace(&format!("target: {name}"), &target)
        .replace("version: 1", "version: 1\npolicy: {allow_addresses: [\"127.0.0.0/8\"]}");
    let proxy = Proxy::start(&here).await;
    let alias = proxy.address("webscaler-db").await;
    assert!(page.contains(&format!("sslmode=disable\" -Atc \"{TLS}\"\nt|TLSv1.3\n")));
    let output = output(psql(alias, "sslmode=disable", &["-c", TLS])).await;
    assert_eq!(written(&output), "t|TLSv1.3\n");
    drop(server);
}
