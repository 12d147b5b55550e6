//! The command line, as people and scripts meet it.

use std::{
    fs,
    net::SocketAddr,
    process::{Command, Stdio},
};

use crate::support::{
    client, loopback,
    proxy::Setup,
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene},
    scripts, trust,
};
use truename::demo::authority::LeafOptions;

const GOOD: &str = "version: 1\naliases:\n  - name: webscaler-manual\n";

#[test]
fn check_tells_every_problem_of_a_file_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let check = |text: &str| {
        fs::write(folder.path().join("truename.yaml"), text).unwrap();
        let mut command = truename(&["check", "--config", "truename.yaml"]);
        let output = command.current_dir(folder.path()).output().unwrap();
        (output.status.code(), text_of(&output.stdout))
    };
    let ok = (Some(0), "truename.yaml: ok, 1 alias\n".to_owned());
    assert_eq!(check(GOOD), ok);
    let (code, out) = check(&format!("{GOOD}    lisen: []\n    port: 0\n"));
    assert_eq!(code, Some(1));
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[0].starts_with("truename.yaml:4:5: "), "{out}");
    assert!(lines[0].contains("did you mean `listen`?"), "{out}");
    assert!(lines[1].starts_with("truename.yaml:5:11: "), "{out}");
    assert_eq!(lines[2], "truename.yaml: 2 problems");
}

#[test]
fn check_finds_its_file_in_a_variable_and_says_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    let mut command = truename(&["check"]);
    command.env("TRUENAME_CONFIG", &path);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text_of(&output.stdout).contains(path.to_str().unwrap()));
    fs::write(&path, GOOD).unwrap();
    assert_eq!(command.output().unwrap().status.code(), Some(0));
    assert_eq!(truename(&["check"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn variables_that_are_set_to_nothing_count_as_unset() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    fs::write(&path, GOOD).unwrap();
    let path = path.to_str().unwrap();
    for arguments in [
        &["check", "--config", path][..],
        &["exec", "-q", "--", "true"],
        &["exec", "-q", "--config", path, "--", "true"],
        &["ca", "show", "--config", path, "--directory", folder.path().to_str().unwrap()],
        // What they then go by is the command's own.
        &["run"],
        &["check"],
        &["wait", "--timeout", "0s"],
    ] {
        let results = [false, true].map(|empty| {
            let mut command = truename(arguments);
            command.env("XDG_STATE_HOME", folder.path());
            for name in ["ALIASES", "CONFIG", "LISTEN", "PROXY", "ADMIN"] {
                let name = format!("TRUENAME_{name}");
                if empty {
                    command.env(name, "");
                } else {
                    command.env_remove(name);
                }
            }
            let output = command.output().unwrap();
            (output.status.code(), text_of(&output.stdout), text_of(&output.stderr))
        });
        let [unset, empty] = results;
        assert_eq!(unset, empty, "{arguments:?}");
    }
}

/// Within 300 MB of address space, most of which the program itself takes.
#[test]
fn a_file_of_a_hundred_kilobytes_takes_no_more_memory_however_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    let open: String = (0..28).map(|n| format!("&a{n} [")).collect();
    let uses = "*a, ".repeat(20_000);
    for text in [
        format!("version: 1\nlog: {open}{}{}\n", "x, ".repeat(33_000), "]".repeat(28)),
        format!("version: 1\nlog: {{level: &a {}}}\naliases: [{uses}]\n", "x".repeat(20_000)),
        format!("version: 1\nlog: {{level: &a {}}}\nx: [{uses}]\n", "x".repeat(700)),
        format!("version: 1\naliases:\n  - &a {{name: a}}\n{}", "  - *a\n".repeat(9_000)),
    ] {
        fs::write(&path, &text).unwrap();
        let limited = "ulimit -v 300000; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", limited, env!("CARGO_BIN_EXE_truename"), "check", "--config"]);
        let output = command.arg(&path).output().unwrap();
        let start = &text[..60];
        assert_eq!(output.status.code(), Some(1), "{start}: {}", text_of(&output.stderr));
    }
}

