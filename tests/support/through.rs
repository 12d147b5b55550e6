//! The shortest scene: one origin, the proxy before it, and requests through both.

use std::net::SocketAddr;

use super::{
    client,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
};

/// A scripted origin with a proxy before it.
pub struct Through {
    /// The proxy.
    pub proxy: Proxy,
    /// Where the alias listens.
    pub address: SocketAddr,
    /// What the alias leads to.
    pub origin: RawOrigin,
    /// DNS, and the origin's port.
    pub scene: Scene,
}

impl Through {
    /// `keys` are further lines of the alias.
    pub async fn new<Script, Run>(keys: &str, script: Script) -> Self
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let origin = scene.script(script).remove(0);
        let proxy = Proxy::start(&scene.yaml(keys)).await;
        let address = proxy.address(ALIAS).await;
        Self { proxy, address, origin, scene }
    }

    /// A connection to the alias.
    pub async fn connect(&self) -> Peer {
        client::connect(self.address).await
    }

    /// Sends a request, on a connection of its own, without a body before its response.
    pub async fn exchange(&self, request: &str) -> Message {
        self.exchanges(request).await.pop().unwrap()
    }

    /// The same with all that comes ahead of the response.
    pub async fn exchanges(&self, request: &str) -> Vec<Message> {
        let mut peer = self.connect().await;
        peer.send(request).await;
        let mut responses = Vec::new();
        loop {
            let response = peer.response_to(request.split(' ').next().unwrap()).await;
            let last = response.status() == 101 || response.status() >= 200;
            responses.push(response);
            if last {
                return responses;
            }
        }
    }

    /// Sends a request that the origin responds to, and returns it as the origin read it.
    pub async fn sent(&self, request: &str) -> Message {
        let response = self.exchange(request).await;
        assert!(response.status() < 400, "{}\n{}", response.head, response.text());
        self.last_request()
    }

    /// The last request that the origin read.
    pub fn last_request(&self) -> Message {
        self.origin.seen().requests.pop().expect("a request that reached the origin")
    }

    /// The true name as a Host at the origin's port, which is not the scheme's.
    pub fn true_host(&self) -> String {
        format!("{TRUE_NAME}:{}", self.scene.port)
    }
}
