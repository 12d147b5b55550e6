//! The examples are used as they stand: their files pass, and the pod's proxy runs as its manifest
//! says.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use crate::support::{
    loopback,
    proxy::{Proxy, Setup},
    within,
};
use serde_json::{Value, json};
use truename::config::{Config, duration};

const POD: &str = "examples/pod/pod.yaml";
/// What the application calls.
const ALIAS: &str = "webscaler-manual";

#[test]
fn every_configuration_passes_check() {
    let mut checked = 0;
    for file in files(&root().join("examples")) {
        if !file.ends_with("truename.yaml") {
            continue;
        }
        passes_check(&file);
        checked += 1;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in config_maps() {
        let file = folder.path().join(name);
        fs::write(&file, text).unwrap();
        passes_check(&file);
        checked += 1;
    }
    assert!(checked >= 4, "only {checked} were found");
}

#[test]
fn the_service_is_the_alias() {
    let service = manifest("Service");
    assert_eq!(service["metadata"]["name"], ALIAS);
    assert_eq!(service["spec"]["type"], "ExternalName");
    let config = pod_configuration();
    assert_eq!(config.aliases[0].name, ALIAS);
    assert!(config.aliases[0].allow[0].matches(service["spec"]["externalName"].as_str().unwrap()));
}

#[test]
fn the_sidecar_is_native_and_asks_for_no_privilege() {
    let pod = manifest("Pod");
    let sidecar = sidecar(&pod);
    assert_eq!(sidecar["restartPolicy"], "Always");
    for container in [sidecar, application(&pod)] {
        let security = &container["securityContext"];
        assert_eq!(security["runAsNonRoot"], true, "{container}");
        assert_eq!(security["allowPrivilegeEscalation"], false, "{container}");
        assert_eq!(security["readOnlyRootFilesystem"], true, "{container}");
        assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}), "{container}");
        assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault", "{container}");
    }
    // Whoever runs as the same user may read the authority's key.
    let user = |container: &Value| container["securityContext"]["runAsUser"].as_u64().unwrap();
    assert_ne!(user(sidecar), user(application(&pod)));
    assert!(pod["spec"].get("hostNetwork").is_none(), "the sysctl would be the node's");
}