#[test]
fn what_is_no_file_or_too_much_of_one_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let huge = folder.path().join("huge");
    fs::File::create(&huge).unwrap().set_len(300 << 20).unwrap();
    let binary = folder.path().join("binary");
    fs::write(&binary, [0xff, 0xfe]).unwrap();
    for (path, told) in [
        (folder.path(), "it is a directory, not a regular file"),
        ("/dev/zero".as_ref(), "it is a device, not a regular file"),
        (&huge, "it is larger than 4MiB"),
        (&binary, "it is not UTF-8"),
    ] {
        for command in ["check", "run"] {
            let output = truename(&[command, "--config", path.to_str().unwrap()]).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{command}");
            let told_by = text_of(&output.stdout) + &text_of(&output.stderr);
            assert!(told_by.contains(told), "{told_by}");
        }
    }
}

#[test]
fn run_tells_what_it_cannot_load_as_check_does() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("garbage"), "garbage").unwrap();
    let path = folder.path().join("truename.yaml");
    let tls = "    tls: {ca: {files: [garbage]}, crls: [garbage]}\n";
    fs::write(&path, format!("{GOOD}{tls}admin: {{listen: null}}\n")).unwrap();
    let path = path.to_str().unwrap();
    let [check, run] = ["check", "run"].map(|command| {
        let output = truename(&[command, "--config", path]).output().unwrap();
        text_of(&output.stdout) + &text_of(&output.stderr)
    });
    let problems: Vec<_> = check.lines().filter(|line| line.contains(".yaml:4:")).collect();
    assert_eq!(problems.len(), 2, "{check}");
    for problem in problems {
        assert!(run.contains(problem), "{run}\n{problem}");
    }
}

#[test]
fn run_refuses_what_it_cannot_use_and_says_what_to_write() {
    let flags: &[(&[&str], &[&str])] = &[
        (&[], &["no alias to serve", "truename run webscaler-manual"]),
        (&["web scaler"], &["in `web scaler`, the alias"]),
        (&["=httpbin.org"], &["has no alias", "ALIAS=TARGET[:PORT]"]),
        (&["a="], &["has no target", "`a=httpbin.org`"]),
        (&["a:8080"], &["has a port but no target", "`a=TARGET:8080`"]),
        (&["a=b:c:d"], &["in `a=b:c:d`, the target"]),
        (&["tcp://a"], &["`tcp://a` has no port", "`tcp://a=TARGET:8883`"]),
        (&["tcp://a:0"], &["`0` is not a port from 1 to 65535"]),
        (&["tcp://a:1", "smtp://a"], &["`smtp://a`", "earlier argument", "`protocol: tcp`"]),
        (&["postgress://a"], &["`postgress` is not a protocol", "`postgres://`"]),
        (&["https://a/"], &["`https` is not a protocol", "write `a`"]),
        (&["tcp://a:1", "tcp://b:1"], &["127.0.0.1:1"]),
        (&["a=httpbin.org:70000"], &["the target", "65535"]),
        (&["a=httpbin.org:0"], &["the target"]),
        (&["a", "--listen", "nowhere"], &["--listen: ", "nowhere"]),
        (&["a", "--listen", "0.0.0.0:8080"], &["allow_non_loopback"]),
        (&["a", "--admin", "127.0.0.1"], &["--admin: "]),
        (&["a", "--proxy", "0.0.0.0:3128"], &["proxy.listen", "allow_non_loopback"]),
        (&["a", "--proxy", "x"], &["--proxy: "]),
        (&["a", "--config", "/nowhere/truename.yaml"], &["/nowhere/truename.yaml", "--config"]),
        (&["a", "--lisen", "8080"], &["--lisen", "--listen"]),
    ];
    for (arguments, parts) in flags {
        refused(truename(&["run"]).args(*arguments), parts);
    }
    let variables: &[(&str, &str, &[&str])] = &[
        ("TRUENAME_ALIASES", "a=", &["has no target"]),
        ("TRUENAME_ALIASES", "a,b:1", &["has a port but no target"]),
        ("TRUENAME_LISTEN", "nowhere", &["--listen: "]),
        ("TRUENAME_ADMIN", "nowhere", &["--admin: "]),
        ("TRUENAME_PROXY", "0.0.0.0:3128", &["proxy.listen", "allow_non_loopback"]),
        ("TRUENAME_CONFIG", "/nowhere/truename.yaml", &["/nowhere/truename.yaml"]),
    ];
    for (name, value, parts) in variables {
        let mut command = truename(&["run"]);
        if *name != "TRUENAME_ALIASES" {
            command.arg("a");
        }
        refused(command.env(name, value), parts);
    }
}

