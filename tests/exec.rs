//! `truename exec`: real programs under it, and the life of a command.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use crate::support::{
    scene::{ALIAS, Scene, TRUE_NAME},
    service_origin::{self, ServiceOrigin},
    tools, trust,
};
use http::Response;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};
use truename::demo::{authority::Authority, origin::Origin};

/// A compiler may have to start first.
const DEADLINE: Duration = Duration::from_secs(90);

/// A world, and a folder with a configuration for it.
pub struct Stage {
    scene: Scene,
    folder: TempDir,
    _origins: Vec<Origin>,
}

impl Stage {
    pub async fn new() -> Self {
        let mut scene = Scene::new(1).await;
        let origins = scene.serve();
        Self { _origins: origins, ..Self::of(scene) }
    }

    fn of(scene: Scene) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("root.pem"), trust::authority().root_pem()).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        let stage = Self { scene, folder, _origins: Vec::new() };
        stage.configure(&stage.scene.yaml(""));
        stage
    }

    fn configure(&self, yaml: &str) {
        let yaml = yaml.replace("$FOLDER", self.folder.path().to_str().unwrap());
        fs::write(self.path("truename.yaml"), yaml).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `truename exec --config FILE -- COMMAND`.
    pub fn exec(&self, command: &[&str]) -> Command {
        let mut exec = exec();
        exec.arg("--config").arg(self.path("truename.yaml")).arg("--").args(command);
        exec.current_dir(self.folder.path()).env("TMPDIR", self.path("tmp"));
        exec
    }

    /// `inner`, run by another program.
    pub fn within(&self, program: &[&str], inner: &Command) -> Command {
        let inner = inner.as_std();
        let mut outer = Command::new(program[0]);
        outer.args(&program[1..]).arg(inner.get_program()).args(inner.get_args());
        outer.env("TMPDIR", self.path("tmp")).current_dir(self.folder.path());
        outer.stdin(Stdio::null());
        outer
    }

    /// Runs it, and gives what it printed; it must succeed.
    async fn prints(&self, command: &[&str]) -> String {
        succeeded(output(&mut self.exec(command)).await)
    }

    fn leftovers(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("tmp")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

/// `truename exec` without what the developer's shell says about proxies and roots.
fn exec() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        let upper = name.to_string_lossy().to_uppercase();
        let roots = ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "JAVA_TOOL_OPTIONS"];
        let of_proxies = upper.starts_with("TRUENAME_") || upper.ends_with("_PROXY");
        if of_proxies || roots.contains(&upper.as_str()) {
            command.env_remove(&name);
        }
    }
    command.arg("exec").stdin(Stdio::null()).kill_on_drop(true);
    command
}

pub async fn output(command: &mut Command) -> Output {
    timeout(DEADLINE, command.output()).await.expect("a command that ends").unwrap()
}

#[track_caller]
fn succeeded(output: Output) -> String {
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    stdout
}

#[track_caller]
fn is_expected(body: &str) {
    let json: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{body}"));
    assert_eq!(json["args"]["test"], "value", "{body}");
}

const URL: &str = "https://webscaler-manual/anything?test=value";

