//! The end of a session, among whatever else a client sends.

use super::*;

/// COM_QUIT as it is, and as it is compressed.
const QUITS: [(bool, &[u8]); 2] =
    [(false, &[1, 0, 0, 0, 1]), (true, &[5, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1])];

/// A packet of a client whose session has begun. What is in a compressed one does not matter.
fn sent(compressed: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = write(0, payload).to_vec();
    if compressed {
        bytes.splice(4..4, [0; 3]);
    }
    bytes
}

fn follow(compressed: bool, bytes: &[u8], length: usize) -> bool {
    let mut packets = ClientPackets::new(compressed);
    bytes.chunks(length).for_each(|piece| packets.pass(piece));
    packets.has_quit()
}

#[test]
fn a_session_is_ended_by_the_whole_packet_in_any_pieces() {
    for (compressed, quit) in QUITS {
        let before = sent(compressed, b"\x03select 1");
        for length in 1..20 {
            assert!(follow(compressed, quit, length));
            assert!(follow(compressed, &[&before, quit].concat(), length));
        }
        for cut in 0..quit.len() {
            assert!(!follow(compressed, &quit[..cut], 100));
        }
        assert!(!follow(compressed, &[quit, &[1]].concat(), 100), "something follows");
    }
}

#[test]
fn what_looks_the_same_within_other_packets_ends_nothing() {
    for (compressed, quit) in QUITS {
        for payload in [
            &[&b"\x03insert "[..], quit].concat()[..],
            quit,
            b"\x0e",
            b"",
            b"\x01\x01",
            &[1; 70_000],
            &[0; 5],
        ] {
            let is_quit = compressed && payload == QUITS[0].1;
            for length in [1, 3, 8, usize::MAX] {
                let bytes = sent(compressed, payload);
                assert_eq!(follow(compressed, &bytes, length), is_quit, "{payload:?}");
            }
        }
    }
    // The rest of a statement of 16 MiB, and a file of LOCAL INFILE, have other numbers.
    assert!(!follow(false, &[1, 0, 0, 1, 1], 5));
    // A packet whose content is compressed has another one in it.
    assert!(!follow(true, &[5, 0, 0, 0, 60, 0, 0, 1, 0, 0, 0, 1], 5));
}

#[test]
fn packets_are_compressed_if_both_sides_can_do_it() {
    const COMPRESS: u32 = 1 << 5;
    const ZSTD: u32 = 1 << 26;
    for (server, client, compressed) in [
        (0, COMPRESS, false),
        (COMPRESS, 0, false),
        (COMPRESS, ZSTD, false),
        (COMPRESS | ZSTD, COMPRESS, true),
        (COMPRESS | ZSTD, ZSTD, true),
    ] {
        let mut greeting = greeting(NATIVE, true);
        // The lower and the upper half of the capabilities.
        let at = 4 + 7 + 4 + 8 + 1;
        greeting[at] = greeting[at] & !(COMPRESS as u8) | (server & COMPRESS) as u8;
        let high = &mut greeting[at + 6];
        *high = *high & !((ZSTD >> 24) as u8) | (server & ZSTD).to_le_bytes()[3];
        let mut run = Run::plain();
        run.target(&greeting);
        run.client(&write(1, &response(CLIENT | client, NATIVE, &[7; 20])));
        let mut packets = run.start.client_packets();
        packets.pass(QUITS[usize::from(compressed)].1);
        assert!(packets.has_quit(), "{server} {client}");
    }
}