#[test]
fn a_file_with_problems_is_told_whole_and_with_exit_2() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    fs::write(&path, format!("{GOOD}    lisen: []\n    port: 0\n")).unwrap();
    let mut command = truename(&["run", "--config", path.to_str().unwrap()]);
    refused(&mut command, &[":4:5: ", "did you mean `listen`?", ":5:11: "]);
}

/// Regression: more problems than the log's buffer holds were told nobody.
#[test]
fn a_file_with_more_problems_than_anybody_reads_is_told_of_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    let wrong = "x".repeat(1_000);
    let many: String = (0..1_100).map(|n| format!("  - {{name: a{n}, port: {wrong}}}\n")).collect();
    let long = format!("  - {{name: a, tls: {{crls: [{}]}}}}\n", "y".repeat(2_000_000));
    for (aliases, part) in
        [(&many, "further problems are not shown"), (&long, "cannot read the file")]
    {
        fs::write(&path, format!("version: 1\naliases:\n{aliases}")).unwrap();
        refused(&mut truename(&["run", "--config", path.to_str().unwrap()]), &[":3:", part]);
    }
}

#[tokio::test]
async fn an_alias_with_its_target_needs_no_file() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    // An address needs no query.
    let listen = loopback::listen_anywhere().local_addr().unwrap();
    let argument = format!("{ALIAS}={}", origins[0].address);
    let mut command = truename(&["run", &argument, "--admin", "none", "--listen"]);
    let mut child = command.arg(listen.to_string()).stderr(Stdio::null()).spawn().unwrap();
    crate::support::within("the proxy to listen", async {
        while tokio::net::TcpStream::connect(listen).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Nobody said that loopback may be dialled: the response shows that the target was understood.
    let response = client::get(listen, ALIAS, "/").await;
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(response.status(), 403);
    assert_eq!(response.json()["endpoint"], origins[0].address.to_string());
}

#[tokio::test]
async fn the_command_line_goes_before_the_file() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let yaml = scene.yaml("target: unheard-of.example\ntls: {mode: insecure_skip_verify}");
    let by_flags = Setup::new(&yaml)
        .argument(&format!("{ALIAS}={}", origins[0].address))
        .argument("--listen")
        .argument("127.0.0.1:0")
        .argument("--listen=[::1]:0");
    let by_variables = Setup::new(&yaml)
        .variable("TRUENAME_ALIASES", &format!("{ALIAS}={}", origins[0].address))
        .variable("TRUENAME_LISTEN", "127.0.0.1:0,[::1]:0")
        .variable("TRUENAME_ADMIN", "127.0.0.1:0");
    for setup in [by_flags, by_variables] {
        let proxy = setup.start().await;
        let mut families: Vec<_> = Vec::new();
        for address in proxy.addresses(ALIAS, 2).await {
            assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
            families.push(address.is_ipv6());
        }
        families.sort_unstable();
        assert_eq!(families, [false, true]);
    }
}

