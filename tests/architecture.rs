//! What ARCHITECTURE.md says of who may know whom is what the sources do.
//!
//! The tables stand in the document, for people; this reads them there, so that neither can change
//! without the other.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

type Names = BTreeSet<String>;

#[test]
fn every_module_imports_exactly_what_its_row_says() {
    let stated = table("module");
    let found = imports();
    let modules: Names = found.keys().cloned().collect();
    assert_eq!(stated.keys().cloned().collect::<Names>(), modules, "rows, against src/");
    for (module, imported) in &found {
        assert_eq!(&stated[module], imported, "row of `{module}`, against its sources");
    }
}

#[test]
fn no_module_imports_itself_by_a_detour() {
    let imports = imports();
    for module in imports.keys() {
        let detour = path(&imports, module, module, &mut Names::new());
        assert_eq!(detour, None, "a cycle of imports");
    }
}

/// Rows of the table can change; these may not.
#[test]
fn what_the_design_rests_on_is_not_imported() {
    let imports = imports();
    for (module, never) in [
        ("resolve", &["tls", "connect", "upstream"][..]),
        ("pool", &["balance", "upstream"]),
        ("balance", &["resolve", "pool", "connect", "tls"]),
        ("tls", &["connect", "pool", "upstream"]),
        ("config", &["cli", "app"]),
        ("forward", &["pool", "balance", "listener", "app"]),
        ("admin", &["app"]),
        ("client", &["app", "listener", "serve"]),
    ] {
        for other in never {
            let reason = path(&imports, module, other, &mut Names::new()).filter(|path| {
                // What it reaches through others is their business; `resolve` alone must not
                // learn of TLS by any way.
                path.len() == 2 || module == "resolve"
            });
            assert_eq!(reason, None, "`{module}` must not know `{other}`");
        }
    }
}

#[test]
fn only_the_modules_of_its_row_name_a_crate() {
    let stated = table("crates");
    assert!(!stated.is_empty());
    let sources = sources();
    for (crates, modules) in &stated {
        let naming = |source: &&Source| {
            crates.split_whitespace().any(|name| names_crate(&source.code, name))
        };
        let found: Names = sources.iter().filter(naming).map(|s| s.module.clone()).collect();
        assert_eq!(modules, &found, "row of `{crates}`, against the sources");
    }
    for (crates, module) in [("hickory", "forward"), ("rustls", "forward"), ("rustls", "resolve")] {
        let mut rows = stated.iter().filter(|(row, _)| row.contains(crates)).peekable();
        assert!(rows.peek().is_some(), "a row for {crates}");
        assert!(rows.all(|(_, modules)| !modules.contains(module)), "{module} names {crates}");
    }
}

#[test]
fn every_file_of_the_document_exists() {
    let document = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let mut seen = 0;
    for word in document.split('`').skip(1).step_by(2) {
        let folders = ["src/", "tests/", "examples/", "docs/", "benches/", "bench/"];
        let is_path = folders.iter().any(|folder| word.starts_with(folder));
        if is_path && !word.contains(['*', '<', ' ']) {
            assert!(root().join(word).exists(), "ARCHITECTURE.md names {word}");
            seen += 1;
        }
    }
    assert!(seen > 10, "only {seen} paths were found");
}

/// The imports of each module, from the sources.
fn imports() -> BTreeMap<String, Names> {
    let sources = sources();
    let modules: Names = sources.iter().map(|source| source.module.clone()).collect();
    let mut imports: BTreeMap<String, Names> = BTreeMap::new();
    for source in &sources {
        let imported = imports.entry(source.module.clone()).or_default();
        for name in crate_paths(&source.code) {
            let file = source.path.display();
            assert!(modules.contains(&name), "{file}: `crate::{name}` is no module");
            if name != source.module {
                imported.insert(name);
            }
        }
    }
    // The crate's two roots import whatever they like: that is all they do.
    imports.retain(|module, _| module != "lib" && module != "main");
    imports
}

/// How `from` comes to know `to`, if it does.
fn path(
    imports: &BTreeMap<String, Names>,
    from: &str,
    to: &str,
    seen: &mut Names,
) -> Option<Vec<String>> {
    for next in imports.get(from)? {
        if next == to {
            return Some(vec![from.to_owned(), to.to_owned()]);
        }
        if seen.insert(next.clone())
            && let Some(mut rest) = path(imports, next, to, seen)
        {
            rest.insert(0, from.to_owned());
            return Some(rest);
        }
    }
    None
}

