//! Calls an alias from a Rust program, without a proxy process: `cargo run --example embed`.
//!
//! Works offline, against the demo's world: the cluster's DNS says that `webscaler-manual` is
//! `httpbin.org`, whose four servers have a certificate for that name only.

use std::{error::Error, time::Duration};

use http::Request;
use http_body_util::BodyExt;
use tower::{ServiceBuilder, ServiceExt};
use truename::{
    Client,
    demo::world::{ALIAS, World},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // In your own program: `Config::load("truename.yaml")`, or a `Config` built in code.
    let world = World::start()?;
    let client = Client::new(&world.config())?;

    // The client is a tower service: a deadline and a limit are ordinary layers around it.
    let service = ServiceBuilder::new()
        .concurrency_limit(8)
        .timeout(Duration::from_secs(10))
        .service(client.clone());

    let request = Request::get(format!("http://{ALIAS}/anything?test=value"));
    let response = service.oneshot(request.body(String::new())?).await?;
    println!("GET /anything: {}", response.status());
    println!("{}", String::from_utf8_lossy(&response.into_body().collect().await?.to_bytes()));

    // An error is a response too, and says how to fix it.
    let request = Request::get("http://elsewhere/").body(String::new())?;
    let response = client.send(request).await;
    println!("GET http://elsewhere/: {}", response.status());

    // Bodies stream: each line is here as soon as the origin has sent it.
    let mut body = client.send(Request::get("/stream/3").body(String::new())?).await.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            println!("GET /stream/3: {} bytes", data.len());
        }
    }
    Ok(())
}
