//! Which servers are asked, in which order, and from which sockets.

use super::*;

#[tokio::test]
async fn servers_that_fail_each_in_its_way_are_all_named() {
    let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let refuses = serve(|r| vec![r.code(5).octets()], None).await;
    let servers = [silent.local_addr().unwrap(), nobody, refuses];
    let ask = |servers: Vec<SocketAddr>| async move {
        DnsClient::new(&servers).walk(NAME, Place::Alias, Family::V4).await.unwrap_err()
    };
    assert_eq!(
        ask(servers.to_vec()).await.what(),
        format!(
            "{refuses} refused to resolve {NAME} (REFUSED); \
             connection refused by nameserver {nobody}, queried for {NAME}; \
             {} did not respond in time for {NAME}",
            servers[0]
        )
    );
    let also = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = ask(vec![nobody, also]).await;
    let expected =
        format!("connection refused by nameservers {nobody}, {also}, queried for {NAME}");
    assert_eq!(error.what(), expected);
    assert!(!error.is_timeout());
}

#[tokio::test]
async fn each_question_has_an_id_and_a_port_of_its_own() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let client = DnsClient::new(&[socket.local_addr().unwrap()]);
    let mut seen: Vec<(u16, u16)> = Vec::new();
    let mut buffer = [0; 4096];
    for _ in 0..32 {
        let response = async {
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            let reply = Reply::to(&buffer[..length]).good().octets();
            socket.send_to(&reply, peer).await.unwrap();
            (u16::from_be_bytes([buffer[0], buffer[1]]), peer.port())
        };
        let (walked, sent) = tokio::join!(client.walk(NAME, Place::Alias, Family::V4), response);
        walked.unwrap();
        seen.push(sent);
    }
    let different = |of: fn(&(u16, u16)) -> u16| {
        seen.iter().map(of).collect::<std::collections::HashSet<_>>().len()
    };
    // A few may be equal by chance.
    assert!(different(|(id, _)| *id) > 28 && different(|(_, port)| *port) > 16, "{seen:?}");
}

#[tokio::test]
async fn many_names_at_once_take_a_bounded_number_of_sockets() {
    const NAMES: usize = MAX_IN_FLIGHT + 100;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let client = DnsClient::new(&[socket.local_addr().unwrap()]);
    let names: Vec<_> = (0..NAMES).map(|n| format!("n{n}.example")).collect();
    let walks = join_all(names.iter().map(|name| client.walk(name, Place::Alias, Family::V4)));
    let server = async {
        let mut open = std::collections::HashMap::new();
        let mut done = std::collections::HashSet::new();
        let mut most = 0;
        let mut buffer = [0; 4096];
        while done.len() < NAMES {
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            let reply = Reply::to(&buffer[..length]).good();
            if done.contains(&reply.questions[0]) {
                // Sent twice.
                continue;
            }
            open.insert(reply.questions[0].clone(), (peer, reply.octets()));
            most = most.max(open.len());
            // Those within the limit have sent their query, or these are the last ones.
            if open.len() == MAX_IN_FLIGHT || done.len() + open.len() == NAMES {
                for (question, (peer, reply)) in open.drain() {
                    socket.send_to(&reply, peer).await.unwrap();
                    done.insert(question);
                }
            }
        }
        most
    };
    let (walked, most) = tokio::join!(walks, server);
    assert!(walked.iter().all(Result::is_ok) && most == MAX_IN_FLIGHT, "{most}");
}

#[tokio::test]
async fn a_server_that_denies_names_of_another_is_not_asked_first_for_ever() {
    let [cluster, public] = [(); 2].map(|()| DnsServer::start(([127, 0, 0, 1], 0).into()));
    let (cluster, public) = (cluster.await.unwrap(), public.await.unwrap());
    cluster.zone([dns::address(NAME, 5, IP)]);
    cluster.respond(NAME, dns::DnsResponse::ServFail);
    public.respond(NAME, dns::DnsResponse::NxDomain);
    let client = DnsClient::new(&[cluster.address(), public.address()]);
    let walk = || client.walk(NAME, Place::Alias, Family::V4);
    assert!(walk().await.is_err_and(|error| error.is_denial()));
    cluster.restore(NAME);
    let asked = cluster.queries(NAME, dns::RecordType::A);
    assert!(walk().await.is_err_and(|error| error.is_denial()));
    assert_eq!(cluster.queries(NAME, dns::RecordType::A), asked, "it may be down");

    client.preferred.lock().since -= RETURN;
    assert_eq!(walk().await.unwrap().addresses(), [IpAddr::from(IP)]);
    // A denial that was already on its way.
    client.responded(1, 1);
    assert_eq!(walk().await.unwrap().addresses(), [IpAddr::from(IP)]);
}

/// Regression: with five servers or more, each timed out before the try without EDNS.
#[tokio::test]
async fn each_of_many_servers_is_asked_without_edns_where_that_is_dropped() {
    let udp = |r: Reply| if r.knows_edns { Vec::new() } else { vec![r.good().octets()] };
    let server = serve(udp, None).await;
    for count in [4, 5, 7, 20] {
        let client = DnsClient::new(&vec![server; count]);
        let chain = client.walk(NAME, Place::Alias, Family::V4).await;
        assert!(chain.is_ok(), "{count}: {chain:?}");
    }
}
