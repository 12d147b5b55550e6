//! `truename exec` on a terminal: what is typed there, and the job control of shells.

use tokio::process::Command;

use crate::exec::{Stage, output};

/// `truename exec -- COMMAND` on a terminal: see [`TERMINAL`].
fn on_terminal(stage: &Stage, command: &[&str]) -> Command {
    stage.within(&["python3", "-c", TERMINAL], &stage.exec(command))
}

/// Runs its arguments on a terminal of their own, types Ctrl-C when they are ready, or sends them what
/// `SIGNAL` says, and prints all they said.
const TERMINAL: &str = r#"
import os, pty, signal, sys
pid, terminal = pty.fork()
if pid == 0:
    # Whoever started the tests in the background had it ignored.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])
said, typed = b"", False
while True:
    try:
        more = os.read(terminal, 1024)
    except OSError:
        break
    if not more:
        break
    said += more
    if not typed and b"ready" in said:
        name = os.environ.get("SIGNAL")
        typed = True
        os.kill(pid, signal.Signals[name]) if name else os.write(terminal, b"\x03")
print(said.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;

/// Counts interrupts until signals of its own have come back from its parent, one after the other:
/// whatever the parent has to say of the first interrupt comes before them.
const COUNTER: &str = r#"
import os, signal
awaited = {signal.SIGINT, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
count = back = 0
print("ready", flush=True)
while back < 10:
    if signal.sigwait(awaited) == signal.SIGINT:
        count += 1
        if count > 1:
            continue
    else:
        back += 1
    os.kill(os.getppid(), signal.SIGUSR1)
print("count", count, "terminal", os.isatty(0), flush=True)
os._exit(5)
"#;

#[tokio::test]
async fn what_is_typed_reaches_the_command_once() {
    let stage = Stage::new().await;
    let output = output(&mut on_terminal(&stage, &["python3", "-c", COUNTER])).await;
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("count 1 terminal True"), "{said}");
}

/// The terminal interrupts its foreground group: a command that left for another group gets it from us.
#[tokio::test]
async fn what_is_typed_reaches_a_command_in_a_session_of_its_own() {
    let stage = Stage::new().await;
    let script = "trap 'exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let output = output(&mut on_terminal(&stage, &["setsid", "sh", "-c", script])).await;
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{said}");
}

/// Runs its arguments as a shell with job control does: as a job with a process group that the terminal belongs
/// to. A job that stops is said so, and continued in the foreground.
const JOB_CONTROL: &str = r#"
import os, pty, signal, sys
pid, terminal = pty.fork()
if pid == 0:
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTTOU):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(sys.argv[1], sys.argv[1:])
    while True:
        _, status = os.waitpid(job, os.WUNTRACED)
        os.tcsetpgrp(0, os.getpgrp())
        if not os.WIFSTOPPED(status):
            break
        print("stopped", flush=True)
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)
    os._exit(os.waitstatus_to_exitcode(status))
said = b""
while True:
    try:
        more = os.read(terminal, 1024)
    except OSError:
        break
    if not more:
        break
    said += more
print(said.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;

#[tokio::test]
async fn a_command_that_stops_gives_the_terminal_back_and_goes_on_with_us() {
    let stage = Stage::new().await;
    // A shell with a process group of its own; one that stays in ours; a command that keeps the terminal, and that with
    // one of us between.
    let truename = env!("CARGO_BIN_EXE_truename");
    let own_group = "suspend; echo back; suspend; echo back; exit 5";
    let keeps_terminal = r#"
import os, signal
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.setpgid(0, 0)
os.tcsetpgrp(0, os.getpid())
for turn in range(2):
    os.kill(os.getpid(), signal.SIGSTOP)
    assert os.tcgetpgrp(0) == os.getpid()
    print("back", flush=True)
os._exit(5)
"#;
    for command in [
        &["bash", "--norc", "--noprofile", "-ic", own_group][..],
        &["sh", "-c", "kill -TSTP $$; echo back; kill -STOP $$; echo back; exit 5"],
        &["python3", "-c", keeps_terminal],
        &[truename, "exec", "-q", "a=192.0.2.1", "--", "python3", "-c", keeps_terminal],
    ] {
        let exec = stage.exec(command);
        let output = output(&mut stage.within(&["python3", "-c", JOB_CONTROL], &exec)).await;
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(5), "{command:?}: {said}");
        let lines = said.lines().filter(|line| ["stopped", "back"].contains(&line.trim()));
        let lines: Vec<_> = lines.map(str::trim).collect();
        assert_eq!(lines, ["stopped", "back", "stopped", "back"], "{command:?}: {said}");
    }
}

/// Where no shell waits for us, nobody would continue us.
#[tokio::test]
async fn a_command_that_stops_where_nobody_would_continue_it_goes_on() {
    let stage = Stage::new().await;
    let command = ["bash", "--norc", "--noprofile", "-ic", "suspend; suspend; exit 5"];
    let output = output(&mut on_terminal(&stage, &command)).await;
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{said}");
}

/// As `docker stop` does it, where there is a terminal and the image says `STOPSIGNAL SIGINT`.
#[tokio::test]
async fn what_was_sent_and_not_typed_reaches_a_command_on_a_terminal() {
    let stage = Stage::new().await;
    for name in ["INT", "QUIT"] {
        let script = format!("trap 'exit 5' {name}; echo ready; while :; do sleep 0.05; done");
        let mut command = on_terminal(&stage, &["sh", "-c", &script]);
        let output = output(command.env("SIGNAL", format!("SIG{name}"))).await;
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(5), "{name}: {said}");
    }
}