/// Regression: `--listen` gave aliases of all protocols the same address, which cannot work.
#[tokio::test]
async fn an_alias_of_another_protocol_needs_no_file_and_listens_on_its_targets_port() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = scene.yaml("").replace("    listen: [\"127.0.0.1:0\"]\n", "");
    let (of_target, named) = (loopback::port_of_its_own(), loopback::port_of_its_own());
    let target = SocketAddr::new(loopback::address(), of_target);
    let listener = tokio::net::TcpListener::bind(target).await.unwrap();
    let leaf = trust::authority().issue(&[], &[target.ip()], LeafOptions::default()).unwrap();
    let tls = leaf.server_config(&[]).unwrap();
    let _origin = RawOrigin::start(listener, Some(tls), scripts::echo);
    let proxy = Setup::new(&yaml)
        .argument(&format!("tcp://broker={target}"))
        .argument(&format!("tcp://other:{named}"))
        .argument("--listen=127.0.0.1:0")
        .variable("SSL_CERT_FILE", "root.pem")
        .start()
        .await;
    let port = |port| SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(proxy.address("other").await, port(named));
    assert_eq!(proxy.address("broker").await, port(of_target));
    let mut peer = client::connect(port(of_target)).await;
    peer.send("bytes").await;
    assert_eq!(peer.exactly(5).await, b"bytes");
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.text(), "ok");
}

#[tokio::test]
async fn the_command_line_and_the_file_agree_on_what_an_alias_is() {
    let yaml = "version: 1\naliases:\n- {name: broker, protocol: tcp, port: 8883, listen: [127.0.0.1:0]}\n";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.yaml");
    fs::write(&path, yaml).unwrap();
    for (argument, part) in [
        ("http://broker", "where `broker` has `protocol: tcp`"),
        ("tcp://broker:1883", "where `broker` has `port: 8883`"),
    ] {
        refused(truename(&["run", argument, "--config"]).arg(&path), &[argument, part]);
    }
    for argument in ["broker", "tcp://broker", "tcp://broker:8883", "broker=mqtt.example.com"] {
        let proxy = Setup::new(yaml).argument(argument).start().await;
        assert_eq!(proxy.addresses("broker", 1).await.len(), 1, "{argument}");
    }
}

#[test]
fn the_schema_is_a_schema() {
    let schema = said(&["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
}

#[test]
fn the_completions_are_a_script_that_bash_takes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("truename.bash");
    fs::write(&path, said(&["completions", "bash"])).unwrap();
    let script = "source \"$1\"; COMP_WORDS=(truename r); COMP_CWORD=1; \
                  _truename truename r truename; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    let output = bash.args(["--norc", "-c", script, "-"]).arg(&path).output().unwrap();
    assert_eq!(text_of(&output.stdout), "run\n", "{output:?}");
}

#[test]
fn help_and_version_are_for_people() {
    assert_eq!(said(&["--version"]), format!("truename {}\n", env!("CARGO_PKG_VERSION")));
    let help = said(&["--help"]);
    for command in ["run", "check", "demo", "schema", "completions"] {
        assert!(help.lines().any(|line| line.trim().starts_with(command)), "{command}:\n{help}");
    }
    let help = said(&["run", "--help"]);
    for part in ["ALIAS[=TARGET[:PORT]]", "--config <FILE>", "TRUENAME_LISTEN", "TRUENAME_ADMIN"] {
        assert!(help.contains(part), "{part}:\n{help}");
    }
    for arguments in [&[][..], &["fly"], &["check", "--nothing"]] {
        let output = truename(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text_of(&output.stderr).contains("Usage: truename"), "{output:?}");
    }
}

/// The binary, without what the developer's shell says to it.
fn truename(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TRUENAME_") {
            command.env_remove(&name);
        }
    }
    // A folder that is gone: the local authority then takes a temporary one.
    command.env("XDG_STATE_HOME", "/nonexistent");
    command.args(arguments).stdin(Stdio::null());
    command
}

#[track_caller]
fn refused(command: &mut Command, parts: &[&str]) {
    let output = command.output().unwrap();
    let errors = text_of(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{command:?}: {errors}");
    for part in parts {
        assert!(errors.contains(part), "{part:?} is not in what {command:?} says: {errors}");
    }
}

#[track_caller]
fn said(arguments: &[&str]) -> String {
    let output = truename(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    text_of(&output.stdout)
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
