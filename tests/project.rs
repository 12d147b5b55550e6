//! What stands around the code is as true as the code.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use truename::config::Config;

#[test]
fn the_example_configuration_has_no_problem() {
    let output = truename(&["check", "--config", "examples/truename.yaml"]);
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}");
    assert_eq!(out, "examples/truename.yaml: ok, 3 aliases\n");
}

#[test]
fn every_configuration_in_the_documentation_has_no_problem() {
    let mut checked = 0;
    for page in ["README.md", "docs/reference.md"] {
        for (nth, block) in blocks(page, "yaml").into_iter().enumerate() {
            let name = format!("{page}, configuration {}", nth + 1);
            Config::parse(&block, &name).unwrap();
            checked += 1;
        }
    }
    assert!(checked >= 2, "only {checked} were found");
}

/// The reference shows each key with its default, so that it may be read as the truth.
#[test]
fn the_reference_shows_every_key_with_its_default() {
    let shown =
        Config::parse(&blocks("docs/reference.md", "yaml")[0], "docs/reference.md").unwrap();
    let mut plain = Config::parse("version: 1\naliases: [{name: webscaler-manual}]\n", "").unwrap();
    assert_eq!(shown.to_json(), plain.to_json());

    // A key that is left out would have its default, too.
    plain.aliases.clear();
    let page = read("docs/reference.md");
    for key in keys(&shown.to_json()) {
        assert!(page.contains(&format!("{key}:")), "docs/reference.md does not show `{key}`");
    }
}

#[test]
fn every_command_is_in_the_reference_and_every_other_is_marked() {
    let help = String::from_utf8(truename(&["--help"]).stdout).unwrap();
    let exists =
        |command: &str| help.lines().any(|line| line.starts_with(&format!("  {command} ")));
    let page = read("docs/reference.md");
    let commands = page.lines().filter_map(|line| line.strip_prefix("| `truename "));
    let mut count = 0;
    for row in commands {
        let command = row.split([' ', '`']).next().unwrap();
        let marked = row.contains("not available in this version");
        assert_eq!(exists(command), !marked, "{row}");
        count += 1;
    }
    assert!(count >= 5, "only {count} commands were found");
    for command in ["run", "check", "demo", "schema", "completions"] {
        assert!(exists(command) && page.contains(&format!("| `truename {command}")), "{command}");
    }
}

#[test]
fn every_metric_is_in_the_reference() {
    let page = read("docs/reference.md");
    let mut found = 0;
    for text in texts(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        for string in text.split('"').filter(|string| string.starts_with("truename_")) {
            let name = string.split('{').next().unwrap();
            assert!(page.contains(&format!("`{name}`")), "{name}");
            found += 1;
        }
    }
    assert!(found > 20, "only {found} were found");
}

#[test]
fn every_link_to_a_file_leads_somewhere() {
    let pages = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"];
    let mut followed = 0;
    for page in
        pages.into_iter().chain(["docs/reference.md", "docs/performance.md", "tests/README.md"])
    {
        let text = read(page);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
            assert!(folder.parent().unwrap().join(file).exists(), "{page} links to {file}");
            followed += 1;
        }
    }
    assert!(followed > 5, "only {followed} were found");
}

#[test]
fn every_case_has_its_tests() {
    let page = read("tests/README.md");
    let is_heading = |row: &&str| row.starts_with("| the ") || row.starts_with("| what |");
    let is_ruler = |row: &&str| row.starts_with("| ---");
    let rows = page.lines().filter(|line| line.starts_with('|'));
    let mut found = 0;
    for row in rows.filter(|row| !is_heading(row) && !is_ruler(row)) {
        let tests: Vec<_> =
            row.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")).collect();
        assert!(!tests.is_empty(), "no test: {row}");
        for (file, name) in tests {
            assert!(has_test(file, name), "{file} has no test {name}");
            found += 1;
        }
    }
    assert!(found > 150, "only {found} were found");
}

/// Whether `file`, of this folder unless it says another, has a test of that name.
fn has_test(file: &str, name: &str) -> bool {
    let file = if file.contains('/') { file.to_owned() } else { format!("tests/{file}") };
    let text = read(&file);
    let lines: Vec<_> = text.lines().map(str::trim_start).collect();
    let is_it = |line: &str| {
        let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        function.and_then(|rest| rest.split('(').next()) == Some(name)
    };
    let Some(at) = lines.iter().position(|line| is_it(line)) else { return false };
    let attributes = lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
    attributes
        .into_iter()
        .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
}

fn truename(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap()
}

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// The fenced blocks of a page in one language.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let text = read(page);
    let fence = format!("```{language}\n");
    let ends = |block: &str| block.split("```").next().unwrap_or_default().to_owned();
    text.split(&fence).skip(1).map(ends).collect()
}

fn keys(json: &serde_json::Value) -> Vec<String> {
    match json {
        serde_json::Value::Object(members) => {
            let own = members.keys().cloned();
            own.chain(members.values().flat_map(keys)).collect()
        }
        serde_json::Value::Array(items) => items.iter().flat_map(keys).collect(),
        _ => Vec::new(),
    }
}

fn texts(path: &Path) -> Vec<String> {
    if path.is_file() {
        return vec![fs::read_to_string(path).unwrap()];
    }
    let entries = fs::read_dir(path).unwrap();
    entries.flat_map(|entry| texts(&entry.unwrap().path())).collect()
}
