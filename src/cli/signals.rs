//! Signal handling that several commands share.

use std::{fs, io, thread};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, SigmaskHow, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// The shells' exit code for a signal is this plus the signal's number.
const EXIT_SIGNAL: i32 = 128;

/// Signals that end a process by default. They are caught, so that no key is left behind.
pub const FATAL: [Signal; 10] = [
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGXCPU,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
];

/// Signals that a terminal sends to its foreground group.
const TERMINAL: [Signal; 3] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGWINCH];

/// Receives `signals`. Those that were ignored when the process was started (`nohup`) stay ignored.
pub fn arrivals(signals: &[Signal]) -> io::Result<mpsc::Receiver<Signal>> {
    let ignored = ignored();
    let (sender, receiver) = mpsc::channel(signals.len().max(1));
    for number in signals.iter().copied() {
        if ignored & bit(number) != 0 {
            continue;
        }
        let mut arrivals = signal(SignalKind::from_raw(number as i32))?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while arrivals.recv().await.is_some() && sender.send(number).await.is_ok() {}
        });
    }
    Ok(receiver)
}

/// Makes the file size limit (`ulimit -f`) an error of the write, like a full disk, instead of the end of
/// the process.
pub fn outlive_file_size_limit() -> io::Result<()> {
    // If it is ignored, it is an error already, and must stay ignored for a command that we start.
    if ignored() & bit(Signal::SIGXFSZ) != 0 {
        return Ok(());
    }
    // The handler stays installed without a receiver.
    signal(SignalKind::from_raw(Signal::SIGXFSZ as i32)).map(drop)
}

/// The exit code of a process that was ended by a signal.
pub fn exit_code(number: i32) -> Option<u8> {
    u8::try_from(EXIT_SIGNAL + number).ok()
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as u32 - 1)
}

/// The mask from `/proc/self/status`, because the system call requires unsafe code.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// The signals that a terminal sends to its foreground group when they are typed or its size changes, with
/// their origin, which a handler does not get.
pub struct Keyboard {
    signals: SigSet,
    /// The signal mask at the start of the process.
    before: SigSet,
}

impl Keyboard {
    /// Must be called while the process has one thread: further threads inherit the mask.
    pub fn new() -> io::Result<Self> {
        let ignored = ignored();
        let mut signals = SigSet::empty();
        for signal in TERMINAL {
            if ignored & bit(signal) == 0 {
                signals.add(signal);
            }
        }
        let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self { signals, before })
    }

    /// Receives the signals, and whether they come from the terminal.
    pub fn arrivals(&self) -> io::Result<mpsc::Receiver<(Signal, bool)>> {
        let arrivals = SignalFd::with_flags(&self.signals, SfdFlags::SFD_CLOEXEC)?;
        let (sender, receiver) = mpsc::channel(2);
        // The thread ends with the process.
        thread::Builder::new().name("signals".into()).spawn(move || {
            loop {
                let arrival = match arrivals.read_signal() {
                    Ok(Some(arrival)) => arrival,
                    Ok(None) | Err(Errno::EINTR) => continue,
                    Err(_) => return,
                };
                let number = i32::try_from(arrival.ssi_signo).unwrap_or_default();
                let typed = arrival.ssi_code == libc::SI_KERNEL;
                if let Ok(signal) = Signal::try_from(number)
                    && sender.blocking_send((signal, typed)).is_err()
                {
                    return;
                }
            }
        })?;
        Ok(receiver)
    }

    /// Starts a process, which inherits the mask that we were started with. Signals that arrive meanwhile go to
    /// the handlers.
    pub fn start<T>(&self, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.before.thread_set_mask()?;
        let started = start();
        self.signals.thread_block()?;
        started
    }
}
