//! Standard error, written by a separate thread: other threads never wait for a reader, and a full disk
//! or a closed pipe does not end the process.
//!
//! Lines wait in a bounded buffer. Lines that do not fit are dropped and counted.

use std::{
    fmt,
    io::{self, Write},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{errno::Errno, unistd};
use parking_lot::{Condvar, Mutex};
use tokio::time::Instant;

/// The size of the buffer. Access log lines leave some of it to the others, which are more important.
const CAPACITY: usize = 1 << 20;
const ACCESS_CAPACITY: usize = CAPACITY / 8 * 7;

/// How long the writer waits for further lines once there is one, so that the lines of a busy proxy share
/// a system call and a wake-up. Readers do not notice the delay.
const GATHER: Duration = Duration::from_millis(10);
/// With this many bytes, the writer does not wait any longer.
const ENOUGH: usize = CAPACITY / 4;

/// The most that is written at once. Writes of up to `PIPE_BUF` are atomic, so that lines of other processes
/// do not end up within ours.
const PIECE: usize = 4096;

/// The pause before the next attempt: another process may have made the pipe non-blocking.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// The capacity that the buffer keeps. After a burst, the rest of its memory is freed.
const KEPT: usize = 64 * 1024;

/// Lines waiting to be written to standard error.
struct Stderr {
    waiting: Mutex<Waiting>,
    /// Wakes the writer: there is a line, there are enough lines, or a thread waits for the end.
    more: Condvar,
    /// Wakes threads that wait until everything is written.
    written: Condvar,
    /// Lines that did not fit or could not be written.
    dropped: AtomicU64,
    has_thread: AtomicBool,
}

struct Waiting {
    lines: Vec<u8>,
    /// How many bytes were ever added, and how many of them the writer is done with.
    taken: u64,
    done: u64,
    /// The writer sleeps until there is a line.
    idle: bool,
    /// A thread waits until everything is written.
    hurried: bool,
}

/// The destination of a log event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    /// Whether it is a line of the access log.
    pub access: bool,
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        stderr().push(line, if self.access { ACCESS_CAPACITY } else { CAPACITY });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes one or several lines for the user who started the process. Never fails and never waits. There is no limit on
/// their length: this is usually the last message of the process, and the only one that says why it ends.
pub fn say(text: impl fmt::Display) {
    stderr().push(format!("{text}\n").as_bytes(), usize::MAX);
}

/// Waits until all lines are written, but no longer than `limit`.
pub fn flush(limit: Duration) {
    stderr().flush(Instant::now() + limit);
}

/// How many lines were dropped so far.
pub(super) fn dropped() -> u64 {
    stderr().dropped.load(Ordering::Relaxed)
}

/// The instance of this process. Its thread starts with the first line.
fn stderr() -> &'static Stderr {
    static WRITER: Once = Once::new();
    static STDERR: Stderr = Stderr::new();
    WRITER.call_once(|| {
        let thread = thread::Builder::new().name("log".into()).spawn(|| STDERR.run(write));
        STDERR.has_thread.store(thread.is_ok(), Ordering::Release);
    });
    &STDERR
}

fn write(bytes: &[u8]) -> nix::Result<usize> {
    // Without the lock of `Stderr`: a panicking thread must not wait for a reader.
    unistd::write(io::stderr(), bytes)
}

impl Stderr {
    const fn new() -> Self {
        let waiting = Waiting { lines: Vec::new(), taken: 0, done: 0, idle: false, hurried: false };
        Self {
            waiting: Mutex::new(waiting),
            more: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
            has_thread: AtomicBool::new(true),
        }
    }

