//! The library face: a program calls aliases without a listener.

use std::{process::Command, sync::Arc, time::Duration};

use crate::support::{
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts,
    service_origin::{ServiceOrigin, streamed},
    trust, within,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, header};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tempfile::TempDir;
use tower::{BoxError, ServiceBuilder, ServiceExt, timeout::error::Elapsed};
use truename::{
    Client, ClientError,
    config::{Alias, Config},
    forward::Body,
};

#[tokio::test]
async fn a_request_to_the_alias_reaches_its_true_name() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let client = client(&scene);

    let response = client.send(get(&format!("http://{ALIAS}/a?b=%7c"))).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(text(response).await, "ok");

    let seen = origins[0].seen();
    assert_eq!(seen.server_names, [Some(TRUE_NAME.to_owned())]);
    let [request] = seen.requests.as_slice() else { panic!("{:?}", seen.requests) };
    assert_eq!(request.start_line(), "GET /a?b=%7c HTTP/1.1");
    assert_eq!(request.field("host"), Some(format!("{TRUE_NAME}:{}", scene.port).as_str()));
}

#[tokio::test]
async fn a_bare_path_is_enough_where_there_is_one_alias() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let client = client(&scene);

    assert_eq!(client.send(get("/a")).await.status(), StatusCode::OK);
    assert_eq!(origins[0].seen().requests[0].start_line(), "GET /a HTTP/1.1");
}

#[tokio::test]
async fn connections_are_used_again() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let client = client(&scene);

    for _ in 0..3 {
        assert_eq!(text(client.send(get("/")).await).await, "ok");
    }
    let seen = origins[0].seen();
    assert_eq!((seen.connections, seen.requests.len()), (1, 3));
}

/// Either body goes on only when the other side has had the last part.
#[tokio::test]
async fn bodies_stream_both_ways() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        let mut scene = Scene::new(1).await;
        let listener = scene.take_listeners().remove(0);
        let _origin =
            ServiceOrigin::start(listener, trust::server(&[TRUE_NAME]), |request| async {
                Response::new(request.into_body().map_err(|_| unreachable!()).boxed())
            });
        let client = client(&scene);

        let (sender, body) = streamed();
        assert!(sender.data("one").await);
        let mut request = Request::post("/").body(body).unwrap();
        *request.version_mut() = version;
        let response = within("the head, before the body's end", client.send(request)).await;
        let mut body = response.into_body();
        for part in ["one", "two", "three"] {
            if part != "one" {
                assert!(sender.data(part).await);
            }
            let frame = within("a part of the body", body.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), part, "{version:?}");
        }
        drop(sender);
        let rest = within("the end", body.collect()).await.unwrap().to_bytes();
        assert!(rest.is_empty(), "{version:?}");
    }
}

#[tokio::test]
async fn a_name_that_is_no_alias_gets_a_response_and_no_connection() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let client = client(&scene);

    let response = client.send(get("http://elsewhere/")).await;
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
    let problem: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
    assert_eq!(problem["stage"], "route");
    assert!(problem["detail"].as_str().unwrap().contains("elsewhere"), "{problem}");
    assert_eq!(origins[0].seen().connections, 0);
}

#[tokio::test]
async fn two_aliases_are_told_apart_by_the_uri() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let (mut config, _folder) = config(&scene);
    let mut other = config.aliases[0].clone();
    other.name = "other".to_owned();
    other.target = Alias::from_arg("other=other.example").unwrap().target;
    config.aliases.push(other);
    let client = Client::new(&config).unwrap();

    assert_eq!(client.send(get(&format!("http://{ALIAS}/"))).await.status(), StatusCode::OK);
    let response = client.send(get("http://other/")).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(text(response).await.contains("other.example"));
    assert_eq!(client.send(get("/")).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(origins[0].seen().requests.len(), 1);
}