#[test]
fn the_alias_unchanged_reaches_the_sidecar_on_ports_80_and_443() {
    let pod = manifest("Pod");
    let sysctl = json!([{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]);
    assert_eq!(pod["spec"]["securityContext"]["sysctls"], sysctl);

    let host_alias = &pod["spec"]["hostAliases"][0];
    let address: IpAddr = host_alias["ip"].as_str().unwrap().parse().unwrap();
    assert!(host_alias["hostnames"].as_array().unwrap().contains(&json!(ALIAS)));
    let listeners = [80, 443].map(|port| SocketAddr::new(address, port));
    assert_eq!(pod_configuration().aliases[0].listen, listeners);
}

#[test]
fn probes_ask_for_paths_that_the_sidecar_serves_and_give_it_the_time() {
    let pod = manifest("Pod");
    let sidecar = sidecar(&pod);
    let config = pod_configuration();
    let admin = config.admin.listen.unwrap();
    assert!(admin.ip().is_unspecified(), "the kubelet could not ask {admin}");
    assert_eq!(sidecar["ports"][0]["name"], "admin");
    assert_eq!(sidecar["ports"][0]["containerPort"], admin.port());
    for (probe, path) in [("readinessProbe", "/readyz"), ("livenessProbe", "/livez")] {
        assert_eq!(sidecar[probe]["httpGet"], json!({"path": path, "port": "admin"}));
    }

    let startup = &sidecar["startupProbe"];
    assert_eq!(startup["exec"]["command"], json!(["truename", "wait"]));
    // The kubelet ends a probe after one second, unless told otherwise.
    let limit = duration("30s").unwrap().as_secs();
    assert!(startup["timeoutSeconds"].as_u64().unwrap() > limit, "{startup}");

    let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(config.shutdown_grace.as_secs() < grace, "the drain would be cut off");
}

/// In the place of the kubelet: with the manifest's arguments, variables and mounts.
#[tokio::test]
async fn the_sidecar_starts_and_its_application_finds_the_roots() {
    let pod = manifest("Pod");
    let (sidecar, application) = (sidecar(&pod), application(&pod));
    let config = pod_configuration();
    let authority = mount_of(sidecar, "truename-ca");
    // In the volume and not the volume itself, which everybody may write to.
    assert_eq!(config.ca.directory.unwrap().parent(), Some(Path::new(authority)));

    // The file is where the variable says, in the mount of the ConfigMap.
    let file = variable(sidecar, "TRUENAME_CONFIG");
    let (name, text) = config_maps().remove(0);
    assert_eq!(file, format!("{}/{name}", mount_of(sidecar, "truename-config")));
    let volume = |name: &str| {
        let volumes = pod["spec"]["volumes"].as_array().unwrap();
        volumes.iter().find(|volume| volume["name"] == name).unwrap().clone()
    };
    assert_eq!(
        volume("truename-config")["configMap"]["name"],
        manifest("ConfigMap")["metadata"]["name"]
    );
    assert!(volume("truename-ca")["emptyDir"].is_object());
    assert_eq!(sidecar["args"], json!(["run"]));

    // Ports that are free here; all else is as it stands.
    let text = text
        .replace("127.0.0.1:80", "127.0.0.1:0")
        .replace("\"127.0.0.1:443\"", "\"[::1]:0\"")
        .replace("0.0.0.0:9990", &format!("{}:9990", loopback::address()))
        .replace(authority, "$FOLDER/authority");
    let proxy = Setup::new(&text).shell("mkdir -m 777 authority; ").spawn();
    let here = proxy.folder().join("truename.yaml");
    let probe: Vec<&str> = strings(&sidecar["startupProbe"]["exec"]["command"]);
    let mut command = truename(&probe[1..]);
    command.env("TRUENAME_CONFIG", here);
    let probed = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = within("the start-up probe", probed).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    for name in ["SSL_CERT_FILE", "CURL_CA_BUNDLE"] {
        let seen = variable(application, name);
        let mount = mount_of(application, "truename-ca");
        let file = Path::new(seen).strip_prefix(mount).unwrap();
        let roots = fs::read_to_string(proxy.folder().join("authority").join(file)).unwrap();
        assert!(roots.matches("BEGIN CERTIFICATE").count() > 20, "{seen} lacks the public roots");
        assert!(roots.contains(&local_root(&proxy)), "{seen} lacks the local root");
    }
    // Another user may read them, and no key.
    let mode = |file: &Path| fs::metadata(file).unwrap().permissions().mode() & 0o777;
    let folder = proxy.folder().join("authority/ca");
    assert_eq!((mode(&folder), mode(&folder.join("bundle.pem"))), (0o755, 0o644));
    let keys = files(&folder).into_iter().filter(|file| file.to_str().unwrap().contains(".key."));
    assert_eq!(keys.map(|key| mode(&key)).collect::<Vec<_>>(), [0o600]);
    assert!(!proxy.log().contains("the existing certificates are not used"));
}

#[test]
fn every_link_leads_somewhere() {
    let mut followed = 0;
    for page in files(&root().join("examples")) {
        if page.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = page.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(file.exists(), "{} links to {link}", page.display());
            followed += 1;
        }
    }
    assert!(followed >= 4, "only {followed} were found");
}

fn local_root(proxy: &Proxy) -> String {
    fs::read_to_string(proxy.folder().join("authority/ca/ca.pem")).unwrap().trim().to_owned()
}

#[track_caller]
fn passes_check(file: &Path) {
    let output = truename(&["check", "--config", file.to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains(": ok, "), "{}", said(&output));
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The binary, without what the developer's shell says to it.
fn truename(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TRUENAME_") {
            command.env_remove(&name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn pod_configuration() -> Config {
    let (name, text) = config_maps().remove(0);
    Config::parse(&text, &name).unwrap()
}

/// The files of every ConfigMap: their names and what is in them.
fn config_maps() -> Vec<(String, String)> {
    let data = manifest("ConfigMap")["data"].clone();
    let entries = data.as_object().unwrap().iter();
    entries.map(|(name, text)| (name.clone(), text.as_str().unwrap().to_owned())).collect()
}

/// The one manifest of this kind.
fn manifest(kind: &str) -> Value {
    let text = fs::read_to_string(root().join(POD)).unwrap();
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let mut of_kind = documents.into_iter().filter(|document| document["kind"] == kind);
    let found = of_kind.next().unwrap();
    assert!(of_kind.next().is_none(), "a second {kind}");
    found
}

fn sidecar(pod: &Value) -> &Value {
    let sidecar = &pod["spec"]["initContainers"][0];
    assert_eq!(sidecar["name"], "truename");
    sidecar
}

fn application(pod: &Value) -> &Value {
    &pod["spec"]["containers"][0]
}

fn mount_of<'a>(container: &'a Value, volume: &str) -> &'a str {
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mount = mounts.iter().find(|mount| mount["name"] == volume).unwrap();
    mount["mountPath"].as_str().unwrap()
}

fn variable<'a>(container: &'a Value, name: &str) -> &'a str {
    let variables = container["env"].as_array().unwrap();
    let variable = variables.iter().find(|variable| variable["name"] == name).unwrap();
    variable["value"].as_str().unwrap()
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
