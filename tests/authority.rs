//! The local certificate authorities: what is in their folder, and who may put it there.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::support::ca::{
    assert_derived, described, files, ids, init, mode, only, plant, show, text, truename,
    truename_ca,
};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair};
use truename::tls::authority::Root;

const ALIAS: &str = "webscaler-manual";
const ALIAS_IN_FULL: &str = "webscaler-manual.default.svc.cluster.local";

#[test]
fn the_files_are_as_open_as_they_must_be_whatever_the_umask() {
    let folder = tempfile::tempdir().unwrap();
    for umask in ["000", "022", "077"] {
        let directory = folder.path().join(umask);
        let mut shell = Command::new("sh");
        shell.args(["-c", "umask $0; exec \"$@\"", umask, env!("CARGO_BIN_EXE_truename")]);
        shell.args(["ca", "init", ALIAS, "--directory"]).arg(&directory);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&only(&directory, ALIAS, "key")), 0o600);
        assert_eq!(mode(&only(&directory, ALIAS, "root")), 0o644);
        for derived in ["ca.pem", "bundle.pem", "truststore.p12"] {
            assert_eq!(mode(&directory.join(derived)), 0o644);
        }
        assert_eq!(files(&directory).len(), 5, "nothing half-written: {:?}", files(&directory));
        assert_derived(&directory);
    }
}

#[test]
fn a_folder_made_where_everybody_may_write_can_be_read_by_those_who_share_it() {
    // An emptyDir is like that, and /tmp, which is sticky, is not.
    for (mode_of_parent, expected) in [(0o777, 0o755), (0o2777, 0o755), (0o1777, 0o700)] {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(mode_of_parent)).unwrap();
        let directory = parent.path().join("ca");
        init(&directory, &[ALIAS]);
        assert_eq!(mode(&directory) & 0o777, expected, "{mode_of_parent:o}");
        assert_eq!(mode(&only(&directory, ALIAS, "key")), 0o600);
    }
}

#[test]
fn a_folder_that_is_there_keeps_its_mode_and_a_key_open_to_others_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    init(folder.path(), &[ALIAS]);
    assert_eq!(mode(folder.path()), 0o755);
    let key = only(folder.path(), ALIAS, "key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    init(folder.path(), &[ALIAS]);
    assert_eq!(mode(&key), 0o600);
}

#[test]
fn a_root_is_constrained_to_exactly_the_names_of_its_alias() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path(), &[ALIAS]);
    let names = ["", ".default", ".default.svc", ".default.svc.cluster.local"];
    let names = names.map(|rest| format!("{ALIAS}{rest}"));
    let names: Vec<&str> =
        std::iter::once("localhost").chain(names.iter().map(String::as_str)).collect();
    let listed = |dot: &str| {
        let names: Vec<String> = names.iter().map(|name| format!("DNS:{dot}{name}")).collect();
        names.join(" ")
    };
    let root = described(&only(folder.path(), ALIAS, "root"));
    for part in [
        "ASN1 OID: prime256v1",
        &format!("critical Permitted: {} IP:127.0.0.0/255.0.0.0 Excluded: ", listed("")),
        &format!("Excluded: {} X509v3", listed(".")),
        "X509v3 Basic Constraints: critical CA:TRUE, pathlen:0",
        "X509v3 Key Usage: critical Certificate Sign",
    ] {
        assert!(root.contains(part), "{part}: {root}");
    }
    let key = fs::read_to_string(only(folder.path(), ALIAS, "key")).unwrap();
    let certificates = crate::support::ca::certificates(&key);
    assert_eq!(certificates.len(), 6);
    for certificate in certificates {
        let file = folder.path().join("one.pem");
        fs::write(&file, certificate).unwrap();
        let leaf = described(&file);
        assert!(
            leaf.contains("CA:FALSE") && leaf.contains("TLS Web Server Authentication"),
            "{leaf}"
        );
        assert!(leaf.contains(
            &names.iter().map(|name| format!("DNS:{name}")).collect::<Vec<_>>().join(", ")
        ));
    }
}

