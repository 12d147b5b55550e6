//! The problems of a configuration, and their positions.

use std::{
    error::Error,
    fmt::{self, Write},
};

/// The most problems that are reported. A file can have one in every third byte.
pub(super) const MAX_PROBLEMS: usize = 1_000;

/// The most bytes of all messages together: a refused file is logged, and the log drops longer lines.
const MAX_BYTES: usize = 512 * 1024;

/// The longest message, in characters. It may contain a path, which can be very long.
const MAX_MESSAGE: usize = 8 * 1024;

/// A position in a file. Both numbers start at 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl Position {
    pub(super) const START: Self = Self { line: 1, column: 1 };
}

/// A problem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where it is; `None` if the configuration is not from a file.
    pub position: Option<Position>,
    /// What is wrong, and how to fix it.
    pub message: String,
}

/// All problems of one configuration. Printed as one `FILE:LINE:COLUMN: message` per line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The file's name as given by the user.
    pub file: String,
    /// In the order of the file; never empty.
    pub list: Vec<Problem>,
}

impl Problems {
    /// Sorts them in the order of the file. A problem that an anchor brings to several places is kept once.
    pub(super) fn new(file: &str, mut list: Vec<Problem>) -> Self {
        list.sort();
        list.dedup();
        Self { file: file.to_owned(), list }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.list.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&self.file)?;
            if let Some(Position { line, column }) = problem.position {
                write!(f, ":{line}:{column}")?;
            }
            f.write_str(": ")?;
            for character in problem.message.chars() {
                // A value may contain anything, including line breaks and terminal control sequences.
                match character.is_control() {
                    true => write!(f, "{}", character.escape_default())?,
                    false => f.write_char(character)?,
                }
            }
        }
        Ok(())
    }
}

impl Error for Problems {}

/// The problems found so far.
#[derive(Debug, Default)]
pub(super) struct Found {
    list: Vec<Problem>,
    /// The length of all messages.
    bytes: usize,
    is_full: bool,
}

impl Found {
    pub(super) fn push(&mut self, mut problem: Problem) {
        if self.is_full {
            return;
        }
        if let Some((end, _)) = problem.message.char_indices().nth(MAX_MESSAGE) {
            problem.message.truncate(end);
            problem.message.push('…');
        }
        self.bytes += problem.message.len();
        self.is_full = self.list.len() == MAX_PROBLEMS || self.bytes > MAX_BYTES;
        if self.is_full {
            problem.message = "further problems are not shown".to_owned();
        }
        self.list.push(problem);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn into_list(self) -> Vec<Problem> {
        self.list
    }
}
