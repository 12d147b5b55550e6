//! The demo's output: plain text, or with colours on a terminal.

use std::io::{self, IsTerminal as _, Write};

/// Output that is written from top to bottom.
#[derive(Debug)]
pub struct Page<W> {
    out: W,
    on_terminal: bool,
    colour: bool,
    started: bool,
}

impl Page<io::Stdout> {
    /// Standard output, with colours if it is a terminal and `NO_COLOR` is not set.
    pub fn stdout() -> Self {
        let out = io::stdout();
        let on_terminal = out.is_terminal();
        // no-color.org: present and not empty.
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { out, on_terminal, colour: on_terminal && !refused, started: false }
    }
}

impl<W: Write> Page<W> {
    /// A page without colours or anything else for terminals only.
    pub fn plain(out: W) -> Self {
        Self { out, on_terminal: false, colour: false, started: false }
    }

    /// The written text, for a page in memory.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// Starts a chapter.
    pub fn chapter(&mut self, title: &str) -> io::Result<()> {
        if std::mem::replace(&mut self.started, true) {
            writeln!(self.out)?;
        }
        let title = self.painted(BOLD, title);
        writeln!(self.out, "{title}")
    }

    /// A line of text.
    pub fn line(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "  {text}")
    }

    /// A command to try, without a prompt, so that the whole line can be copied.
    pub fn to_try(&mut self, command: &str) -> io::Result<()> {
        let command = self.painted(CYAN, command);
        writeln!(self.out, "  {command}")
    }

    /// A command that has the result shown after it.
    pub fn command(&mut self, command: &str) -> io::Result<()> {
        let command = self.painted(CYAN, &format!("$ {command}"));
        writeln!(self.out, "  {command}")
    }

    /// Whether a claim held.
    pub fn verdict(&mut self, held: bool, text: &str) -> io::Result<()> {
        let mark = if held { self.painted(GREEN, "ok") } else { self.painted(RED, "FAILED") };
        writeln!(self.out, "  {mark}  {text}")?;
        // So that each result is visible immediately.
        self.out.flush()
    }

    /// A bar of `length`, in `width` columns.
    pub fn bar(&mut self, label: &str, length: usize, width: usize) -> io::Result<()> {
        let block = if self.on_terminal { "█" } else { "#" };
        let bar = self.painted(CYAN, &block.repeat(length));
        let rest = " ".repeat(width.saturating_sub(length));
        writeln!(self.out, "  {label:<12} {bar}{rest} {length}")
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

const BOLD: &str = "1";
const RED: &str = "1;31";
const GREEN: &str = "32";
const CYAN: &str = "36";