#[tokio::test]
async fn curl_verifies_the_alias_without_being_told_anything() {
    let stage = Stage::new().await;
    is_expected(&stage.prints(&["curl", "-sS", URL]).await);
    is_expected(&stage.prints(&["curl", "-sS", &URL.replace("https:", "http:")]).await);
    let long = URL.replace(ALIAS, "webscaler-manual.default.svc.cluster.local");
    is_expected(&stage.prints(&["curl", "-sS", &long]).await);
    assert_eq!(stage.leftovers(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn without_it_the_same_curl_does_not_even_find_the_name() {
    let plain = output(Command::new("curl").args(["-sS", "--noproxy", "*", URL])).await;
    assert_ne!(plain.status.code(), Some(0));
}

#[tokio::test]
async fn an_alias_with_its_target_needs_no_file() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let address = std::net::SocketAddr::new(scene.addresses[0], scene.port);
    let mut command = exec();
    command.arg(format!("{ALIAS}={address}")).args(["--", "curl", "-sS", URL]);
    let output = output(&mut command).await;
    // Loopback is no place for a target unless a file allows it: and that is what curl is told.
    let problem: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(problem["status"], 403, "{problem}");
    assert_eq!(problem["alias"], ALIAS);
}

#[tokio::test]
async fn wget_gets_through() {
    let stage = Stage::new().await;
    let plain = URL.replace("https:", "http:");
    is_expected(&stage.prints(&["wget", "-qO-", &plain]).await);
    // GnuTLS, which Debian's wget has, knows no variable for its roots.
    let script = format!("wget -qO- --ca-certificate=\"$SSL_CERT_FILE\" '{URL}'");
    is_expected(&stage.prints(&["sh", "-c", &script]).await);
}

#[tokio::test]
async fn python_gets_through() {
    let stage = Stage::new().await;
    let script = format!(
        "import urllib.request\nprint(urllib.request.urlopen('{URL}', timeout=20).read().decode())"
    );
    is_expected(&stage.prints(&["python3", "-c", &script]).await);
    let python = tools::python();
    for library in ["requests", "httpx"] {
        let script = format!("import {library}\nprint({library}.get('{URL}', timeout=20).text)");
        is_expected(&stage.prints(&[python.to_str().unwrap(), "-c", &script]).await);
    }
}

#[tokio::test]
async fn a_rust_client_gets_through() {
    const RESPONSE: &str = "RESPONSE_OF_THE_RUST_CLIENT";
    // This very test is the client, too, when it runs under the command.
    if let Some(file) = std::env::var_os(RESPONSE) {
        let response = reqwest::get(URL).await.unwrap();
        fs::write(file, response.text().await.unwrap()).unwrap();
        return;
    }
    let stage = Stage::new().await;
    let this = std::env::current_exe().unwrap();
    let mut command =
        stage.exec(&[this.to_str().unwrap(), "--exact", "exec::a_rust_client_gets_through"]);
    let ran = succeeded(output(command.env(RESPONSE, stage.path("response"))).await);
    is_expected(&fs::read_to_string(stage.path("response")).expect(&ran));
}

#[tokio::test]
async fn node_s_own_fetch_gets_through() {
    let stage = Stage::new().await;
    let fetch = format!(
        "const fail = e => {{ console.error(e); process.exit(1) }};
         fetch('{URL}').then(r => r.text()).then(body => console.log(body), fail);"
    );
    is_expected(&stage.prints(&[tools::node().to_str().unwrap(), "-e", &fetch]).await);
}

#[tokio::test]
async fn a_node_of_any_age_gets_through_with_a_proxy_agent() {
    let stage = Stage::new().await;
    // What such an agent does.
    let script = format!(
        "const proxy = new URL(process.env.https_proxy), url = new URL('{URL}');
         const fail = e => {{ console.error(e); process.exit(1) }};
         const connect = {{host: proxy.hostname, port: proxy.port, method: 'CONNECT',
             path: url.hostname + ':443'}};
         require('http').request(connect).on('connect', (_, socket) =>
             require('https').get(url, {{socket, agent: false}}, response => {{
                 let body = '';
                 response.on('data', data => body += data).on('end', () => console.log(body));
             }}).on('error', fail)).on('error', fail).end();"
    );
    is_expected(&stage.prints(&["node", "-e", &script]).await);
}

#[tokio::test]
async fn java_gets_through() {
    let stage = Stage::new().await;
    let source = format!(
        "import java.net.*; import java.net.http.*;
         public class Get {{
             public static void main(String[] arguments) throws Exception {{
                 HttpRequest request = HttpRequest.newBuilder(URI.create(\"{URL}\")).build();
                 HttpClient client = HttpClient.newHttpClient();
                 System.out.print(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
             }}
         }}"
    );
    fs::write(stage.path("Get.java"), source).unwrap();
    is_expected(&stage.prints(&["java", "-Xshare:auto", "Get.java"]).await);
}

#[tokio::test]
async fn keytool_reads_the_trust_store_and_finds_it_whole() {
    let stage = Stage::new().await;
    let script = "keytool -list -keystore \"$(dirname \"$SSL_CERT_FILE\")/roots.p12\" \
                  -storepass changeit 2>/dev/null; grep -c BEGIN \"$SSL_CERT_FILE\"";
    let printed = stage.prints(&["sh", "-c", script]).await;
    let roots = printed.trim().lines().last().unwrap();
    assert!(printed.contains(&format!("contains {roots} entries")), "{printed}");
    assert!(roots.parse::<usize>().unwrap() > 100, "the public roots, too: {roots}");
}

#[tokio::test]
async fn git_clones_over_https() {
    let mut scene = Scene::new(1).await;
    let repository = tempfile::tempdir().unwrap();
    let bare = repository.path().join("bare.git");
    let script = format!(
        "git init -q -b main work && cd work && echo hello > file && git add file && \
         git -c user.name=n -c user.email=e@example.com commit -qm one && cd .. && \
         git clone -q --bare work {0} && git -C {0} update-server-info",
        bare.display()
    );
    let mut prepare = Command::new("sh");
    prepare.args(["-c", &script]).current_dir(repository.path());
    succeeded(output(&mut prepare).await);
    let tls = trust::server(&[TRUE_NAME]);
    let _origin = ServiceOrigin::start(scene.take_listeners().remove(0), tls, move |request| {
        let path = request.uri().path().trim_start_matches("/bare.git/").to_owned();
        let found = fs::read(bare.join(path));
        async move {
            let status = if found.is_ok() { 200 } else { 404 };
            let body = service_origin::whole(found.unwrap_or_default());
            Response::builder().status(status).body(body).unwrap()
        }
    });
    let stage = Stage::of(scene);
    stage.prints(&["git", "clone", "-q", &format!("https://{ALIAS}/bare.git"), "clone"]).await;
    assert_eq!(fs::read_to_string(stage.path("clone/file")).unwrap(), "hello\n");
}

#[tokio::test]
async fn the_file_s_listeners_are_not_bound() {
    let stage = Stage::new().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let yaml = stage.scene.yaml("").replace("127.0.0.1:0", &taken.to_string());
    stage.configure(&format!("{yaml}\nadmin: {{listen: \"127.0.0.1:9990\"}}\n"));
    let script = format!("curl -sS '{URL}'");
    // Two at once: none has a port of its own but the private one.
    let (mut one, mut two) =
        (stage.exec(&["sh", "-c", &script]), stage.exec(&["sh", "-c", &script]));
    let (one, two) = tokio::join!(output(&mut one), output(&mut two));
    is_expected(&succeeded(one));
    is_expected(&succeeded(two));
}

#[tokio::test]
async fn the_private_proxy_asks_for_no_credentials_whatever_the_file_says() {
    let stage = Stage::new().await;
    fs::write(stage.path("credentials"), "ann:one\n").unwrap();
    let yaml = stage.scene.yaml("");
    let proxy = "proxy: {listen: 3128, credentials: $FOLDER/credentials}";
    stage.configure(&format!("{yaml}\n{proxy}\n"));
    is_expected(&stage.prints(&["curl", "-sS", URL]).await);
}

#[tokio::test]
async fn no_proxy_of_the_shell_keeps_what_is_no_alias() {
    let stage = Stage::new().await;
    let mut command = stage.exec(&["sh", "-c", "echo \"$NO_PROXY $no_proxy\"; curl -sS $0", URL]);
    command.env("NO_PROXY", "internal.example,webscaler-manual,*").env("no_proxy", ".svc");
    let printed = succeeded(output(&mut command).await);
    let (exempt, body) = printed.split_once('\n').unwrap();
    let expected = "localhost,127.0.0.1,::1,internal.example";
    assert_eq!(exempt, format!("{expected} {expected}"));
    is_expected(body);
}

#[tokio::test]
async fn roots_that_the_shell_named_are_still_trusted() {
    let stage = Stage::new().await;
    let port = stage.scene.port;
    let address = stage.scene.addresses[0];
    // Past the proxy, to an origin whose certificate only the file's authority has issued.
    let connect = format!("{TRUE_NAME}:{port}:{address}");
    let url = format!("https://{TRUE_NAME}:{port}/get");
    let arguments =
        ["curl", "-sS", "-o", "/dev/null", "--noproxy", "*", "--resolve", &connect, &url];
    let status = output(&mut stage.exec(&arguments)).await.status;
    assert_eq!(status.code(), Some(60), "without it, no root is known");
    let mut command = stage.exec(&arguments);
    command.env("CURL_CA_BUNDLE", stage.path("root.pem"));
    succeeded(output(&mut command).await);
    // Joined without care, and by an editor of Windows.
    let other = Authority::new("another root").unwrap();
    let root = fs::read_to_string(stage.path("root.pem")).unwrap();
    for text in [format!("\u{feff}{root}"), format!("{}{root}", other.root_pem().trim_end())] {
        fs::write(stage.path("joined.pem"), text).unwrap();
        for variable in ["CURL_CA_BUNDLE", "SSL_CERT_FILE"] {
            let mut command = stage.exec(&arguments);
            command.env(variable, stage.path("joined.pem"));
            succeeded(output(&mut command).await);
        }
    }
}

#[tokio::test]
async fn one_line_says_what_it_did_and_quiet_says_none() {
    let stage = Stage::new().await;
    let output_of = output(&mut stage.exec(&["curl", "-sS", URL])).await;
    let stderr = String::from_utf8(output_of.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("truename exec: proxy http://127.0.0.1:"), "{stderr}");

    let mut quiet = exec();
    quiet.arg("--config").arg(stage.path("truename.yaml")).args(["-q", "--", "curl", "-sS", URL]);
    let output_of = output(&mut quiet).await;
    assert_eq!(String::from_utf8(output_of.stderr).unwrap(), "");
}

#[tokio::test]
async fn it_ends_with_the_status_of_its_command() {
    let stage = Stage::new().await;
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["sh", "-c", "kill -KILL $$"], 128 + 9),
        (&["/nowhere/command"], 127),
        (&["no-such-command-anywhere"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let output = output(&mut stage.exec(command)).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
        assert_eq!(stage.leftovers(), Vec::<PathBuf>::new(), "{command:?}");
    }
}

#[tokio::test]
async fn bad_usage_ends_with_2_and_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let ran = folder.path().join("ran");
    let ran = ran.to_str().unwrap();
    for (arguments, part) in [
        (&["a"][..], "required"),
        (&["a", "--"], "required"),
        (&["a="], "required"),
        (&["a=", "--", "touch", ran], "has no target"),
        (&["a:80", "--", "touch", ran], "`a=TARGET:80`"),
        (&["--", "touch", ran], "no alias to serve"),
        (&["--config", "/nowhere/truename.yaml", "--", "touch", ran], "/nowhere/truename.yaml"),
        (&["a", "--listen", "8080", "--", "touch", ran], "--listen"),
    ] {
        let output = output(exec().args(arguments)).await;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
    assert!(!Path::new(ran).exists());
}

#[tokio::test]
async fn signals_are_the_commands() {
    let stage = Stage::new().await;
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGALRM,
        Signal::SIGXCPU,
        Signal::SIGPWR,
        Signal::SIGWINCH,
    ] {
        let name = signal.as_str().trim_start_matches("SIG");
        let script = format!(
            "trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 0.05; done"
        );
        let mut command = stage.exec(&["sh", "-c", &script]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next =
            async || timeout(DEADLINE, lines.next_line()).await.expect("a line").unwrap().unwrap();
        assert_eq!(next().await, "ready");
        kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), signal).unwrap();
        assert_eq!(next().await, format!("got {name}"));
        let status = timeout(DEADLINE, child.wait()).await.expect("an end").unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(stage.leftovers(), Vec::<PathBuf>::new());
    }
}

/// Where it is the first process of a container, or a process that adopts others as this one is.
#[tokio::test]
async fn processes_whose_parents_have_ended_are_reaped() {
    let stage = Stage::new().await;
    // PR_SET_CHILD_SUBREAPER
    let adopting = "import ctypes, os, sys\n\
                    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0\n\
                    os.execv(sys.argv[1], sys.argv[1:])\n";
    let script = "for n in 1 2 3; do sh -c 'sleep 0.05 & echo $!' > pid; read pid < pid; \
                  while test -d /proc/$pid; do sleep 0.05; done; done; exit 5";
    let inner = stage.exec(&["sh", "-c", script]);
    let output = output(&mut stage.within(&["python3", "-c", adopting], &inner)).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
}

#[tokio::test]
async fn a_temporary_folder_that_is_set_to_nothing_is_the_usual_one() {
    let stage = Stage::new().await;
    let mut command = stage.exec(&["sh", "-c", "dirname \"$(dirname \"$SSL_CERT_FILE\")\""]);
    assert_eq!(succeeded(output(command.env("TMPDIR", "")).await), "/tmp\n");
}

#[tokio::test]
async fn a_command_gets_no_signal_s_mask_from_us() {
    let stage = Stage::new().await;
    let said = stage.prints(&["grep", "SigBlk", "/proc/self/status"]).await;
    assert_eq!(said, "SigBlk:\t0000000000000000\n");
}

/// As under a parent that does not want to hear of the end of its own children.
#[tokio::test]
async fn the_status_is_passed_on_where_the_end_of_children_is_ignored() {
    let stage = Stage::new().await;
    let script = "import os, signal, sys\n\
                  signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n\
                  os.execv(sys.argv[1], sys.argv[1:])\n";
    let inner = stage.exec(&["sh", "-c", "exit 7"]);
    let mut command = stage.within(&["python3", "-c", script], &inner);
    let output = output(&mut command).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
}

#[tokio::test]
async fn where_no_private_folder_can_be_made_the_variable_that_mends_it_is_named() {
    let stage = Stage::new().await;
    let output = output(stage.exec(&["true"]).env("TMPDIR", "/proc/nowhere")).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("/proc/nowhere") && said.contains("TMPDIR"), "{said}");
    assert!(!said.contains("ca.directory"), "{said}");
}

#[tokio::test]
async fn a_signal_that_was_ignored_stays_ignored() {
    let stage = Stage::new().await;
    let inner = stage.exec(&["sh", "-c", "kill -HUP $PPID; kill -HUP $$; echo survived"]);
    let mut nohup = stage.within(&["nohup"], &inner);
    assert_eq!(succeeded(output(&mut nohup).await), "survived\n");

    // Caught for ourselves, unless it is ignored.
    let inner = stage.exec(&["sh", "-c", "kill -XFSZ $$; echo survived"]);
    let ignoring = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"];
    assert_eq!(succeeded(output(&mut stage.within(&ignoring, &inner)).await), "survived\n");
}

#[tokio::test]
async fn its_folder_is_private() {
    let stage = Stage::new().await;
    let script = "d=$(dirname \"$SSL_CERT_FILE\"); stat -c %a \"$d\" \"$d\"/*.key.pem";
    assert_eq!(stage.prints(&["sh", "-c", script]).await, "700\n600\n");
}

#[tokio::test]
async fn stdin_is_the_commands() {
    let stage = Stage::new().await;
    fs::write(stage.path("input"), "typed\n").unwrap();
    let mut command = stage.exec(&["cat"]);
    command.stdin(fs::File::open(stage.path("input")).unwrap());
    assert_eq!(succeeded(output(&mut command).await), "typed\n");
}