#[test]
fn names_of_which_one_lies_below_another_have_roots_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = "version: 1\naliases: [{name: app, hosts: [example.com, www.example.com]}]\n\
                dns: {namespace: app, cluster_domain: cluster.local}\nca: {directory: ca}\n";
    fs::write(folder.path().join("truename.yaml"), yaml).unwrap();
    let mut init = truename(&["ca", "init", "--config", "truename.yaml"]);
    let output = init.current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let shown = show(&folder.path().join("ca"));
    let mut sets: Vec<BTreeSet<&str>> = shown["authorities"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            one["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
        })
        .collect();
    sets.sort_by_key(BTreeSet::len);
    assert_eq!(sets[0], ["app.app", "localhost", "www.example.com"].into());
    let rest = ["app", "app.app.svc", "app.app.svc.cluster.local", "example.com", "localhost"];
    assert_eq!(sets[1], rest.into());
    for name in files(&folder.path().join("ca")).iter().filter(|name| name.contains(".root.")) {
        // This also says that each name's subdomains are excluded.
        let text = fs::read(folder.path().join("ca").join(name)).unwrap();
        Root::from_pem(&text).unwrap();
    }
}

#[test]
fn each_alias_has_an_authority_that_no_other_alias_changes() {
    let folder = tempfile::tempdir().unwrap();
    assert!(init(folder.path(), &[ALIAS]).starts_with("Created 1 certificate authority.\n"));
    let first = ids(folder.path(), ALIAS);
    assert!(
        init(folder.path(), &[ALIAS])
            .starts_with("Every alias already has a certificate authority.\n")
    );
    init(folder.path(), &["payments", "webscaler-db"]);
    assert_eq!(ids(folder.path(), ALIAS), first);
    assert_eq!(ids(folder.path(), "payments").len(), 1);
    assert_derived(folder.path());
    let removed = truename_ca(&["remove", "payments"], folder.path());
    assert!(text(&removed.stdout).starts_with("Removed 1 authority of `payments`.\n"));
    assert_eq!(ids(folder.path(), ALIAS), first);
    assert!(ids(folder.path(), "payments").is_empty());
    assert_derived(folder.path());
    assert!(!files(folder.path()).iter().any(|name| name.starts_with("payments")));

    let again = truename_ca(&["remove", "payments"], folder.path());
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("contains no authority of `payments`"), "{again:?}");
}

#[test]
fn processes_that_add_and_remove_aliases_at_once_or_die_leave_every_root_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let start = |verb: &str, alias: &str| {
        let mut command = truename(&["ca", verb, alias, "--directory"]);
        command.arg(folder.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    init(folder.path(), &["stays"]);
    let stays = ids(folder.path(), "stays");
    for round in 0..6 {
        let aliases: Vec<String> = (0..8).map(|number| format!("alias-{number}")).collect();
        let mut children: Vec<_> = aliases.iter().map(|alias| start("init", alias)).collect();
        children.push(start("init", "alias-0"));
        children.push(start("remove", &aliases[round]));
        // Killed wherever they happen to be: at most they leave files that nobody takes for others.
        for victim in children.iter_mut().skip(round).step_by(3) {
            victim.kill().unwrap();
        }
        for child in &mut children {
            child.wait().unwrap();
        }
        // Whoever looks next, as running proxies do each second, completes what the dead left.
        init(folder.path(), &["stays"]);
        assert_derived(folder.path());
        assert_eq!(ids(folder.path(), "stays"), stays);
    }
    let all: Vec<String> = (0..8).map(|number| format!("alias-{number}")).collect();
    init(folder.path(), &all.iter().map(String::as_str).collect::<Vec<_>>());
    for alias in &all {
        assert!(!ids(folder.path(), alias).is_empty(), "{alias}");
    }
    assert_derived(folder.path());
}

#[test]
fn a_full_disk_leaves_the_files_that_applications_read_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path(), &[ALIAS]);
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    let before = ["ca.pem", "bundle.pem", "truststore.p12"].map(read);
    // No file can be larger than this: a key fits, and what applications read does not.
    let mut shell = Command::new("bash");
    shell.args([
        "-c",
        "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_truename"),
    ]);
    shell.args(["ca", "init", "payments", "--directory"]).arg(folder.path());
    let output = shell.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(text(&output.stderr).contains("File too large"), "{output:?}");
    assert_eq!(["ca.pem", "bundle.pem", "truststore.p12"].map(read), before);
    assert!(!files(folder.path()).iter().any(|name| name.starts_with(".beside")));
    init(folder.path(), &["payments"]);
    assert_derived(folder.path());
}

