//! What a running proxy does with its local authorities, whatever becomes of their folder and the clock.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::support::{
    ca::{
        LIFETIME, OBEY_MODES, assert_derived, certificates, files, ids, init, mode, plant,
        truename_ca,
    },
    curl::{Curl, curl},
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene},
    scripts, within,
};
use nix::sys::signal::Signal;
use truename::tls::authority::DAY;

/// All that an alias of this name needs certificates for.
const NAMES: [&str; 5] = [
    "localhost",
    ALIAS,
    "webscaler-manual.default",
    "webscaler-manual.default.svc",
    "webscaler-manual.default.svc.cluster.local",
];

#[tokio::test]
async fn a_second_proxy_with_other_aliases_breaks_none_of_the_first_ones_clients() {
    let world = World::new().await;
    let folder = world.directory();
    let first = world.start().await;
    let address = first.address(ALIAS).await;
    let trusted = world.keep_roots();
    let before = files(&folder);

    let second = Proxy::start(&world.yaml("payments")).await;
    second.address("payments").await;
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
    assert!(files(&folder).is_superset(&before), "{:?}", files(&folder));
    assert_eq!(ids(&folder, ALIAS).len(), 1);
    assert_derived(&folder);
    // Who reads the roots now, trusts both.
    let both = world.keep_roots();
    let other = second.address("payments").await;
    assert_eq!(fetch(&both, ALIAS, address).await.code, 0);
    assert_eq!(fetch(&both, "payments", other).await.code, 0);
}

#[tokio::test]
async fn an_alias_that_comes_or_goes_with_a_reload_changes_no_other() {
    let world = World::new().await;
    let proxy = world.start().await;
    let address = proxy.address(ALIAS).await;
    let trusted = world.keep_roots();
    let before = ids(&world.directory(), ALIAS);
    let yaml = world.scene.yaml("");
    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    let more = format!("{}{}", world.yaml(ALIAS), alias.replace(ALIAS, "payments"));
    proxy.rewrite(&format!("{more}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"));
    proxy.logged("configuration reloaded").await;
    assert_eq!(ids(&world.directory(), "payments").len(), 1);
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
    assert_eq!(fetch(&world.roots(), "payments", address).await.code, 0);
    assert_eq!(ids(&world.directory(), ALIAS), before);
}

#[tokio::test]
async fn a_name_that_is_added_disturbs_nobody_and_one_that_is_taken_away_is_no_longer_served() {
    let world = World::new().await;
    let start = async |hosts: &str| {
        let proxy = Proxy::start(&world.with(hosts)).await;
        let address = proxy.address(ALIAS).await;
        (proxy, address)
    };
    let (proxy, address) = start("").await;
    let trusted = world.keep_roots();
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
    drop(proxy);
    let (proxy, address) = start("hosts: [pay.example]").await;
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0, "the former one is still served");
    assert_eq!(fetch(&world.roots(), "pay.example", address).await.code, 0);
    drop(proxy);
    let (_proxy, address) = start("").await;
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
    assert_eq!(fetch(&world.roots(), "pay.example", address).await.code, 35, "an alert");
}

