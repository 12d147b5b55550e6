//! `truename exec` and programs that have no setting for a proxy: they find the aliases in a hosts file of their own.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::Output,
};

use crate::{
    exec::{Stage, output},
    support::{loopback, raw_origin::RawOrigin, scene::ALIAS, scripts},
};
use tokio::net::TcpListener;

/// Connects to each host and port, and prints what comes back, or the error.
const TALK: &str = r#"
import socket, sys
for host, port in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        connection = socket.create_connection((host, int(port)), 20)
        connection.sendall(b"hello")
        print(host, connection.recv(5).decode())
    except OSError as error:
        print(host, type(error).__name__)
"#;

/// A stage with `broker`, an alias of plain TCP that echoes, and its port.
async fn stage_with_broker() -> (Stage, RawOrigin, u16) {
    let stage = Stage::new().await;
    let target = SocketAddr::new(loopback::address(), loopback::port_of_its_own());
    let listener = TcpListener::bind(target).await.unwrap();
    let origin = RawOrigin::start(listener, None, scripts::echo);
    let mut yaml = fs::read_to_string(stage.path("truename.yaml")).unwrap();
    yaml.push_str(&format!(
        "  - {{name: broker, protocol: tcp, target: \"{target}\", tls: {{mode: plaintext}}}}\n"
    ));
    fs::write(stage.path("truename.yaml"), yaml).unwrap();
    (stage, origin, target.port())
}

#[track_caller]
fn printed(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn a_program_without_a_setting_for_a_proxy_finds_the_alias_by_all_its_names() {
    let (stage, _origin, port) = stage_with_broker().await;
    let machines = fs::read("/etc/hosts").unwrap();
    let port = port.to_string();
    let names = ["broker", "broker.default", "broker.default.svc.cluster.local"];
    let mut command = vec!["python3", "-c", TALK];
    command.extend(names.iter().flat_map(|name| [name, port.as_str()]));
    let (stdout, stderr) = printed(&output(&mut stage.exec(&command)).await);
    let expected: String = names.iter().map(|name| format!("{name} hello\n")).collect();
    assert_eq!(stdout, expected, "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("broker is 127.0.1."), "{stderr}");
    assert!(stderr.contains(&format!(", port {port}")), "{stderr}");
    assert!(fs::read("/etc/hosts").unwrap() == machines, "the machine's own file");
}

#[tokio::test]
async fn an_http_alias_is_found_on_the_usual_ports_if_they_can_be_bound() {
    let stage = Stage::new().await;
    let urls = [format!("https://{ALIAS}/get"), format!("http://{ALIAS}/get")];
    let can_bind = std::net::TcpListener::bind((Ipv4Addr::new(127, 0, 1, 254), 80));
    for url in urls {
        let curl = stage.exec(&["curl", "-sS", "--noproxy", "*", &url]).output().await.unwrap();
        let (stdout, stderr) = printed(&curl);
        if can_bind.is_ok() {
            assert!(stdout.contains("\"url\""), "{stdout}\n{stderr}");
            assert!(stderr.contains(", ports 80 and 443\n"), "{stderr}");
        } else {
            let reason = format!("{ALIAS} only through the proxy, as ports 80 and 443");
            assert!(stderr.contains(&reason), "{stderr}");
        }
    }
}

#[tokio::test]
async fn without_a_hosts_file_the_line_says_why_and_where_the_alias_is() {
    let (stage, _origin, port) = stage_with_broker().await;
    let script = "echo 0 >/proc/sys/user/max_mnt_namespaces && exec \"$@\"";
    let inner = stage.exec(&["cat", "/etc/hosts"]);
    let mut outer = stage.within(&["unshare", "-Ur", "sh", "-c", script, "sh"], &inner);
    let (stdout, stderr) = printed(&output(&mut outer).await);
    assert_eq!(stdout, fs::read_to_string("/etc/hosts").unwrap(), "{stderr}");
    assert!(stderr.contains("no hosts file (the system permits no more mount"), "{stderr}");
    assert!(stderr.contains("broker is at 127.0.1."), "{stderr}");
    assert!(stderr.contains(&format!(", port {port}")), "{stderr}");
}

#[tokio::test]
async fn a_command_with_its_own_hosts_file_is_still_the_same_process_and_user() {
    let (stage, _origin, _) = stage_with_broker().await;
    for (command, code) in [
        (&["sh", "-c", "exit 7"][..], 7),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["no-such-command-anywhere"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let output = output(&mut stage.exec(command)).await;
        assert_eq!(output.status.code(), Some(code), "{command:?}: {output:?}");
    }
    let ids = ["sh", "-c", "id -u; id -g; umask; cat /proc/self/oom_score_adj"];
    let (inside, stderr) = printed(&output(&mut stage.exec(&ids)).await);
    let outside = tokio::process::Command::new(ids[0]).args(&ids[1..]).output().await.unwrap();
    assert_eq!(inside, printed(&outside).0, "{stderr}");
}

#[tokio::test]
async fn two_commands_at_once_have_addresses_of_their_own() {
    let (stage, _origin, port) = stage_with_broker().await;
    let port = port.to_string();
    let command = ["python3", "-c", TALK, "broker", &port];
    let (mut first, mut second) = (stage.exec(&command), stage.exec(&command));
    let (first, second) = tokio::join!(output(&mut first), output(&mut second));
    for output in [first, second] {
        let (stdout, stderr) = printed(&output);
        assert_eq!(stdout, "broker hello\n", "{stderr}");
    }
}

#[tokio::test]
async fn the_hosts_file_is_left_alone_on_request() {
    let (stage, _origin, _) = stage_with_broker().await;
    let inner = stage.exec(&["cat", "/etc/hosts"]);
    let mut command = tokio::process::Command::new(inner.as_std().get_program());
    command.args(["exec", "--no-hosts"]).args(inner.as_std().get_args().skip(1));
    let (stdout, stderr) = printed(&output(&mut command).await);
    assert_eq!(stdout, fs::read_to_string("/etc/hosts").unwrap(), "{stderr}");
    assert!(stderr.contains("no hosts file (--no-hosts): "), "{stderr}");
    assert!(stderr.contains("broker is at 127.0.1."), "{stderr}");
}