#[test]
fn what_is_not_one_of_our_roots_is_left_out_and_said() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path(), &[ALIAS]);
    let good = fs::read_to_string(only(folder.path(), ALIAS, "root")).unwrap();
    let put = |name: &str, contents: &str| fs::write(folder.path().join(name), contents).unwrap();
    // A certificate authority for everything, under the name that it should have.
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "truename evil 0123456789abcdef");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let evil = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    let digest = truename_digest(evil.der());
    put(&format!("evil.{digest}.root.pem"), &evil.pem());
    put("copy.0123456789abcdef.root.pem", &good);
    put("two.0123456789abcdef.root.pem", &format!("{good}{good}"));
    put("garbage.0123456789abcdef.root.pem", "garbage");
    put("huge.0123456789abcdef.root.pem", &"x".repeat(1 << 20));
    symlink("/dev/zero", folder.path().join("zero.0123456789abcdef.root.pem")).unwrap();
    symlink("nowhere", folder.path().join("dangling.0123456789abcdef.root.pem")).unwrap();
    let pipe = folder.path().join("pipe.0123456789abcdef.root.pem");
    assert!(Command::new("mkfifo").arg(pipe).status().unwrap().success());
    fs::create_dir(folder.path().join("folder.0123456789abcdef.root.pem")).unwrap();
    put("..root.pem", &good);
    put("a.root.pem", &good);
    put(".0123456789abcdef.root.pem", &good);
    for number in 0..2000 {
        put(&format!("many.{number:016x}.root.pem"), "garbage");
    }

    let mut run = truename(&["ca", "init", "payments", "--directory"]);
    let output = run.arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stderr);
    assert!(
        (10..30).contains(&said.lines().count()) && said.contains("more files there"),
        "{said}"
    );
    let trusted = fs::read_to_string(folder.path().join("ca.pem")).unwrap();
    let aliases: Vec<String> = show(folder.path())["authorities"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["alias"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(aliases, ["payments", ALIAS]);
    assert_eq!(crate::support::ca::certificates(&trusted).len(), 2);
}

#[test]
fn nothing_is_kept_in_a_folder_that_others_can_write_to() {
    let folder = tempfile::tempdir().unwrap();
    plant(folder.path(), ALIAS, &[ALIAS, "localhost"], 0);
    for unsafe_mode in [0o777, 0o1777, 0o775] {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(unsafe_mode)).unwrap();
        for arguments in [&["init", ALIAS][..], &["show"], &["issue", ALIAS], &["remove", ALIAS]] {
            let output = truename_ca(arguments, folder.path());
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
            let said = text(&output.stderr);
            assert!(
                said.contains("can be written by other users") && said.contains("chmod go-w"),
                "{said}"
            );
        }
    }
    assert_eq!(files(folder.path()).len(), 2);
    if nix::unistd::geteuid().is_root() {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(folder.path(), Some(12345), None).unwrap();
        let output = truename_ca(&["show"], folder.path());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(text(&output.stderr).contains("belongs to user 12345"), "{output:?}");
    }
}

#[test]
fn the_authority_of_a_former_version_is_no_longer_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let old = fs::read_to_string({
        let other = folder.path().join("other");
        init(&other, &["old"]);
        only(&other, "old", "root")
    })
    .unwrap();
    let directory = folder.path().join("ca");
    fs::create_dir(&directory).unwrap();
    for file in ["ca.pem", "bundle.pem", "ca-key.pem"] {
        fs::write(directory.join(file), &old).unwrap();
    }
    init(&directory, &[ALIAS]);
    assert!(!fs::read_to_string(directory.join("ca.pem")).unwrap().contains(&old));
    assert_derived(&directory);
    assert_eq!(fs::read_to_string(directory.join("ca-key.pem")).unwrap(), old, "not ours to lose");
}

/// Regression: no file can have such a name, and the message asked for another folder.
#[test]
fn a_certificate_is_issued_for_the_longest_name() {
    let folder = tempfile::tempdir().unwrap();
    let (directory, out) = (folder.path().join("ca"), folder.path().join("out"));
    let labels = ["a", "b", "c"].map(|letter| letter.repeat(63));
    let long = format!("{}.{}", labels.join("."), "d".repeat(61));
    init(&directory, &[&long]);
    let issued = truename_ca(&["issue", &long, "--out", out.to_str().unwrap()], &directory);
    assert!(issued.status.success(), "{issued:?}");
    let printed = text(&issued.stdout);
    let file = |what: &str| {
        let line = printed.lines().find_map(|line| line.strip_prefix(what)).unwrap();
        PathBuf::from(line.trim())
    };
    assert_eq!(verify(&directory.join("ca.pem"), &file("certificate"), &long), 0);
    assert_eq!(mode(&file("key")), 0o600);
}

