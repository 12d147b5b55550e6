use super::*;

fn entry(last: u8, names: &[&str]) -> Entry {
    let names = names.iter().map(|&name| name.to_owned()).collect();
    Entry { address: [127, 0, 1, last].into(), names }
}

#[test]
fn the_aliases_come_first_and_nothing_else_has_their_names() {
    let machines = "\
        127.0.0.1\tlocalhost # not 10.0.0.7 DB\n\
        # db\n\
        10.0.0.7 old.example DB old # moved\n\
        10.0.0.8 db.default\n\
        \n\
        ::1 ip6-localhost";
    let entries = [entry(1, &["db", "db.default"]), entry(2, &["broker"])];
    assert_eq!(
        text(machines, &entries),
        "127.0.1.1 db db.default\n\
         127.0.1.2 broker\n\
         127.0.0.1\tlocalhost # not 10.0.0.7 DB\n\
         # db\n\
         10.0.0.7 old.example old # moved\n\
         \n\
         ::1 ip6-localhost\n"
    );
}
