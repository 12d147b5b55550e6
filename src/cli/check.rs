//! `truename check`: every problem of a file in one run.

use std::{
    io::{self, Write},
    path::Path,
};

use crate::config::{Config, LoadError};

/// Writes a line for each problem of the file at `path`, or that it has none, and gives the exit code.
///
/// 0: a good file; 1: a bad one; 2: none that can be read.
pub fn run(path: &Path, out: &mut impl Write) -> io::Result<u8> {
    let file = path.display();
    match Config::load(path) {
        Ok(config) => {
            writeln!(out, "{file}: ok, {}", counted(config.aliases.len(), "alias", "aliases"))?;
            Ok(0)
        }
        Err(LoadError::Problems(problems)) => {
            writeln!(out, "{problems}")?;
            writeln!(out, "{file}: {}", counted(problems.list.len(), "problem", "problems"))?;
            Ok(1)
        }
        Err(error @ LoadError::Unreadable { .. }) => {
            writeln!(out, "{error}")?;
            Ok(2)
        }
    }
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

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
    fn a_missing_file_is_bad_usage() {
        let mut out = Vec::new();
        assert_eq!(run(Path::new("/nowhere/truename.yaml"), &mut out).unwrap(), 2);
        let out = String::from_utf8(out).unwrap();
        assert!(out.starts_with("cannot read the configuration /nowhere/truename.yaml: "), "{out}");
        assert!(out.contains("--config FILE"), "{out}");
    }

    #[test]
    fn a_file_beyond_all_measure_is_not_read() {
        let (code, out) = check(&"# much\n".repeat(200_000));
        assert_eq!(code, 2, "{out}");
        assert!(out.contains("at most 1MiB"), "{out}");
    }
}