#[tokio::test]
async fn a_proxy_puts_its_files_back_when_they_are_gone() {
    let world = World::new().await;
    let proxy = world.start().await;
    let address = proxy.address(ALIAS).await;
    let trusted = world.keep_roots();
    let before = files(&world.directory());
    fs::remove_dir_all(world.directory()).unwrap();
    within("the files", async {
        while !world.roots().exists() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(files(&world.directory()), before);
    assert_derived(&world.directory());
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
    for name in &before {
        let file = world.directory().join(name);
        fs::remove_file(&file).unwrap();
        within(name, async {
            while !file.exists() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    // What follows from the others is written after them.
    let trusted = fs::read(trusted).unwrap();
    within("the roots", async {
        while !fs::read(world.roots()).is_ok_and(|roots| roots == trusted) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_authority_that_is_removed_while_it_is_served_is_replaced_by_another() {
    let world = World::new().await;
    let proxy = world.start().await;
    let address = proxy.address(ALIAS).await;
    let trusted = world.keep_roots();
    let old = ids(&world.directory(), ALIAS);
    assert!(truename_ca(&["remove", ALIAS], &world.directory()).status.success());
    within("another", async { while fetch(&world.roots(), ALIAS, address).await.code != 0 {} })
        .await;
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 60, "nobody shows the old one");
    let new = ids(&world.directory(), ALIAS);
    assert_eq!(new.len(), 1);
    assert_ne!(new, old);
    assert_derived(&world.directory());
}

#[tokio::test]
async fn a_folder_that_can_only_be_read_is_served_from_to_the_end() {
    let world = World::new().await;
    // As a Secret is mounted, with ten days to go.
    let versions = world.directory().join("..version_1");
    plant(&versions, ALIAS, &NAMES, LIFETIME - 10 * DAY);
    let root = versions.join("ca.pem");
    for name in files(&versions) {
        fs::set_permissions(versions.join(&name), fs::Permissions::from_mode(0o440)).unwrap();
        symlink(Path::new("..data").join(&name), world.directory().join(&name)).unwrap();
        if name.contains(".root.") {
            fs::copy(versions.join(&name), &root).unwrap();
        }
    }
    symlink("..version_1", world.directory().join("..data")).unwrap();
    for folder in [&versions, &world.directory()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o555)).unwrap();
    }
    let before = files(&world.directory());
    let proxy = Setup::new(&world.yaml(ALIAS)).shell(OBEY_MODES).start().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(fetch(&root, ALIAS, address).await.code, 0);
    let line = proxy.logged("EXPIRE SOON").await;
    assert!(line.contains("\"error\"") || line.contains("\"ERROR\""), "{line}");
    assert_eq!(files(&world.directory()), before);
    for folder in [&versions, &world.directory()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test]
async fn a_successor_is_trusted_long_before_it_is_served() {
    let world = World::new().await;
    let old = plant(&world.directory(), ALIAS, &NAMES, LIFETIME - 300 * DAY);
    let proxy = world.start().await;
    let address = proxy.address(ALIAS).await;
    let all = ids(&world.directory(), ALIAS);
    assert_eq!(all.len(), 2, "{all:?}");
    let only = |id: &str| world.directory().join(format!("{ALIAS}.{id}.root.pem"));
    assert_eq!(fetch(&only(&old), ALIAS, address).await.code, 0);
    drop(proxy);
    // With less than a month to go, it is the successor's turn.
    fs::remove_dir_all(world.directory()).unwrap();
    let old = plant(&world.directory(), ALIAS, &NAMES, LIFETIME - 20 * DAY);
    let proxy = world.start().await;
    let address = proxy.address(ALIAS).await;
    let new = ids(&world.directory(), ALIAS).into_iter().find(|id| *id != old).unwrap();
    assert_eq!(fetch(&only(&new), ALIAS, address).await.code, 0);
    assert_eq!(fetch(&only(&old), ALIAS, address).await.code, 60);
    assert_eq!(certificates(&fs::read_to_string(world.roots()).unwrap()).len(), 2);
}

#[tokio::test]
async fn an_authority_that_begins_in_the_future_or_has_ended_is_not_served() {
    for age in [-90 * DAY, LIFETIME + DAY] {
        let world = World::new().await;
        let planted = plant(&world.directory(), ALIAS, &NAMES, age);
        let proxy = world.start().await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(fetch(&world.roots(), ALIAS, address).await.code, 0, "{age}");
        let mut all = ids(&world.directory(), ALIAS);
        all.retain(|id| *id != planted);
        assert_eq!(all.len(), 1);
        // What has ended is nobody's any more.
        let there = files(&world.directory()).iter().any(|name| name.contains(&planted));
        assert_eq!(there, age < 0);
        assert_derived(&world.directory());
    }
}

#[tokio::test]
async fn what_nobody_has_used_for_a_month_is_deleted_and_what_was_issued_is_not() {
    let world = World::new().await;
    let unused = plant(&world.directory(), "unused", &["unused"], 40 * DAY);
    let recent = plant(&world.directory(), "recent", &["recent"], 40 * DAY);
    let issued = plant(&world.directory(), "issued", &["issued"], 40 * DAY);
    fs::remove_file(world.directory().join(format!("issued.{issued}.key.pem"))).unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(31 * 24 * 3600);
    for (alias, id) in [("unused", &unused), ("issued", &issued)] {
        let root = world.directory().join(format!("{alias}.{id}.root.pem"));
        fs::File::options().write(true).open(root).unwrap().set_modified(long_ago).unwrap();
    }
    let _proxy = world.start().await;
    assert!(ids(&world.directory(), "unused").is_empty());
    assert_eq!(ids(&world.directory(), "recent"), [recent]);
    assert_eq!(ids(&world.directory(), "issued"), [issued]);
    assert!(!files(&world.directory()).iter().any(|name| name.starts_with("unused")));
    assert_derived(&world.directory());
}

#[tokio::test]
async fn in_a_folder_that_others_can_write_to_nothing_is_used_and_what_applications_trust_is_written()
 {
    let world = World::new().await;
    let planted = plant(&world.directory(), ALIAS, &NAMES, 0);
    let root =
        fs::read_to_string(world.directory().join(format!("{ALIAS}.{planted}.root.pem"))).unwrap();
    fs::set_permissions(world.directory(), fs::Permissions::from_mode(0o777)).unwrap();
    let proxy = world.start().await;
    let line = proxy.logged("the existing certificates are not used").await;
    assert!(line.contains("can be written by other users"), "{line}");
    let address = proxy.address(ALIAS).await;
    assert_eq!(fetch(&world.roots(), ALIAS, address).await.code, 0);
    assert!(!fs::read_to_string(world.roots()).unwrap().contains(&root));
    // Two of them do not fight over the files.
    let second = Proxy::start(&world.yaml("payments")).await;
    second.address("payments").await;
    let written = fs::read(world.roots()).unwrap();
    fs::write(world.directory().join("touched"), "").unwrap();
    assert_eq!(fetch(&world.roots(), "payments", second.address("payments").await).await.code, 0);
    assert_eq!(fs::read(world.roots()).unwrap(), written);
}

#[tokio::test]
async fn a_configured_folder_that_cannot_be_made_is_bad_configuration() {
    let scene = Scene::new(1).await;
    let yaml = format!("{}ca: {{directory: $FOLDER/root.pem/ca}}\n", scene.yaml(""));
    let proxy = Setup::new(&yaml).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    proxy.logged("set `ca.directory` to a writable folder").await;
}

#[tokio::test]
async fn a_temporary_folder_survives_a_reload_and_goes_with_the_proxy() {
    let scene = Scene::new(1).await;
    let temporary = tempfile::tempdir().unwrap();
    let yaml = scene.yaml("");
    let proxy = Setup::new(&yaml)
        .variable("XDG_STATE_HOME", "/dev/null")
        .variable("TMPDIR", temporary.path().to_str().unwrap())
        .start()
        .await;
    let folders = || -> Vec<PathBuf> {
        fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let [folder] = folders().try_into().unwrap();
    let before = ids(&folder, ALIAS);
    assert_eq!(mode(&folder), 0o700);
    proxy.rewrite(&format!("{yaml}admin: {{listen: \"127.0.0.1:0\"}}\nshutdown_grace: 1s\n"));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("configuration reloaded").await;
    assert_eq!(folders(), std::slice::from_ref(&folder));
    assert_eq!(ids(&folder, ALIAS), before);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.exit().await.code(), Some(0));
    assert_eq!(folders(), [] as [PathBuf; 0]);
}

/// Regression: all aliases moved to new authorities in a temporary folder, and a reload that added an alias was refused.
#[tokio::test]
async fn with_a_full_state_folder_aliases_keep_their_authorities_and_new_ones_wait_in_memory() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let state = tempfile::tempdir().unwrap();
    let setup =
        |yaml: &str| Setup::new(yaml).variable("XDG_STATE_HOME", state.path().to_str().unwrap());
    let yaml = scene.yaml("");
    drop(setup(&yaml).start().await);
    let directory = state.path().join("truename");
    let (before, roots) = (files(&directory), directory.join("ca.pem"));

    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    let more = |names: &[&str]| {
        let more: String = names.iter().map(|name| alias.replace(ALIAS, name)).collect();
        format!("{yaml}{more}")
    };
    let full = setup(&more(&["payments"])).shell("ulimit -S -f 0; ").start().await;
    let line = full.logged("in memory until they can be written").await;
    assert!(line.contains("payments") && line.contains("set `ca.directory`"), "{line}");
    full.rewrite(&more(&["payments", "orders"]));
    full.signal(Signal::SIGHUP);
    full.logged("configuration reloaded").await;
    for (name, code) in [(ALIAS, 0), ("payments", 60), ("orders", 60)] {
        assert_eq!(fetch(&roots, name, full.address(name).await).await.code, code, "{name}");
    }
    assert_eq!(files(&directory), before);

    full.free_disk();
    full.logged("new local certificate authorities").await;
    for name in ["payments", "orders"] {
        let address = full.address(name).await;
        within(name, async { while fetch(&roots, name, address).await.code != 0 {} }).await;
        assert_eq!(ids(&directory, name).len(), 1, "{name}");
    }
    assert_derived(&directory);
}

/// Regression: the reload was refused.
#[tokio::test]
async fn a_reload_does_not_depend_on_a_state_folder_that_is_gone() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let yaml = scene.yaml("");
    let setup = Setup::new(&yaml).variable("XDG_STATE_HOME", state.to_str().unwrap());
    let proxy = setup.start().await;
    let (directory, trusted) = (state.join("truename"), folder.path().join("trusted.pem"));
    fs::copy(directory.join("ca.pem"), &trusted).unwrap();
    // No folder can be made there.
    fs::rename(&state, folder.path().join("gone")).unwrap();
    fs::write(&state, "").unwrap();
    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    proxy.rewrite(&format!("{yaml}{}", alias.replace(ALIAS, "payments")));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("configuration reloaded").await;
    proxy.logged("in memory until they can be written").await;
    assert_eq!(fetch(&trusted, ALIAS, proxy.address(ALIAS).await).await.code, 0);
    let address = proxy.address("payments").await;
    assert_eq!(fetch(&trusted, "payments", address).await.code, 60);
    fs::remove_file(&state).unwrap();
    let is_there = || directory.join("ca.pem").exists();
    within("the roots", async {
        while !is_there() {
            tokio::task::yield_now().await
        }
    })
    .await;
    for name in [ALIAS, "payments"] {
        let (roots, address) = (directory.join("ca.pem"), proxy.address(name).await);
        assert_eq!(fetch(&roots, name, address).await.code, 0, "{name}");
    }
    assert_eq!(fetch(&trusted, ALIAS, proxy.address(ALIAS).await).await.code, 0);
    assert_derived(&directory);
}

/// Regression: another authority was created, which no application trusted yet.
#[tokio::test]
async fn a_start_that_cannot_read_an_authority_just_now_fails_and_creates_no_other() {
    let world = World::new().await;
    let state = world.folder.path().join("state");
    let setup = |yaml: &str| Setup::new(yaml).variable("XDG_STATE_HOME", state.to_str().unwrap());
    let yamls = [world.yaml(ALIAS), world.scene.yaml("")];
    for (yaml, folder) in yamls.iter().zip([world.directory(), state.join("truename")]) {
        drop(setup(yaml).start().await);
        let (before, [id]) = (files(&folder), ids(&folder, ALIAS).try_into().unwrap());
        let trusted = fs::read(folder.join("ca.pem")).unwrap();
        for kind in ["key", "root"] {
            let file = folder.join(format!("{ALIAS}.{id}.{kind}.pem"));
            let away = world.folder.path().join("away");
            fs::rename(&file, &away).unwrap();
            // It has no first byte: EIO.
            symlink("/proc/self/mem", &file).unwrap();
            let proxy = setup(yaml).spawn();
            assert_eq!(proxy.exit().await.code(), Some(2));
            let line = proxy.logged("no other is created").await;
            assert!(line.contains(file.to_str().unwrap()), "{line}");
            fs::rename(&away, &file).unwrap();
            assert_eq!(files(&folder), before);
            assert_eq!(fs::read(folder.join("ca.pem")).unwrap(), trusted);
        }
        drop(setup(yaml).start().await);
        assert_eq!(ids(&folder, ALIAS), [id]);
    }
}

#[tokio::test]
async fn what_init_makes_is_what_run_serves() {
    let world = World::new().await;
    init(&world.directory(), &[ALIAS]);
    let trusted = world.keep_roots();
    let proxy = world.start().await;
    // Said with its whole path where there is a new one, and there is none.
    assert!(!proxy.log().contains("new local certificate authorities"));
    let address = proxy.address(ALIAS).await;
    assert_eq!(fetch(&trusted, ALIAS, address).await.code, 0);
}

/// As Java is, which gives no name of one label.
#[tokio::test]
async fn who_names_no_server_in_a_tunnel_is_shown_the_certificate_of_the_tunnels_alias() {
    let world = World::new().await;
    let yaml = world.yaml(ALIAS).replace("listen: [\"127.0.0.1:0\"]", "listen: []");
    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    let proxy = "proxy: {listen: \"127.0.0.1:0\"}";
    let proxy = Proxy::start(&format!("{proxy}\n{yaml}{}", alias.replace(ALIAS, "payments"))).await;
    let through = proxy.forward_proxy().await.to_string();
    for (tunnel, name, code) in
        [(ALIAS, ALIAS, 0), ("payments", "payments", 0), ("payments", ALIAS, 1)]
    {
        let target = format!("{tunnel}:443");
        let mut openssl = Command::new("openssl");
        openssl.args(["s_client", "-proxy", &through, "-connect", &target, "-noservername"]);
        openssl.args(["-verify_return_error", "-verify_hostname", name, "-CAfile"]);
        openssl.arg(world.roots()).stdin(Stdio::null());
        let run = tokio::task::spawn_blocking(move || openssl.output().unwrap());
        let output = within("openssl", run).await.unwrap();
        assert_eq!(output.status.code(), Some(code), "{tunnel} {name}: {output:?}");
    }
}

/// A scene with an origin that responds `ok`, and a folder for authorities that outlives proxies.
struct World {
    scene: Scene,
    _origins: Vec<RawOrigin>,
    folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let mut scene = Scene::new(1).await;
        let origins = scene.script(scripts::respond);
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("ca")).unwrap();
        Self { scene, _origins: origins, folder }
    }

    fn directory(&self) -> PathBuf {
        self.folder.path().join("ca")
    }

    fn roots(&self) -> PathBuf {
        self.directory().join("ca.pem")
    }

    /// A copy of `ca.pem` as it is now: what a program that has started already trusts.
    fn keep_roots(&self) -> PathBuf {
        let kept = self.folder.path().join(format!("kept-{}.pem", fastrand::u64(..)));
        fs::copy(self.roots(), &kept).unwrap();
        kept
    }

    fn yaml(&self, alias: &str) -> String {
        self.with("").replace(ALIAS, alias)
    }

    /// With further lines of the alias.
    fn with(&self, keys: &str) -> String {
        format!("ca: {{directory: {:?}}}\n{}", self.directory(), self.scene.yaml(keys))
    }

    async fn start(&self) -> Proxy {
        Proxy::start(&self.yaml(ALIAS)).await
    }
}

/// Asks the proxy at `address`, as a client that trusts only these roots.
async fn fetch(roots: &Path, name: &str, address: SocketAddr) -> Curl {
    let resolve = format!("{name}:{}:{}", address.port(), address.ip());
    let url = format!("https://{name}:{}/", address.port());
    curl(&["--cacert", roots.to_str().unwrap(), "--resolve", &resolve, &url]).await
}
