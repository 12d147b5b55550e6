//! `truename check`: reports all problems of a file at once.

use std::{
    io::{self, Write},
    path::Path,
};

use crate::{
    config::{Alias, Config, Document},
    tls::{
        ClientTls, RootStores, TlsConfigError, TlsFault,
        source::{Source, SourceError},
    },
};

/// Writes a line for each problem of the file at `path`, or that it has none, and returns the exit code.
///
/// 0: a valid file; 1: an invalid file; 2: an unreadable file.
pub fn run(path: &Path, out: &mut impl Write) -> io::Result<u8> {
    let file = path.display();
    let mut document = match Config::read(path) {
        Ok(text) => Document::parse(&text, &path.to_string_lossy()),
        Err(error) => {
            writeln!(out, "{error}")?;
            return Ok(2);
        }
    };
    if document.config().is_some_and(|config| config.aliases.is_empty()) {
        document.report("aliases", "no alias to serve; add one, as in `- name: webscaler-manual`");
    }
    load(&mut document);
    match document.finish() {
        Ok(config) => {
            writeln!(out, "{file}: ok, {}", counted(config.aliases.len(), "alias", "aliases"))?;
            Ok(0)
        }
        Err(problems) => {
            writeln!(out, "{problems}")?;
            writeln!(out, "{file}: {}", counted(problems.list.len(), "problem", "problems"))?;
            Ok(1)
        }
    }
}

/// Loads the certificates, keys and lists that a configuration names, as the proxy does when it starts.
/// Reports errors at the keys that name the files.
pub(super) fn load(document: &mut Document) {
    let Some(config) = document.config() else { return };
    let mut problems = Vec::new();
    let mut roots = RootStores::default();
    for (index, alias) in config.aliases.iter().enumerate() {
        if let Err(errors) = ClientTls::load(&alias.tls, &mut roots) {
            for error in errors.iter().filter(|error| !is_known(error)) {
                let path = format!("aliases[{index}].{}", key(alias, error));
                problems.push((path, error.what.to_string()));
            }
        }
    }
    problems.extend(listener_certificate(config));
    for (path, what) in problems {
        document.report(&path, &what);
    }
}

/// Whether validation reports the error already, as for files that cannot be opened and for missing roots.
fn is_known(error: &TlsConfigError) -> bool {
    match &error.what {
        TlsFault::Read { source, .. } => !source.is_size(),
        TlsFault::NoRoots => error.file.is_none(),
        _ => false,
    }
}

/// The key of an alias, with the index of the file if the key is a list.
fn key(alias: &Alias, error: &TlsConfigError) -> String {
    let files = match error.key {
        "tls.ca.files" => &alias.tls.ca.files,
        "tls.crls" => &alias.tls.crls,
        key => return key.to_owned(),
    };
    let index = files.iter().position(|file| Some(file) == error.file.as_ref());
    index.map_or_else(|| error.key.to_owned(), |index| format!("{}[{index}]", error.key))
}