/// The rows of the table in ARCHITECTURE.md whose first column is headed `head`: names in code
/// font, the first cell's against the second's.
fn table(head: &str) -> BTreeMap<String, Names> {
    let document = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let start = format!("| {head} |");
    let lines = document.lines().skip_while(|line| !line.starts_with(&start)).skip(2);
    let mut rows = BTreeMap::new();
    for line in lines.take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        let [key, names] = cells.as_slice() else { panic!("not two cells: {line}") };
        let names = in_code_font(names).collect();
        let key = in_code_font(key).collect::<Vec<_>>().join(" ");
        assert!(rows.insert(key, names).is_none(), "a second row: {line}");
    }
    assert!(!rows.is_empty(), "no table `{head}` in ARCHITECTURE.md");
    rows
}

fn in_code_font(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// A file of src/, without its comments and its tests.
struct Source {
    path: PathBuf,
    module: String,
    code: String,
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for file in rust_files(&root().join("src")) {
        let path = file.strip_prefix(root()).unwrap().to_owned();
        let mut parts = path.iter().skip(1).map(|part| part.to_str().unwrap());
        let module = parts.next().unwrap().trim_end_matches(".rs").to_owned();
        if path.iter().any(|part| part == "tests" || part == "tests.rs") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let without_tests = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code: Vec<&str> = without_tests.lines().map(without_comment).collect();
        sources.push(Source { path, module, code: code.join("\n") });
    }
    sources
}

fn without_comment(line: &str) -> &str {
    // A URL in a string is no comment.
    let comment = line.match_indices("//").find(|(at, _)| !line[..*at].ends_with(':'));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The first segment of every path that begins at the crate's root.
fn crate_paths(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        // `$crate::` of a macro and names that end in `crate` are other things.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(first_segments(group)),
            None => names.push(identifier(rest)),
        }
    }
    names
}

/// Of `a::{b, c}, d}`: `a` and `d`.
fn first_segments(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0;
    let mut fresh = true;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => fresh = true,
            c if fresh && !c.is_whitespace() => {
                names.push(identifier(&group[at..]));
                fresh = false;
            }
            _ => {}
        }
    }
    names
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = &code[..at];
        let alone = !before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '.');
        // `tls::rustls` would be an item of ours, `::rustls` is the crate.
        let rooted = !before.ends_with("::") || !before[..at - 2].ends_with(char::is_alphanumeric);
        alone && rooted && code[at + name.len()..].starts_with("::")
    })
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

mod of_itself {
    use super::*;

    #[test]
    fn it_finds_paths_of_every_form() {
        let code = "use crate::{\n a::{self, B},\n c,\n};\nlet x = crate::d::E;\n$crate::f!()";
        assert_eq!(crate_paths(code), ["a", "c", "d", "f"]);
    }

    #[test]
    fn it_finds_crates_and_not_what_is_named_like_them() {
        for code in ["use rustls::A;", "x(::rustls::b())", "&rustls::C"] {
            assert!(names_crate(code, "rustls"), "{code}");
        }
        for code in ["use tokio_rustls::A;", "tls::rustls::A", "rustls_native_certs::b()"] {
            assert!(!names_crate(code, "rustls"), "{code}");
        }
    }

    #[test]
    fn it_sees_no_code_in_comments() {
        assert_eq!(without_comment("a(); // crate::b"), "a(); ");
        assert_eq!(without_comment("/// [`crate::b`]"), "");
        assert_eq!(without_comment("let url = \"https://a\";"), "let url = \"https://a\";");
    }

    #[test]
    fn it_finds_a_cycle_of_any_length() {
        let to = |name: &str| Names::from([name.to_owned()]);
        let imports = BTreeMap::from([
            ("a".to_owned(), to("b")),
            ("b".to_owned(), to("c")),
            ("c".to_owned(), to("a")),
        ]);
        let found = path(&imports, "a", "a", &mut Names::new()).unwrap();
        assert_eq!(found, ["a", "b", "c", "a"]);
    }
}