#[tokio::test]
async fn a_timeout_layer_gives_the_request_up() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::never_respond);
    let layer = ServiceBuilder::new().timeout(Duration::from_millis(50));
    let service = layer.service(client(&scene));

    let error: BoxError = service.oneshot(get("/")).await.err().unwrap();
    assert!(error.is::<Elapsed>(), "{error}");
    origins[0].until(|seen| seen.ended == seen.connections).await;
}

/// A library caller has no connection that could become the upgraded one.
#[tokio::test]
async fn an_upgrade_is_not_asked_for() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::upgrade_and_echo);
    let client = client(&scene);

    let mut request = get("/");
    request.headers_mut().insert(header::CONNECTION, "upgrade".parse().unwrap());
    request.headers_mut().insert(header::UPGRADE, "websocket".parse().unwrap());
    assert_eq!(client.send(request).await.status(), StatusCode::UPGRADE_REQUIRED);
    assert_eq!(origins[0].seen().requests[0].all("upgrade"), [""; 0]);
}

#[tokio::test]
async fn the_last_clone_takes_idle_connections_along() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let client = client(&scene);
    let clone = client.clone();
    assert_eq!(text(client.send(get("/")).await).await, "ok");

    drop(client);
    assert_eq!(text(clone.send(get("/")).await).await, "ok");
    assert_eq!(origins[0].seen().ended, 0);
    drop(clone);
    origins[0].until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_response_that_is_under_way_outlives_its_client() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (sender, body) = streamed();
    let body = Arc::new(Mutex::new(Some(body)));
    let _origin = ServiceOrigin::start(listener, trust::server(&[TRUE_NAME]), move |_| {
        let body = body.lock().take().unwrap();
        async { Response::new(body) }
    });
    let client = client(&scene);
    let response = client.send(get("/")).await;

    drop(client);
    assert!(sender.data("late").await);
    drop(sender);
    assert_eq!(within("the rest", text(response)).await, "late");
}

#[test]
fn outside_of_a_runtime_there_is_an_error_and_no_panic() {
    let config = Config { aliases: vec![Alias::named(ALIAS)], ..Config::default() };
    let error = Client::new(&config).unwrap_err();
    assert!(matches!(error, ClientError::NoRuntime), "{error}");
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused_with_its_reason() {
    let with = |aliases| Client::new(&Config { aliases, ..Config::default() }).unwrap_err();
    let said = with(Vec::new()).to_string();
    assert!(said.contains("`aliases`"), "{said}");

    let said = with(vec![Alias::named(ALIAS), Alias::named(ALIAS)]).to_string();
    assert!(said.contains("duplicate alias"), "{said}");

    let mut bad = Alias::named(ALIAS);
    bad.tls.ca.files = vec!["/nowhere/root.pem".into()];
    let said = with(vec![bad]).to_string();
    assert!(said.contains("/nowhere/root.pem"), "{said}");
}

#[test]
fn the_example_does_what_it_says() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--locked", "--offline", "--example", "embed"]);
    let output = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("GET /anything: 200 OK"), "{out}");
    assert!(out.contains("\"test\": \"value\""), "{out}");
    assert!(out.contains("GET http://elsewhere/: 404 Not Found"), "{out}");
    assert!(out.contains("GET /stream/3: "), "{out}");
}

fn client(scene: &Scene) -> Client {
    let (config, _folder) = config(scene);
    Client::new(&config).unwrap()
}

/// A configuration, and the folder of its root certificate, which loading it reads.
fn config(scene: &Scene) -> (Config, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("root.pem"), trust::authority().root_pem()).unwrap();
    let yaml = scene.yaml("").replace("$FOLDER", folder.path().to_str().unwrap());
    (Config::parse(&yaml, "the test").unwrap(), folder)
}

fn get(uri: &str) -> Request<String> {
    Request::get(uri).body(String::new()).unwrap()
}

async fn text(response: Response<Body>) -> String {
    let body: Bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}
