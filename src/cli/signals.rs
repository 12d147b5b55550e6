//! Signals, as far as several commands have to do with them.

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

/// As shells have it: and the signal's number.
const EXIT_SIGNAL: i32 = 128;

/// What ends a process at once, unless it says otherwise. Caught, so that no key is left behind.
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

/// What a terminal gives to its foreground group.
const TERMINAL: [Signal; 3] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGWINCH];

/// Those of `signals` that arrive. One that was ignored when we were started (`nohup`) stays so.
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

/// Has a file that may grow no further (`ulimit -f`) be an error for whoever writes to it, as a full
/// disk is, and no longer the end of the process.
pub fn outlive_file_size_limit() -> io::Result<()> {
    // Where it is ignored, it is one already; and a command that we start has it ignored, too.
    if ignored() & bit(Signal::SIGXFSZ) != 0 {
        return Ok(());
    }
    // The handler stays, whoever listens to it.
    signal(SignalKind::from_raw(Signal::SIGXFSZ as i32)).map(drop)
}

/// The exit code of what a signal ended.
pub fn exit_code(number: i32) -> Option<u8> {
    u8::try_from(EXIT_SIGNAL + number).ok()
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as u32 - 1)
}

/// The mask in `/proc/self/status`: asking the kernel directly takes unsafe code.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// The signals that a terminal gives to its foreground group, when they are typed or its size changes,
/// read with what the kernel says of where they come from: a handler is not told.
pub struct Keyboard {
    signals: SigSet,
    /// The mask of signals that this process was started with.
    before: SigSet,
}

impl Keyboard {
    /// To be called while the process has one thread: those that it starts inherit the mask.
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

    /// The signals that arrive, and whether they come from the terminal.
    pub fn arrivals(&self) -> io::Result<mpsc::Receiver<(Signal, bool)>> {
        let arrivals = SignalFd::with_flags(&self.signals, SfdFlags::SFD_CLOEXEC)?;
        let (sender, receiver) = mpsc::channel(2);
        // It ends with the process.
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

    /// Starts a process, which inherits the mask that we were started with. What arrives meanwhile comes to
    /// handlers.
    pub fn start<T>(&self, start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.before.thread_set_mask()?;
        let started = start();
        self.signals.thread_block()?;
        started
    }
}