fn listener_certificate(config: &Config) -> Option<(String, String)> {
    let tls = &config.listener.tls;
    let (certificate, key) = tls.certificate.clone().zip(tls.key.clone())?;
    match Source::files(&certificate, &key).certificates() {
        Err(SourceError::Files(error)) if is_known(&error) => None,
        Err(SourceError::Files(error)) => Some((error.key.to_owned(), error.what.to_string())),
        Err(error) => Some(("listener.tls.key".to_owned(), error.to_string())),
        Ok(_) => None,
    }
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::demo::authority::{Authority, LeafOptions};

    fn check(text: &str) -> (u8, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("truename.yaml");
        fs::write(&path, text).unwrap();
        let mut out = Vec::new();
        let code = run(&path, &mut out).unwrap();
        let folder = format!("{}/", folder.path().display());
        (code, String::from_utf8(out).unwrap().replace(&folder, ""))
    }

    #[test]
    fn a_good_file_is_ok() {
        let (code, out) = check("version: 1\naliases:\n  - name: a\n  - name: b\n");
        assert_eq!((code, out.as_str()), (0, "truename.yaml: ok, 2 aliases\n"));
    }

    #[test]
    fn every_problem_has_a_line_of_its_own() {
        let (code, out) = check("version: 1\naliases:\n  - name: a\n    lisen: []\n    port: 0\n");
        let expected = "truename.yaml:4:5: unknown key `lisen`; did you mean `listen`?\n\
             truename.yaml:5:11: aliases[0].port: `0` is not a whole number from 1 to 65535\n\
             truename.yaml: 2 problems\n";
        assert_eq!((code, out.as_str()), (1, expected));
    }

    #[test]
    fn a_file_without_an_alias_has_nothing_to_serve() {
        let (code, out) = check("version: 1\nworkers: 2\naliases: []\n");
        assert_eq!(code, 1);
        assert!(out.starts_with("truename.yaml:3:10: aliases: no alias to serve; "), "{out}");
        let (_, out) = check("version: 1\n");
        assert!(out.starts_with("truename.yaml:1:1: aliases: no alias to serve; "), "{out}");
        // A problem is not reported twice.
        let (_, out) = check("version: 1\naliases: nothing\n");
        assert_eq!(out.lines().count(), 2, "{out}");
    }

    #[test]
    fn certificates_keys_and_lists_that_cannot_be_used_are_told_at_their_keys() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("Root").unwrap();
        let [one, two] = ["one", "two"]
            .map(|name| authority.issue(&[name], &[], LeafOptions::default()).unwrap());
        for (name, text) in [
            ("root.pem", authority.root_pem()),
            ("one.pem", &one.chain_pem),
            ("one.key", &one.key_pem),
            ("two.key", &two.key_pem),
            ("garbage", "garbage"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let huge = fs::File::create(folder.path().join("huge")).unwrap();
        huge.set_len(1 << 40).unwrap();
        let path = folder.path().join("truename.yaml");
        let text = "\
version: 1
aliases:
  - name: a
    lisen: [1]
    tls:
      ca:
        files: [root.pem, garbage, missing, pipe, huge]
      crls: [garbage, /dev/zero]
      client_certificate: {cert: one.pem, key: two.key}
  - name: b
    listen: [8081]
    tls: {client_certificate: {cert: garbage, key: one.key}}
  - name: c
    listen: [8082]
    tls: {client_certificate: {cert: one.pem, key: garbage}}
listener: {tls: {certificate: one.pem, key: two.key}}
";
        fs::write(&path, text).unwrap();
        let mut out = Vec::new();
        assert_eq!(run(&path, &mut out).unwrap(), 1);
        let out = String::from_utf8(out).unwrap();
        let expected = [
            ":4:5: unknown key `lisen`",
            ":7:27: aliases[0].tls.ca.files[1]: ",
            ":7:36: aliases[0].tls.ca.files[2]: cannot read",
            ":7:45: aliases[0].tls.ca.files[3]: cannot read",
            ":7:51: aliases[0].tls.ca.files[4]: cannot read",
            ":8:14: aliases[0].tls.crls[0]: ",
            ":8:23: aliases[0].tls.crls[1]: cannot read",
            ":9:27: aliases[0].tls.client_certificate: the key in ",
            ":12:38: aliases[1].tls.client_certificate.cert: ",
            ":15:52: aliases[2].tls.client_certificate.key: ",
            ":16:45: listener.tls.key: ",
            ": 11 problems",
        ];
        assert_eq!(out.lines().count(), expected.len(), "{out}");
        for (line, part) in out.lines().zip(expected) {
            let line = line.strip_prefix(&path.display().to_string()).unwrap();
            assert!(line.starts_with(part), "{line}\n{part}");
        }
    }

    #[test]
    fn a_missing_file_is_bad_usage() {
        let mut out = Vec::new();
        assert_eq!(run(Path::new("/nowhere/truename.yaml"), &mut out).unwrap(), 2);
        let out = String::from_utf8(out).unwrap();
        assert!(out.starts_with("cannot read the configuration /nowhere/truename.yaml: "), "{out}");
        assert!(out.contains("--config FILE"), "{out}");
    }

    #[test]
    fn a_file_beyond_all_measure_is_not_read() {
        let (code, out) = check(&"# much\n".repeat(600_000));
        assert_eq!(code, 2, "{out}");
        assert!(out.contains("it is larger than 4MiB"), "{out}");
    }
}
