//! Reads values from a file's tree, and collects their problems.

use std::{path::PathBuf, rc::Rc};

use super::{
    places::Places,
    problems::{Found, Position, Problem},
    suggest,
    tree::Node,
};

/// The longest value, except for the path of a file. Parsers show the value in their errors.
pub(super) const MAX_TEXT: usize = 1024;

/// Walks a tree, and collects problems with their positions.
pub(crate) struct Reader {
    pub(super) path: String,
    /// What relative paths are relative to: the folder of the configuration; empty for the working directory.
    pub(super) folder: PathBuf,
    pub(super) places: Places,
    pub(super) problems: Found,
}

impl Reader {
    pub(super) fn new(root: Rc<Node>, folder: PathBuf, problems: Found) -> Self {
        Self { path: String::new(), folder, places: Places::of(root), problems }
    }

    /// Reports a problem with the value being read.
    pub(super) fn problem(&mut self, at: Position, what: &str) {
        self.places.mark_unreadable(&self.path);
        let message = match self.path.as_str() {
            "" => what.to_owned(),
            path => format!("{path}: {what}"),
        };
        self.problems.push(Problem { position: Some(at), message });
    }

    pub(super) fn mismatch<T>(&mut self, node: &Node, expected: &str) -> Option<T> {
        let found = node.describe();
        self.problem(node.at, &format!("expected {expected}, found {found}"));
        None
    }

    pub(super) fn unknown_key<'a>(
        &mut self,
        at: Position,
        name: &str,
        known: impl Iterator<Item = &'a str> + Clone,
    ) {
        let hint = match suggest::nearest(name, known.clone()) {
            // YAML 1.1 tools such as Helm turn `on` into `true` when they print a file.
            _ if matches!(name, "on" | "true") && known.clone().any(|key| key == "when") => {
                "use `when`: YAML 1.1 tools read `on` as the boolean true"
                    .to_owned()
            }
            _ if name == "leaf_lifetime" => {
                "it was removed: certificates are created once and replaced before they expire; leave it out"
                    .to_owned()
            }
            Some(key) => format!("did you mean `{key}`?"),
            None => format!("expected one of {}", suggest::listed(known)),
        };
        let name: String = name.chars().take(MAX_TEXT).collect();
        let message = format!("unknown key `{name}`; {hint}");
        self.problems.push(Problem { position: Some(at), message });
    }

    pub(super) fn missing(&mut self, at: Position, key: &str, about: &str) {
        let place = match self.path.as_str() {
            "" => String::new(),
            path => format!("{path}: "),
        };
        self.places.mark_unreadable(&format!("{}.{key}", self.path));
        let message = format!("{place}the key `{key}` is missing: {about}");
        self.problems.push(Problem { position: Some(at), message });
    }

    /// Reads `node` one step (`.key` or `[index]`) further down.
    pub(super) fn inside<T>(
        &mut self,
        step: &str,
        node: &Node,
        read: impl FnOnce(&Node, &mut Self) -> T,
    ) -> T {
        let above = self.path.len();
        // The root's own keys have no leading dot.
        self.path.push_str(if above == 0 { step.trim_start_matches('.') } else { step });
        let value = read(node, self);
        self.path.truncate(above);
        value
    }
}
