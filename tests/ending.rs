//! How processes end: whatever hangs, whoever says nothing, and with nothing left behind.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use crate::support::{
    ca, client,
    process::{ended, names_in, signal},
    proxy::{Proxy, Setup},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::ServiceOrigin,
    trust, within,
};
use nix::sys::signal::Signal;
use truename::demo::dns::RecordType;

/// A regular file that cannot be opened for as long as this lives, as on a volume that hangs: its
/// lease is another process', which does not let go of it.
struct Hanging {
    child: Child,
    said: Option<BufReader<ChildStdout>>,
}

impl Hanging {
    fn new(path: &Path) -> Self {
        let script = "import fcntl, os, signal, sys\n\
                      signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])\n\
                      file = os.open(sys.argv[1], os.O_RDWR)\n\
                      fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
                      print('leased', flush=True)\n\
                      signal.sigwait([signal.SIGIO])\n\
                      print('opened', flush=True)\n\
                      sys.stdin.read()\n";
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(line(&mut said), "leased\n");
        Self { child, said: Some(said) }
    }

    /// Waits until somebody hangs.
    async fn opened(&mut self) {
        let mut said = self.said.take().unwrap();
        let line = tokio::task::spawn_blocking(move || line(&mut said));
        assert_eq!(within("the file to be opened", line).await.unwrap(), "opened\n");
    }
}