    /// Adds a line, if there is room.
    fn push(&self, line: &[u8], capacity: usize) {
        let mut waiting = self.waiting.lock();
        let length = waiting.lines.len() + line.len();
        if length > capacity {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let enough = length >= ENOUGH && waiting.lines.len() < ENOUGH;
        waiting.lines.extend_from_slice(line);
        waiting.taken += line.len() as u64;
        if std::mem::take(&mut waiting.idle) || enough {
            self.more.notify_one();
        }
    }

    fn flush(&self, deadline: Instant) {
        if !self.has_thread.load(Ordering::Acquire) {
            // So that a process that cannot start a thread can still log that.
            self.write(&mut Out { write, broken_line: false });
            return;
        }
        // A panicking thread may hold the lock.
        let deadline = deadline.into_std();
        let Some(mut waiting) = self.waiting.try_lock_until(deadline) else { return };
        let target = waiting.taken;
        while waiting.done < target {
            waiting.hurried = true;
            self.more.notify_one();
            if self.written.wait_until(&mut waiting, deadline).timed_out() {
                return;
            }
        }
    }

    /// The writer's thread.
    fn run(&self, write: impl FnMut(&[u8]) -> nix::Result<usize>) {
        let mut out = Out { write, broken_line: false };
        let mut reported = 0;
        loop {
            self.gather();
            let lost = self.write(&mut out);
            let dropped = self.dropped.load(Ordering::Relaxed);
            if lost == 0 && dropped > reported {
                tracing::warn!(
                    lines = dropped - reported,
                    "log lines were dropped: standard error could not be written, or was read too \
                     slowly",
                );
                reported = dropped;
            }
        }
    }

    /// Waits for a line, and then a moment for others.
    fn gather(&self) {
        let mut waiting = self.waiting.lock();
        while waiting.lines.is_empty() {
            waiting.idle = true;
            self.more.wait(&mut waiting);
        }
        waiting.idle = false;
        let gathered = Instant::now().into_std() + GATHER;
        while !waiting.hurried && waiting.lines.len() < ENOUGH {
            if self.more.wait_until(&mut waiting, gathered).timed_out() {
                return;
            }
        }
    }

    /// Writes the waiting lines. Returns how many were lost.
    fn write(&self, out: &mut Out<impl FnMut(&[u8]) -> nix::Result<usize>>) -> u64 {
        let lines = {
            let mut waiting = self.waiting.lock();
            waiting.hurried = false;
            std::mem::take(&mut waiting.lines)
        };
        let lost = pieces(&lines).map(|piece| out.write(piece)).sum();
        self.dropped.fetch_add(lost, Ordering::Relaxed);
        let mut waiting = self.waiting.lock();
        waiting.done += lines.len() as u64;
        if waiting.lines.is_empty() && lines.capacity() <= KEPT {
            waiting.lines = lines;
            waiting.lines.clear();
        }
        drop(waiting);
        self.written.notify_all();
        lost
    }
}

/// The output, and whether the last line there is incomplete.
struct Out<W> {
    write: W,
    broken_line: bool,
}

impl<W: FnMut(&[u8]) -> nix::Result<usize>> Out<W> {
    /// Writes whole lines. Returns how many of them were lost.
    fn write(&mut self, piece: &[u8]) -> u64 {
        // A line that was cut off by a full disk must not run into the next one.
        if self.broken_line && self.write_all(b"\n") == 1 {
            self.broken_line = false;
        }
        let written = self.write_all(piece);
        let (there, rest) = piece.split_at(written);
        self.broken_line = there.last().map_or(self.broken_line, |last| *last != b'\n');
        rest.iter().filter(|byte| **byte == b'\n').count() as u64
    }

    /// Returns how many bytes were written.
    fn write_all(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match (self.write)(&bytes[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => thread::sleep(BUSY_PAUSE),
                Err(_) => break,
            }
        }
        written
    }
}

/// Splits at the ends of lines, into pieces of no more than [`PIECE`] if the lines are short enough.
fn pieces(mut lines: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        if lines.is_empty() {
            return None;
        }
        let is_end = |byte: &u8| *byte == b'\n';
        let within = &lines[..lines.len().min(PIECE)];
        let end = match within.iter().rposition(is_end) {
            Some(last) => last + 1,
            None => lines.iter().position(is_end).map_or(lines.len(), |first| first + 1),
        };
        let (piece, rest) = lines.split_at(end);
        lines = rest;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accepts this many bytes, and then fails.
    fn disk(mut room: usize) -> impl FnMut(&[u8]) -> nix::Result<usize> {
        move |bytes| match room {
            0 => Err(Errno::ENOSPC),
            _ => {
                let count = bytes.len().min(room);
                room -= count;
                Ok(count)
            }
        }
    }

    #[test]
    fn pieces_are_whole_lines_and_all_of_them() {
        let long = "x".repeat(PIECE * 2);
        let text = format!("a\nbb\n{long}\n{}end", "line\n".repeat(2000));
        let all: Vec<&[u8]> = pieces(text.as_bytes()).collect();
        assert_eq!(all.concat(), text.as_bytes());
        let (last, others) = all.split_last().unwrap();
        assert!(others.iter().all(|piece| piece.ends_with(b"\n")), "cut within a line");
        assert!(last.ends_with(b"end"));
        let lines = |piece: &&&[u8]| piece.iter().filter(|byte| **byte == b'\n').count() > 1;
        assert!(others.iter().filter(lines).all(|piece| piece.len() <= PIECE));
    }

    #[test]
    fn what_a_full_disk_cut_off_does_not_run_into_the_next_line() {
        let mut written = Vec::new();
        let mut rooms = vec![disk(5), disk(100)];
        let write = |bytes: &[u8]| match rooms[0](bytes) {
            Ok(count) => {
                written.extend_from_slice(&bytes[..count]);
                Ok(count)
            }
            Err(error) => {
                drop(rooms.remove(0));
                Err(error)
            }
        };
        let mut out = Out { write, broken_line: false };
        assert_eq!(out.write(b"one\ntwo\nthree\n"), 2);
        assert_eq!(out.write(b"four\n"), 0);
        assert_eq!(String::from_utf8(written).unwrap(), "one\nt\nfour\n");
    }

    #[test]
    fn lines_that_find_no_room_are_dropped_and_counted_and_others_have_more_room() {
        let stderr = Stderr::new();
        let line = [b'x'; 1024];
        for _ in 0..CAPACITY / line.len() {
            stderr.push(&line, ACCESS_CAPACITY);
        }
        let dropped = (CAPACITY - ACCESS_CAPACITY) / line.len();
        assert_eq!(stderr.dropped.load(Ordering::Relaxed), dropped as u64);
        stderr.push(&line, CAPACITY);
        assert_eq!(stderr.dropped.load(Ordering::Relaxed), dropped as u64);
        assert_eq!(stderr.waiting.lock().lines.len(), ACCESS_CAPACITY + line.len());
    }
}
