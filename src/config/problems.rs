//! What is wrong with a configuration, and where.

use std::{
    error::Error,
    fmt::{self, Write},
};

/// More than these are not told: nobody reads them, and a file can have one in every third byte.
pub(super) const MAX_PROBLEMS: usize = 1_000;

/// Nor are more than so many bytes of them: a refused file is logged, and a longer line finds no room in the log.
const MAX_BYTES: usize = 512 * 1024;

/// The longest message, in characters: whoever writes a path may write one of any length.
const MAX_MESSAGE: usize = 8 * 1024;

/// A place in a file; both count from 1, columns in characters.
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

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where; `None` in a configuration that came from no file.
    pub position: Option<Position>,
    /// What, and what mends it.
    pub message: String,
}

/// Everything that is wrong with one configuration; shown as one `FILE:LINE:COLUMN: message` a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The file's name as the user gave it.
    pub file: String,
    /// In the order of the file; never empty.
    pub list: Vec<Problem>,
}

impl Problems {
    /// In the order of the file. What an anchor brings to several places is said once.
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
                // A value may hold anything: line breaks, or what a terminal obeys.
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

/// What is being found.
#[derive(Debug, Default)]
pub(super) struct Found {
    list: Vec<Problem>,
    /// Of all messages.
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