fn line(said: &mut impl BufRead) -> String {
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    line
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[tokio::test]
async fn a_file_that_hangs_at_the_start_does_not_keep_a_process_from_its_end() {
    let scene = Scene::new(1).await;
    for (hanging, yaml) in [
        ("truename.yaml", scene.yaml("")),
        ("root.pem", scene.yaml("")),
        (
            "users",
            scene.yaml("") + "proxy: {listen: \"127.0.0.1:0\", credentials: $FOLDER/users}\n",
        ),
    ] {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            // It waits until the file hangs.
            let setup = Setup::new(&yaml).file("users", "ann:one\n");
            let proxy = setup.shell("mkfifo go; read line <go; ").spawn();
            let go = proxy.folder().join("go");
            within("the shell", async {
                while !go.exists() {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            let mut hangs = Hanging::new(&proxy.folder().join(hanging));
            tokio::task::spawn_blocking(move || fs::write(go, "go\n")).await.unwrap().unwrap();
            hangs.opened().await;
            proxy.signal(signal);
            assert_eq!(proxy.exit().await.code(), Some(0), "{hanging}, {signal}");
        }
    }
}

/// Regression: it was looked for on the thread that has the signals.
#[tokio::test]
async fn a_file_that_hangs_while_a_problem_s_place_is_looked_for_does_not_either() {
    let scene = Scene::new(1).await;
    let tls = "tls: {crls: [\"$FOLDER/garbage\"]}";
    let setup = Setup::new(&scene.yaml(tls))
        .file("garbage", "garbage")
        .variable("SSL_CERT_FILE", "slow.pem")
        .shell("mkfifo slow.pem; ");
    let proxy = setup.spawn();
    let slow = proxy.folder().join("slow.pem");
    let opened = async || {
        within("the roots to be read", async {
            loop {
                // Fails for as long as there is no reader.
                let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
                match fs::OpenOptions::new().write(true).custom_flags(flags).open(&slow) {
                    Ok(pipe) => break pipe,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await
    };
    // By the start; then to find the place in the configuration.
    let first = opened().await;
    // Its reader must be gone, so that the next one is another.
    fs::rename(&slow, proxy.folder().join("first.pem")).unwrap();
    nix::unistd::mkfifo(&slow, nix::sys::stat::Mode::S_IRWXU).unwrap();
    drop(first);
    let _pipe = opened().await;
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn while_a_file_hangs_a_proxy_serves_is_alive_and_ends() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let users = "proxy: {listen: \"127.0.0.1:0\", credentials: $FOLDER/users}\n";
    let proxy =
        Setup::new(&(scene.restless_yaml("") + users)).file("users", "ann:one\n").start().await;
    let address = proxy.address(ALIAS).await;
    let hanging = ["truename.yaml", "root.pem", "users"];
    let mut hanging = hanging.map(|name| Hanging::new(&proxy.folder().join(name)));
    // All that looks at files by itself does so within seconds.
    for hanging in &mut hanging {
        hanging.opened().await;
    }
    proxy.signal(Signal::SIGHUP);
    let admin = proxy.admin().await;
    for _ in 0..3 {
        assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
        assert_eq!(client::get(admin, "localhost", "/livez").await.status(), 200);
        let asked = scene.dns.queries(ALIAS_IN_DNS, RecordType::A);
        scene.dns.wait_for_queries(ALIAS_IN_DNS, asked + 1).await;
    }
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

/// Its end is awaited for longer than a file may hang.
#[tokio::test]
async fn a_reload_whose_file_hangs_is_given_up_with_its_name_and_what_runs_stays() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Setup::new(&scene.yaml("")).file("other.pem", trust::authority().root_pem());
    let proxy = proxy.start().await;
    let address = proxy.address(ALIAS).await;
    let other = proxy.folder().join("other.pem");
    let changed = scene.yaml("hosts: [new.example]");
    let mut hanging = Hanging::new(&other);
    proxy.rewrite(&changed.replace("root.pem", "other.pem"));
    proxy.signal(Signal::SIGHUP);
    hanging.opened().await;
    assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    let line = proxy.logged("the running one stays").await;
    assert!(
        line.contains(&format!("`{}` could not be read within 10s", other.display())),
        "{line}"
    );
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);

    proxy.rewrite(&changed);
    proxy.logged("configuration reloaded").await;
    assert_eq!(client::get(address, "new.example", "/").await.text(), "ok");
}

/// Its end is awaited for longer than a file may hang.
#[tokio::test]
async fn a_start_for_which_the_system_s_roots_hang_is_given_up_with_their_name() {
    let scene = Scene::new(1).await;
    let yaml = scene.yaml("tls: {ca: {system: true, files: [\"$FOLDER/root.pem\"]}}");
    let setup = Setup::new(&yaml).variable("SSL_CERT_FILE", "slow.pem").shell("mkfifo slow.pem; ");
    let proxy = setup.spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    assert!(proxy.log().contains("`slow.pem` could not be read within 10s"), "{}", proxy.log());
}

/// Regression: it was waited for without end, and not named.
#[tokio::test]
async fn a_start_for_which_the_authorities_folder_hangs_is_given_up_with_the_file_s_name() {
    let scene = Scene::new(1).await;
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("ca");
    ca::init(&directory, &[ALIAS]);
    let roots = directory.join("ca.pem");
    let _hanging = Hanging::new(&roots);
    let yaml = format!("{}ca: {{directory: {}}}\n", scene.yaml(""), directory.display());
    let proxy = Setup::new(&yaml).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    let told = format!("`{}` could not be read within 10s", roots.display());
    assert!(proxy.log().contains(&told), "{}", proxy.log());
}

#[tokio::test]
async fn connections_on_which_nothing_was_asked_do_not_delay_the_end() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let more = "shutdown_grace: 10m\nproxy: {listen: \"127.0.0.1:0\"}\n";
    let proxy = Proxy::start(&(scene.yaml("") + more)).await;
    let (address, forward) = (proxy.address(ALIAS).await, proxy.forward_proxy().await);

    let mut idle = Vec::new();
    for (address, words) in [
        (address, ""),
        (forward, ""),
        // A record of TLS that never ends, and the beginning of HTTP/2.
        (address, "\x16\x03\x01\x02\x00\x01"),
        (address, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        let mut peer = client::connect(address).await;
        peer.send(words).await;
        idle.push(peer);
    }
    let mut tunnel = client::connect(forward).await;
    tunnel.send(format!("CONNECT {ALIAS}:80 HTTP/1.1\r\nHost: {ALIAS}:80\r\n\r\n")).await;
    assert_eq!(tunnel.response_to("CONNECT").await.status(), 200);
    idle.push(tunnel);
    let mut kept = client::connect(address).await;
    kept.send(format!("GET /kept HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(kept.response().await.status(), 200);
    idle.push(kept);

    // Requests that were sent get a response, and late clients are served.
    let mut slow = client::connect(address).await;
    slow.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();
    proxy.signal(Signal::SIGTERM);
    proxy.logged("\"draining\"").await;
    for mut peer in idle {
        let _ = peer.rest().await;
    }
    let mut late = client::connect(address).await;
    late.send(format!("GET /late HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(late.response().await.status(), 200);
    let mut silent = client::connect(address).await;
    silent.closed().await;
    drop(stream);
    assert_eq!(slow.response().await.status(), 200);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_proxy_that_is_interrupted_twice_leaves_no_key_behind() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    // Nobody can make a folder there: the authority is in a temporary one.
    let proxy = Setup::new(&scene.yaml("")).variable("XDG_STATE_HOME", "/proc/nowhere");
    let proxy = proxy.variable("TMPDIR", "tmp").shell("mkdir tmp; ").start().await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let _stream = within("the stream", streams.recv()).await.unwrap();
    let tmp = proxy.folder().join("tmp");
    assert_eq!(names_in(&tmp).len(), 1, "the private folder");
    proxy.signal(Signal::SIGINT);
    proxy.logged("draining").await;
    proxy.signal(Signal::SIGINT);
    assert_eq!(proxy.exit().await.code(), Some(130));
    assert_eq!(names_in(&tmp), BTreeSet::new());
}

/// SIGQUIT is Ctrl-\\; the others end whatever does not expect them.
#[tokio::test]
async fn a_proxy_that_another_signal_ends_leaves_no_key_behind() {
    let scene = Scene::new(1).await;
    for signal in [Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGXCPU, Signal::SIGPWR] {
        let proxy = Setup::new(&scene.yaml("")).variable("XDG_STATE_HOME", "/proc/nowhere");
        let proxy = proxy.variable("TMPDIR", "tmp").shell("mkdir tmp; ").start().await;
        let tmp = proxy.folder().join("tmp");
        assert_eq!(names_in(&tmp).len(), 1, "the private folder");
        proxy.signal(signal);
        assert_eq!(proxy.exit().await.code(), Some(128 + signal as i32), "{signal}");
        assert_eq!(names_in(&tmp), BTreeSet::new(), "{signal}");
        assert!(proxy.log().contains(&format!("ended by {signal}")), "{}", proxy.log());
    }
}

#[tokio::test]
async fn a_demo_that_loses_its_terminal_its_reader_or_gets_sigquit_leaves_no_key_behind() {
    for lost in ["terminal", "reader", "terminal and reader", "SIGQUIT"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
        command.arg("demo").env("TMPDIR", folder.path()).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        // With its first line, its folder is there.
        assert_ne!(line(&mut out), "");
        assert_ne!(names_in(folder.path()).len(), 0);
        if lost.contains("reader") {
            drop((out, child.stderr.take()));
        } else {
            std::thread::spawn(move || out.read_to_end(&mut Vec::new()));
        }
        if lost.contains("terminal") {
            signal(&child, Signal::SIGHUP);
        }
        if lost == "SIGQUIT" {
            signal(&child, Signal::SIGQUIT);
        }
        ended(&mut child).await;
        assert_eq!(names_in(folder.path()), BTreeSet::new(), "{lost}");
    }
}

#[tokio::test]
async fn a_command_that_waits_for_a_file_that_hangs_ends_with_the_signal_and_leaves_no_key_behind()
{
    let folder = tempfile::tempdir().unwrap();
    let roots = folder.path().join("roots.pem");
    fs::write(&roots, trust::authority().root_pem()).unwrap();
    fs::create_dir(folder.path().join("tmp")).unwrap();
    let mut hanging = Hanging::new(&roots);
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    command.args(["exec", "a=b.example", "--", "true"]).env("TMPDIR", folder.path().join("tmp"));
    let mut child = command.env("SSL_CERT_FILE", &roots).stdin(Stdio::null()).spawn().unwrap();
    hanging.opened().await;
    signal(&child, Signal::SIGTERM);
    assert_eq!(ended(&mut child).await, Some(128 + 15));
    assert_eq!(names_in(&folder.path().join("tmp")), BTreeSet::new());
}
