//! The position of each value of a configuration.

use std::{collections::HashSet, rc::Rc};

use super::{
    problems::{MAX_PROBLEMS, Position, Problem},
    tree::Node,
};

/// The position of each value of a configuration, by its path (`aliases[0].tls.ca`).
#[derive(Debug, Default)]
pub(super) struct Places {
    root: Option<Rc<Node>>,
    unreadable: HashSet<String>,
}

impl Places {
    pub(super) fn of(root: Rc<Node>) -> Self {
        Self { root: Some(root), unreadable: HashSet::new() }
    }

    /// A value that could not be read has its default. No further problems of it are reported.
    pub(super) fn mark_unreadable(&mut self, path: &str) {
        // Problems beyond that number are not reported anyway.
        if self.unreadable.len() <= MAX_PROBLEMS {
            self.unreadable.insert(path.to_owned());
        }
    }

    pub(super) fn was_given(&self, path: &str) -> bool {
        self.root.as_ref().is_some_and(|root| root.find(path).1)
    }

    pub(super) fn is_unreadable(&self, path: &str) -> bool {
        ancestry(path).any(|path| self.unreadable.contains(path))
    }

    /// A problem with the value at `path`, unless that value could not be read.
    pub(super) fn problem(&self, path: &str, what: &str) -> Option<Problem> {
        let message = format!("{path}: {what}");
        (!self.is_unreadable(path)).then(|| Problem { position: self.find(path), message })
    }

    /// The position of the value, or of the nearest mapping or list around it.
    pub(super) fn find(&self, path: &str) -> Option<Position> {
        self.root.as_ref().map(|root| root.find(path).0.at)
    }
}

/// `a.b[0]`, `a.b`, `a` and the root, which is empty.
fn ancestry(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| {
        (!path.is_empty()).then(|| path.rfind(['.', '[']).map_or("", |end| &path[..end]))
    })
}
