//! SMTP, IMAP and POP3 before TLS.

use super::*;

#[track_caller]
fn fails(protocol: StartTls, turns: &[&str], error: &StartTlsError) {
    let turns: Vec<_> = turns.iter().map(|turn| turn.as_bytes()).collect();
    assert_eq!(run(protocol, &turns, &[]).result.as_ref(), Err(error), "{turns:?}");
    assert_eq!(run(protocol, &turns, &[1]).result.as_ref(), Err(error), "{turns:?}");
}

fn unwilling(response: &str) -> StartTlsError {
    StartTlsError::Unwilling { response: response.into() }
}

fn refused(request: &'static str, response: &str) -> StartTlsError {
    StartTlsError::Refused { request, response: response.into() }
}

fn unexpected(found: &str) -> StartTlsError {
    StartTlsError::Unexpected { found: found.into() }
}

#[test]
fn an_smtp_server_may_refuse_at_each_step() {
    fails(StartTls::Smtp, &["421 4.3.2 busy\r\n"], &unwilling("421 4.3.2 busy"));
    fails(StartTls::Smtp, &["554-no\r\n554 service\r\n"], &unwilling("554-no"));
    let old = ["220 hi\r\n", "502 what?\r\n"];
    fails(StartTls::Smtp, &old, &refused("EHLO", "502 what?"));
    let without = ["220 hi\r\n", "250 hi\r\n", "454 4.7.0 TLS not available\r\n"];
    fails(StartTls::Smtp, &without, &refused("STARTTLS", "454 4.7.0 TLS not available"));
}

#[test]
fn an_smtp_reply_has_a_code_and_a_line_that_is_the_last() {
    let fine = [&b"220\n"[..], b"250-x\n250\n", b"220-wait\r\n220 go\n"];
    let run = run(StartTls::Smtp, &fine, &[]);
    assert_eq!(run.result.as_deref(), Ok(&b"220\r\n"[..]));
    for line in ["22 hi", "2200", "220_hi", "hello", "", "\u{16}\u{3}\u{1}", "* OK", "+OK"] {
        let found = line.replace(|c: char| !matches!(c, ' '..='~'), "?");
        fails(StartTls::Smtp, &[&format!("{line}\r\n")], &unexpected(&found));
    }
}

#[test]
fn an_address_of_ipv6_is_called_so() {
    for (local, hello) in
        [("2001:db8::7", "EHLO [IPv6:2001:db8::7]\r\n"), ("::ffff:10.1.2.3", "EHLO [10.1.2.3]\r\n")]
    {
        let mut opening = Opening::new(StartTls::Smtp);
        opening.made_from(local.parse().unwrap());
        let sent = opening.next(&mut BytesMut::from("220 hi\r\n"));
        assert_eq!(sent, Ok(Step::Send(Bytes::from_static(hello.as_bytes()))));
    }
}

#[test]
fn a_server_that_does_not_wait_for_its_turn_is_refused() {
    for (protocol, early) in
        [(StartTls::Smtp, "220 hi\r\n250 hi\r\n220 go\r\n"), (StartTls::Pop3, "+OK\r\n+OK\r\n")]
    {
        let run = run(protocol, &[early.as_bytes()], &[]);
        assert_eq!(run.result, Err(StartTlsError::OutOfTurn));
    }
}

#[test]
fn a_line_that_clients_may_see_two_in_is_refused() {
    for (protocol, greeting) in [
        (StartTls::Smtp, "220 hi\r250 x\r\n"),
        (StartTls::Smtp, "220 hi\0\r\n"),
        (StartTls::Pop3, "+OK hi\r\r\n"),
        (StartTls::Imap, "* OK hi\r* OK\r\n"),
    ] {
        let found = greeting.trim_end_matches('\n').strip_suffix('\r').unwrap();
        fails(protocol, &[greeting], &unexpected(&found.replace(['\r', '\0'], "?")));
    }
}

#[test]
fn an_imap_server_may_refuse_or_have_logged_in() {
    fails(StartTls::Imap, &["* BYE full\r\n"], &unwilling("* BYE full"));
    fails(StartTls::Imap, &["* PREAUTH hello you\r\n"], &StartTlsError::Preauthenticated);
    fails(StartTls::Imap, &["* preauth\r\n"], &StartTlsError::Preauthenticated);
    for answer in ["truename NO not now", "truename BAD what?"] {
        let turns = ["* OK\r\n", &format!("* OK hm\r\n{answer}\r\n")];
        fails(StartTls::Imap, &turns, &refused("STARTTLS", answer));
    }
    fails(StartTls::Imap, &["* OK\r\n", "* BYE sorry\r\n"], &unwilling("* BYE sorry"));
    for odd in ["a OK", "+ go on", "truename", "OK", "truename MAYBE x"] {
        fails(StartTls::Imap, &["* OK\r\n", &format!("{odd}\r\n")], &unexpected(odd));
    }
    for greeting in ["220 mail", "+OK", "* CAPABILITY X", "*"] {
        fails(StartTls::Imap, &[&format!("{greeting}\r\n")], &unexpected(greeting));
    }
}

#[test]
fn an_imap_server_may_say_more_at_any_time() {
    let turns = [&b"* ok hi\n* OK [ALERT] down at noon\r\n"[..], b"* OK\r\ntruename ok\r\n"];
    assert_eq!(
        run(StartTls::Imap, &turns, &[]).result.as_deref(),
        Ok(&b"* OK IMAP4 ready\r\n"[..])
    );
}

#[test]
fn a_pop3_server_may_refuse_at_each_step() {
    let busy = "-ERR [SYS/TEMP] busy";
    fails(StartTls::Pop3, &[&format!("{busy}\r\n")], &unwilling(busy));
    let without = "-ERR unknown command";
    fails(StartTls::Pop3, &["+OK\r\n", &format!("{without}\r\n")], &refused("STLS", without));
    for odd in ["+OKAY", "220 mail", "* OK", ""] {
        fails(StartTls::Pop3, &[&format!("{odd}\r\n")], &unexpected(odd));
    }
}

#[test]
fn what_a_server_says_is_quoted_on_one_line_and_not_at_length() {
    let line = format!("554 \u{1b}[31m{}\r\n", "x".repeat(500));
    let Err(StartTlsError::Unwilling { response }) =
        run(StartTls::Smtp, &[line.as_bytes()], &[]).result
    else {
        panic!()
    };
    assert!(response.starts_with("554 ?[31mxxx") && response.ends_with("x..."), "{response}");
    assert!(response.len() < 210);
}