#[test]
fn issue_makes_a_certificate_for_names_of_aliases_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("ca");
    init(&directory, &[ALIAS]);
    let out = folder.path().join("out");
    let arguments = ["issue", ALIAS, ALIAS_IN_FULL, "--out", out.to_str().unwrap()];
    let issued = truename_ca(&arguments, &directory);
    assert!(issued.status.success(), "{issued:?}");
    let (certificate, key) =
        (out.join(format!("{ALIAS}.pem")), out.join(format!("{ALIAS}-key.pem")));
    assert_eq!(mode(&key), 0o600);
    for (name, code) in [(ALIAS, 0), (ALIAS_IN_FULL, 0), ("webscaler-manual.default", 2)] {
        assert_eq!(verify(&directory.join("ca.pem"), &certificate, name), code, "{name}");
    }
    assert_derived(&directory);
    assert_eq!(ids(&directory, ALIAS).len(), 2, "its root is its own");

    // Nothing is overwritten, and the authorities' own folder is not written to.
    let before = fs::read(&key).unwrap();
    let again = truename_ca(&arguments, &directory);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(text(&again.stderr).contains("existing files are not overwritten"), "{again:?}");
    assert_eq!(fs::read(&key).unwrap(), before);
    init(&directory, &["ca", "bundle"]);
    for name in ["ca", "bundle"] {
        let refused =
            truename_ca(&["issue", name, "--out", directory.to_str().unwrap()], &directory);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(text(&refused.stderr).contains("own folder"), "{refused:?}");
    }
    assert_derived(&directory);

    let printed = text(&truename_ca(&["issue", ALIAS], &directory).stdout);
    assert_eq!(printed.matches("BEGIN CERTIFICATE").count(), 1);
    assert_eq!(printed.matches("BEGIN PRIVATE KEY").count(), 1);
    for name in ["example.org", "login.webscaler-manual", "127.0.0.1", "*.default", "localhost"] {
        let refused = truename_ca(&["issue", ALIAS, name], &directory);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
        assert!(refused.stdout.is_empty());
        assert!(said.contains(&format!("`{name}` is not a name of an alias")), "{said}");
        assert!(said.contains(ALIAS_IN_FULL), "{said}");
    }
}

#[test]
fn init_takes_the_aliases_and_the_folder_of_a_configuration_and_says_how_to_trust() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = "version: 1\naliases: [{name: payments, hosts: [pay.example]}]\n\
                dns: {namespace: shop, cluster_domain: corp.local}\nca: {directory: mine}\n";
    fs::write(folder.path().join("truename.yaml"), yaml).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = truename(arguments);
        command.args(["--config", "truename.yaml"]).current_dir(folder.path()).output().unwrap()
    };
    let said = text(&run(&["ca", "init"]).stdout);
    let root = folder.path().canonicalize().unwrap().join("mine/ca.pem");
    for part in [
        "pay.example",
        "payments.shop.svc.corp.local",
        &format!("curl --cacert {}", root.display()),
        &format!("NODE_EXTRA_CA_CERTS={}", root.display()),
        "truststore.p12",
    ] {
        assert!(said.contains(part), "{part} is not in:\n{said}");
    }
    assert!(text(&run(&["ca", "show"]).stdout).contains("pay.example"));

    let nobody = truename(&["ca", "init"]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(2));
    assert!(text(&nobody.stderr).contains("no alias to create an authority for"));
    let nothing = truename_ca(&["show"], &folder.path().join("none"));
    assert_eq!(nothing.status.code(), Some(1));
    assert!(text(&nothing.stderr).contains("create one with `truename ca init ALIAS`"));
}

/// OpenSSL's exit code.
fn verify(roots: &Path, certificate: &Path, name: &str) -> i32 {
    let mut openssl = Command::new("openssl");
    openssl.args(["verify", "-x509_strict", "-verify_hostname", name, "-CAfile"]).arg(roots);
    openssl.arg(certificate).output().unwrap().status.code().unwrap()
}

/// What the file of a root is called by.
fn truename_digest(der: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
    digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}
